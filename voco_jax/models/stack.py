"""A stack of equal layers whose parameters share one leading axis, so that 32 layers compile like one."""

from collections.abc import Callable
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from voco_jax.parallel.sharding import gather_layer

# What the backward pass keeps of a layer beside its input, by name; all else it computes again. Each line keeps what
# the one above does and more (numbers: values a token and layer of Llama-7B, in units of D = 4,096).
REMAT = {
    "full": (),  # 0
    "context": ("context",),  # 1: attention's output and log-sum-exp; its kernel runs once
    "qkv": ("context", "query", "key", "value"),  # 4
    "attention": ("context", "query", "key", "value", "attention_out"),  # 5
    "gate": ("context", "query", "key", "value", "attention_out", "gate"),  # 7.7
    "dots": ("context", "query", "key", "value", "attention_out", "gate", "up"),  # 10.4: no matrix product runs twice
}


def stack_layers(make_layer: Callable[[nnx.Rngs], nnx.Module], num_layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """One module whose parameters are `[num_layers, ...]`, every layer with its own random numbers."""

    @nnx.split_rngs(splits=num_layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs: nnx.Rngs) -> nnx.Module:
        return make_layer(rngs)

    return make(rngs)


def scan_layers(
    body: Callable, carry: Any, layers: nnx.Module, xs: Any = None, *, dtype, unroll: bool = False, remat: str = "none"
):
    """Run `carry, y = body(layer, carry, x, index)` over the layers; returns the last carry and the stacked ys.

    `xs` is a pytree with a leading layer axis. Under `unroll` the layers become straight-line code and `index` is a
    Python integer (longer to compile; faster for the few small layers of a CPU model); else `index` is traced.
    `remat` is 'none' (the backward pass finds every value kept) or a line of `REMAT`. Kernels that are spread over
    devices are gathered in `dtype`, a layer at a time.
    """
    graphdef, stacked = nnx.split(layers)
    stacked = nnx.to_pure_dict(stacked)
    num_layers = jax.tree.leaves(stacked)[0].shape[0]

    def step(carry, inputs, index):
        state, x = inputs
        return body(nnx.merge(graphdef, gather_layer(state, dtype)), carry, x, index)

    def remembering(step):
        if remat == "none":
            return step
        policy = jax.checkpoint_policies.save_only_these_names(*REMAT[remat])
        return jax.checkpoint(step, policy=policy, prevent_cse=unroll)

    if not unroll:
        step = remembering(step)
        return jax.lax.scan(lambda c, inputs: step(c, *inputs), carry, ((stacked, xs), jnp.arange(num_layers)))
    ys = []
    for index in range(num_layers):
        inputs = jax.tree.map(lambda leaf, i=index: leaf[i], (stacked, xs))
        carry, y = remembering(functools.partial(step, index=index))(carry, inputs)
        ys.append(y)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *ys)


def apply_below(index: int | jax.Array, count: int, of: int, function: Callable, x: jax.Array) -> jax.Array:
    """`function(x)` in the first `count` of `of` layers, else x; costs nothing where `index` is known to Python."""
    if count == of or isinstance(index, int):
        return function(x) if count == of or index < count else x
    with jax.named_scope(f"taken_{count}_of_{of}"):  # for the estimate of ahead-of-time compiling (hlo_cost.py)
        return jax.lax.cond(index < count, function, lambda x: x, x)
