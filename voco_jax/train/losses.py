"""What training minimises, chosen by `train.loss`. How to add a loss: docs/training.md."""

from collections.abc import Callable

from voco_jax.errors import UserError
from voco_jax.models.voco import VoCoLlama
from voco_jax.train.distillation import distillation
from voco_jax.train.label_losses import label_cross_entropy
from voco_jax.train.loss_types import Batch, Loss, LossConfig, LossExtra, LossOutput, hidden_states


def make_loss(config: LossConfig) -> Loss:
    """UserError for a name that `LOSSES` does not have."""
    if config.name not in LOSSES:
        raise UserError(f"config.train.loss: expected one of {', '.join(LOSSES)}; found {config.name!r}")
    return LOSSES[config.name](config)


def cross_entropy(config: LossConfig) -> Loss:
    """Next-token cross-entropy (nats), weighted by the batch's `weights` [rows, T]."""

    def loss(model: VoCoLlama, batch: Batch, extra: LossExtra) -> LossOutput:
        hidden = model.llama.norm(hidden_states(model, batch, config.compress_gradients))
        head, vocab_size = model.llama.head(), model.config.llama.vocab_size
        total = label_cross_entropy(hidden, head, batch["targets"], batch["weights"], vocab_size)
        return LossOutput(total, batch["weights"].sum())

    return loss


LOSSES: dict[str, Callable[[LossConfig], Loss]] = {"cross_entropy": cross_entropy, "distillation": distillation}
