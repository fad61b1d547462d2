"""One training step: the loss of a batch, its gradients, an update. Which loss it is, the step does not know."""

from collections.abc import Callable
from typing import Any

import einops
from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import optax

from voco_jax.errors import UserError
from voco_jax.parallel.mesh import ROWS, axis_keys, axis_size, constrain
from voco_jax.parallel.sharding import batch_spec
from voco_jax.train.loss_types import Batch, Loss, LossExtra, LossOutput
from voco_jax.train.skip_bad_updates import global_norm, was_bad
from voco_jax.train.teachers import TeacherOf, no_teacher
from voco_jax.train.trainable import TrainableFilter


def make_train_step(
    graphdef: nnx.GraphDef,
    loss: Loss,
    optimizer: optax.GradientTransformationExtraArgs,
    trainable: TrainableFilter = TrainableFilter(),  # noqa: B008 (it is frozen)
    shardings: tuple[Any, Any] | None = None,
    accumulate: int = 1,
    teacher_of: TeacherOf = no_teacher,
) -> Callable:
    """A jitted `(params, opt_state, batch, teacher_params=None) -> (params, opt_state, metrics)`, which takes over the
    first two's memory.

    Args:
      optimizer: as `make_optimizer` makes it; its state is that of the trained parameters alone.
      trainable: which parameters have a gradient.
      shardings: (of params, of opt_state), in which they come and leave, over the ambient mesh.
      accumulate: pieces that the batch is computed in, one after the other.
      teacher_of: makes the loss's teacher.

    Metrics are float32 scalars on every device: `loss` and the loss's own, `grad_norm` (before clipping), and `bad`
    (1.0 for a step that should not count: `skip_bad_updates.py`).
    """

    def step(params, opt_state, batch, teacher_params=None):
        trained, frozen = trainable.split(params)
        extra = LossExtra(opt_state.good_steps, teacher_of(params, opt_state, teacher_params))

        def loss_of(trained, batch):
            return loss(nnx.merge(graphdef, trainable.merge(trained, frozen)), batch, extra)

        output, gradients = loss_and_gradients(loss_of, trained, batch, accumulate)
        metrics = output.means()
        updates, new_state = optimizer.update(gradients, opt_state, trained, value=metrics["loss"])
        metrics |= {"grad_norm": global_norm(gradients), "bad": was_bad(opt_state, new_state)}
        return trainable.merge(optax.apply_updates(trained, updates), frozen), new_state, metrics

    out_shardings = None if shardings is None else (*shardings, NamedSharding(jax.tree.leaves(shardings)[0].mesh, P()))
    return jax.jit(step, donate_argnums=(0, 1), out_shardings=out_shardings)


def loss_and_gradients(
    loss_of: Callable[[dict, Batch], LossOutput], trained: dict, batch: Batch, pieces: int = 1
) -> tuple[LossOutput, dict]:
    """`loss_of(trained, batch)` and the gradients of its mean, computed in so many pieces one after the other.

    Pieces may have different weights: sums, weights and gradients of sums are added up (in float32) and divided last.
    """
    if pieces == 1:

        def mean(trained):
            output = loss_of(trained, batch)
            return output.means()["loss"], output

        gradients, output = jax.grad(mean, has_aux=True)(trained)
        return output, gradients

    def summed(trained, piece):
        output = loss_of(trained, piece)
        return output.sum, output

    def add(sums, piece):
        gradients, output = jax.grad(summed, has_aux=True)(trained, piece)
        return jax.tree.map(lambda total, x: total + x.astype(jnp.float32), sums, (output, gradients)), None

    batches = split_batch(batch, pieces)
    piece = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batches)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (jax.eval_shape(loss_of, trained, piece), trained))
    (output, gradients), _ = jax.lax.scan(add, zeros, batches)
    weight = jnp.maximum(output.weight, 1)
    return output, jax.tree.map(lambda g, p: (g / weight).astype(p.dtype), gradients, trained)


def split_batch(batch: Batch, pieces: int) -> Batch:
    """A batch in so many pieces: arrays [rows, ...] become [pieces, rows/pieces, ...].

    Every device cuts its own packs up, so nothing moves between devices, and rows stay with their pack's images.
    UserError where `pieces` does not divide the packs of a device.
    """
    devices = axis_size(*ROWS)
    packs = len(batch["pixel_values"])
    if packs % (devices * pieces):
        over = (
            f"the {devices} devices along {axis_keys(ROWS)} times train.accumulate"
            if devices > 1
            else "train.accumulate"
        )
        raise UserError(f"config.data.batch_size: expected a multiple of {devices * pieces}, {over}; found {packs}")

    def split(name, array):
        cut = einops.rearrange(array, "(d a b) ... -> a (d b) ...", d=devices, a=pieces)
        return constrain(cut, None, *batch_spec(name))

    return {name: split(name, array) for name, array in batch.items()}
