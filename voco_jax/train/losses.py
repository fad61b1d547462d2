"""What training minimises, chosen by `train.loss`. How to add a loss: docs/training.md."""

from collections.abc import Callable
import dataclasses
from typing import NamedTuple, Protocol

from flax import nnx
import jax
import jax.numpy as jnp

from voco_jax.errors import UserError
from voco_jax.models.voco import Read, VoCoLlama
from voco_jax.train.label_losses import label_cross_entropy

# tokens, positions, segment_ids, slot_index, targets and weights [rows, T]; pixel_values [packs, I, size, size, 3]
Batch = dict[str, jax.Array]


class LossOutput(NamedTuple):
    """A loss as a sum and its weight, float32 scalars over all rows of a batch: `sum / max(weight, 1)` is the loss.

    Sums and weights add up over the pieces of an accumulated batch and over the batches of an evaluation; means would
    not. `weight` depends on the batch alone, never on parameters. `metrics` are logged with the loss: (sum, weight)
    each, by name.
    """

    sum: jax.Array
    weight: jax.Array
    metrics: dict[str, tuple[jax.Array, jax.Array]] = {}  # noqa: RUF012 (nobody changes it)

    def means(self) -> dict[str, jax.Array]:
        """The metrics, and `loss` itself."""
        pairs = {"loss": (self.sum, self.weight)} | self.metrics
        return {name: total / jnp.maximum(weight, 1) for name, (total, weight) in pairs.items()}


class Loss(Protocol):
    def __call__(self, model: VoCoLlama, batch: Batch, /) -> LossOutput: ...


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What losses take from the config. `name` is `train.loss`; a new loss adds its own keys here."""

    name: str = "cross_entropy"
    compress_gradients: bool = True


def make_loss(config: LossConfig) -> Loss:
    """UserError for a name that `LOSSES` does not have."""
    if config.name not in LOSSES:
        raise UserError(f"config.train.loss: expected one of {', '.join(LOSSES)}; found {config.name!r}")
    return LOSSES[config.name](config)


def cross_entropy(config: LossConfig) -> Loss:
    """Next-token cross-entropy (nats), weighted by the batch's `weights` [rows, T]."""

    def loss(model: VoCoLlama, batch: Batch) -> LossOutput:
        hidden = model.llama.norm(hidden_states(model, batch, config.compress_gradients))
        head, vocab_size = model.llama.head(), model.config.llama.vocab_size
        total = label_cross_entropy(hidden, head, batch["targets"], batch["weights"], vocab_size)
        return LossOutput(total, batch["weights"].sum())

    return loss


LOSSES: dict[str, Callable[[LossConfig], Loss]] = {"cross_entropy": cross_entropy}


def hidden_states(model: VoCoLlama, batch: Batch, compress_gradients: bool = True) -> jax.Array:
    """The read stream's last hidden states [rows, T, D], before the final norm.

    Without `compress_gradients` the images' memories are constants: the values are the same, the gradient is that of
    the read stream alone.
    """
    read = Read(*(batch[name] for name in Read._fields))
    pixels = batch["pixel_values"]
    if compress_gradients or not pixels.shape[1]:
        return model.hidden(read, pixels)
    # Constant parameters keep nothing for a backward pass. Compressing first, and not beside the read stream, leaves of
    # each layer's images only the slots' keys and values in memory.
    graphdef, params = nnx.split(model)
    constant = nnx.merge(graphdef, jax.lax.stop_gradient(params))
    return model.read(read, constant.compress(constant.encode_images(pixels)))
