"""What a training step carries from step to step, as shapes with their places on the mesh, and as arrays."""

from typing import Any, NamedTuple

import jax
import optax

from voco_jax.train.trainable import TrainableFilter


class AbstractState(NamedTuple):
    """Parameters and optimizer state as shapes with shardings; `shardings` is (of params, of opt_state).

    `opt_state` is of what `trainable` leaves to train.
    """

    graphdef: Any
    params: dict
    opt_state: Any
    shardings: tuple[Any, Any]
    trainable: TrainableFilter


def init_opt_state(optimizer: optax.GradientTransformation, params: dict, state: AbstractState):
    """The optimizer's state before the first step, made in its shards."""
    init = jax.jit(lambda params: optimizer.init(state.trainable.split(params)[0]), out_shardings=state.shardings[1])
    return init(params)
