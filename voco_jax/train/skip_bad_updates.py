"""Steps that must not count: a loss or gradient that is not finite, or a loss far above what it has been."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from voco_jax.errors import UserError

ACTIONS = ("stop", "skip")
WARM_UP = 20  # good steps, before which no loss is a spike
MEMORY = 50  # steps that the running mean looks back over, about


class SkipState(NamedTuple):
    """Scalars beside the wrapped optimizer's state."""

    mean_loss: jax.Array  # running mean of good losses, float32
    good_steps: jax.Array  # int32
    inner: Any


def skip_bad_updates(
    inner: optax.GradientTransformation, action: str = "stop", spike_factor: float = 0.0
) -> optax.GradientTransformationExtraArgs:
    """`inner`, told the loss (`value=`), with a `SkipState` that counts good steps; `inner` is told them (`step=`).

    Bad is a loss or gradient norm that is not finite, and with a `spike_factor` above 0 a loss of more than so many
    times the running mean. With action 'skip' a bad step changes nothing: its updates are zeros, and the inner state
    is what it was (the learning rate's step too). With 'stop' it goes through, and whoever asks for the step stops.
    """
    if action not in ACTIONS:
        raise UserError(f"config.train.on_bad_step: expected {' or '.join(ACTIONS)}; found {action!r}")
    inner = optax.with_extra_args_support(inner)

    def init(params):
        return SkipState(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32), inner.init(params))

    def update(gradients, state, params=None, *, value, **extra):
        loss = jnp.asarray(value, jnp.float32)
        bad = ~(jnp.isfinite(loss) & jnp.isfinite(global_norm(gradients)))
        if spike_factor:
            bad |= (state.good_steps >= WARM_UP) & (loss > spike_factor * state.mean_loss)
        step = state.good_steps
        updates, new_inner = inner.update(gradients, state.inner, params, value=value, step=step, **extra)
        if action == "skip":
            # Not a conditional: the choice is part of the loops that update anyway. -0.0 leaves every number as it is
            updates = jax.tree.map(lambda u: jnp.where(bad, jnp.array(-0.0, u.dtype), u), updates)
            new_inner = jax.tree.map(lambda old, new: jnp.where(bad, old, new), state.inner, new_inner)
        weight = jnp.maximum(1 / (state.good_steps + 1), 1 / MEMORY)  # the plain mean, to begin with
        mean = jnp.where(bad, state.mean_loss, state.mean_loss + weight * (loss - state.mean_loss))
        count = state.good_steps + jnp.where(bad, 0, 1)
        return updates, SkipState(mean, count, new_inner)

    return optax.GradientTransformationExtraArgs(init, update)


def was_bad(before: SkipState, after: SkipState) -> jax.Array:
    """1.0 (float32) if the step between the two states was bad."""
    return (after.good_steps == before.good_steps).astype(jnp.float32)


def global_norm(tree) -> jax.Array:
    """Root of the sum of all squares, summed in float32."""
    return jnp.sqrt(sum(jnp.square(leaf.astype(jnp.float32)).sum() for leaf in jax.tree.leaves(tree)))
