"""A checksum of every array of a state, the same on any mesh: what comes back from a disk is what went there, or an
error.

A file that was cut off, lost or overwritten may read as zeros, or as numbers like any others; shapes do not tell. The
checksum is the exclusive or of an array's 32-bit words (of 16- and 8-bit numbers: of the numbers), so neither the
order nor the place of its parts matters. In small arrays, which may be constant (a norm's ones), it also has what all
words have in common.
"""

import functools

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_REDUCE = (np.bitwise_xor, np.bitwise_or, np.bitwise_and)
_SMALL = 2**20  # numbers: of more, the exclusive or alone


def checksums(tree) -> dict[str, int]:
    """Checksum by dotted path of a tree of arrays; all processes call it together and get the same."""
    leaves = {jax.tree_util.keystr(p, simple=True, separator="."): x for p, x in jax.tree.leaves_with_path(tree)}
    own = np.array(jax.device_get([_of_own_shards(x) for x in leaves.values()]), np.uint32).reshape(-1, 1, 3)
    if jax.process_count() > 1:
        own = np.moveaxis(multihost_utils.process_allgather(own[:, 0]), 0, 1)
    whole = np.stack([operation.reduce(own[..., i], axis=1) for i, operation in enumerate(_REDUCE)], axis=-1)
    return {name: _value(words) for name, words in zip(leaves, whole, strict=True)}


class PartedSum:
    """The checksum of an array that is read or written part by part on the host: layers of a stack, say."""

    def __init__(self, size: int):
        """`size`: numbers of the whole array."""
        self._small, self._parts = size <= _SMALL, {}

    def add(self, key, values: np.ndarray) -> bool:
        """Take in the part of a name; False where there was another one under that name."""
        words = _on_cpu(values, self._small)
        return np.array_equal(self._parts.setdefault(key, words), words)

    def __contains__(self, key) -> bool:
        return key in self._parts

    def value(self) -> int:
        """As `checksums` has it, once all parts were added."""
        return _value(_joined(self._parts.values()))


def _joined(parts) -> np.ndarray:
    """[exclusive or, or, and] of a whole, from those of its parts."""
    whole = np.array([0, 0, 2**32 - 1], np.uint32)  # of nothing
    for part in parts:
        whole = np.array([f(a, b) for f, a, b in zip(_REDUCE, whole, part, strict=True)], np.uint32)
    return whole


def _value(words: np.ndarray) -> int:
    bits, some, all_ = (int(word) for word in words)
    return (bits + 3 * some + 5 * (~all_ % 2**32)) % 2**32


def _of_own_shards(array: jax.Array):
    """[exclusive or, or, and] of the words that this process has; of copies, one counts."""
    shards = [shard.data for shard in array.addressable_shards if shard.replica_id == 0 and shard.data.size]
    small = array.size <= _SMALL
    of_each = [(_on_cpu if next(iter(x.devices())).platform == "cpu" else _on_device)(x, small) for x in shards]
    return _joined(jax.device_get(of_each))


def _on_cpu(array: jax.Array | np.ndarray, small: bool) -> np.ndarray:
    """By numpy: XLA is slow at this on a CPU."""
    words = np.ravel(np.asarray(array)).view(_WORDS[array.dtype.itemsize])
    if words.itemsize == 8:
        words = words.view(np.uint32)
    found = [f.reduce(words) for f in _REDUCE] if small else [np.bitwise_xor.reduce(words), 0, 2**32 - 1]
    return np.array(found, np.uint32)


@functools.partial(jax.jit, static_argnums=1)
def _on_device(array: jax.Array, small: bool) -> jax.Array:
    """The same of one device's shard: XLA has no reduction of bits over devices everywhere."""
    words = jax.lax.bitcast_convert_type(array, _WORDS[array.dtype.itemsize]).astype(jnp.uint32)
    ones = np.uint32(2**32 - 1)
    starts = (np.uint32(0), np.uint32(0), ones)
    functions = (jax.lax.bitwise_xor, jax.lax.bitwise_or, jax.lax.bitwise_and)
    found = [jax.lax.reduce(words, s, f, range(words.ndim)) for s, f in zip(starts, functions, strict=True)]
    return jnp.stack(found if small else [found[0], jnp.uint32(0), jnp.uint32(ones)])
