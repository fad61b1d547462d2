"""Model families of other projects: tensors, config keys and dimensions. docs/converting.md says how to add one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from voco_jax.convert.config_keys import Keys
from voco_jax.convert.families import llama, llava, mistral, qwen2, qwen3
from voco_jax.convert.families.vision import VISION_TOWERS
from voco_jax.convert.rules import Rule
from voco_jax.errors import UserError
from voco_jax.models.llama import LlamaConfig
from voco_jax.terminal import shortened

Config = TypeVar("Config")


class Family(Protocol[Config]):
    """What a family's module has."""

    RULES: tuple[Rule, ...]
    KEYS: Keys
    SWITCHES: Mapping[str, bool]  # of the config, by which the family is told from others

    def from_hf(self, fields: dict, file: Path, *args: Any, **kwargs: Any) -> Config:
        """The config for fields of config.json. UserError for what is not computed here."""
        ...

    def to_hf(self, config: Config) -> dict:
        """Fields of config.json."""
        ...


# By `model_type` of config.json
LANGUAGE_MODELS: dict[str, Family[LlamaConfig]] = {"llama": llama, "mistral": mistral, "qwen2": qwen2, "qwen3": qwen3}

# Of all families; several may have one rule
_RULES = [family.RULES for family in LANGUAGE_MODELS.values()] + [family.RULES for family in VISION_TOWERS.values()]
RULES = tuple(dict.fromkeys(rule for rules in (*_RULES, llava.RULES) for rule in rules))
BY_OURS = {rule.ours: rule for rule in RULES}


def language_family(fields: dict, file: Path, prefix: str = "") -> Family[LlamaConfig]:
    """The family of a config's `model_type`, Llama's where there is none. UserError for an unknown one."""
    kind = fields.get("model_type") or "llama"
    if kind in llama.KEYS.expected["model_type"]:  # of a released LLaVA too
        return llama
    if not isinstance(kind, str) or kind not in LANGUAGE_MODELS:
        raise UserError(f"{file}: {prefix}model_type: expected {', '.join(LANGUAGE_MODELS)}; found {shortened(kind)}")
    return LANGUAGE_MODELS[kind]


def language_to_hf(config: LlamaConfig) -> dict:
    """Fields of config.json, of the family that has these switches. ValueError where none has all of them."""
    if config.qkv_bias and config.qk_norm:
        raise ValueError("llama.qkv_bias and llama.qk_norm: no family has both")
    switched = {"qwen3": config.qk_norm, "qwen2": config.qkv_bias, "mistral": config.sliding_window}
    return LANGUAGE_MODELS[next((name for name, value in switched.items() if value), "llama")].to_hf(config)
