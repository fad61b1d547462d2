"""Llama: tensors, config keys and dimensions, as Hugging Face's `LlamaForCausalLM` has them."""

from collections.abc import Collection, Mapping
import dataclasses
from pathlib import Path
from typing import Any

from voco_jax.convert.config_keys import ANY, NONE, OFF, ONE, Keys, check_numbers, given, keys_of
from voco_jax.convert.rope import rope_of_hf, rope_to_hf
from voco_jax.convert.rules import COPY, FROM_HEADS, KERNEL, Rule
from voco_jax.errors import UserError
from voco_jax.models.llama import LlamaConfig, RopeScaling

RULES: tuple[Rule, ...] = (
    Rule("llama.embed_tokens.embedding", "llm", "embed_tokens.weight", COPY),
    Rule("llama.norm.scale", "llm", "norm.weight", COPY),
    Rule("llama.lm_head.kernel", "head", "lm_head.weight", KERNEL),
    *(
        Rule(f"llama.layers.{ours}", "llm", f"layers.{{}}.{theirs}.weight", transform)
        for ours, theirs, transform in (
            ("q_proj.kernel", "self_attn.q_proj", KERNEL),
            ("k_proj.kernel", "self_attn.k_proj", KERNEL),
            ("v_proj.kernel", "self_attn.v_proj", KERNEL),
            ("o_proj.kernel", "self_attn.o_proj", FROM_HEADS),
            ("gate_proj.kernel", "mlp.gate_proj", KERNEL),
            ("up_proj.kernel", "mlp.up_proj", KERNEL),
            ("down_proj.kernel", "mlp.down_proj", KERNEL),
            ("input_layernorm.scale", "input_layernorm", COPY),
            ("post_attention_layernorm.scale", "post_attention_layernorm", COPY),
        )
    ),
)

KEYS = ANY | keys_of(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "max_position_embeddings rms_norm_eps rope_theta rope_scaling rope_parameters original_max_position_embeddings "
    "tie_word_embeddings initializer_range max_sequence_length",
    {
        "model_type": ("llama", "llava_llama", "llava"),
        "hidden_act": ("silu",),
        "attention_bias": OFF,
        "mlp_bias": OFF,
        "bias": OFF,
        "qkv_bias": OFF,
        "sliding_window": NONE,
        "use_sliding_window": OFF,
        "partial_rotary_factor": ONE,
        "rope_interleaved": OFF,
        "qk_norm": OFF,
        "use_qk_norm": OFF,
        "attention_multiplier": NONE,  # 1 would be no neutral value: it stands for 1 / sqrt(head_dim)
        "embedding_multiplier": ONE,
        "residual_multiplier": ONE,
        "logits_scaling": ONE,
        "logit_scale": ONE,
        "attn_logit_softcapping": NONE,
        "final_logit_softcapping": NONE,
        "num_experts": (0, 1, None),
        "num_local_experts": (0, 1, None),
    },
    ("pretraining_tp", "max_window_layers|is_llama_config|pad_to_multiple_of|neftune_noise_alpha|bf16|fp16|tf32"),
)


SWITCHES: Mapping[str, bool] = {}  # fields of our config that make it this family
_OF_RELATIVES = {"qkv_bias", "qk_norm", "sliding_window"}  # none of the keys is one


def from_hf(
    fields: dict, file: Path, keys: Keys = KEYS, prefix: str = "", ignored: Collection[str] = (), **switches: Any
) -> LlamaConfig:
    """From `LlamaConfig`'s fields; defaults are transformers'. `keys`: what else stands among them (LLaVA's own).

    `switches`: fields of our config that make it a relative.
    """
    keys.check(fields, file, prefix, ignored)
    fields = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "initializer_range": 0.02} | given(fields)
    theta, scaling = rope_of_hf(fields, file, fields["max_position_embeddings"], prefix, ignored)
    names = {field.name for field in dataclasses.fields(LlamaConfig)}
    names -= {"rope_theta", "rope_scaling", "vocab_multiple"} | _OF_RELATIVES
    defaults = {"intermediate_size": 11008, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
    values = defaults | {"vocab_size": 32000} | {name: fields[name] for name in names if name in fields}
    values.setdefault("num_key_value_heads", values["num_attention_heads"])
    window = {"sliding_window": switches["sliding_window"]} if switches.get("sliding_window") else {}
    check_numbers(file, values | {"rope_theta": theta} | window, "llama")
    if scaling is not None:
        numbers = {key: value for key, value in scaling.items() if key not in ("rope_type", "truncate")}
        check_numbers(file, numbers, f"{prefix}rope_scaling")
        low, high = numbers.get("low_freq_factor", 0), numbers.get("high_freq_factor", 1)
        if low >= high:  # frequencies between the two are interpolated
            raise UserError(f"{file}: {prefix}rope_scaling.high_freq_factor: expected above {low}, found {high}")
    longest = fields.get("max_sequence_length")  # Vicuna 16k's: max_position_embeddings is what it was before
    if scaling is not None and scaling["rope_type"] == "linear" and isinstance(longest, int):
        values["max_position_embeddings"] = max(longest, values["max_position_embeddings"])
    try:
        rope_scaling = None if scaling is None else RopeScaling(**scaling)
        return LlamaConfig(**values, **switches, rope_theta=theta, rope_scaling=rope_scaling)
    except (TypeError, ValueError) as error:
        raise UserError(f"{file}: {error}") from None


def to_hf(config: LlamaConfig) -> dict:
    """Fields that transformers before and after version 5 read."""
    left_out = _OF_RELATIVES | {"vocab_multiple", "rope_scaling"}  # the vocabulary's padding is cut on the way out
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in left_out}
    if config.rope_scaling is not None:
        fields["rope_scaling"] = rope_to_hf(config.rope_scaling)
    return fields | {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "model_type": "llama"}
