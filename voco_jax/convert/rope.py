"""Rotary positions in the configs of Hugging Face (all versions) and llama.cpp."""

from collections.abc import Callable, Collection
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from voco_jax.convert.config_keys import ONE, keys_of, section
from voco_jax.errors import UserError
from voco_jax.models.llama import ROPE_TYPES, LlamaConfig, RopeScaling
from voco_jax.terminal import shortened

# Keys of `rope_scaling` or `rope_parameters`. As in transformers, a type does not read keys that it does not need.
ROPE = keys_of(
    "rope_type type rope_theta factor original_max_position_embeddings low_freq_factor high_freq_factor beta_fast "
    "beta_slow attention_factor mscale mscale_all_dim truncate",
    {"partial_rotary_factor": ONE},
    ("finetuned",),
)
_NUMBERS = {  # that each type needs
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "beta_fast", "beta_slow", "attention_factor", "original_max_position_embeddings"),
}


def rope_of_hf(
    fields: dict, file: Path, positions: int, prefix: str = "", ignored: Collection[str] = ()
) -> tuple[Any, dict | None]:
    """(theta, arguments of `RopeScaling` or None) as transformers reads a config with `positions` positions.

    `rope_parameters` is of transformers 5, `rope_scaling` and `rope_theta` of earlier versions. UserError for an
    unknown type or key, with `prefix` before its name; numbers are not checked yet.
    """
    old, new = (section(fields, key, file) for key in ("rope_scaling", "rope_parameters"))
    if old and new and old != new:
        raise UserError(f"{file}: rope_scaling and rope_parameters: expected one of them, found two that differ")
    scaling, where = old or new, f"{prefix}rope_scaling" if old else f"{prefix}rope_parameters"
    ROPE.check(scaling, file, f"{where}.", ignored)
    theta = scaling.get("rope_theta")
    theta = fields.get("rope_theta") if theta is None else theta
    theta = 10000.0 if theta is None else theta
    given = {key: value for key, value in scaling.items() if value is not None}
    kind = given.get("rope_type", given.get("type"))
    if kind is None and "factor" not in given or kind == "default":
        return theta, None
    if kind not in ROPE_TYPES:
        raise UserError(
            f"{file}: {where}.rope_type: expected default, {', '.join(ROPE_TYPES)}; found {shortened(kind)}"
        )
    if given.get("type", kind) != kind:  # versions of transformers differ in which one they read
        found = f"rope_type {shortened(kind)} and type {shortened(given['type'])}"
        raise UserError(f"{file}: {where}: {found}: expected one of them")
    if kind in ("llama3", "yarn"):
        original = fields.get("original_max_position_embeddings") or given.get("original_max_position_embeddings")
        given["original_max_position_embeddings"] = original or positions
    if kind == "yarn":
        given = _yarn(given, positions, file, where)
    missing = [key for key in _NUMBERS[kind] if key not in given]
    if missing:
        raise UserError(f"{file}: {where}: key {missing[0]!r} is missing")
    arguments = {"rope_type": kind} | {key: given[key] for key in _NUMBERS[kind]}
    return theta, arguments | ({"truncate": bool(given.get("truncate", True))} if kind == "yarn" else {})


def _yarn(given: dict, positions: int, file: Path, where: str) -> dict:
    """With transformers' defaults. `attention_factor`, if it is not given, follows from factor and mscale."""
    numbers = {"beta_fast": 32.0, "beta_slow": 1.0} | {key: value for key, value in given.items() if value}
    try:
        factor = numbers.setdefault("factor", positions / numbers["original_max_position_embeddings"])
        if "attention_factor" not in given:
            scales = [numbers.get(key, 0) for key in ("mscale", "mscale_all_dim")]
            over, under = scales if all(scales) else (1, 0)
            growth = 0.1 * math.log(factor) if factor > 1 else 0.0
            numbers["attention_factor"] = (over * growth + 1) / (under * growth + 1)
    except (TypeError, ValueError, ArithmeticError):
        raise UserError(f"{file}: {where}: expected numbers above 0, found {shortened(given)}") from None
    return numbers | {key: given[key] for key in ("attention_factor", "truncate") if key in given}


def rope_to_hf(scaling: RopeScaling) -> dict:
    """`rope_scaling` for transformers before and after version 5.

    For 'linear' and 'dynamic', transformers 4.37 (the released code's) takes exactly the two keys `type` and `factor`.
    """
    if scaling.rope_type in ("linear", "dynamic"):
        return {"type": scaling.rope_type, "factor": scaling.factor}
    fields = {"rope_type": scaling.rope_type} | {key: getattr(scaling, key) for key in _NUMBERS[scaling.rope_type]}
    return fields if scaling.truncate else fields | {"truncate": False}


def rope_of_gguf(field: Callable, architecture: str, file: Path) -> RopeScaling | None:
    """As in llama.cpp: a factor without a type is linear. `field(key, default)` gives the file's metadata, of a key
    without the architecture's name."""
    kind = field(".rope.scaling.type", "linear")
    factor = float(field(".rope.scaling.factor", 0.0) or field(".rope.scale_linear", 0.0) or 1.0)
    if kind == "none" or kind == "linear" and factor == 1:
        return None
    if kind == "linear":
        return RopeScaling(rope_type="linear", factor=factor)
    if kind != "yarn":
        raise UserError(
            f"{file}: {architecture}.rope.scaling.type: expected none, linear or yarn; found {shortened(kind)}"
        )
    original = int(field(".rope.scaling.original_context_length", field(".context_length")))
    fast, slow = field(".rope.scaling.yarn_beta_fast", 32.0), field(".rope.scaling.yarn_beta_slow", 1.0)
    return RopeScaling(
        rope_type="yarn", factor=factor, original_max_position_embeddings=original,
        beta_fast=float(fast), beta_slow=float(slow),
    )  # fmt: skip


def rope_of_factors(factors: np.ndarray, config: LlamaConfig, file: Path) -> RopeScaling | None:
    """The scaling of `rope_freqs.weight`, by which llama.cpp divides frequencies: only Llama 3's is known.

    Its largest factor must give all others, with low_freq_factor 1, high_freq_factor 4 and 8,192 positions.
    """
    if factors.shape != (config.head_dim // 2,):
        raise UserError(f"{file}: rope_freqs.weight: expected shape [{config.head_dim // 2}], found {factors.shape}")
    if not (np.isfinite(factors) & (factors > 0)).all():
        raise UserError(f"{file}: rope_freqs.weight: expected factors above 0, found others")
    if np.allclose(factors, 1):
        return None
    scaling = RopeScaling(factor=float(factors.max()))
    frequencies = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = np.clip((turns - 1) / 3, 0, 1)
    if config.rope_scaling is not None or not np.allclose(1 / factors, kept + (1 - kept) / scaling.factor, rtol=1e-3):
        raise UserError(f"{file}: rope_freqs.weight: expected the factors of Llama 3's scaling, found others")
    return dataclasses.replace(scaling, factor=round(scaling.factor, 4))
