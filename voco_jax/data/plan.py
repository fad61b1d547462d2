"""Third of sources → index → plan → pipeline → batches: which conversations stand in which batch.

A plan is a pure function of the seed, the epoch and the lengths in the index. An epoch takes every record of every
source `weight` times, in random order, and lays its conversations out over packs. A pack is one element of a batch:
rows of a fixed number of tokens, and a fixed number of images. Packs are numbered through all epochs; `batch_size` of
them are a batch, so the state of a run is one number too. Every host and every worker makes the same plan, and takes
its own packs from it.

Two layouts: 'pack' fills packs by best fit (`best_fit.py`); 'group' is the released code's recipe, one conversation in
each pack, each batch of one modality and sorted by length.
"""

from collections.abc import Sequence
import dataclasses
import hashlib
import threading
from typing import NamedTuple

import numpy as np

from voco_jax.data.best_fit import Packs, PackShape, first_fit, pack_items
from voco_jax.data.index import Index, same_pictures
from voco_jax.errors import UserError

LAYOUTS = ("pack", "group")
ROWS = (*range(1, 9), 10, 12, 16)  # of a pack, to choose from
ROWS_JUDGED_BY = 1000  # records, about


class PackedExample(NamedTuple):
    """A conversation's place in a pack: what it is (source, record, conversation of the record) and its row.

    Those of one `item` of the pack share their images.
    """

    item: int
    source: int
    record: int
    conversation: int
    row: int
    epoch: int


class Pack(NamedTuple):
    """A pack of a plan by its number, which counts through all epochs."""

    number: int
    examples: list[PackedExample]


class Use(NamedTuple):
    """How much of an epoch's packs is filled: shares of the read rows' tokens and of the image slots."""

    tokens: float
    images: float
    packs: int


class Amount(NamedTuple):
    """What some packs hold: conversations, tokens of the read rows (no padding), images."""

    conversations: int
    tokens: int
    images: int


