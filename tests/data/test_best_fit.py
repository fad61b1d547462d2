import hashlib
import itertools

import numpy as np
import pytest

from benchmarks.data import suggest_images, usage
from tests.helpers.mix665k import PARTS, Mix, mix665k, shared, unshared
from voco_jax.data.best_fit import PackShape, first_fit, pack_items


def contents(packs):
    return [packs.items[start:end].tolist() for start, end in itertools.pairwise(packs.offsets)]


def check(packs, num_images, offsets, lengths, shape):
    """Every item once, every conversation in a row, and no budget exceeded."""
    assert packs.offsets[0] == 0 and (np.diff(packs.offsets) > 0).all()
    assert sorted(packs.items.tolist()) == list(range(len(num_images)))
    assert len(packs.rows) == len(lengths) and packs.offsets.dtype == packs.items.dtype == packs.rows.dtype == np.int64
    for members in contents(packs):
        left = [shape.row_length] * shape.rows
        for item in members:
            for i in range(offsets[item], offsets[item + 1]):
                assert packs.rows[i] >= 0
                left[packs.rows[i]] -= lengths[i]
        assert min(left) >= 0
        assert sum(num_images[item] for item in members) <= shape.images


def singles(*lengths):
    return np.arange(len(lengths) + 1), np.array(lengths)


def test_items_that_fill_a_bin_together():
    packs = pack_items([1, 1, 1, 1], *singles(6, 7, 3, 4), PackShape(rows=1, row_length=10, images=2))
    assert contents(packs) == [[0, 3], [1, 2]] and packs.rows.tolist() == [0, 0, 0, 0]


def test_image_slots_are_a_budget_too():
    packs = pack_items([2, 1, 1, 0], *singles(4, 4, 4, 4), PackShape(rows=1, row_length=16, images=2))
    assert contents(packs) == [[0, 3], [1, 2]]
    assert usage(packs, np.array([2, 1, 1, 0]), np.full(4, 4), PackShape(1, 16, 2)) == (0.5, 1.0)


def test_every_row_is_filled():
    packs = pack_items([1] * 4, *singles(6, 7, 3, 4), PackShape(rows=2, row_length=10, images=4))
    assert sorted(contents(packs)[0]) == [0, 1, 2, 3]
    assert packs.rows[0] == packs.rows[3] == 0 and packs.rows[1] == packs.rows[2] == 1


def test_conversations_of_one_item():
    """First-fit decreasing where a row does not hold them: 6 and 4, then 5, 3 and 2."""
    packs = pack_items([8], [0, 5], [2, 3, 4, 5, 6], PackShape(rows=2, row_length=10, images=8))
    assert packs.rows.tolist() == [1, 1, 0, 1, 0]
    packs = pack_items([1, 1], [0, 1, 3], [5, 4, 4], PackShape(rows=2, row_length=10, images=2))
    assert contents(packs) == [[0, 1]] and packs.rows.tolist() == [0, 0, 1]  # beside the 5, 4 goes, and 4 more does not


def test_conversations_share_the_rows_that_others_left():
    """Two items of 7 leave 3 and 3 tokens: no room for 3 + 3 in one row, but for 3 in each."""
    packs = pack_items([1, 1, 1], [0, 1, 2, 4], [7, 7, 3, 3], PackShape(rows=2, row_length=10, images=3))
    assert len(contents(packs)) == 1 and sorted(packs.rows[:2]) == sorted(packs.rows[2:]) == [0, 1]


def test_no_items():
    packs = pack_items([], [0], [], PackShape(1, 8, 1))
    assert contents(packs) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 3], *singles(4, 4)), "item 1 of 3 images and 4 tokens does not fit into PackShape"),
        (([1, 1], *singles(4, 11)), "item 1 of 1 images and 11 tokens does not fit"),
        (([1, 1], [0, 3, 4], [7, 7, 6, 1]), "item 0 of 1 images and 20 tokens does not fit"),  # 7, 7 and then 6
        (([1, 1], *singles(4, 0)), "items: expected a conversation each, at least 1 token"),
        (([1, -1], *singles(4, 4)), "0 images or more"),
        (([1, 1], [0, 0, 2], [4, 4]), "a conversation each"),
        (([1, 1], [0, 1], [4, 4]), "offsets: expected 3 from 0 to 2"),
        (([1, 1], [0, 1, 3], [4, 4]), "offsets: expected 3 from 0 to 2"),
    ],
)
def test_bad_items(arguments, message):
    with pytest.raises(ValueError, match=message):
        pack_items(*arguments, PackShape(rows=2, row_length=10, images=2))


