"""What a loss is given and what it returns, and the ways in which losses read a batch."""

import dataclasses
from typing import NamedTuple, Protocol

from flax import nnx
import jax
import jax.numpy as jnp

from voco_jax.config_keys import DistillConfig
from voco_jax.models.read import Read, first_tokens
from voco_jax.models.voco import VoCoConfig, VoCoLlama

# tokens, positions, segment_ids, slot_index, targets and weights [rows, T]; pixel_values [packs, I, size, size, 3];
# where train.elastic_k is set, num_tokens [packs]; for a teacher that reads rows of its own, or stored logits, theirs
Batch = dict[str, jax.Array]


class LossOutput(NamedTuple):
    """A loss as a sum and its weight, float32 scalars over all rows of a batch: `sum / max(weight, 1)` is the loss.

    Sums and weights add up over the pieces of an accumulated batch and over the batches of an evaluation; means would
    not. `weight` depends on the batch alone, never on parameters. `metrics` are logged with the loss: (sum, weight)
    each, by name; one whose weight is 0 is not known.
    """

    sum: jax.Array
    weight: jax.Array
    metrics: dict[str, tuple[jax.Array, jax.Array]] = {}  # noqa: RUF012 (nobody changes it)

    def means(self) -> dict[str, jax.Array]:
        """The metrics, and `loss` itself. NaN for a metric that is not known."""
        known = {name: jnp.where(weight > 0, total / weight, jnp.nan) for name, (total, weight) in self.metrics.items()}
        return {"loss": self.sum / jnp.maximum(self.weight, 1)} | known


class LossExtra(NamedTuple):
    """What a loss may need beside the model and a batch; plain ones need nothing of it.

    step: updates done so far, an int32 scalar. teacher: the model of `train.distill.teacher`, where it is another than
    the one that trains; nothing of it has gradients.
    """

    step: jax.Array | int = 0
    teacher: VoCoLlama | None = None


class Loss(Protocol):
    def __call__(self, model: VoCoLlama, batch: Batch, extra: LossExtra, /) -> LossOutput: ...


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What losses take from the config. `name` is `train.loss`; a new loss adds its own keys here.

    distill: its keys; steps: of the whole training; images_per_row: for which a row of text has room to read them
    whole; by_rows: the teacher reads rows of its own, with another prompt.
    """

    name: str = "cross_entropy"
    compress_gradients: bool = True
    distill: DistillConfig = DistillConfig()  # noqa: RUF009 (it is frozen)
    steps: int = 1
    images_per_row: int = 1
    by_rows: bool = False


def read_of(batch: Batch, config: VoCoConfig) -> Read:
    """The rows that a batch's text reads: of each image as many VoCo tokens as its pack's `num_tokens` says, or all."""
    read = Read(*(batch[name] for name in Read._fields))
    return first_tokens(read, batch["num_tokens"], config.num_voco_tokens) if "num_tokens" in batch else read


def hidden_states(model: VoCoLlama, batch: Batch, compress_gradients: bool = True) -> jax.Array:
    """The read stream's last hidden states [rows, T, D], before the final norm.

    Without `compress_gradients` the images' memories are constants: the values are the same, the gradient is that of
    the read stream alone.
    """
    read, pixels = read_of(batch, model.config), batch["pixel_values"]
    if compress_gradients or not pixels.shape[1]:
        return model.hidden(read, pixels)
    # Constant parameters keep nothing for a backward pass. Compressing first, and not beside the read stream, leaves of
    # each layer's images only the slots' keys and values in memory.
    fixed = constant(model)
    return model.read(read, fixed.compress(fixed.encode_images(pixels)))


def constant(model: VoCoLlama) -> VoCoLlama:
    """The same model, without gradients."""
    graphdef, params = nnx.split(model)
    return nnx.merge(graphdef, jax.lax.stop_gradient(params))