class Plan:
    """`plan[i]` is the i-th pack, a list of `PackedExample`. There is no last pack; after `epochs` epochs (0: never)
    they are empty. A plan is small enough to be sent to workers."""

    def __init__(
        self,
        indices: Sequence[Index],
        weights: Sequence[float],
        shape: PackShape,
        *,
        seed: int,
        layout: str = "pack",
        batch_size: int = 1,
        conversations_per_record: int = 0,
        share_images: bool = True,
        epochs: int = 0,
    ):
        if layout not in LAYOUTS:
            raise UserError(f"config.data.layout: expected {' or '.join(LAYOUTS)}, found {layout!r}")
        sizes = [len(index) for index in indices]
        self.shape, self.seed, self._layout, self._batch_size = shape, seed, layout, batch_size
        self._empty = [shape.row_length] * shape.rows  # tokens left in the rows of a pack
        self._weights, self._sizes, self._first = list(weights), sizes, np.cumsum([0, *sizes])
        self._per_record, self._share, self._num_epochs = conversations_per_record, share_images, epochs
        # All sources' arrays as one; records are numbered through
        self._source = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
        self._records = np.concatenate([index.records for index in indices])
        self._num_images = np.concatenate([index.num_images for index in indices])
        # Sources share no pictures: what is called the same in two sets of shards need not be the same
        apart = [np.where(index.pictures, index.pictures ^ (i << 48), 0) for i, index in enumerate(indices)]
        self._pictures = np.concatenate(apart)
        self._counts = np.concatenate([np.diff(index.offsets) for index in indices])
        self._starts = np.cumsum(self._counts) - self._counts
        self._conversations = np.concatenate([index.conversations for index in indices])
        self._lengths = np.concatenate([index.lengths for index in indices])
        self._digests = np.concatenate([index.digests for index in indices])
        self._lock = threading.RLock()  # threads that load packs ask for them at once
        self._ends: list[int] = []  # packs up to and with each epoch
        self._epochs: dict[int, _Epoch] = {}
        if max(weight * size for weight, size in zip(self._weights, sizes, strict=True)) < 1:
            raise UserError("config.data.train: expected at least one record an epoch; see the sources' weights")

    def __getstate__(self):
        return self.__dict__ | {"_epochs": {}, "_lock": None}

    def __setstate__(self, state: dict):
        self.__dict__ = state | {"_lock": threading.RLock()}

    def __getitem__(self, i: int) -> list[PackedExample]:
        if self._num_epochs and i >= self.packs(self._num_epochs - 1).stop:
            return []
        epoch, pack_ = self.locate(i)
        plan = self._epoch(epoch)
        packed = []
        for n, item in enumerate(plan.items[plan.offsets[pack_] : plan.offsets[pack_ + 1]].tolist()):
            for c in range(plan.item_offsets[item], plan.item_offsets[item + 1]):
                record, conversation = int(plan.records[c]), int(self._conversations[plan.conversations[c]])
                where = int(self._source[record]), int(self._records[record])
                packed.append(PackedExample(n, *where, conversation, int(plan.rows[c]), epoch))
        return packed

    def locate(self, i: int) -> tuple[int, int]:
        """(epoch, pack of the epoch) of the i-th pack."""
        with self._lock:
            while not self._ends or i >= self._ends[-1]:
                epoch = len(self._ends)
                self._ends.append((self._ends[-1] if epoch else 0) + len(self._epoch(epoch).offsets) - 1)
        epoch = int(np.searchsorted(self._ends, i, side="right"))
        return epoch, i - (self._ends[epoch - 1] if epoch else 0)

    def packs(self, epoch: int) -> range:
        """The numbers of an epoch's packs."""
        while len(self._ends) <= epoch:
            self.locate(self._ends[-1] if self._ends else 0)
        return range(self._ends[epoch - 1] if epoch else 0, self._ends[epoch])

    @property
    def num_conversations(self) -> int:
        return len(self._lengths)

    def amount(self, packs: range) -> Amount:
        """What consecutive packs hold, as planned: a record that later cannot be loaded counts too."""
        total, i = np.zeros(3, np.int64), packs.start
        while i < packs.stop:
            epoch, first = self.locate(i)
            plan = self._epoch(epoch)
            last = min(first + packs.stop - i, len(plan.offsets) - 1)
            items = plan.items[plan.offsets[first] : plan.offsets[last]]
            conversations = plan.item_offsets[items + 1] - plan.item_offsets[items]
            total += conversations.sum(), plan.tokens[items].sum(), plan.num_images[items].sum()
            i += last - first
        return Amount(*total.tolist())

    def use(self, epoch: int = 0) -> Use:
        """How full the packs of an epoch are."""
        plan, shape = self._epoch(epoch), self.shape
        packs = len(plan.offsets) - 1
        tokens = int(self._lengths[plan.conversations].sum())
        images = int(plan.num_images.sum())
        return Use(tokens / (packs * shape.rows * shape.row_length), images / max(1, packs * shape.images), packs)

    def most_images_in_a_row(self, epoch: int = 0) -> int:
        """The most images that one read row of an epoch speaks of; those of two of its conversations count twice."""
        rows, _, images = self.placed(epoch)
        return int(np.bincount(rows, images).max())

    def longest_whole(self, tokens_an_image: int, most_images: int) -> int:
        """Tokens of the longest conversation about images, of at most so many, if each took so many tokens more; 0
        where there is none."""
        images = np.repeat(self._num_images, self._counts)
        lengths = self._lengths + images * tokens_an_image
        return int(lengths[(images > 0) & (images <= most_images)].max(initial=0))

    def placed(self, epoch: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of all conversations of an epoch, in the order in which they stand in the packs' rows: which row, counted
        through all packs; which of all conversations of the indices; how many images. Each [n]."""
        plan = self._epoch(epoch)
        item_of = np.repeat(np.arange(len(plan.items)), np.diff(plan.item_offsets))
        pack_of, rank = np.empty((2, len(plan.items)), np.int64)
        pack_of[plan.items] = np.repeat(np.arange(len(plan.offsets) - 1), np.diff(plan.offsets))
        rank[plan.items] = np.arange(len(plan.items))
        order = np.argsort(rank[item_of], kind="stable")
        rows = pack_of[item_of] * self.shape.rows + plan.rows
        return rows[order], plan.conversations[order], plan.num_images[item_of][order]

    def fingerprint(self) -> str:
        """A hash of everything that the plan depends on."""
        digest = hashlib.sha256()
        rows, row_length, images = dataclasses.astuple(self.shape)
        # Every word of this text is part of the checkpoints' fingerprints: "BinShape" is what a PackShape once was
        digest.update(
            f"({self.seed!r}, {self._weights!r}, {self._sizes!r}, "
            f"BinShape(rows={rows!r}, row_length={row_length!r}, images={images!r}), "
            f"{self._layout!r}, {self._batch_size!r}, {self._per_record!r}, {self._share!r})".encode()
        )
        plan = self._epoch(0)  # what packing and numpy make of all this, in the versions at hand
        for array in (
            self._records, self._num_images, same_pictures(self._pictures), self._counts, self._conversations,
            self._lengths, self._digests, plan.offsets, plan.items, plan.records, plan.rows,
        ):  # fmt: skip
            digest.update(np.ascontiguousarray(array, np.int64).tobytes())
        return digest.hexdigest()[:16]

    # ---- An epoch ----------------------------------------------------------------------------------------------

    def _epoch(self, epoch: int) -> "_Epoch":
        with self._lock:
            if epoch not in self._epochs:
                if len(self._epochs) > 1:  # the workers of two epochs' border need both
                    del self._epochs[min(self._epochs)]
                self._epochs[epoch] = self._make_epoch(epoch)
            return self._epochs[epoch]

    def _make_epoch(self, epoch: int) -> "_Epoch":
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(np.concatenate([self._draw(source, epoch) for source in range(len(self._sizes))]))
        records, conversations = self._choose(order, rng)
        records, conversations, item_offsets = self._form_items(order, records, conversations)
        num_images = self._num_images[records[item_offsets[:-1]]]
        lengths = self._lengths[conversations]
        if self._layout == "pack":
            packs = pack_items(num_images, item_offsets, lengths, self.shape)
            order = rng.permutation(len(packs.offsets) - 1)
        else:
            packs = _one_each(item_offsets, lengths, self.shape)
            totals = np.add.reduceat(lengths, item_offsets[:-1])
            order = group_by_length(totals, num_images > 0, self._batch_size, rng)
        sizes = np.diff(packs.offsets)[order]
        items = np.concatenate([packs.items[packs.offsets[b] : packs.offsets[b + 1]] for b in order.tolist()])
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        if (
            self._layout == "group"
        ):  # empty packs fill the last batch, so that the next epoch's groups are whole batches
            offsets = np.append(offsets, np.full(-len(sizes) % self._batch_size, offsets[-1]))
        tokens = np.add.reduceat(lengths, item_offsets[:-1], dtype=np.int64)
        return _Epoch(offsets, items, item_offsets, records, conversations, packs.rows, num_images, tokens)

    def _draw(self, source: int, epoch: int) -> np.ndarray:
        """A source's records of an epoch: `weight` times all of them.

        Of an endless row of shuffles, epoch e takes what stands from e·weight·n to (e + 1)·weight·n: with weight 1/2
        two epochs take every record once.
        """
        n, weight = self._sizes[source], self._weights[source]
        start, end = int(epoch * weight * n), int((epoch + 1) * weight * n)
        rounds = range(start // n, -(-end // n)) if n else ()
        shuffles = [np.random.default_rng((self.seed, 1 + source, i)).permutation(n) for i in rounds]
        if not shuffles:
            return np.zeros(0, np.int64)
        first = start // n * n
        return np.concatenate(shuffles)[start - first : end - first] + self._first[source]

    def _choose(self, order: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """For each record of the order all its conversations, or a random few in random order: (place in the order,
        conversation), both [c]."""
        counts = self._counts[order]
        if self._per_record:
            within = np.concatenate([rng.permutation(n)[: self._per_record] for n in counts.tolist()])
            counts = np.minimum(counts, self._per_record)
        else:
            within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        places = np.repeat(np.arange(len(order)), counts)
        return places, self._starts[order[places]] + within

    def _form_items(self, order: np.ndarray, places: np.ndarray, conversations: np.ndarray):
        """(records [c], conversations [c], where items begin [items + 1]): an item shares its images.

        Conversations about the same images stand side by side, where the first of them stood, as far as a pack has
        room for all; a record that comes up a second time in an epoch (its weight is above 1) shares with none.
        """
        keys = -1 - places
        if self._share and self._layout == "pack":
            pictures, again = self._pictures[order], np.ones(len(order), bool)
            again[np.unique(order, return_index=True)[1]] = False
            keys = np.where((pictures == 0) | again, -1 - np.arange(len(order)), pictures)[places]
            _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
            sharing = np.argsort(first[inverse], kind="stable")
            places, conversations, keys = places[sharing], conversations[sharing], keys[sharing]
        starts: list[int] = []
        held: list[int] = []  # lengths of the item's conversations
        previous = None
        for i, (key, length) in enumerate(zip(keys.tolist(), self._lengths[conversations].tolist(), strict=True)):
            if key != previous or first_fit([*held, length], self._empty) is None:
                starts.append(i)
                held, previous = [], key
            held.append(length)
        return order[places], conversations, np.array([*starts, len(places)], np.int64)


def cheapest_rows(
    indices: Sequence[Index], weights: Sequence[float], shape: PackShape, compress_length: int, **options
) -> tuple[int, float]:
    """How many read rows of `shape.row_length` a pack should have, and how many times the tokens of that
    `shape.rows` would need (1 where those are 0, or not more).

    The fewest whose epoch needs no more tokens than others, but for 2 %: read rows with their padding, and
    `compress_length` an image slot. Judged by some of the records, the same in all processes. `options` are `Plan`'s.
    """
    few = max(1, sum(map(len, indices)) // ROWS_JUDGED_BY)
    some: Sequence[Index] = [index.every(few) for index in indices]
    if max(weight * len(index) for weight, index in zip(weights, some, strict=True)) < 1:
        some = indices

    def tokens(rows: int) -> int:
        packs = Plan(some, weights, dataclasses.replace(shape, rows=rows), **options).use().packs
        return packs * (rows * shape.row_length + shape.images * compress_length)

    needed = {rows: tokens(rows) for rows in ROWS}
    chosen = next(rows for rows in ROWS if needed[rows] <= 1.02 * min(needed.values()))
    return chosen, max(1.0, tokens(shape.rows) / needed[chosen]) if shape.rows else 1.0


def _one_each(item_offsets: np.ndarray, lengths: np.ndarray, shape: PackShape) -> Packs:
    """Every item in a pack of its own."""
    items = np.arange(len(item_offsets) - 1)
    empty = [shape.row_length] * shape.rows
    rows = [first_fit(lengths[a:b].tolist(), empty) for a, b in zip(item_offsets, item_offsets[1:], strict=False)]
    return Packs(np.arange(len(items) + 1), items, np.concatenate([np.array(r, np.int64) for r in rows]))


class _Epoch(NamedTuple):
    """offsets [packs + 1] into items; item_offsets [items + 1] into records, conversations and rows [c]. Of each item
    its images and its tokens [items]."""

    offsets: np.ndarray
    items: np.ndarray
    item_offsets: np.ndarray
    records: np.ndarray
    conversations: np.ndarray
    rows: np.ndarray
    num_images: np.ndarray
    tokens: np.ndarray


def group_by_length(lengths: np.ndarray, with_images: np.ndarray, batch_size: int, rng) -> np.ndarray:
    """An order in which every batch is random items of one modality, longest first: LLaVA's `group_by_modality_length`.

    What is left of the two modalities fills the last batches, mixed.
    """
    batches, rest = [], []
    for members in (np.flatnonzero(with_images), np.flatnonzero(~with_images)):
        members = rng.permutation(members)
        whole = len(members) // batch_size * batch_size
        batches += list(members[:whole].reshape(-1, batch_size))
        rest.append(members[whole:])
    batches = [batches[i] for i in rng.permutation(len(batches))]
    left = np.concatenate(rest)
    batches += [left[i : i + batch_size] for i in range(0, len(left), batch_size)]
    return np.concatenate([batch[np.argsort(-lengths[batch], kind="stable")] for batch in batches])