@pytest.mark.parametrize("seed", range(60))
def test_no_budget_is_exceeded_and_no_item_lost(seed):
    """Random shapes and items, of videos and of many conversations too."""
    rng = np.random.default_rng(seed)
    shape = PackShape(int(rng.integers(1, 5)), int(rng.integers(8, 300)), int(rng.choice([0, 1, 3, 6, 64, 100])))
    count = int(rng.integers(1, 400))
    most = min(shape.images, int(rng.choice([1, 4, 64])))
    num_images = rng.integers(0, most + 1, count)
    longest = int(rng.integers(1, shape.row_length + 1))
    items = []
    for _ in range(count):  # conversations one after the other into rows of an empty pack, so that every item fits
        conversations = rng.integers(1, longest + 1, int(rng.choice([1, 1, 1, 3, 12])))
        items.append(conversations[np.cumsum(conversations) <= shape.rows * shape.row_length // 2])
        if len(items[-1]) == 0 or longest > shape.row_length // 2:  # half the tokens fit, if short
            items[-1] = conversations[:1]
    offsets, lengths = np.cumsum([0, *map(len, items)]), np.concatenate(items)
    packs = pack_items(num_images, offsets, lengths, shape, pool_size=int(rng.choice([1, 5, 50, 1000])))
    check(packs, num_images, offsets, lengths, shape)


@pytest.fixture(scope="module")
def mix():
    return mix665k(records=40_000)


@pytest.mark.parametrize(
    ("make_items", "rows", "images"), [(unshared, 2, 10), (unshared, 4, 20), (shared, 4, 12), (shared, 4, 13)]
)
def test_both_budgets_are_used(mix, make_items, rows, images):
    items, shape = make_items(mix), PackShape(rows, 2048, images)
    packs = pack_items(*items, shape)
    check(packs, *items, shape)
    used_tokens, used_images = usage(packs, items.num_images, items.lengths, shape)
    assert used_tokens >= 0.95 and used_images >= 0.9


def test_videos_fill_the_image_slots():
    """8 to 64 frames and a few conversations: the slots run out first."""
    rng = np.random.default_rng(0)
    num_images, conversations = rng.integers(8, 65, 4000), rng.integers(1, 5, 4000)
    offsets = np.concatenate([[0], np.cumsum(conversations)])
    lengths = rng.integers(80, 500, offsets[-1])
    shape = PackShape(2, 2048, 128)
    packs = pack_items(num_images, offsets, lengths, shape)
    check(packs, num_images, offsets, lengths, shape)
    assert usage(packs, num_images, lengths, shape)[1] >= 0.97


def test_the_order_stays_nearly_as_shuffled(mix):
    """No item comes earlier than the pool lets it; the mix is the same at all times, and packs of no kind gather."""
    items = unshared(mix)
    packs = pack_items(*items, PackShape(4, 2048, 20), pool_size=1000)
    places = np.empty(len(packs.items), int)
    places[packs.items] = np.arange(len(packs.items))
    moved = places - np.arange(len(places))
    assert moved.min() > -1000 and np.abs(moved).mean() < 1500
    tenths = [lengths.mean() for lengths in np.array_split(items.lengths[packs.items], 10)]
    assert max(tenths) < 1.05 * min(tenths)
    images = np.add.reduceat(items.num_images[packs.items], packs.offsets[:-1])
    assert np.quantile(images[:-100], 0.05) >= 17  # the last packs hold what is left


def test_the_oldest_item_opens_each_pack():
    """A long text that goes with nothing else is not put off for ever."""
    lengths = [10, *[5] * 40]
    lengths[3] = 10
    packs = pack_items([1] * 41, *singles(*lengths), PackShape(1, 10, 2), pool_size=8)
    assert contents(packs)[0] == [0] and [3] in contents(packs)[:4]


def test_the_plan_is_the_same_everywhere():
    """Integers alone decide: these digests hold on every machine."""
    lengths = np.arange(3000) * 7919 % 701 + 40
    packs = pack_items(np.arange(3000) % 11 % 2, np.arange(3001), lengths, PackShape(2, 2048, 6))
    digest = hashlib.sha256(np.concatenate(packs).astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == "f24c6ca47fc6fa3b"


def test_suggested_images(mix):
    items = unshared(Mix(*(values[:4000] for values in mix)))
    assert suggest_images(*items, 1, 2048) == 5
    assert suggest_images(*items, 2, 2048) == 10
    assert suggest_images(*items, 4, 2048) in (19, 20)
    assert suggest_images(*items, 2, 2048, slot_cost=0) > 10  # slots for nothing: fill the rows
    assert suggest_images(*items, 2, 2048, slot_cost=100_000) < 10
    assert suggest_images([0, 0], *singles(4, 4), 2, 2048) == 0
    assert suggest_images([64, 1], *singles(2000, 2000), 1, 2048) == 64  # as many as the largest item has


def test_the_generated_mix():
    mix = mix665k(records=30_000)
    assert sum(part.records for part in PARTS) == 665_298
    assert len(mix.lengths) == pytest.approx(30_000, abs=10) and mix.lengths.max() == 2048
    text = mix.pictures < 0
    assert (mix.num_images == ~text).all() and text.mean() == pytest.approx(40_688 / 665_298, rel=0.01)
    assert 1100 < mix.lengths[text].mean() < 1300
    np.testing.assert_array_equal(mix.lengths, mix665k(records=30_000).lengths)
    items = shared(mix)
    tokens = np.add.reduceat(items.lengths, items.offsets[:-1])
    assert items.lengths.sum() == mix.lengths.sum() and len(items.num_images) < 0.75 * len(mix.lengths)
    assert tokens[np.diff(items.offsets) > 1].max() <= 1024


def test_first_fit():
    assert first_fit([4, 6, 7, 3], [10, 10]) == [1, 1, 0, 0]
    assert first_fit([10], [10, 10]) == [0] and first_fit([11], [10, 10]) is None
    assert first_fit([6, 6, 6], [10, 10]) is None and first_fit([6, 6], [5, 12]) == [1, 1]
