"""What a training step carries from step to step, as shapes with their places on the mesh, and as arrays."""

from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
import optax

from voco_jax.models.voco import VoCoConfig
from voco_jax.parallel.sharding import param_shardings, with_shardings
from voco_jax.run import abstract_model
from voco_jax.train.freeze import split_params


class AbstractState(NamedTuple):
    """Parameters and optimizer state as shapes with shardings; `shardings` is (of params, of opt_state)."""

    graphdef: Any
    params: dict
    opt_state: Any
    shardings: tuple[Any, Any]


def abstract_state(
    config: ConfigDict, model_config: VoCoConfig, optimizer: optax.GradientTransformation, mesh: Mesh
) -> AbstractState:
    """The state of a run, nothing allocated. UserError where the mesh does not divide a parameter."""
    graphdef, params = abstract_model(model_config)
    opt_state = jax.eval_shape(optimizer.init, split_params(params, config.train.freeze)[0])
    shardings = param_shardings(mesh, params), param_shardings(mesh, opt_state)
    return AbstractState(graphdef, *map(with_shardings, (params, opt_state), shardings), shardings)


def init_opt_state(config: ConfigDict, optimizer: optax.GradientTransformation, params: dict, shardings):
    """The optimizer's state before the first step, made in its shards."""
    init = jax.jit(lambda params: optimizer.init(split_params(params, config.train.freeze)[0]), out_shardings=shardings)
    return init(params)
