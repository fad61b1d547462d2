"""bfloat16 parameters and moments that move as float32 ones would, on average: stochastic rounding.

Between two neighbours in bfloat16 lie 2^16 numbers of float32. An update that is less than half of that gap is lost by
rounding to the nearest: at a learning rate of 2e-5 that is every parameter above 0.01, and a second moment that
changes by less than 0.2 % a step. Here a number becomes the neighbour above with the probability that says how near it
is (Gupta et al., Deep Learning with Limited Numerical Precision, arXiv:1502.02551), so that its mean is exact.
"""

import math
import zlib

import jax
import jax.numpy as jnp
import optax

ROUNDINGS = ("stochastic", "nearest")
_STAYS = 2**9  # elements this many times as large as an update are at least half a gap away from the next number


def rounded(inner: optax.GradientTransformation, seed: int) -> optax.GradientTransformationExtraArgs:
    """`inner`, computed in float32, with what is stored in bfloat16 (parameters, state) rounded stochastically.

    Updates are such that `optax.apply_updates` makes the rounded parameters of them. What is random follows from the
    seed, the number of the step (`step=`, an integer scalar), the path of an array and the place in it: from nothing
    that a resumed run or another mesh would change. Nothing changes where all is float32.
    """
    inner = optax.with_extra_args_support(inner)

    def update(gradients, state, params=None, *, step, **extra):
        wide = _widened(params)
        updates, new_state = inner.update(_widened(gradients), _widened(state), wide, **extra)

        def random_bits(path, x):
            return _bits(x.shape, f"{seed} {jax.tree_util.keystr(path)}", step)

        def round_update(path, p, wide, u):
            if p.dtype != jnp.bfloat16:
                return u
            # Exact: a difference of two bfloat16 numbers is at most a rounding of float32 away from itself
            return stochastic_round(wide + u, random_bits(path, p)).astype(jnp.float32) - wide

        def round_state(path, before, x):
            rounds = getattr(before, "dtype", None) == jnp.bfloat16
            return stochastic_round(x, random_bits(("state", *path), x)) if rounds else x

        updates = jax.tree_util.tree_map_with_path(round_update, params, wide, updates)
        return updates, jax.tree_util.tree_map_with_path(round_state, state, new_state)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def stochastic_round(x: jax.Array, bits: jax.Array) -> jax.Array:
    """float32 to bfloat16, up or down by random `bits` (uint32, of which the upper half is used): the mean is `x`.

    What bfloat16 can hold stays as it is, infinities and NaN too.
    """
    raised = jax.lax.bitcast_convert_type(x, jnp.uint32) + (bits >> 16)  # what is below bfloat16 carries over, or not
    cut = jax.lax.bitcast_convert_type(raised & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), cut, x).astype(jnp.bfloat16)


def _bits(shape: tuple[int, ...], stream: str, step: jax.Array) -> jax.Array:
    """Random uint32s by place, stream and step. Arithmetic on the place alone: it becomes part of the loop that updates
    a parameter, on any shard of it, where `jax.random` would write arrays of its own."""
    place = jnp.uint32(0)
    for axis in range(len(shape)):
        stride = jnp.uint32(math.prod(shape[axis + 1 :]) % 2**32)
        place += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
    return _mixed(place ^ _mixed(jnp.uint32(zlib.crc32(stream.encode())) ^ _mixed(jnp.asarray(step, jnp.uint32))))


def _mixed(x: jax.Array) -> jax.Array:
    """A bijection of uint32 in which every bit depends on all: `triple32` of C. Wellons' hash-prospector. (Two
    multiplications, as in `lowbias32`, leave a bias in the upper 8 bits that a chi-square test of 2^20 sees.)"""
    for shift, factor in (17, 0xED5AD4BB), (11, 0xAC4C1B51), (15, 0x31848BAB):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 14)


def _widened(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, tree)


def lost_updates(rounding: str, learning_rate: float, trained) -> str:
    """A warning for bfloat16 parameters that are rounded to the nearest; '' where little is lost."""
    stays = _STAYS * learning_rate
    if rounding != "nearest" or stays >= 1 or all(x.dtype != jnp.bfloat16 for x in jax.tree.leaves(trained)):
        return ""  # a norm's weights begin as 1, and little is larger
    return (
        f"warning: rounded to the nearest, bfloat16 parameters above {stays:.2g} do not move at optim.learning_rate = "
        f"{learning_rate:g}, and others too little; a run with optim.rounding = 'stochastic' loses nothing"
    )
