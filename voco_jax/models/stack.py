"""A stack of equal layers whose parameters share one leading axis, so that 32 layers compile like one."""

from collections.abc import Callable
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp


def stack_layers(make_layer: Callable[[nnx.Rngs], nnx.Module], num_layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """One module whose parameters are `[num_layers, ...]`, every layer with its own random numbers."""

    @nnx.split_rngs(splits=num_layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs: nnx.Rngs) -> nnx.Module:
        return make_layer(rngs)

    return make(rngs)


def scan_layers(body: Callable, carry: Any, layers: nnx.Module, xs: Any = None, *, unroll: bool = False):
    """Run `carry, y = body(layer, carry, x, index)` over the layers; returns the last carry and the stacked ys.

    `xs` is a pytree with a leading layer axis. Under `unroll` the layers become straight-line code and `index` is a
    Python integer (longer to compile; faster for the few small layers of a CPU model); else `index` is traced.
    """
    graphdef, stacked = nnx.split(layers)
    num_layers = jax.tree.leaves(stacked)[0].shape[0]
    if unroll:
        ys = []
        for index in range(num_layers):
            state, x = jax.tree.map(lambda leaf, i=index: leaf[i], (stacked, xs))
            carry, y = body(nnx.merge(graphdef, state), carry, x, index)
            ys.append(y)
        return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *ys)

    def step(carry, inputs):
        state, x, index = inputs
        return body(nnx.merge(graphdef, state), carry, x, index)

    return jax.lax.scan(step, carry, (stacked, xs, jnp.arange(num_layers)))


def apply_if(condition: bool | jax.Array, function: Callable, x: jax.Array) -> jax.Array:
    """`function(x)` where the condition holds, else x; costs nothing where the condition is known to Python."""
    if isinstance(condition, bool):
        return function(x) if condition else x
    return jax.lax.cond(condition, function, lambda x: x, x)
