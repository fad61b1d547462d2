"""What a training step carries from step to step, as shapes with their places on the mesh, and as arrays."""

from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
import optax

from voco_jax.models.build import abstract_model
from voco_jax.models.voco import VoCoConfig
from voco_jax.parallel.sharding import param_shardings, with_shardings
from voco_jax.train.optimizer import check_decayed
from voco_jax.train.trainable import TrainableFilter, trainable_filter


class AbstractState(NamedTuple):
    """Parameters and optimizer state as shapes with shardings; `shardings` is (of params, of opt_state).

    `opt_state` is of what `trainable` leaves to train.
    """

    graphdef: Any
    params: dict
    opt_state: Any
    shardings: tuple[Any, Any]
    trainable: TrainableFilter


def abstract_state(
    config: ConfigDict, model_config: VoCoConfig, optimizer: optax.GradientTransformation, mesh: Mesh
) -> AbstractState:
    """The state of a run, nothing allocated. UserError where the mesh does not divide a parameter."""
    graphdef, params = abstract_model(model_config)
    check_decayed(config.optim.decayed, params)
    trainable = trainable_filter(config, model_config)
    opt_state = jax.eval_shape(optimizer.init, trainable.trained(params))
    shardings = param_shardings(mesh, params), param_shardings(mesh, opt_state)
    return AbstractState(graphdef, *map(with_shardings, (params, opt_state), shardings), shardings, trainable)


def init_opt_state(optimizer: optax.GradientTransformation, params: dict, state: AbstractState):
    """The optimizer's state before the first step, made in its shards."""
    init = jax.jit(lambda params: optimizer.init(state.trainable.split(params)[0]), out_shardings=state.shardings[1])
    return init(params)
