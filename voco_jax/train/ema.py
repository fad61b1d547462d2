"""The running mean of the parameters that train, as a part of the optimizer's state: teacher 'ema' reads with it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from voco_jax.train.skip_bad_updates import SkipState


class EmaState(NamedTuple):
    """`ema` is float32, in the form of the trained parameters: it is saved, and spread over the mesh, as they are."""

    ema: Any
    inner: Any


def with_ema(inner: optax.GradientTransformation, decay: float) -> optax.GradientTransformationExtraArgs:
    """`inner`, and a running mean of the parameters that its updates make. It begins with the first ones."""
    inner = optax.with_extra_args_support(inner)

    def init(params):
        # Copied: the step takes over the memory of both
        return EmaState(jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params), inner.init(params))

    def update(gradients, state, params=None, **extra):
        updates, new_inner = inner.update(gradients, state.inner, params, **extra)
        new = optax.apply_updates(params, updates)
        ema = jax.tree.map(lambda mean, p: mean + (1 - decay) * (p.astype(jnp.float32) - mean), state.ema, new)
        return updates, EmaState(ema, new_inner)

    return optax.GradientTransformationExtraArgs(init, update)


def ema_of(opt_state: SkipState) -> Any:
    """The running mean in the state of an optimizer that skips bad steps."""
    return opt_state.inner.ema
