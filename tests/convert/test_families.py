"""Llama's relatives: config.json files as their authors wrote them, the presets of their dimensions, and refusals."""

import dataclasses
from pathlib import Path

import pytest

from voco_jax.convert.families import LANGUAGE_MODELS, language_family, language_to_hf
from voco_jax.errors import UserError
from voco_jax.models import presets
from voco_jax.models.llama import LlamaConfig
from voco_jax.models.voco import VoCoConfig

FILE = Path("config.json")
LLAMA_3_2_1B = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.45.0",
    "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
QWEN2_5_0_5B = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
    "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
    "max_position_embeddings": 32768, "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 14,
    "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 12288, "max_position_embeddings": 40960, "max_window_layers": 36, "model_type": "qwen3",
    "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
MISTRAL_V0_1 = {
    "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
    "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
MISTRAL_V0_3 = MISTRAL_V0_1 | {"rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32768}
MISTRAL_7B = presets.LLAMA["mistral-7b"]
# A text_config says what differs from its class's defaults, and no more
OF_DEFAULTS = {
    "mistral": LlamaConfig(
        intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=131072, rms_norm_eps=1e-6,
        sliding_window=4096,
    ),
    "qwen2": LlamaConfig(
        vocab_size=151936, intermediate_size=22016, max_position_embeddings=32768, rms_norm_eps=1e-6, qkv_bias=True
    ),
    "qwen3": LlamaConfig(
        vocab_size=151936, intermediate_size=22016, max_position_embeddings=32768, rms_norm_eps=1e-6, qk_norm=True,
        head_dim=128,
    ),
}  # fmt: skip


def read(fields: dict) -> LlamaConfig:
    return language_family(fields, FILE).from_hf(fields, FILE)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (LLAMA_3_2_1B, presets.LLAMA["llama-3.2-1b"]),
        (QWEN2_5_0_5B, presets.LLAMA["qwen2.5-0.5b"]),
        (QWEN3_8B, presets.LLAMA["qwen3-8b"]),
        (MISTRAL_V0_3, MISTRAL_7B),
        (MISTRAL_V0_1, dataclasses.replace(MISTRAL_7B, vocab_size=32000, rope_theta=10000.0, sliding_window=4096)),
        *(({"model_type": name}, config) for name, config in OF_DEFAULTS.items()),
    ],
)
def test_configs_as_their_authors_wrote_them(fields, expected):
    assert read(fields) == expected
    again = language_to_hf(expected)
    assert read(again) == expected
    if fields is not MISTRAL_V0_3:  # which is a Llama
        assert again["model_type"] == fields["model_type"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (QWEN2_5_0_5B | {"use_sliding_window": True}, "max_window_layers: expected a sliding window in all 24"),
        (QWEN3_8B | {"use_sliding_window": True, "sliding_window": "4k", "max_window_layers": 0}, "llama.sliding_w"),
        (QWEN3_8B | {"use_sliding_window": "no"}, "use_sliding_window: expected True or False or None, found 'no'"),
        (
            QWEN3_8B | {"layer_types": ["sliding_attention"] * 36},
            "layer_types: expected a .* use_sliding_window is not",
        ),
        (
            QWEN3_8B | {"layer_types": ["full_attention"] * 35},
            "layer_types: expected a sliding window in no layer, for",
        ),
        (QWEN3_8B | {"attention_bias": True}, "attention_bias: expected False or None, found True"),
        (QWEN2_5_0_5B | {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24]}}, "rope_scaling.mrope_section"),
        (QWEN2_5_0_5B | {"use_mrope": True}, "use_mrope: expected False or None, found True"),
        (QWEN3_8B | {"num_experts": 128}, "num_experts: expected 0 or 1 or None, found 128"),
        (
            QWEN3_8B | {"model_type": "qwen3_moe", "num_experts": 128},
            "model_type: expected llama, mistral, qwen2, qwen3; found 'qwen3_m",
        ),
        (MISTRAL_V0_1 | {"sliding_window": -1}, "llama.sliding_window: expected a whole number above 0, found -1"),
    ],
)
def test_what_is_not_computed_is_refused(fields, message):
    with pytest.raises(UserError, match=rf"^config.json: {message}") as error:
        read(fields)
    assert "\n" not in str(error.value)


def test_windows_of_some_layers():
    """Of Qwen's two ways to say which layers have one."""
    window = {"use_sliding_window": True, "sliding_window": 512}
    for fields, expected in (
        ({"max_window_layers": 0}, 512),
        ({"max_window_layers": 36}, 0),
        ({"layer_types": ["sliding_attention"] * 36}, 512),
        ({"layer_types": ["full_attention"] * 36}, 0),
        ({"layer_types": ["full_attention"] * 36, "use_sliding_window": False}, 0),
    ):
        assert read(QWEN3_8B | window | fields).sliding_window == expected
    for kinds in (["sliding_attention", "full_attention"] * 18, ["sliding_attention"], ["linear_attention"] * 36, "x"):
        with pytest.raises(
            UserError, match="layer_types: expected a sliding window in all 36 layers, or in none; found"
        ):
            read(QWEN3_8B | window | {"layer_types": kinds})


def test_no_family_has_all_switches():
    with pytest.raises(ValueError, match="no family has both"):
        language_to_hf(LlamaConfig(qkv_bias=True, qk_norm=True))
    assert LANGUAGE_MODELS.keys() == {"llama", "mistral", "qwen2", "qwen3"}


def test_windows_that_a_kernel_has_not():
    """Refused at set-up, but where no row is longer than the window."""
    config = VoCoConfig(llama=LlamaConfig(vocab_size=32001, sliding_window=700), attention="splash")
    config.check_kernels(700, training=True)
    with pytest.raises(ValueError, match=r"'splash' has no sliding windows, found one of 700 tokens; 'xla' has them"):
        config.check_kernels(701, training=True)
    config = dataclasses.replace(config, attention="xla")
    config.check_kernels(701, training=True)
    with pytest.raises(ValueError, match=r"llama.sliding_window: expected at least 768 where images are read whole"):
        config.check_kernels(700, training=True, whole_images=1)
