"""Keys of GGUF's metadata: the types of their values, and the values that the model computes.

Most of them begin with the architecture's name: `qwen2.block_count`. The tables here leave it out: `.block_count`.
"""

from collections.abc import Callable, Mapping
import functools
import math
import re

from voco_jax.convert.config_keys import Keys

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # Mistral's files say "llama"


def _is_list_of(kind: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(type(item) is kind for item in value)


_WHOLE = "a whole number", lambda value: type(value) is int and value >= 0
_NUMBER = "a number", lambda value: type(value) is float and math.isfinite(value)
_FLAG = "true or false", lambda value: type(value) is bool
_TEXT = "text", lambda value: type(value) is str

# Types of the keys that are read, from the format's description: in words, and as a test of a value
_KINDS: Mapping[str, tuple[str, Callable[[object], bool]]] = {
    key: kind
    for kind, keys in (
        (
            _WHOLE,
            "general.alignment general.file_type general.quantization_version split.count split.no .vocab_size "
            ".context_length .embedding_length .feed_forward_length .block_count "
            ".attention.head_count .attention.head_count_kv .attention.key_length "
            ".attention.value_length .attention.sliding_window .rope.dimension_count "
            ".rope.scaling.original_context_length .expert_count .expert_used_count .pooling_type "
            ".leading_dense_block_count tokenizer.ggml.bos_token_id tokenizer.ggml.eos_token_id "
            "tokenizer.ggml.eot_token_id tokenizer.ggml.padding_token_id",
        ),
        (
            _NUMBER,
            ".attention.layer_norm_rms_epsilon .attention.scale .attention.clamp_kqv "
            ".attention.max_alibi_bias .rope.freq_base .rope.scale_linear .rope.scaling.factor "
            ".rope.scaling.attn_factor .rope.scaling.yarn_log_multiplier .rope.scaling.yarn_beta_fast "
            ".rope.scaling.yarn_beta_slow .logit_scale .residual_scale .embedding_scale",
        ),
        (_FLAG, ".attention.causal .use_parallel_residual .rope.scaling.finetuned"),
        (
            _TEXT,
            "general.architecture general.type .rope.scaling.type .tensor_data_layout tokenizer.ggml.model "
            "tokenizer.ggml.pre tokenizer.chat_template",
        ),
        (("a list of texts", _is_list_of(str)), "tokenizer.ggml.tokens tokenizer.ggml.merges"),
        (("a list of numbers", _is_list_of(float)), "tokenizer.ggml.scores"),
        (("a list of whole numbers", _is_list_of(int)), "tokenizer.ggml.token_type"),
    )
    for key in keys.split()
}

_EXPECTED = {
    "general.type": ("model",),
    "split.count": (0, 1),
    ".expert_count": (0,),
    ".expert_used_count": (0,),
    ".attention.sliding_window": (0,),
    ".attention.causal": (True,),
    ".attention.clamp_kqv": (0,),
    ".attention.max_alibi_bias": (0,),
    ".use_parallel_residual": (False,),
    ".pooling_type": (0,),
    ".rope.scaling.attn_factor": (1,),
    ".rope.scaling.yarn_log_multiplier": (0,),
    ".logit_scale": (1,),
    ".residual_scale": (1,),
    ".embedding_scale": (1,),
}


@functools.cache
def kinds_of(architecture: str) -> Mapping[str, tuple[str, Callable[[object], bool]]]:
    """The type of each key that is read: in words, and as a test of a value."""
    return {_named(key, architecture): kind for key, kind in _KINDS.items()}


@functools.cache
def keys_of(architecture: str) -> Keys:
    """The known keys; llama.cpp reads only those under the architecture's name."""
    expected = {_named(key, architecture): values for key, values in _EXPECTED.items()}
    return Keys(frozenset(kinds_of(architecture)), expected, re.compile(rf"(?!{architecture}\.).+"))


def _named(key: str, architecture: str) -> str:
    return f"{architecture}{key}" if key.startswith(".") else key
