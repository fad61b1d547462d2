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
_KINDS = "full_attention", "sliding_attention"
_WINDOWS = "sliding_window max_window_layers layer_types"
_EXPECTED = {"model_type": ("qwen2",), "use_sliding_window": (True, False, None), "use_mrope": (False, None)}
KEYS = llama.KEYS | keys_of(_WINDOWS, _EXPECTED, ())
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

    Qwen's configs name a window that `use_sliding_window` switches on, for the layers from `max_window_layers` on, or
    for those that `layer_types` names.
    """
    size = fields.get("sliding_window", 4096) if fields.get("use_sliding_window") else None
    layers, first, kinds = (fields.get(key) for key in ("num_hidden_layers", "max_window_layers", "layer_types"))
    layers, first = 32 if layers is None else layers, 28 if first is None else first
    if not isinstance(layers, int):
        return 0  # refused with the other numbers
    count = 0 if size is None else None  # of layers with a window; None: neither key says
    if isinstance(kinds, list) and len(kinds) == layers and all(kind in _KINDS for kind in kinds):
        count = kinds.count(_KINDS[1])
    elif kinds is not None:
        count = None
    elif size is not None and isinstance(first, int):
        count = layers - min(max(first, 0), layers)
    if count == 0:
        return 0
    if count == layers and size is not None:
        return size
    key, found = ("max_window_layers", first) if kinds is None else ("layer_types", kinds)
    expected = (
        "in no layer, for use_sliding_window is not set" if size is None else f"in all {layers} layers, or in none"
    )
    raise UserError(f"{file}: {prefix}{key}: expected a sliding window {expected}; found {shortened(found)}")


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
