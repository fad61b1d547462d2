"""What is kept up to a number of bytes: what was used last the longest time ago goes first."""

from collections import OrderedDict
from collections.abc import Container, Hashable, Iterator
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Lru(Generic[K, V]):
    """Values by key, each of a size in bytes; `trim` brings them to the limit. Not for several threads at once.

    >>> lru = Lru(10)
    >>> for key, size in (("a", 4), ("b", 4), ("c", 4), ("larger than all", 11)):
    ...     lru.put(key, key.upper(), size)
    >>> lru.get("a"), lru.trim(), list(lru), lru.bytes
    ('A', ['larger than all', 'b'], ['c', 'a'], 8)
    """

    def __init__(self, limit: int):
        self.limit, self.bytes = limit, 0
        self._kept: OrderedDict[K, tuple[V, int]] = OrderedDict()  # what was used last at the end

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[K]:
        return iter(self._kept)

    def __contains__(self, key: object) -> bool:
        return key in self._kept

    def items(self) -> Iterator[tuple[K, V]]:
        return ((key, value) for key, (value, _) in self._kept.items())

    def peek(self, key: K) -> V | None:
        """Without using it."""
        return self._kept[key][0] if key in self._kept else None

    def get(self, key: K) -> V | None:
        if key not in self._kept:
            return None
        value, size = self._kept[key]
        self._kept.move_to_end(key, last=size <= self.limit)  # for one that has no room the others need not go
        return value

    def put(self, key: K, value: V, size: int) -> None:
        self.pop(key)
        self._kept[key] = value, size
        self.bytes += size
        self.get(key)

    def change(self, key: K, value: V) -> None:
        """Of the same size, without using it."""
        self._kept[key] = value, self._kept[key][1]

    def pop(self, key: K) -> V | None:
        if key not in self._kept:
            return None
        value, size = self._kept.pop(key)
        self.bytes -= size
        return value

    def trim(self, pinned: Container[K] = (), pinned_bytes: int = 0) -> list[K]:
        """Drop what is beyond the limit; the dropped keys. Those that are pinned, of so many bytes, stay and do not
        count."""
        dropped: list[K] = []
        excess = self.bytes - pinned_bytes - self.limit
        for key, (_, size) in self._kept.items():
            if excess <= 0:
                break
            if key not in pinned:
                dropped.append(key)
                excess -= size
        for key in dropped:
            self.pop(key)
        return dropped
