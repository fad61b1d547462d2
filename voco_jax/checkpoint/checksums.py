"""A 64-bit checksum of every array, the same on any mesh. It finds arrays that are not read as they were written.

A truncated, lost or overwritten file, or one with exchanged parts, can still be read as an array of the right shape.
The checksum is over the array's 32-bit words (of 16- and 8-bit numbers: over the numbers). Its two halves:

    upper   1 + the sum of all words, each mixed with its place in the array
    lower   the xor of all words; in small arrays, which may be constant, also their or and and

Neither depends on how the array is split. Earlier versions wrote only the lower half, which does not depend on places.
"""

from collections.abc import Iterator, Sequence
import functools
import math

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_REDUCE = (np.bitwise_xor, np.bitwise_or, np.bitwise_and, np.add)
_OF_NOTHING = (0, 0, 2**32 - 1, 0)
_SMALL = 2**20  # numbers; in larger arrays the lower half is the xor alone
_CHUNK = 2**16  # words mixed at once, which stay in the processor's cache
# Multipliers of Fibonacci hashing and of MurmurHash3's finalizer, by which any bit changes half of the others
_PLACE, _FIRST, _SECOND = (np.uint32(n) for n in (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35))


def checksums(tree) -> dict[str, int]:
    """The checksum of each array of a tree, by dotted path. All processes call it together and get the same."""
    leaves = {jax.tree_util.keystr(p, simple=True, separator="."): x for p, x in jax.tree.leaves_with_path(tree)}
    own = np.array(jax.device_get([_of_own_shards(x) for x in leaves.values()]), np.uint32).reshape(-1, 1, 4)
    if jax.process_count() > 1:
        own = np.moveaxis(multihost_utils.process_allgather(own[:, 0]), 0, 1)
    return {name: _value(_joined(parts)) for name, parts in zip(leaves, own, strict=True)}


def as_earlier(checksum: int) -> int:
    """The checksum of an array as earlier versions wrote it."""
    return checksum % 2**32


def is_same(expected: int, found: int) -> bool:
    """Whether what was read has the checksum that this version, or an earlier one, wrote."""
    return expected == (found if expected >= 2**32 else as_earlier(found))


class PartedSum:
    """The checksum of an array of a shape that comes as a whole, or in parts along its first axis, in host memory."""

    def __init__(self, shape: Sequence[int]):
        self._shape = tuple(shape)
        self._parts: dict[int | None, np.ndarray] = {}

    def add(self, key: int | None, values: np.ndarray) -> bool:
        """Add the whole array (key None), or part `key` of the first axis; False if it differs from the one before."""
        is_part = values.shape != self._shape
        place = (key or 0) if is_part else 0
        values = values[None] if is_part else values
        words = _on_cpu(values, self._shape, (place, *(0 for _ in self._shape[1:])))
        return np.array_equal(self._parts.setdefault(key, words), words)

    def __contains__(self, key: int | None) -> bool:
        return key in self._parts

    def value(self) -> int:
        """The checksum, once all parts were added."""
        return _value(_joined(self._parts.values()))


def _joined(parts) -> np.ndarray:
    """[xor, or, and, sum] of a whole array, from those of its parts."""
    whole = np.array(_OF_NOTHING, np.uint32)
    for part in parts:
        whole = np.array([f(a, b) for f, a, b in zip(_REDUCE, whole, part, strict=True)], np.uint32)
    return whole


def _value(words: np.ndarray) -> int:
    bits, some, all_, placed = (int(word) for word in words)
    return (1 + placed) * 2**32 + (bits + 3 * some + 5 * (~all_ % 2**32)) % 2**32


def _of_own_shards(array: jax.Array):
    """[xor, or, and, sum] of the words that this process holds; of several copies one counts."""
    of_each = []
    for shard in array.addressable_shards:
        if shard.replica_id == 0 and shard.data.size:
            starts = tuple(part.start or 0 for part in shard.index)
            on_cpu = next(iter(shard.data.devices())).platform == "cpu"
            of_each.append((_on_cpu if on_cpu else _on_device)(shard.data, array.shape, starts))
    return _joined(jax.device_get(of_each))


