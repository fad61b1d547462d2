"""Continuous batching: whenever a request comes and whatever is beside it, it gets the answer that it gets alone."""

from collections import deque
import dataclasses
import sys

from flax import nnx
import jax
import numpy as np
import pytest

from tests.helpers.eight_devices import failures_of, run_checks
from tests.models.test_two_streams import CONFIG, FAMILIES, make_model
from tests.parallel.test_meshes import mesh_of
from voco_jax.chat_templates import CHAT_TEMPLATES
from voco_jax.data.conversations import Encoder
from voco_jax.data.tokenizer import train_tokenizer
from voco_jax.errors import UserError
from voco_jax.infer import continuous
from voco_jax.infer.continuous import Ask, ContinuousBatch
from voco_jax.infer.engine import GREEDY, Engine
from voco_jax.infer.generate import Sampling, trim
from voco_jax.infer.memory import Embeddings, Item, from_memory, join_images
from voco_jax.infer.prompts import gather
from voco_jax.parallel.sharding import param_shardings

WORDS = ["what", "is", "it?", "a", "red", "cat"]
CASES = {
    "two VoCo tokens": dict(num_voco_tokens=2),
    "uncompressed": dict(compressor="none"),
    "embeddings": dict(compressor="voco_embedding", num_voco_tokens=2),
    "a window": dict(num_voco_tokens=1, llama=FAMILIES["Mistral v0.1"]),
}
SLOW = ("embeddings", "a window")


def engine_of(tokenizer, mesh=None, **changes) -> Engine:
    config = dataclasses.replace(CONFIG, **changes)
    k = config.num_voco_tokens if config.has_compress_stream else 0
    encoder = Encoder(tokenizer, CHAT_TEMPLATES["bare"], k, config.num_visual_tokens, config.has_compress_stream)
    llama = dataclasses.replace(config.llama, vocab_size=len(tokenizer), max_position_embeddings=512, vocab_multiple=16)
    model = make_model(dataclasses.replace(config, llama=llama, voco_token_id=encoder.ids.voco_token_id))
    if mesh is not None:
        graphdef, params = nnx.split(model)
        model = nnx.merge(graphdef, jax.device_put(params, param_shardings(mesh, params)))
    return Engine(model, encoder, mesh)


def images_of(engine: Engine, count: int):
    """One bank, or embeddings, an image."""
    pixels = np.random.default_rng(0).normal(size=(count, 1, 8, 8, 3)).astype(np.float32)
    visual, items = engine.encode_images(pixels), (Item(""),) * count
    if engine.config.has_compress_stream:
        encoded = from_memory(visual, engine.config.num_voco_tokens, items, "m")
    else:
        encoded = Embeddings(np.asarray(visual).reshape(count, *visual.shape[2:]), items)
    return [encoded[i] for i in range(count)]


def asks_of(engine: Engine, images, rng, count: int = 14) -> list[Ask]:
    """Random questions about 0 to 3 images; some begin as others do, some are longer than a piece, some draw."""
    asks = []
    for n in range(count):
        which = (
            [] if n % 5 == 4 else [0, 1] if n % 5 == 3 else rng.choice(len(images), rng.integers(1, 4), False).tolist()
        )
        about = tuple((f"image {i}", images[i]) for i in which)
        tokens = engine.encoder.num_visual_tokens
        encoder = engine.encoder
        if n % 4 == 1 and engine.config.has_compress_stream:  # fewer tokens of each
            encoder, tokens = engine.for_tokens(1).encoder, 1
        words = rng.choice(WORDS, 50 if n % 7 == 2 else rng.integers(1, 9))
        sample = encoder.encode_question("what is it? " + " ".join(words), len(which))
        sampling = Sampling(0.8, 20, 0.9, seed=n) if n % 3 == 0 else GREEDY
        new = int(rng.integers(1, 30))
        asks.append(Ask(sample, about, tokens, new, sampling, n % 2, top=n % 3 == 0))
    return asks


