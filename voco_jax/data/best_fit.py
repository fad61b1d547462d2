"""Which items go together in a pack: a plan that fills read rows and image slots at once.

An item is n images (0, 1, or many for a video) and the conversations about them. It goes whole into one pack, each of
its conversations whole into one of the pack's rows. A pack has two budgets, tokens (in rows) and image slots. Filling
it by tokens alone fails: packs of long items waste slots and packs of short ones waste tokens. Here every pack is to
look like the items still waiting, in tokens for each image, until few items are missing; these are found by best fit.

Packs are filled one after the other from a pool of the next few thousand items, so an item stays near its place in the
shuffled order. The oldest item in the pool opens each pack: none waits long, and long items are spread over the packs.
Only integers are compared, and nothing is drawn at random: the plan is the same on every machine.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
import dataclasses
from typing import NamedTuple

import numpy as np

POOL_SIZE = 2048  # items to choose from: enough to have nearly every length, and few beside an epoch's
LOOK = 8  # items compared at a time


@dataclasses.dataclass(frozen=True)
class PackShape:
    """What a pack holds: `rows` read rows of `row_length` tokens, and `images` image slots."""

    rows: int
    row_length: int
    images: int


class Packs(NamedTuple):
    """Pack b holds `items[offsets[b]:offsets[b + 1]]`. All int64."""

    offsets: np.ndarray  # [packs + 1]
    items: np.ndarray  # [n], each item once, in the order of the packs
    rows: np.ndarray  # [m], the row of every conversation within its pack, in the order of `pack_items`'s `lengths`


def pack_items(
    num_images: np.ndarray, offsets: np.ndarray, lengths: np.ndarray, shape: PackShape, pool_size: int = POOL_SIZE
) -> Packs:
    """Items in shuffled order to packs: every item once, no budget exceeded.

    `num_images` [n] counts each item's images; item i's conversations have `lengths[offsets[i]:offsets[i + 1]]` tokens
    (`offsets` [n + 1], `lengths` [m]; integers). Raises ValueError where an item has no conversation, or does not fit
    into an empty pack: too many images, or first-fit decreasing finds no row for one of its conversations.

    >>> packs = pack_items([1, 1, 0, 1], [0, 1, 2, 3, 4], [6, 7, 4, 3], PackShape(rows=1, row_length=10, images=2))
    >>> [packs.items[start:end].tolist() for start, end in zip(packs.offsets, packs.offsets[1:])]
    [[0, 2], [1, 3]]
    """
    items = _Items(num_images, offsets, lengths, shape)
    pool = _Pool(items, max(pool_size, 1))
    pack_offsets, order, rows = [0], [], [0] * len(items.lengths)
    while pool.waiting:
        for item, item_rows in _Pack(items, pool, shape).fill():
            order.append(item)
            rows[items.offsets[item] : items.offsets[item + 1]] = item_rows
        pack_offsets.append(len(order))
    return Packs(*(np.array(values, np.int64) for values in (pack_offsets, order, rows)))


def first_fit(lengths: Sequence[int], left: Sequence[int]) -> list[int] | None:
    """A row for each length, the longest first into the first row with so many tokens left; None where one has none.

    >>> first_fit([4, 6, 7, 3], [10, 10])
    [1, 1, 0, 0]
    """
    left, rows = list(left), [0] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((row for row, room in enumerate(left) if room >= lengths[i]), None)
        if row is None:
            return None
        left[row] -= lengths[i]
        rows[i] = row
    return rows


class _Items:
    """The arguments of `pack_items` as lists, checked; and how an item's conversations go into rows."""

    def __init__(self, num_images, offsets, lengths, shape: PackShape):
        num_images, offsets, lengths = (np.asarray(x, np.int64) for x in (num_images, offsets, lengths))
        if len(offsets) != len(num_images) + 1 or offsets[0] != 0 or offsets[-1] != len(lengths):
            raise ValueError(f"offsets: expected {len(num_images) + 1} from 0 to {len(lengths)}")
        if (np.diff(offsets) < 1).any() or (lengths < 1).any() or (num_images < 0).any():
            raise ValueError("items: expected a conversation each, at least 1 token in it, and 0 images or more")
        self.images: list[int] = num_images.tolist()
        self.offsets: list[int] = offsets.tolist()
        self.lengths: list[int] = lengths.tolist()
        self.tokens: list[int] = np.diff(np.concatenate([[0], np.cumsum(lengths)])[offsets]).tolist()
        empty = [shape.row_length] * shape.rows
        for item, (images, tokens) in enumerate(zip(self.images, self.tokens, strict=True)):
            if images > shape.images or (tokens > shape.row_length and self.spread(item, empty) is None):
                raise ValueError(f"item {item} of {images} images and {tokens} tokens does not fit into {shape}")

    def spread(self, item: int, left: list[int]) -> list[int] | None:
        """A row for each of the item's conversations, by first-fit decreasing into `left` tokens; None: no room."""
        start, end = self.offsets[item], self.offsets[item + 1]
        if self.tokens[item] > sum(left):
            return None
        return first_fit(self.lengths[start:end], left)


