"""A checksum of every array of a state, the same on any mesh: what comes back from a disk is what went there, or an
error.

A file that was cut off, lost or overwritten may read as zeros, or as numbers like any others; shapes do not tell. The
checksum is the exclusive or of an array's 32-bit words (of 16- and 8-bit numbers: of the numbers), so neither the
order nor the place of its parts matters, and any one change of bits shows.
"""

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np

_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def checksums(tree) -> dict[str, int]:
    """Checksum by dotted path of a tree of arrays; all processes call it together and get the same."""
    leaves = {jax.tree_util.keystr(p, simple=True, separator="."): x for p, x in jax.tree.leaves_with_path(tree)}
    if all(device.platform == "cpu" for x in leaves.values() for device in x.sharding.device_set):
        own = np.array([_of_own_shards(x) for x in leaves.values()], np.uint32)  # XLA is slow at this on a CPU
        values = own if jax.process_count() == 1 else np.bitwise_xor.reduce(multihost_utils.process_allgather(own))
    else:
        values = np.asarray(_on_devices(list(leaves.values())))
    return {name: int(value) for name, value in zip(leaves, values, strict=True)}


def _of_own_shards(array: jax.Array) -> int:
    whole = 0
    for shard in array.addressable_shards:
        if shard.replica_id == 0:  # of copies, one counts
            words = np.ravel(np.asarray(shard.data)).view(_WORDS[array.dtype.itemsize])
            whole ^= int(np.bitwise_xor.reduce(words)) if words.size else 0
    return (whole ^ (whole >> 32)) & 0xFFFFFFFF


def _on_devices(arrays: list) -> jax.Array:
    """As `_of_own_shards`, of all shards; replicated."""

    def one(array):
        words = jax.lax.bitcast_convert_type(array, _WORDS[array.dtype.itemsize])
        return jax.lax.reduce(words, np.zeros((), words.dtype), jax.lax.bitwise_xor, range(words.ndim))

    def stacked(arrays):
        return jnp.stack([one(array).astype(jnp.uint32) for array in arrays])

    mesh = getattr(arrays[0].sharding, "mesh", None)
    replicated = None if mesh is None else jax.sharding.NamedSharding(mesh, P())
    return jax.jit(stacked, out_shardings=replicated)(arrays)
