"""The parts of a training that follow from the config alone, made of the few values that each takes."""

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
import optax

from voco_jax.config import typed
from voco_jax.errors import UserError
from voco_jax.models.build import abstract_model
from voco_jax.models.voco import VoCoConfig
from voco_jax.parallel.sharding import param_shardings, with_shardings
from voco_jax.train.distillation_checks import check_keys
from voco_jax.train.ema import with_ema
from voco_jax.train.loss_types import Loss, LossConfig
from voco_jax.train.losses import make_loss
from voco_jax.train.optimizer import build_optimizer, check_decayed
from voco_jax.train.skip_bad_updates import skip_bad_updates
from voco_jax.train.state import AbstractState
from voco_jax.train.step import make_train_step
from voco_jax.train.teachers import TeacherOf, TeacherRun, ema_teacher, no_teacher
from voco_jax.train.trainable import TrainableFilter


def loss_of(config: ConfigDict, teacher: TeacherRun | None = None, images_per_row: int = 1) -> Loss:
    """The loss of a run, with the run that teaches and the images of a row that it reads whole, where the config leaves
    them open."""
    train = typed(config).train
    check_keys(train)
    images_per_row, by_rows = train.distill.images_per_row or images_per_row, teacher is not None and teacher.by_rows
    return make_loss(
        LossConfig(train.loss, train.compress_gradients, train.distill, train.steps, images_per_row, by_rows)
    )


def teacher_maker(config: ConfigDict, state: AbstractState, teacher: TeacherRun | None) -> TeacherOf:
    """What makes the loss's teacher at each step."""
    if teacher is not None:
        return teacher.teacher_of
    return ema_teacher(state.graphdef, state.trainable) if _has_ema(config) else no_teacher


def _has_ema(config: ConfigDict) -> bool:
    return config.train.loss == "distillation" and config.train.distill.teacher == "ema"


def make_optimizer(config: ConfigDict) -> optax.GradientTransformationExtraArgs:
    """The optimizer, which skips or reports bad steps: `update` takes the loss as `value=`.

    UserError for settings that cannot train.
    """
    for key in ("dtype", "param_dtype"):
        if config.model[key] == "float16":
            raise UserError(
                f"config.model.{key}: expected bfloat16 or float32 to train, found float16 (gradients vanish in it); "
                "bfloat16 has as many bytes"
            )
    train = config.train
    optimizer = build_optimizer(typed(config).optim, train.steps, config.seed)
    if _has_ema(config):
        optimizer = with_ema(optimizer, train.distill.ema_decay)
    return skip_bad_updates(optimizer, train.on_bad_step, train.spike_factor)


def trainable_filter(config: ConfigDict, model_config: VoCoConfig) -> TrainableFilter:
    return TrainableFilter.of_model(model_config, tuple(config.train.freeze), config.train.compress_gradients)


def abstract_state(
    config: ConfigDict, model_config: VoCoConfig, optimizer: optax.GradientTransformation, mesh: Mesh
) -> AbstractState:
    """The state of a run, nothing allocated. UserError where the mesh does not divide a parameter."""
    graphdef, params = abstract_model(model_config)
    check_decayed(config.optim.decayed, params)
    trainable = trainable_filter(config, model_config)
    opt_state = jax.eval_shape(optimizer.init, trainable.trained(params))
    shardings = param_shardings(mesh, params), param_shardings(mesh, opt_state)
    params, opt_state = map(with_shardings, (params, opt_state), shardings)
    return AbstractState(graphdef, params, opt_state, shardings, trainable)


def train_step_of(
    config: ConfigDict,
    state: AbstractState,
    optimizer: optax.GradientTransformationExtraArgs,
    teacher: TeacherRun | None = None,
    images_per_row: int = 1,
):
    """The training step of a run, over the ambient mesh; the last two as for `loss_of`."""
    return make_train_step(
        state.graphdef, loss_of(config, teacher, images_per_row), optimizer, state.trainable, state.shardings,
        config.train.accumulate, teacher_maker(config, state, teacher),
    )  # fmt: skip