class _Pool:
    """The items waiting, in three orders: by age, in a ring to draw from, and by length for each number of images."""

    def __init__(self, items: _Items, size: int):
        self._items = items
        self._count = len(items.images)
        self._next = self._first = self._cursor = 0
        self._place = [-1] * self._count  # in `waiting`; -1: not in the pool
        self._by_length: dict[int, list[int]] = {n: [] for n in sorted(set(items.images))}  # tokens · count + item
        self.waiting: list[int] = []
        self.tokens = self.images = 0  # of all that wait
        for _ in range(min(size, self._count)):
            self._add()

    def _add(self):
        item = self._next
        self._next += 1
        self._place[item] = len(self.waiting)
        self.waiting.append(item)
        self.tokens += self._items.tokens[item]
        self.images += self._items.images[item]
        insort(self._by_length[self._items.images[item]], self._items.tokens[item] * self._count + item)

    def take(self, item: int):
        """Take an item out; the next one of the epoch comes in."""
        place, last = self._place[item], self.waiting.pop()
        if last != item:
            self.waiting[place], self._place[last] = last, place
        self._place[item] = -1
        self.tokens -= self._items.tokens[item]
        self.images -= self._items.images[item]
        same = self._by_length[self._items.images[item]]
        del same[bisect_left(same, self._items.tokens[item] * self._count + item)]
        if self._next < self._count:
            self._add()

    def oldest(self) -> int:
        while self._place[self._first] < 0:
            self._first += 1
        return self._first

    def draw(self) -> list[int]:
        """The next few items of the ring."""
        start = self._cursor if self._cursor < len(self.waiting) else 0
        self._cursor = start + LOOK
        return self.waiting[start : start + LOOK]

    def longest(self, tokens: int, images: int, but: int = -1) -> Iterator[int]:
        """For each number of images up to `images`, the longest item of at most `tokens` tokens, not being `but`."""
        limit = (tokens + 1) * self._count
        for n, same in self._by_length.items():
            if n > images:
                break
            i = bisect_left(same, limit) - 1
            if i >= 0 and same[i] % self._count == but:
                i -= 1
            if i >= 0:
                yield same[i] % self._count


class _Pack:
    """A pack being filled, row after row: items that keep to the pool's mix, then those that fit best."""

    def __init__(self, items: _Items, pool: _Pool, shape: PackShape):
        self._items, self._pool = items, pool
        self._left = [shape.row_length] * shape.rows  # tokens, of every row
        self._slots = shape.images
        self._row = 0  # now being filled
        self._tokens = self._images = 0  # in the pack
        self._pool_tokens, self._pool_images = pool.tokens, max(pool.images, 1)
        waiting = len(pool.waiting)
        self._mean_tokens = pool.tokens // waiting
        # the budget that runs out first, were all packs like the pool, is the one not to waste
        self._slots_bind = pool.images * shape.rows * shape.row_length > pool.tokens * shape.images
        self._last_tokens = 5 * pool.tokens // (2 * waiting)  # room for about two items: time for the best fit

    def fill(self) -> Iterator[tuple[int, list[int]]]:
        """The items put in, with the rows of their conversations; each is taken out of the pool."""
        chosen = [self._pool.oldest()]
        while chosen:
            for item in chosen:
                yield item, self._put(item)
            chosen = self._choose()

    def _put(self, item: int) -> list[int]:
        items = self._items
        lengths = items.lengths[items.offsets[item] : items.offsets[item + 1]]
        fits = items.tokens[item] <= self._left[self._row]
        rows = [self._row] * len(lengths) if fits else items.spread(item, self._left)
        assert rows is not None  # no item is chosen that has no room
        for length, row in zip(lengths, rows, strict=True):
            self._left[row] -= length
        self._tokens += items.tokens[item]
        self._images += items.images[item]
        self._slots -= items.images[item]
        self._pool.take(item)
        return rows

    def _choose(self) -> list[int]:
        """Up to two items that fit; none: the pack is full."""
        while self._pool.waiting:
            if self._left[self._row] <= self._last_tokens:
                chosen = self._best_fit() or self._typical()
            else:
                chosen = self._typical() or self._best_fit()
            if chosen:
                return chosen
            if self._row == len(self._left) - 1:
                break
            self._row += 1
        return []

    def _off(self, tokens: int, images: int) -> int:
        """How far the pack would be off the pool's mix with so much more in it, in tokens times the pool's images."""
        return abs((self._tokens + tokens) * self._pool_images - (self._images + images) * self._pool_tokens)

    def _typical(self) -> list[int]:
        """Of a few items, the one with which the pack is nearest to the pool's mix."""
        items, room = self._items, self._left[self._row]
        best, best_off = [], None
        for item in self._pool.draw():
            tokens, images = items.tokens[item], items.images[item]
            rest = room - tokens
            if images > self._slots:
                continue
            if rest < 0:  # one conversation waits for a later row; several may share the rows
                if items.offsets[item + 1] - items.offsets[item] == 1 or items.spread(item, self._left) is None:
                    continue
            elif rest < self._mean_tokens and rest * 64 > room:
                continue  # it would leave too little of the row to be of use, and too much to be lost
            off = self._off(tokens, images)
            if best_off is None or off < best_off:
                best, best_off = [item], off
        return best

    def _best_fit(self) -> list[int]:
        """Of a few items, or none, each with each that would then fit best, those that waste least."""
        items, room = self._items, self._left[self._row]
        best, best_score = [], None
        firsts = [(-1, 0, 0)] + [(item, items.tokens[item], items.images[item]) for item in self._pool.draw()]
        for first, first_tokens, first_images in firsts:
            for second in self._pool.longest(room - first_tokens, self._slots - first_images, but=first):
                tokens, images = first_tokens + items.tokens[second], first_images + items.images[second]
                waste = self._slots - images if self._slots_bind else room - tokens
                score = waste, self._off(tokens, images)
                if best_score is None or score < best_score:
                    best, best_score = [second] if first < 0 else [first, second], score
        return best
