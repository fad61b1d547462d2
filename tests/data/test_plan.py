"""What an epoch takes, in which packs: every conversation as often as its weight says, whatever the layout."""

from collections import Counter
import copy

import numpy as np
import pytest

from voco_jax.data.best_fit import PackShape
from voco_jax.data.index import Index
from voco_jax.data.plan import ROWS_JUDGED_BY, Plan, cheapest_rows, group_by_length
from voco_jax.data.reports import Report
from voco_jax.errors import UserError


def index(lengths, num_images=None, pictures=None) -> Index:
    """Of records whose conversations have these lengths: `[[5, 6], [7]]` has two in its first record."""
    counts = [len(of_record) for of_record in lengths]
    n = len(lengths)
    return Index(
        records=np.arange(n) * 10,  # places in a source of which nine of ten records are unusable
        num_images=np.array([1] * n if num_images is None else num_images),
        pictures=np.arange(1, n + 1) if pictures is None else np.array(pictures),
        offsets=np.concatenate([[0], np.cumsum(counts)]),
        conversations=np.concatenate([np.arange(c) for c in counts]),
        lengths=np.concatenate([np.array(of_record) for of_record in lengths]),
        digests=np.arange(sum(counts)),
        answers=np.arange(sum(counts)),
        report=Report(),
    )


