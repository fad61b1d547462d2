"""A stack of equal layers whose parameters share one leading axis, so that 32 layers compile like one."""

from collections.abc import Callable
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

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
    body: Callable,
    carry: Any,
    layers: nnx.Module,
    xs: Any = None,
    *,
    dtype: Any,
    start: int = 0,
    count: int | None = None,
    last: Callable | None = None,
    unroll: bool = False,
    remat: str = "none",
) -> tuple[Any, Any]:
    """Run `carry, y = body(layer, carry, x)` over the layers; returns the last carry and the stacked ys.

    `xs` is a pytree with a leading layer axis. Only the first `count` layers are run (None: all), and of them those
    from `start` on; if `last` is given, it is the body of the last of them. `unroll` makes straight-line code: it
    compiles longer, runs faster for the few small layers of a CPU model, and is the only way for layers that
    `part_layers` has parted. `remat` is 'none' (all values are kept for the backward pass) or a line of `REMAT`.
    Kernels that are spread over devices are gathered in `dtype`, one layer at a time.
    """
    graphdef, stacked = nnx.split(layers)
    params = nnx.to_pure_dict(stacked)
    inputs = (params, xs)
    one = jax.tree.leaves(params, is_leaf=_is_parted)[0]
    num_layers, unroll = len(one), unroll or _is_parted(one)
    count = num_layers if count is None else count

    def remembering(body, in_loop=False):
        def step(carry, inputs):
            state, x = inputs
            return body(nnx.merge(graphdef, gather_layer(state, dtype)), carry, x)

        if remat == "none":
            return step
        policy = jax.checkpoint_policies.save_only_these_names(*REMAT[remat])
        return jax.checkpoint(step, policy=policy, prevent_cse=not in_loop)

    def at(index: int):
        return jax.tree.map(lambda leaf: leaf[index], inputs[0], is_leaf=_is_parted), jax.tree.map(
            lambda x: x[index], xs
        )

    # A layer that differs comes after the loop. A conditional inside it would cost more than it saves: the gradients of
    # its weights would be summed over devices separately, and again with those of the layer's other uses.
    looped = count if last is None else count - 1
    ys = []
    if unroll:
        for index in range(start, looped):
            carry, y = remembering(body)(carry, at(index))
            ys.append(jax.tree.map(lambda leaf: leaf[None], y))
    elif looped > start:
        some = inputs if looped - start == num_layers else jax.tree.map(lambda leaf: leaf[start:looped], inputs)
        carry, y = jax.lax.scan(remembering(body, in_loop=True), carry, some)
        ys.append(y)
    if last is not None:
        carry, y = remembering(last)(carry, at(count - 1))
        ys.append(jax.tree.map(lambda leaf: leaf[None], y))
    return carry, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *ys) if ys else None


def part_layers(params: Any) -> Any:
    """Stacked parameters on one CPU, in the other form that `scan_layers` takes: each leaf a tuple of layers' arrays.

    They are views and take no memory. XLA copies a layer's weights out of a stack: decoding, where a step does little
    more than read all weights once, would take three times as long.
    """

    def views(stacked: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(jax.device_put(layer, stacked.sharding, may_alias=True) for layer in np.asarray(stacked))

    return jax.tree.map(views, params)


def _is_parted(leaf: Any) -> bool:
    return isinstance(leaf, tuple)