def alone(engine: Engine, ask: Ask) -> tuple[list[int], np.ndarray]:
    """Ids and log-probabilities by the engine that answers batches."""
    engine = engine.for_tokens(ask.tokens) if engine.config.has_compress_stream else engine
    of_k = [one.first_tokens(ask.tokens) if engine.config.has_compress_stream else one for _, one in ask.images]
    visual, indices = gather([join_images(of_k) if of_k else None])
    state = engine.prefill([ask.sample], visual, indices, ask.max_new_tokens, ask.sampling, [ask.stream])
    state = engine.decode(state, ask.max_new_tokens)
    ids = trim(np.asarray(state.output)[0], [engine.encoder.ids.eos_token_id])
    sure = np.asarray(state.log_probabilities)[0]
    return ids, sure[: min(len(ids) + 1, ask.max_new_tokens)]


def run(batch: ContinuousBatch, asks: list[Ask], rng, leave: set[int] = frozenset()) -> dict[int, list]:
    """Steps of each request by its number; those who `leave` do so after their first token."""
    waiting, came, found = deque(range(len(asks))), deque(), {i: [] for i in range(len(asks))}
    rows: dict = {}
    stop = {*batch._engine.encoder.stop_ids}
    while waiting or came or rows:
        for _ in range(min(len(waiting), int(rng.integers(0, 4)))):
            came.append(waiting.popleft())
        for row in batch.admit([asks[i] for i in came]):
            rows[row] = came.popleft()
        for read in (True, False):
            if read and (not batch.is_reading or rng.random() < 0.3):
                continue
            for row, step in batch.read_on() if read else batch.decode(hurry=bool(came)):
                i = rows[row]
                found[i].append(step)
                count = sum(len(s.ids) for s in found[i])
                if stop & {*step.ids.tolist()} or count == asks[i].max_new_tokens or i in leave:
                    batch.release(row)
                    del rows[row]
    return found


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] if case in SLOW else []) for case in CASES]
)
def test_every_request_gets_what_it_gets_alone(case, small_tokenizer, monkeypatch):
    """Rows come and go, the cache grows and shrinks, prompts are read in pieces and after what a row has read before;
    some draw, some leave."""
    for name in ("PIECES", "LONG_PIECES"):
        monkeypatch.setattr(continuous, name, (32,))
    monkeypatch.setattr(continuous, "LEAST_PLACES", 64)
    monkeypatch.setattr(continuous, "SHRINK_AFTER", 3)
    engine, rng = engine_of(small_tokenizer, **CASES[case]), np.random.default_rng(0)
    images = images_of(engine, 4)
    asks = asks_of(engine, images, rng)
    batch = ContinuousBatch(engine, most_rows=4)
    leave = {3, 8}
    found = run(batch, asks, rng, leave)
    eos = engine.encoder.ids.eos_token_id
    answered = set()
    for i, ask in enumerate(asks):
        ids = np.concatenate([step.ids for step in found[i]])
        sure = np.concatenate([step.log_probabilities for step in found[i]])
        expected, expected_sure = alone(engine, ask)
        if i in leave:
            expected, expected_sure = expected[: len(ids)], expected_sure[: len(ids)]
        assert trim(ids, [eos]) == expected, i
        np.testing.assert_allclose(sure, expected_sure, atol=2e-5)
        answered.add(tuple(expected))
        if ask.top:
            likeliest, how = (
                np.concatenate([getattr(step, x) for step in found[i]]) for x in ("top_ids", "top_log_probabilities")
            )
            assert likeliest.shape == (len(ids), continuous.TOP) and (np.diff(how) <= 0).all()
            place = (likeliest == ids[:, None]).argmax(axis=1)  # a token that was drawn is among the 20 likeliest
            np.testing.assert_array_equal(how[np.arange(len(ids)), place], sure)
    assert len(answered) > len(asks) - 3  # or the comparison would say little
    assert batch.free == 4 and not batch.is_decoding and not batch.is_reading