def random_index(rng, n) -> Index:
    images = rng.integers(0, 3, n)
    pictures = np.where(images > 0, rng.integers(1, n // 2, n), 0)
    images = np.where(pictures > 0, 1 + pictures % 2, 0)
    return index([rng.integers(1, 30, rng.integers(1, 4)).tolist() for _ in range(n)], images, pictures)


def conversations(plan, epoch) -> Counter:
    return Counter((p.source, p.record, p.conversation) for i in plan.packs(epoch) for p in plan[i])


@pytest.mark.parametrize("layout", ["pack", "group"])
@pytest.mark.parametrize("share", [True, False])
def test_an_epoch_has_every_conversation_once_and_packs_hold_them(layout, share):
    first, second = (random_index(np.random.default_rng(seed), n) for seed, n in ((1, 90), (2, 40)))
    shape = PackShape(rows=3, row_length=40, images=5)
    plan = Plan([first, second], [1, 1], shape, seed=7, layout=layout, batch_size=4, share_images=share)
    expected = {
        (s, int(i.records[r]), int(c)): int(i.lengths[k])
        for s, i in enumerate((first, second))
        for r in range(len(i))
        for k in range(i.offsets[r], i.offsets[r + 1])
        for c in [i.conversations[k]]
    }
    images = {
        (s, int(i.records[r])): (int(i.pictures[r]), int(i.num_images[r]))
        for s, i in enumerate((first, second))
        for r in range(len(i))
    }
    orders = []
    for epoch in range(3):
        in_row: Counter = Counter()
        assert conversations(plan, epoch) == Counter(list(expected))
        for b in plan.packs(epoch):
            used = np.zeros(shape.rows, int)
            held = {}
            for p in plan[b]:
                used[p.row] += expected[p.source, p.record, p.conversation]
                held.setdefault(p.item, set()).add(images[p.source, p.record])
                in_row[b, p.row] += images[p.source, p.record][1]
                assert p.epoch == epoch
            assert used.max() <= shape.row_length
            assert all(len(pictures) == 1 for pictures in held.values())  # an item has one set of images
            assert sum(n for pictures in held.values() for _, n in pictures) <= shape.images
        orders.append([(p.source, p.record) for b in plan.packs(epoch) for p in plan[b]])
        tokens = sum(expected.values()) / (len(plan.packs(epoch)) * 120)
        assert plan.use(epoch).tokens == pytest.approx(tokens)
        amount = plan.amount(plan.packs(epoch))
        assert (amount.conversations, amount.tokens) == (len(expected), sum(expected.values()))
        assert plan.most_images_in_a_row(epoch) == max(in_row.values()) > 2
        assert amount.images == round(plan.use(epoch).images * len(plan.packs(epoch)) * shape.images)
    assert orders[0] != orders[1] != orders[2]


def test_the_packs_of_epochs_follow_one_another():
    plan = Plan([random_index(np.random.default_rng(3), 50)], [1], PackShape(1, 60, 4), seed=0)
    first, second = plan.packs(0), plan.packs(1)
    assert first.start == 0 and second.start == first.stop
    assert plan.locate(first.stop - 1) == (0, len(first) - 1) and plan.locate(first.stop) == (1, 0)
    late = Plan([random_index(np.random.default_rng(3), 50)], [1], PackShape(1, 60, 4), seed=0)
    assert late[second.stop + 2] == plan[second.stop + 2]  # no matter what was asked before
    assert copy.deepcopy(plan)[7] == plan[7]


def test_what_stands_in_packs_across_epochs():
    known = random_index(np.random.default_rng(3), 50)
    plan = Plan([known], [1], PackShape(1, 60, 4), seed=0)
    packs = range(plan.packs(0).stop - 3, plan.packs(1).stop + 2)
    examples = [p for b in packs for p in plan[b]]
    lengths = [known.lengths[known.offsets[p.record // 10] + p.conversation] for p in examples]
    records = {(b, p.item): p.record // 10 for b in packs for p in plan[b]}
    images = sum(known.num_images[record] for record in records.values())
    assert plan.amount(packs) == (len(examples), sum(lengths), images)
    parts = [plan.amount(range(b, b + 1)) for b in packs]
    assert tuple(map(sum, zip(*parts, strict=True))) == plan.amount(packs)


def test_groups_stay_whole_in_later_epochs():
    """63 records do not divide by 8: empty packs fill the last batch."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 2, 63)
    records = index([[int(n)] for n in rng.integers(1, 99, 63)], images, np.where(images, np.arange(1, 64), 0))
    plan = Plan([records], [1], PackShape(1, 100, 1), seed=0, layout="group", batch_size=8)
    for epoch in range(3):
        packs = plan.packs(epoch)
        assert len(packs) == 64 and packs.start % 8 == 0 and sum(map(len, (plan[i] for i in packs))) == 63
        for start in packs[: 8 * (images.sum() // 8 + (63 - images.sum()) // 8) : 8]:
            batch = [plan[i][0].record // 10 for i in range(start, start + 8)]
            assert len(set(images[batch])) == 1 and (np.diff(records.lengths[batch]) <= 0).all()


def test_other_words_of_the_same_length_are_other_data():
    plans = []
    for change in (lambda i: None, lambda i: i.digests.__setitem__(1, 77), lambda i: i.pictures.__iadd__(5)):
        records = index([[5], [6], [7]])
        change(records)
        plans.append(Plan([records], [1], PackShape(1, 20, 3), seed=0).fingerprint())
    assert plans[0] != plans[1] and plans[0] == plans[2]  # the same pictures in another directory


def test_the_fingerprints_of_runs_made_earlier():
    """Literal values of the code that made the first runs: their checkpoints know the data by these."""
    first, second = (random_index(np.random.default_rng(seed), n) for seed, n in ((3, 50), (4, 20)))
    plan = Plan([first], [1], PackShape(2, 60, 4), seed=0)
    assert plan.fingerprint() == "aabdb4ae01d1482f"
    options = dict(layout="group", batch_size=4, conversations_per_record=2, share_images=False)
    plan = Plan([first, second], [1, 2.5], PackShape(1, 60, 4), seed=1, **options)
    assert plan.fingerprint() == "d8dc44e96ae4aca6"


def test_packs_come_in_random_order():
    """Packing leaves what is left over to its last packs; training must not meet it always last."""
    plan = Plan([index([[6]] * 31)], [1], PackShape(1, 20, 3), seed=0)
    emptiest = [min(range(11), key=lambda i: len(plan[plan.packs(epoch)[i]])) for epoch in range(8)]
    assert len(set(emptiest)) > 3


def test_seeds_differ():
    plans = [Plan([random_index(np.random.default_rng(3), 50)], [1], PackShape(1, 60, 4), seed=s) for s in (0, 0, 1)]
    assert plans[0][0] == plans[1][0] != plans[2][0]
    assert plans[0].fingerprint() == plans[1].fingerprint() != plans[2].fingerprint()


def test_conversations_about_one_picture_share_it():
    records = index([[5], [6], [7], [8]], pictures=[3, 9, 3, 3])
    together = Plan([records], [1], PackShape(1, 100, 4), seed=0)
    items = Counter()
    for p in together[0]:
        items[p.record, p.item] += 1
    by_record = {record: item for record, item in items}
    assert by_record[0] == by_record[20] == by_record[30] != by_record[10]
    assert together.use().images == 2 / 4
    assert Plan([records], [1], PackShape(1, 100, 4), seed=0, share_images=False).use().images == 1.0
    small = Plan([records], [1], PackShape(1, 16, 4), seed=0)  # 5 + 7 + 8 do not fit one row: compressed twice
    assert sum(small.use().images * 4 for _ in small.packs(0)) == 3


@pytest.mark.parametrize("weight", [2, 0.5, 1.5])
def test_weights_are_how_often_a_record_comes_up(weight):
    ten, four = index([[5]] * 10), index([[6]] * 4)
    plan = Plan([ten, four], [1, weight], PackShape(1, 20, 3), seed=0)
    counts = [conversations(plan, epoch) for epoch in range(4)]
    for count in counts:
        assert [count[0, i * 10, 0] for i in range(10)] == [1] * 10
        assert sum(n for (source, _, _), n in count.items() if source == 1) == 4 * weight
    whole = sum(counts, Counter())  # over four epochs all come up equally often
    assert [whole[1, i * 10, 0] for i in range(4)] == [4 * weight] * 4


def test_a_record_that_comes_up_twice_is_not_read_twice_at_once():
    plan = Plan([index([[5], [5]], pictures=[1, 2])], [2], PackShape(1, 20, 4), seed=0)
    for i in plan.packs(0):
        items = Counter((p.item, p.record) for p in plan[i])
        assert set(items.values()) == {1}


def test_some_conversations_of_a_record():
    plan = Plan([index([[5] * 8, [5]])], [1], PackShape(4, 5, 1), seed=0, conversations_per_record=3)
    drawn = [sorted(c for (_, r, c), _ in conversations(plan, epoch).items() if r == 0) for epoch in range(6)]
    assert all(len(d) == 3 for d in drawn) and len(set(map(tuple, drawn))) > 2
    assert all(conversations(plan, epoch)[0, 10, 0] == 1 for epoch in range(6))


def test_groups_are_of_one_modality_and_sorted():
    rng = np.random.default_rng(0)
    lengths, with_images = rng.integers(1, 1000, 100), rng.random(100) < 0.7
    order = group_by_length(lengths, with_images, 8, np.random.default_rng(1))
    assert sorted(order) == list(range(100))
    batches = [order[i : i + 8] for i in range(0, 100, 8)]
    whole = with_images.sum() // 8 + (~with_images).sum() // 8
    kinds = [bool(with_images[batch[0]]) for batch in batches[:whole]]
    assert all((with_images[batch] == kind).all() for batch, kind in zip(batches, kinds, strict=False))
    assert 0 < sum(kinds) < whole and kinds != sorted(kinds, reverse=True)  # the modalities take turns
    assert all((np.diff(lengths[batch]) <= 0).all() for batch in batches)


def test_a_group_bin_has_one_record():
    plan = Plan([random_index(np.random.default_rng(5), 30)], [1], PackShape(3, 40, 5), seed=0, layout="group")
    assert len(plan.packs(0)) == 30 and all(len({p.record for p in plan[i]}) == 1 for i in plan.packs(0))


def test_plans_that_cannot_be():
    with pytest.raises(UserError, match="config.data.layout: expected pack or group, found 'heap'"):
        Plan([index([[5]])], [1], PackShape(1, 10, 1), seed=0, layout="heap")
    with pytest.raises(UserError, match="config.data.train: expected at least one record an epoch"):
        Plan([index([[5]])], [0.5], PackShape(1, 10, 1), seed=0)


@pytest.mark.parametrize(
    ("conversations", "images", "per_record", "rows"),
    [
        (1, 1, 8, 1),  # a caption a picture
        (5, 1, 8, 5),  # more of them about each, of equal length
        (5, 1, 2, 2),  # of which two are drawn
        (1, 8, 8, 8),  # pictures enough for the rows
        (1, 0, 8, 1),  # text alone: any number is as good
    ],
)
def test_the_cheapest_number_of_rows(conversations, images, per_record, rows):
    """A row for each of the conversations that come together: fewer compress pictures again, more are padding."""
    of = index([[20] * conversations] * 400, [int(images > 0)] * 400, range(1, 401) if images else [0] * 400)
    options = dict(seed=0, conversations_per_record=per_record)
    shape = PackShape(rows=0, row_length=20, images=images)
    assert cheapest_rows([of], [1], shape, 64, **options) == (rows, 1)
    # The tokens that an epoch of 16 rows needs, over those of so many
    needed = {
        n: Plan([of], [1], PackShape(n, 20, images), **options).use().packs * (20 * n + 64 * images) for n in (rows, 16)
    }
    assert cheapest_rows([of], [1], PackShape(16, 20, images), 64, **options)[1] == needed[16] / needed[rows]


def test_some_of_a_large_index():
    """It has the same kinds of records, and all that share a picture."""
    whole = random_index(np.random.default_rng(0), 9000)
    some = whole.every(3)
    assert 0.3 < len(some) / len(whole) < 0.37 and some.offsets[-1] == len(some.lengths) == len(some.digests)
    pictures = set(some.pictures[some.pictures > 0].tolist())
    assert np.isin(whole.pictures, [*pictures]).sum() == (some.pictures > 0).sum()
    for i, record in enumerate(some.records.tolist()):
        j = record // 10
        here, there = slice(*some.offsets[i : i + 2]), slice(*whole.offsets[j : j + 2])
        assert some.digests[here].tolist() == whole.digests[there].tolist()
    shape = PackShape(rows=0, row_length=30, images=3)
    some = whole.every(len(whole) // ROWS_JUDGED_BY)
    assert cheapest_rows([whole], [1], shape, 9, seed=0) == cheapest_rows([some], [1], shape, 9, seed=0)
