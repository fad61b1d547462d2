"""Model families of other projects, a module each: tensors, config keys, and dimensions from a config and back.

docs/converting.md says how to add one.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Protocol

from voco_jax.convert.config_keys import Keys
from voco_jax.convert.families import clip, llama, llava
from voco_jax.convert.rules import Rule
from voco_jax.models.llama import LlamaConfig
from voco_jax.models.vit import ViTConfig


class LanguageModel(Protocol):
    """A module of a language model's family."""

    RULES: tuple[Rule, ...]
    KEYS: Keys

    def from_hf(
        self, fields: dict, file: Path, keys: Keys = ..., prefix: str = ..., ignored: Collection[str] = ...
    ) -> LlamaConfig:
        """Dimensions and switches from the fields of its config.json; `keys` are all that may stand there, `prefix`
        what a message has before their names. UserError for what this package does not compute."""
        ...

    def to_hf(self, config: LlamaConfig) -> dict:
        """The fields of its config.json."""
        ...


class VisionTower(Protocol):
    """A module of a vision tower's family."""

    RULES: tuple[Rule, ...]
    KEYS: Keys

    def from_hf(
        self, fields: dict, file: Path, select_layer: int, select_feature: str, ignored: Collection[str] = ...
    ) -> ViTConfig:
        """As a language model's; `select_layer` and `select_feature` say what LLaVA takes from the tower."""
        ...

    def to_hf(self, config: ViTConfig) -> dict:
        """The fields of its config.json."""
        ...


# By `model_type` of config.json
LANGUAGE_MODELS: dict[str, LanguageModel] = {"llama": llama}
VISION_TOWERS: dict[str, VisionTower] = {"clip_vision_model": clip, "clip": clip}

# Of all families; several may have one rule
RULES = tuple(
    dict.fromkeys(
        [
            *(rule for family in LANGUAGE_MODELS.values() for rule in family.RULES),
            *(rule for family in VISION_TOWERS.values() for rule in family.RULES),
            *llava.RULES,
        ]
    )
)
BY_OURS = {rule.ours: rule for rule in RULES}


def language_family(fields: dict) -> LanguageModel:
    """The family that a config's `model_type` names; Llama's, whose keys then say what is wrong, for an unknown one."""
    return LANGUAGE_MODELS.get(str(fields.get("model_type")), llama)


def vision_family(fields: dict) -> VisionTower:
    """The family that a config's `model_type` names; CLIP's, whose keys then say what is wrong, for an unknown one."""
    return VISION_TOWERS.get(str(fields.get("model_type")), clip)
