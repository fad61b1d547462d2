"""The optimizer from its config: AdamW, Muon for the matrices with AdamW for the rest, or Adafactor."""

import dataclasses

import jax
import optax

from voco_jax.config_keys import OptimConfig
from voco_jax.errors import UserError
from voco_jax.optim import make_schedule
from voco_jax.train.rounding import ROUNDINGS, rounded

NAMES = ("adamw", "muon", "adafactor")
FACTORED_FROM = 64  # both sides of a matrix, for Adafactor: a head is a side, the number of layers none


def build_optimizer(optim: OptimConfig, steps: int, seed: int = 0) -> optax.GradientTransformationExtraArgs:
    """Clipping by global norm, the optimizer of that name, decoupled weight decay, learning rate, that of each part.

    `seed` is that of stochastic rounding. UserError for settings that cannot be.
    """
    if optim.rounding not in ROUNDINGS:
        raise UserError(f"config.optim.rounding: expected {' or '.join(ROUNDINGS)}; found {optim.rounding!r}")
    chain = optax.chain(
        optax.clip_by_global_norm(optim.clip_norm),
        _descend(optim),
        # Here, for all alike: optax's muon decays norms and biases too
        optax.add_decayed_weights(-optim.weight_decay, lambda params: decayed(params, optim.decayed)),
        optax.scale_by_schedule(make_schedule(optim, steps)),
        _scale_parts(dataclasses.asdict(optim.lr_multiplier)),
    )
    return rounded(chain, seed) if optim.rounding == "stochastic" else optax.with_extra_args_support(chain)


def _descend(optim: OptimConfig) -> optax.GradientTransformation:
    """From gradients to steps downwards, at learning rate 1."""
    if optim.name == "adamw":
        return optax.adam(1.0, b1=optim.b1, b2=optim.b2)
    if optim.name == "muon":
        return optax.contrib.muon(
            1.0,
            adam_b1=optim.b1,
            adam_b2=optim.b2,
            muon_weight_dimension_numbers=muon_dimension_numbers,
            consistent_rms=0.2,  # updates the size of Adam's, so that one learning rate serves both
        )
    if optim.name == "adafactor":
        # Without a first moment, and second moments as rows and columns (Shazeer and Stern, arXiv:1804.04235); its
        # updates have a root mean square of 1 at most, as Adam's have, so the learning rate means the same.
        return optax.adafactor(
            None, min_dim_size_to_factor=FACTORED_FROM, multiply_by_parameter_scale=False, clipping_threshold=1.0
        )
    raise UserError(f"config.optim.name: expected {', '.join(NAMES[:-1])} or {NAMES[-1]}; found {optim.name!r}")


def _scale_parts(scales: dict[str, float]) -> optax.GradientTransformation:
    """Updates of each top-level part of the parameters times its number."""
    for part, scale in scales.items():
        if not scale > 0:
            hint = "train.freeze keeps a part as it is" if scale == 0 else "it scales a learning rate"
            raise UserError(f"config.optim.lr_multiplier.{part}: expected above 0, found {scale}; {hint}")
    scales = {part: scale for part, scale in scales.items() if scale != 1}

    def scaled(updates, params=None):
        return {
            part: jax.tree.map(lambda u: u * scales[part], tree) if part in scales else tree  # noqa: B023 (used here)
            for part, tree in updates.items()
        }

    return optax.stateless(scaled) if scales else optax.identity()


def decayed(params, names) -> dict:
    """Which parameters decay: those whose last part of the path is in `names` (a lone VoCo row as its embedding)."""

    def decays(path, _):
        name = path[-1].key
        return ("embedding" if name == "voco_row" else name) in names

    return jax.tree_util.tree_map_with_path(decays, params)


def check_decayed(names, params) -> None:
    """UserError for a name that no parameter has."""
    found = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    if unknown := sorted(set(names) - found - {"lora_a", "lora_b"}):
        expected = f"expected some of {', '.join(sorted(found))}"
        raise UserError(f"config.optim.decayed: {expected}; found {unknown[0]!r}")


def muon_dimension_numbers(params):
    """Which axes of each kernel are a matrix's rows and columns; None (AdamW) for all else: embeddings, norms, LoRA.

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
