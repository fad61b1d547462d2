"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values; as `Qwen2ForCausalLM` has it."""

from collections.abc import Collection, Mapping
from pathlib import Path

from voco_jax.convert.config_keys import Keys, keys_of
from voco_jax.convert.families import llama
from voco_jax.convert.rules import HEAD_BIAS, Rule
from voco_jax.errors import UserError
from voco_jax.models.llama import LlamaConfig
from voco_jax.terminal import shortened

RULES = (
    *llama.RULES,
    *(
        Rule(f"llama.layers.{name}.bias", "llm", f"layers.{{}}.self_attn.{name}.bias", HEAD_BIAS)
        for name in ("q_proj", "k_proj", "v_proj")
    ),
)
SWITCHES: Mapping[str, bool] = {"qkv_bias": True}
_WINDOWS = "use_sliding_window sliding_window max_window_layers layer_types"
KEYS = llama.KEYS | keys_of(_WINDOWS, {"model_type": ("qwen2",), "use_mrope": (False, None)}, ())
DEFAULTS = {
    "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768,
}  # fmt: skip


def from_hf(
    fields: dict, file: Path, keys: Keys = KEYS, prefix: str = "", ignored: Collection[str] = ()
) -> LlamaConfig:
    """From `Qwen2Config`'s fields."""
    window = sliding_window(fields, file, prefix)
    return llama.from_hf(DEFAULTS | fields, file, keys, prefix, ignored, **SWITCHES, sliding_window=window)


def sliding_window(fields: dict, file: Path, prefix: str) -> int:
    """The window of all layers, or 0. UserError where only some layers have one.

    Qwen's configs name a window that `use_sliding_window` switches on, for the layers from `max_window_layers` on.
    """
    size = fields.get("sliding_window", 4096)
    if not fields.get("use_sliding_window") or size is None:
        return 0
    layers, first = fields.get("num_hidden_layers", 32), fields.get("max_window_layers", 28)
    kinds = fields.get("layer_types")
    if not isinstance(kinds, list) and isinstance(layers, int) and isinstance(first, int):
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(min(layers, 2**12))]
    if kinds and all(kind == "full_attention" for kind in kinds):
        return 0
    if not kinds or any(kind != "sliding_attention" for kind in kinds):
        found = f"{shortened(first)} of {shortened(layers)} layers without one"
        raise UserError(f"{file}: {prefix}max_window_layers: expected a sliding window in all layers, or none; {found}")
    return size


def to_hf(config: LlamaConfig) -> dict:
    fields = llama.to_hf(config) | {"model_type": "qwen2"} | window_to_hf(config)
    return {key: value for key, value in fields.items() if key not in ("attention_bias", "mlp_bias")}


def window_to_hf(config: LlamaConfig) -> dict:
    size = config.sliding_window
    return {
        "use_sliding_window": bool(size),
        "sliding_window": size or None,
        "max_window_layers": 0 if size else config.num_hidden_layers,
    }