def _strides(shape: Sequence[int]) -> list[int]:
    """By how much a step along each axis raises a number's place in the flattened array."""
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


def _on_cpu(part: jax.Array | np.ndarray, shape: Sequence[int], starts: Sequence[int]) -> np.ndarray:
    """The same for a part of an array of a shape, which begins at `starts`. In numpy: on a CPU, XLA is slow at it."""
    if not part.size:
        return np.array(_OF_NOTHING, np.uint32)
    numbers = np.ascontiguousarray(np.asarray(part)).reshape(part.shape or (1,))
    words = numbers.reshape(-1).view(_WORDS[numbers.dtype.itemsize])
    as_words = words.view(np.uint32) if words.itemsize == 8 else words
    placed = 0
    for chunk, place in _placed(words.reshape(-1, numbers.shape[-1]), part.shape, shape, starts):
        halves = (chunk, chunk >> np.uint64(32)) if words.itemsize == 8 else (chunk,)
        for half in halves:
            placed += int(_mixed(half.astype(np.uint32), place).sum(dtype=np.uint32))
    found = [f.reduce(as_words) for f in _REDUCE[:3]] if _is_small(shape) else [np.bitwise_xor.reduce(as_words), 0, -1]
    return np.array([int(word) % 2**32 for word in (*found, placed)], np.uint32)


def _placed(rows: np.ndarray, part: Sequence[int], shape: Sequence[int], starts: Sequence[int]) -> Iterator:
    """(words, their places in the whole array modulo 2³²) of a part's rows [rows, last axis], chunk by chunk."""
    *outer, inner = _strides(shape) or [1]
    base: np.ndarray = np.zeros((), np.uint32)
    for length, start, stride in zip(part[:-1], starts[:-1], outer, strict=True):
        along = (np.arange(start, start + length, dtype=np.uint64) * np.uint64(stride)).astype(np.uint32)
        base = base[..., None] + along
    base, width = base.reshape(-1), min(_CHUNK, rows.shape[1])
    first, count = (starts or (0,))[-1], max(1, _CHUNK // width)
    for begin in range(0, rows.shape[1], width):
        end = min(begin + width, rows.shape[1])
        within = (np.arange(first + begin, first + end, dtype=np.uint64) * np.uint64(inner)).astype(np.uint32)
        for row in range(0, len(rows), count):
            yield rows[row : row + count, begin:end], base[row : row + count, None] + within


def _mixed(words, places):
    """32-bit words, each mixed with its place; for arrays of numpy and of jax."""
    mixed = words ^ places * _PLACE
    mixed = (mixed ^ mixed >> 16) * _FIRST
    mixed = (mixed ^ mixed >> 13) * _SECOND
    return mixed ^ mixed >> 16


def _is_small(shape: Sequence[int]) -> bool:
    return math.prod(shape) <= _SMALL


def _on_device(part: jax.Array, shape: Sequence[int], starts: Sequence[int]) -> jax.Array:
    """The same for one device's shard."""
    strides = [np.uint32(stride % 2**32) for stride in _strides(shape)]
    return _reduced(part, _is_small(shape), strides, [np.uint32(start) for start in starts])


@functools.partial(jax.jit, static_argnums=1)
def _reduced(part: jax.Array, small: bool, strides: list, starts: list) -> jax.Array:
    words = jax.lax.bitcast_convert_type(part, _WORDS[part.dtype.itemsize]).astype(jnp.uint32)
    places = jnp.zeros(part.shape, jnp.uint32)
    for axis, (stride, start) in enumerate(zip(strides, starts, strict=True)):
        places += (jax.lax.broadcasted_iota(jnp.uint32, part.shape, axis) + start) * stride
    starts = [np.uint32(word) for word in _OF_NOTHING]
    functions = (jax.lax.bitwise_xor, jax.lax.bitwise_or, jax.lax.bitwise_and, jax.lax.add)
    values = (words, words, words, _mixed(words, places))
    found = [jax.lax.reduce(x, s, f, range(x.ndim)) for x, s, f in zip(values, starts, functions, strict=True)]
    return jnp.stack(found if small else [found[0], starts[1], starts[2], found[3]])
