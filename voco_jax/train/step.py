"""One training step: next-token cross-entropy on the labels, gradients, update."""

import einops
from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import optax

from voco_jax.errors import UserError
from voco_jax.models.voco import Read
from voco_jax.parallel.mesh import ROWS, axis_keys, axis_size, constrain
from voco_jax.parallel.sharding import batch_spec
from voco_jax.train.cross_entropy import label_cross_entropy
from voco_jax.train.skip_bad_updates import global_norm, was_bad
from voco_jax.train.trainable import TrainableFilter


def label_loss(
    graphdef, params, batch: dict, total: jax.Array | None = None, *, compress_gradients: bool = True
) -> jax.Array:
    """Mean cross-entropy (nats) over the labels of a batch (see `data/pipeline.py`), in float32.

    `total` is what the sum is divided by: the weights' sum, if not another (of a batch that this one is a piece of).
    Without `compress_gradients` the images' memories are constants: the loss is the same, and its gradient is that of
    the read stream alone.
    """
    model = nnx.merge(graphdef, params)
    read = Read(batch["tokens"], batch["positions"], batch["segment_ids"], batch["visual"])
    pixels = batch["pixel_values"]
    if compress_gradients or not pixels.shape[1]:
        hidden = model.hidden(read, pixels)
    else:
        # Of constant parameters, so that nothing is kept for a backward pass; and before the read stream, not beside it
        # as else, so that of a layer's images nothing but their slots' keys and values lasts.
        constant = nnx.merge(graphdef, jax.lax.stop_gradient(params))
        hidden = model.read(read, constant.compress(constant.encode_images(pixels)))
    hidden = model.llama.norm(hidden)
    head, vocab_size = model.llama.head(), model.config.llama.vocab_size
    loss = label_cross_entropy(hidden, head, batch["targets"], batch["weights"], vocab_size)
    return loss / (total_weight(batch) if total is None else total)


def total_weight(batch: dict) -> jax.Array:
    """What the sum of a batch's label losses is divided by."""
    return jnp.maximum(batch["weights"].sum(), 1)


def split_batch(batch: dict, pieces: int) -> dict:
    """A batch in so many pieces: arrays [rows, ...] become [pieces, rows/pieces, ...].

    Every device cuts its own packs up, so nothing moves between devices, and rows stay with their pack's images.
    UserError for a number of packs that is no multiple.
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


def loss_and_gradients(loss_of, trained: dict, batch: dict, pieces: int = 1):
    """(loss, gradients) of `loss_of(trained, batch, total)` at a batch, computed in so many pieces one after the other.

    The pieces' losses are shares of the whole batch's and so add up to it, whatever labels each has; gradients are
    summed in float32.
    """
    if pieces == 1:
        return jax.value_and_grad(loss_of)(trained, batch)
    total = total_weight(batch)

    def add(sums, piece):
        found = jax.value_and_grad(loss_of)(trained, piece, total)
        return jax.tree.map(lambda total, x: total + x.astype(jnp.float32), sums, found), None

    zeros = jnp.float32(0), jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), trained)
    (loss, gradients), _ = jax.lax.scan(add, zeros, split_batch(batch, pieces))
    return loss, jax.tree.map(lambda g, p: g.astype(p.dtype), gradients, trained)


def make_train_step(
    graphdef,
    optimizer: optax.GradientTransformationExtraArgs,
    trainable: TrainableFilter = TrainableFilter(),  # noqa: B008 (it is frozen)
    shardings=None,
    accumulate: int = 1,
):
    """A jitted `(params, opt_state, batch) -> (params, opt_state, metrics)`; the first two are given up to it.

    What is frozen has no gradient; `opt_state` is of the rest, and `optimizer` one that `make_optimizer` made.
    `shardings` (of params, of opt_state) are those in which they come and leave, over the ambient mesh; `metrics` are
    float32 scalars on every device: `loss`, `grad_norm` (before clipping) and `bad` (1.0: see
    `train/skip_bad_updates.py`).
    The batch is computed in `accumulate` pieces, one after the other.
    """

    def step(params, opt_state, batch):
        trained, frozen = trainable.split(params)

        def loss_of(trained, batch, total=None):
            params = trainable.merge(trained, frozen)
            return label_loss(graphdef, params, batch, total, compress_gradients=trainable.compress_gradients)

        loss, gradients = loss_and_gradients(loss_of, trained, batch, accumulate)
        updates, new_state = optimizer.update(gradients, opt_state, trained, value=loss)
        metrics = {"loss": loss, "grad_norm": global_norm(gradients), "bad": was_bad(opt_state, new_state)}
        return trainable.merge(optax.apply_updates(trained, updates), frozen), new_state, metrics

    out_shardings = None if shardings is None else (*shardings, NamedSharding(jax.tree.leaves(shardings)[0].mesh, P()))
    return jax.jit(step, donate_argnums=(0, 1), out_shardings=out_shardings)
