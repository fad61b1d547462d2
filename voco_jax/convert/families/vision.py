"""Which vision tower is of which family: by the `model_type` of its config, by its name, and by its switches."""

from collections.abc import Collection
import dataclasses
from pathlib import Path
from typing import Any, Protocol

from voco_jax.convert.config_keys import Keys
from voco_jax.convert.families import clip, siglip
from voco_jax.convert.rules import Rule
from voco_jax.errors import UserError
from voco_jax.models import presets
from voco_jax.models.vit import ViTConfig
from voco_jax.terminal import shortened


class VisionFamily(Protocol):
    """What a vision family's module has."""

    RULES: tuple[Rule, ...]
    KEYS: Keys
    NOT_READ: str  # a pattern of tensors of a whole model that are not the tower's
    POOLING: str  # a pattern of the tower's own tensors that no feature depends on; '' for none
    SWITCHES: dict[str, bool]  # of `ViTConfig`

    def from_hf(self, fields: dict, file: Path, ignored: Collection[str] = (), **selected: Any) -> ViTConfig:
        """The config for fields of config.json; `selected`: ViTConfig's choices of features. UserError for what is not
        computed here."""
        ...

    def to_hf(self, config: ViTConfig) -> dict:
        """Fields of config.json."""
        ...


# By `model_type` of config.json. The last two are of NaFlex towers, which SigLIP's family refuses by name.
VISION_TOWERS: dict[str, VisionFamily] = {
    "clip_vision_model": clip, "clip": clip, "siglip_vision_model": siglip, "siglip": siglip,
    "siglip2_vision_model": siglip, "siglip2": siglip,
}  # fmt: skip

# What LLaVA's configs call a vision tower that is not part of the checkpoint
HUB_TOWERS = {
    "openai/clip-vit-large-patch14-336": "clip-vit-l-14-336",
    "openai/clip-vit-large-patch14": "clip-vit-l-14",
    "openai/clip-vit-base-patch16": "clip-vit-b-16",
    "google/siglip-base-patch16-224": "siglip-base-16-224",
    "google/siglip-so400m-patch14-384": "siglip-so400m-14-384",
    "google/siglip2-base-patch16-256": "siglip2-base-16-256",
    "google/siglip2-so400m-patch14-384": "siglip2-so400m-14-384",
}


def vision_family(fields: dict, file: Path, prefix: str = "") -> VisionFamily:
    """The family of a config's `model_type`, CLIP's where there is none. UserError for an unknown one."""
    kind = fields.get("model_type") or "clip_vision_model"
    if not isinstance(kind, str) or kind not in VISION_TOWERS:
        known = " or ".join(repr(kind) for kind in VISION_TOWERS if not kind.startswith("siglip2"))
        raise UserError(f"{file}: {prefix}model_type: expected {known}, found {shortened(kind)}")
    return VISION_TOWERS[kind]


def family_of_tower(config: ViTConfig) -> VisionFamily | None:
    """The family that has a tower's switches; None: no other project has such a tower."""
    families: tuple[VisionFamily, ...] = (clip, siglip)
    return next((f for f in families if all(getattr(config, k) == value for k, value in f.SWITCHES.items())), None)


def from_name(name: str, file: Path, **selected: Any) -> ViTConfig:
    """The config of a tower that a LLaVA config names; `selected`: ViTConfig's choices of features."""
    if name not in HUB_TOWERS:
        raise UserError(f"{file}: mm_vision_tower {shortened(name)} is not known; give it with --vision-tower DIR")
    try:
        return dataclasses.replace(presets.VIT[HUB_TOWERS[name]], **selected)
    except ValueError as error:
        raise UserError(f"{file}: {error}") from None
