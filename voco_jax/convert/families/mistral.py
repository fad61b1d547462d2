"""Mistral: Llama, whose tokens see a window of the last positions in v0.1; as `MistralForCausalLM` has it."""

from collections.abc import Collection, Mapping
from pathlib import Path

from voco_jax.convert.config_keys import Keys, keys_of
from voco_jax.convert.families import llama
from voco_jax.models.llama import LlamaConfig

RULES = llama.RULES
SWITCHES: Mapping[str, bool] = llama.SWITCHES
KEYS = llama.KEYS | keys_of("sliding_window", {"model_type": ("mistral",)}, ("max_window_layers",))
DEFAULTS = {
    "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096,
}  # fmt: skip


def from_hf(
    fields: dict, file: Path, keys: Keys = KEYS, prefix: str = "", ignored: Collection[str] = ()
) -> LlamaConfig:
    """From `MistralConfig`'s fields; a `sliding_window` of null is none, and one that is not there is 4,096."""
    fields = DEFAULTS | fields
    return llama.from_hf(fields, file, keys, prefix, ignored, sliding_window=fields["sliding_window"] or 0)


def to_hf(config: LlamaConfig) -> dict:
    """Of a model without a window it says so: `sliding_window` is null."""
    fields = llama.to_hf(config) | {"model_type": "mistral", "sliding_window": config.sliding_window or None}
    return {key: value for key, value in fields.items() if key not in ("attention_bias", "mlp_bias")}
