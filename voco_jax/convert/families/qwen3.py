"""Qwen3: Llama with norms on each head's queries and keys; as `Qwen3ForCausalLM` has it."""

from collections.abc import Collection, Mapping
from pathlib import Path

from voco_jax.convert.config_keys import OFF, Keys, keys_of
from voco_jax.convert.families import llama, qwen2
from voco_jax.convert.rules import COPY, Rule
from voco_jax.models.llama import LlamaConfig

RULES = (
    *llama.RULES,
    *(
        Rule(f"llama.layers.{name}.scale", "llm", f"layers.{{}}.self_attn.{name}.weight", COPY)
        for name in ("q_norm", "k_norm")
    ),
)
SWITCHES: Mapping[str, bool] = {"qk_norm": True}
KEYS = qwen2.KEYS | keys_of("", {"model_type": ("qwen3",), "attention_bias": OFF}, ())


def from_hf(
    fields: dict, file: Path, keys: Keys = KEYS, prefix: str = "", ignored: Collection[str] = ()
) -> LlamaConfig:
    """From `Qwen3Config`'s fields."""
    window = qwen2.sliding_window(fields, file, prefix)
    fields = qwen2.DEFAULTS | {"head_dim": 128} | fields
    return llama.from_hf(fields, file, keys, prefix, ignored, **SWITCHES, sliding_window=window)


def to_hf(config: LlamaConfig) -> dict:
    fields = llama.to_hf(config) | {"model_type": "qwen3"} | qwen2.window_to_hf(config)
    return {key: value for key, value in fields.items() if key != "mlp_bias"}
