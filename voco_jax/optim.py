"""The learning rate by step: the optimizer follows it, and a run that goes on must have had the same."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from voco_jax.config_keys import OptimConfig
from voco_jax.errors import UserError


def make_schedule(optim: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up from zero, then the schedule of that name.

    'cosine' and 'linear' go down from there on, 'wsd' (warm-up, stable, decay) in a line over the last `decay_fraction`
    of all steps; at `steps` all have arrived at `min_lr_ratio` times the learning rate. 'constant' stays.
    """
    rate, warmup = optim.learning_rate, optim.warmup_steps
    if not 0 <= warmup < steps:
        raise UserError(
            f"config.optim.warmup_steps: expected 0 to {steps - 1} (train.steps is {steps}); found {warmup}; "
            "set a smaller optim.warmup_steps or more train.steps"
        )
    pieces = [(0, optax.linear_schedule(0.0, rate, warmup))]  # (first step, schedule from there on)
    rest = steps - warmup
    if optim.schedule == "cosine":
        pieces.append((warmup, optax.cosine_decay_schedule(rate, rest, alpha=optim.min_lr_ratio)))
    elif optim.schedule == "linear":
        pieces.append((warmup, optax.linear_schedule(rate, rate * optim.min_lr_ratio, rest)))
    else:
        pieces.append((warmup, optax.constant_schedule(rate)))
    if optim.schedule == "wsd":
        decay = round(optim.decay_fraction * steps)
        if not 1 <= decay <= rest:
            expected = f"expected 1 to {rest} steps of decay (train.steps is {steps}, optim.warmup_steps {warmup})"
            raise UserError(f"config.optim.decay_fraction: {expected}; found {decay}")
        pieces.append((steps - decay, optax.linear_schedule(rate, rate * optim.min_lr_ratio, decay)))
    starts, schedules = zip(*pieces, strict=True)
    return optax.join_schedules(schedules, starts[1:])


def learning_rates(optim: OptimConfig, steps: int) -> np.ndarray:
    """The learning rate of each step, [steps]; all at once, as each would wait in the devices' queue for others."""
    return np.asarray(jax.vmap(make_schedule(optim, steps))(jnp.arange(steps)))
