import hashlib
import itertools

import numpy as np
import pytest

from tests.helpers.mix665k import PARTS, Mix, mix665k, shared, unshared
from voco_jax.data.best_fit import BinShape, first_fit, pack, suggest_images, usage


def contents(bins):
    return [bins.items[start:end].tolist() for start, end in itertools.pairwise(bins.offsets)]


def check(bins, num_images, offsets, lengths, shape):
    """Every item once, every conversation in a row, and no budget exceeded."""
    assert bins.offsets[0] == 0 and (np.diff(bins.offsets) > 0).all()
    assert sorted(bins.items.tolist()) == list(range(len(num_images)))
    assert len(bins.rows) == len(lengths) and bins.offsets.dtype == bins.items.dtype == bins.rows.dtype == np.int64
    for members in contents(bins):
        left = [shape.row_length] * shape.rows
        for item in members:
            for i in range(offsets[item], offsets[item + 1]):
                assert bins.rows[i] >= 0
                left[bins.rows[i]] -= lengths[i]
        assert min(left) >= 0
        assert sum(num_images[item] for item in members) <= shape.images


def singles(*lengths):
    return np.arange(len(lengths) + 1), np.array(lengths)


def test_items_that_fill_a_bin_together():
    bins = pack([1, 1, 1, 1], *singles(6, 7, 3, 4), BinShape(rows=1, row_length=10, images=2))
    assert contents(bins) == [[0, 3], [1, 2]] and bins.rows.tolist() == [0, 0, 0, 0]


def test_image_slots_are_a_budget_too():
    bins = pack([2, 1, 1, 0], *singles(4, 4, 4, 4), BinShape(rows=1, row_length=16, images=2))
    assert contents(bins) == [[0, 3], [1, 2]]
    assert usage(bins, [2, 1, 1, 0], [4, 4, 4, 4], BinShape(1, 16, 2)) == (0.5, 1.0)


def test_every_row_is_filled():
    bins = pack([1] * 4, *singles(6, 7, 3, 4), BinShape(rows=2, row_length=10, images=4))
    assert sorted(contents(bins)[0]) == [0, 1, 2, 3]
    assert bins.rows[0] == bins.rows[3] == 0 and bins.rows[1] == bins.rows[2] == 1


def test_conversations_of_one_item():
    """First-fit decreasing where a row does not hold them: 6 and 4, then 5, 3 and 2."""
    bins = pack([8], [0, 5], [2, 3, 4, 5, 6], BinShape(rows=2, row_length=10, images=8))
    assert bins.rows.tolist() == [1, 1, 0, 1, 0]
    bins = pack([1, 1], [0, 1, 3], [5, 4, 4], BinShape(rows=2, row_length=10, images=2))
    assert contents(bins) == [[0, 1]] and bins.rows.tolist() == [0, 0, 1]  # beside the 5, 4 goes, and 4 more does not


def test_conversations_share_the_rows_that_others_left():
    """Two items of 7 leave 3 and 3 tokens: no room for 3 + 3 in one row, but for 3 in each."""
    bins = pack([1, 1, 1], [0, 1, 2, 4], [7, 7, 3, 3], BinShape(rows=2, row_length=10, images=3))
    assert len(contents(bins)) == 1 and sorted(bins.rows[:2]) == sorted(bins.rows[2:]) == [0, 1]


def test_no_items():
    bins = pack([], [0], [], BinShape(1, 8, 1))
    assert contents(bins) == [] and usage(bins, [], [], BinShape(1, 8, 1)) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 3], *singles(4, 4)), "item 1 of 3 images and 4 tokens does not fit into BinShape"),
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
        pack(*arguments, BinShape(rows=2, row_length=10, images=2))


