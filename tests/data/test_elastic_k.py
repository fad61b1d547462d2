"""How many VoCo tokens a pack reads: drawn from `train.elastic_k` by the pack's number alone."""

from collections import Counter
import contextlib

import numpy as np
import pytest

from tests.helpers import tiny
from tests.helpers.record_lists import ListSource, data_config, make_batches, plain_picture, turns
from voco_jax.chat_templates import CHAT_TEMPLATES
from voco_jax.data.conversations import Encoder
from voco_jax.data.records import Record
from voco_jax.data.training_data import open_test_data, open_training_data
from voco_jax.errors import UserError

NUMBERS = (1, 2, 4)


@pytest.fixture(scope="module")
def make(small_tokenizer, tmp_path_factory):
    """Batches of four packs about twenty pictures."""
    encoder = Encoder(small_tokenizer, CHAT_TEMPLATES["bare"], num_voco_tokens=4, num_visual_tokens=4, compressed=True)
    source = ListSource([Record([plain_picture(5 + i)], conversations=[turns("what?", "red")]) for i in range(20)])
    cache = tmp_path_factory.mktemp("cache")

    def make(elastic_k=NUMBERS, **options):
        data = data_config(batch_size=4, rows_per_pack=1, images_per_pack=1)
        return make_batches([source], encoder, data, cache, elastic_k=elastic_k, **options)

    return make


def drawn(batches, count: int) -> np.ndarray:
    with contextlib.closing(batches):
        return np.stack([next(batches)["num_tokens"] for _ in range(count)])


def test_a_number_for_each_pack(make):
    elastic, plain = make(), make(())
    counts: Counter = Counter()
    for _ in range(60):
        batch, expected = next(elastic), next(plain)
        numbers = batch.pop("num_tokens")
        assert (numbers.shape, numbers.dtype) == ((4,), np.int32)
        counts.update(numbers.tolist())
        assert batch.keys() == expected.keys()  # nothing else changes
        for name, array in batch.items():
            np.testing.assert_array_equal(array, expected[name])
    assert counts.keys() == set(NUMBERS) and all(abs(n - 80) < 25 for n in counts.values())  # 3.4 standard deviations
    assert (drawn(make(seed=1), 9) != drawn(make(), 9)).any()


def test_a_number_that_stands_twice_is_drawn_twice_as_often(make):
    counts = Counter(drawn(make((1, 4, 4)), 60).ravel().tolist())
    assert counts.keys() == {1, 4} and abs(counts[4] - 160) < 25


def test_the_same_for_any_hosts_and_after_a_resume(make):
    expected = drawn(make(), 8)  # into the second epoch: a pack reads another number there
    assert make().loader.plan.locate(5 * 4)[0] == 1 and (expected[:3] != expected[5:]).any()
    hosts = [drawn(make(shard=shard), 8) for shard in ([0, 1], [2, 3])]
    np.testing.assert_array_equal(np.concatenate(hosts, axis=1), expected)
    going_on = make()
    going_on.set_state(going_on.state_at(3))
    np.testing.assert_array_equal(drawn(going_on, 5), expected[3:])


def test_evaluation_reads_all(tmp_path):
    config = tiny.config(tmp_path, model__num_voco_tokens=4, train__elastic_k=NUMBERS)
    config.data.test = config.data.train
    batches = open_training_data(config, log=lambda line: None).batches
    assert set(batches.peek()["num_tokens"].tolist()) <= set(NUMBERS)
    assert "num_tokens" not in open_test_data(config, batches, lambda line: None).peek()


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(train__elastic_k=(0, 4)), r"expected numbers from 1 to 4 \(config.model.num_voco_tokens\), found 0"),
        (dict(train__elastic_k=(4, 8)), r"expected numbers from 1 to 4 \(config.model.num_voco_tokens\), found 8"),
        (dict(train__elastic_k=(1, 2)), r"expected 4 \(config.model.num_voco_tokens\) as the largest, found 2"),
        (dict(model__compressor="none"), r"expected config.model.compressor 'voco'.*; found 'none'"),
        (dict(model__compressor="average_pool"), r"expected config.model.compressor 'voco'.*; found 'average_pool'"),
    ],
)
def test_numbers_that_cannot_be_read(changes, message, tmp_path):
    config = tiny.config(tmp_path, **{"model__num_voco_tokens": 4, "train__elastic_k": NUMBERS} | changes)
    with pytest.raises(UserError, match=f"^config.train.elastic_k: {message}"):
        open_training_data(config)