def test_what_a_row_has_read_is_not_read_again(small_tokenizer, monkeypatch):
    """A later turn reads what is new, of its own owner's row alone; the same images, numbered anew, are others."""
    engine = engine_of(small_tokenizer, num_voco_tokens=2)
    images = images_of(engine, 2)
    batch = ContinuousBatch(engine, most_rows=1)
    read = []
    extend = batch._extend

    def counted(reading, texts):
        read.append(sum(map(len, texts)))
        return extend(reading, texts)

    monkeypatch.setattr(batch, "_extend", counted)

    def answer(turns, key="a", owner="", image=0):
        sample = engine.encoder.encode(turns, 1)
        ask = Ask(sample, ((key, images[image]),), 2, 12, owner=owner)
        (row,) = batch.admit([ask])
        ((_, first),) = batch.read_on()
        ids = [*first.ids.tolist()]
        while len(ids) < 12 and ids[-1] not in engine.encoder.stop_ids:
            ids += batch.decode()[0][1].ids.tolist()
        batch.release(row)
        assert trim(ids, engine.encoder.stop_ids) == alone(engine, ask)[0]
        return len(sample)

    turns = [{"from": "human", "value": engine.encoder.question("what is it?", 1)}]
    text = answer(turns) - 2
    assert read == [text]
    later = [*turns, {"from": "gpt", "value": ("a red cat",)}, {"from": "human", "value": ("is it a cat?",)}]
    whole = answer(later) - 2
    assert read[1] < whole - text + 4  # what was said, and the next question
    answer(later)
    assert read[2] == 1  # the last token, after which the answer begins
    answer(later, owner="another")
    assert read[3] == whole
    answer(later, key="b", image=1, owner="another")
    assert read[4] == whole  # all of it comes after the image


def test_a_beginning_is_read_once_for_all_rows(small_tokenizer, monkeypatch):
    """A system text that a row has read, also one that is being answered, is not read by the others."""
    engine = engine_of(small_tokenizer, num_voco_tokens=2)
    batch = ContinuousBatch(engine, most_rows=4)
    read = []
    extend = batch._extend
    monkeypatch.setattr(
        batch, "_extend", lambda reading, texts: (read.append([len(t) for t in texts]), extend(reading, texts))[1]
    )
    system = "what is it? a red cat " * 6
    asks = [
        Ask(engine.encoder.encode_question(f"{system} {last}", 0), (), 2, 12) for last in ("is it?", "a cat?", "red?")
    ]
    found = {}
    for some in (asks[:1], asks[1:]):
        for row in batch.admit(some):
            found[row] = []
        for row, step in batch.read_on():
            found[row] += step.ids.tolist()
    assert read[0][0] > 30 and max(read[1]) < 12
    while any(len(ids) < 12 and not {*ids} & {*engine.encoder.stop_ids} for ids in found.values()):
        for row, step in batch.decode():
            found[row] += step.ids.tolist()
    for row, ids in found.items():
        assert trim(ids, engine.encoder.stop_ids) == alone(engine, row.ask)[0]


def test_what_no_row_has_room_for(small_tokenizer):
    engine = engine_of(small_tokenizer)
    batch = ContinuousBatch(engine, most_places=40)
    sample = engine.encoder.encode_question("what is it?", 0)
    batch.check(Ask(sample, (), 1, 40 - len(sample)))
    with pytest.raises(
        UserError, match=rf"at most 40 tokens with the answer, found {len(sample)} and 40 for the answe"
    ):
        batch.check(Ask(sample, (), 1, 40))
    with pytest.raises(UserError, match="rows: expected at least 1, found 0"):
        ContinuousBatch(engine, most_rows=0)


def rows_over_a_mesh_are_those_of_one_device():
    """A program for eight devices: rows along data and fsdp, heads along tensor."""
    tokenizer = train_tokenizer(["USER: what is it? ASSISTANT: a red cat\n"] * 9, vocab_size=400)
    continuous.PIECES, continuous.LEAST_PLACES = (64,), 256
    one = engine_of(tokenizer, num_voco_tokens=2)
    spread = engine_of(tokenizer, mesh_of((2, 2, 1, 2)), num_voco_tokens=2)
    rng = np.random.default_rng(0)
    asks = asks_of(one, images_of(one, 4), rng, 5)
    batch = ContinuousBatch(spread, most_rows=4)
    found = run(batch, asks, rng)
    for i, ask in enumerate(asks):
        ids, sure = (np.concatenate([getattr(step, x) for step in found[i]]) for x in ("ids", "log_probabilities"))
        expected, expected_sure = alone(one, ask)
        assert trim(ids, [one.encoder.ids.eos_token_id]) == expected, i
        np.testing.assert_allclose(sure, expected_sure, atol=5e-5)
    assert len(batch._state.cache.keys.sharding.device_set) == 8


CHECKS = {"rows over a mesh": rows_over_a_mesh_are_those_of_one_device}


@pytest.mark.multiprocess
def test_over_eight_devices():
    assert not failures_of(__name__)


if __name__ == "__main__":
    run_checks(CHECKS, sys.argv[1:])