@pytest.mark.parametrize("seed", range(60))
def test_no_budget_is_exceeded_and_no_item_lost(seed):
    """Random shapes and items, of videos and of many conversations too."""
    rng = np.random.default_rng(seed)
    shape = BinShape(int(rng.integers(1, 5)), int(rng.integers(8, 300)), int(rng.choice([0, 1, 3, 6, 64, 100])))
    count = int(rng.integers(1, 400))
    most = min(shape.images, int(rng.choice([1, 4, 64])))
    num_images = rng.integers(0, most + 1, count)
    longest = int(rng.integers(1, shape.row_length + 1))
    items = []
    for _ in range(count):  # conversations one after the other into rows of an empty bin, so that every item fits
        conversations = rng.integers(1, longest + 1, int(rng.choice([1, 1, 1, 3, 12])))
        items.append(conversations[np.cumsum(conversations) <= shape.rows * shape.row_length // 2])
        if len(items[-1]) == 0 or longest > shape.row_length // 2:  # half the tokens fit, if short
            items[-1] = conversations[:1]
    offsets, lengths = np.cumsum([0, *map(len, items)]), np.concatenate(items)
    bins = pack(num_images, offsets, lengths, shape, pool_size=int(rng.choice([1, 5, 50, 1000])))
    check(bins, num_images, offsets, lengths, shape)


@pytest.fixture(scope="module")
def mix():
    return mix665k(records=40_000)


@pytest.mark.parametrize(
    ("make_items", "rows", "images"), [(unshared, 2, 10), (unshared, 4, 20), (shared, 4, 12), (shared, 4, 13)]
)
def test_both_budgets_are_used(mix, make_items, rows, images):
    items, shape = make_items(mix), BinShape(rows, 2048, images)
    bins = pack(*items, shape)
    check(bins, *items, shape)
    used = usage(bins, items.num_images, items.lengths, shape)
    assert used.tokens >= 0.95 and used.images >= 0.9


def test_videos_fill_the_image_slots():
    """8 to 64 frames and a few conversations: the slots run out first."""
    rng = np.random.default_rng(0)
    num_images, conversations = rng.integers(8, 65, 4000), rng.integers(1, 5, 4000)
    offsets = np.concatenate([[0], np.cumsum(conversations)])
    lengths = rng.integers(80, 500, offsets[-1])
    shape = BinShape(2, 2048, 128)
    bins = pack(num_images, offsets, lengths, shape)
    check(bins, num_images, offsets, lengths, shape)
    assert usage(bins, num_images, lengths, shape).images >= 0.97


def test_the_order_stays_nearly_as_shuffled(mix):
    """No item comes earlier than the pool lets it; the mix is the same at all times, and bins of no kind gather."""
    items = unshared(mix)
    bins = pack(*items, BinShape(4, 2048, 20), pool_size=1000)
    places = np.empty(len(bins.items), int)
    places[bins.items] = np.arange(len(bins.items))
    moved = places - np.arange(len(places))
    assert moved.min() > -1000 and np.abs(moved).mean() < 1500
    tenths = [lengths.mean() for lengths in np.array_split(items.lengths[bins.items], 10)]
    assert max(tenths) < 1.05 * min(tenths)
    images = np.add.reduceat(items.num_images[bins.items], bins.offsets[:-1])
    assert np.quantile(images[:-100], 0.05) >= 17  # the last bins hold what is left


def test_the_oldest_item_opens_each_bin():
    """A long text that goes with nothing else is not put off for ever."""
    lengths = [10, *[5] * 40]
    lengths[3] = 10
    bins = pack([1] * 41, *singles(*lengths), BinShape(1, 10, 2), pool_size=8)
    assert contents(bins)[0] == [0] and [3] in contents(bins)[:4]


def test_the_plan_is_the_same_everywhere():
    """Integers alone decide: these digests hold on every machine."""
    lengths = np.arange(3000) * 7919 % 701 + 40
    bins = pack(np.arange(3000) % 11 % 2, np.arange(3001), lengths, BinShape(2, 2048, 6))
    digest = hashlib.sha256(np.concatenate(bins).astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == "f24c6ca47fc6fa3b"


def test_suggested_images(mix):
    items = unshared(Mix(*(values[:10_000] for values in mix)))
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
