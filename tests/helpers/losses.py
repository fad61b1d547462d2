"""The trainer's loss of parameters and a batch, for tests that differentiate it."""

from flax import nnx
import jax

from voco_jax.train.loss_types import LossConfig, LossExtra, LossOutput
from voco_jax.train.losses import make_loss

CROSS_ENTROPY = make_loss(LossConfig())


def cross_entropy(graphdef, params, batch: dict, loss=CROSS_ENTROPY) -> LossOutput:
    return loss(nnx.merge(graphdef, params), batch, LossExtra())


def label_loss(graphdef, params, batch: dict, *, compress_gradients: bool = True) -> jax.Array:
    """Mean cross-entropy (nats) over the labels of a batch."""
    loss = make_loss(LossConfig(compress_gradients=compress_gradients))
    return cross_entropy(graphdef, params, batch, loss).means()["loss"]
