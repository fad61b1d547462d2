"""The optimizer from its config: AdamW, or Muon for the matrices with AdamW for the rest."""

import jax
from ml_collections import ConfigDict
import optax

from voco_jax.errors import UserError


def make_schedule(optim: ConfigDict, steps: int) -> optax.Schedule:
    """Linear warm-up to the learning rate, then cosine or linear decay to zero at the last step."""
    if not 0 <= optim.warmup_steps < steps:
        raise UserError(
            f"optim.warmup_steps: expected 0 to {steps - 1} (train.steps is {steps}); found {optim.warmup_steps}"
        )
    decay_steps = steps - optim.warmup_steps
    decays = {
        "cosine": optax.cosine_decay_schedule(optim.learning_rate, decay_steps),
        "linear": optax.linear_schedule(optim.learning_rate, 0.0, decay_steps),
    }
    if optim.schedule not in decays:
        raise UserError(f"optim.schedule: expected one of {', '.join(decays)}; found {optim.schedule!r}")
    warmup = optax.linear_schedule(0.0, optim.learning_rate, optim.warmup_steps)
    return optax.join_schedules([warmup, decays[optim.schedule]], [optim.warmup_steps])


def make_optimizer(optim: ConfigDict, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, the optimizer of that name, decoupled weight decay, learning rate."""
    if optim.name == "adamw":
        descend = optax.adam(1.0, b1=optim.b1, b2=optim.b2)
    elif optim.name == "muon":
        descend = optax.contrib.muon(
            1.0,
            adam_b1=optim.b1,
            adam_b2=optim.b2,
            muon_weight_dimension_numbers=muon_dimension_numbers,
            consistent_rms=0.2,  # updates the size of Adam's, so that one learning rate serves both
        )
    else:
        raise UserError(f"optim.name: expected adamw or muon; found {optim.name!r}")
    return optax.chain(
        optax.clip_by_global_norm(optim.clip_norm),
        descend,
        optax.add_decayed_weights(-optim.weight_decay, decayed),  # here: optax's muon decays norms and biases too
        optax.scale_by_schedule(make_schedule(optim, steps)),
    )


def decayed(params):
    """Which parameters decay: kernels and embeddings, not norms and biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in ("kernel", "embedding"), params)


def muon_dimension_numbers(params):
    """Which axes of each kernel are a matrix's rows and columns; None (AdamW) for embeddings, norms and biases.

    Stacked layers have a leading axis of matrices; heads and head size together are one side of a projection.
    """

    def dimensions(path, param):
        name = jax.tree_util.keystr(path)
        first = int("layers" in name)
        if "kernel" not in name or "lm_head" in name or param.ndim - first < 2:
            return None
        heads_first = path[-2].key in ("o_proj", "out_proj", "out")
        inputs = param.ndim - first - 1 if heads_first else 1
        axes = tuple(range(first, param.ndim))
        return optax.contrib.MuonDimensionNumbers(axes[:inputs], axes[inputs:])

    return jax.tree_util.tree_map_with_path(dimensions, params)
