"""Keys of GGUF's metadata: the types of their values, and the values that the model computes."""

from collections.abc import Callable, Mapping
import math
import re

from voco_jax.convert.config_keys import Keys


def _is_list_of(kind: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(type(item) is kind for item in value)


_WHOLE = "a whole number", lambda value: type(value) is int and value >= 0
_NUMBER = "a number", lambda value: type(value) is float and math.isfinite(value)
_FLAG = "true or false", lambda value: type(value) is bool
_TEXT = "text", lambda value: type(value) is str

# Types of the keys that are read, from the format's description: in words, and as a test of a value
KINDS: Mapping[str, tuple[str, Callable[[object], bool]]] = {
    key: kind
    for kind, keys in (
        (
            _WHOLE,
            "general.alignment general.file_type general.quantization_version split.count split.no llama.vocab_size "
            "llama.context_length llama.embedding_length llama.feed_forward_length llama.block_count "
            "llama.attention.head_count llama.attention.head_count_kv llama.attention.key_length "
            "llama.attention.value_length llama.attention.sliding_window llama.rope.dimension_count "
            "llama.rope.scaling.original_context_length llama.expert_count llama.expert_used_count llama.pooling_type "
            "llama.leading_dense_block_count tokenizer.ggml.bos_token_id tokenizer.ggml.eos_token_id "
            "tokenizer.ggml.padding_token_id",
        ),
        (
            _NUMBER,
            "llama.attention.layer_norm_rms_epsilon llama.attention.scale llama.attention.clamp_kqv "
            "llama.attention.max_alibi_bias llama.rope.freq_base llama.rope.scale_linear llama.rope.scaling.factor "
            "llama.rope.scaling.attn_factor llama.rope.scaling.yarn_log_multiplier llama.rope.scaling.yarn_beta_fast "
            "llama.rope.scaling.yarn_beta_slow llama.logit_scale llama.residual_scale llama.embedding_scale",
        ),
        (_FLAG, "llama.attention.causal llama.use_parallel_residual llama.rope.scaling.finetuned"),
        (
            _TEXT,
            "general.architecture general.type llama.rope.scaling.type llama.tensor_data_layout tokenizer.ggml.model "
            "tokenizer.ggml.pre",
        ),
        (("a list of texts", _is_list_of(str)), "tokenizer.ggml.tokens tokenizer.ggml.merges"),
        (("a list of numbers", _is_list_of(float)), "tokenizer.ggml.scores"),
        (("a list of whole numbers", _is_list_of(int)), "tokenizer.ggml.token_type"),
    )
    for key in keys.split()
}

KEYS = Keys(
    frozenset(KINDS),
    {
        "general.type": ("model",),
        "split.count": (0, 1),
        "llama.expert_count": (0,),
        "llama.expert_used_count": (0,),
        "llama.attention.sliding_window": (0,),
        "llama.attention.causal": (True,),
        "llama.attention.clamp_kqv": (0,),
        "llama.attention.max_alibi_bias": (0,),
        "llama.use_parallel_residual": (False,),
        "llama.pooling_type": (0,),
        "llama.rope.scaling.attn_factor": (1,),
        "llama.rope.scaling.yarn_log_multiplier": (0,),
        "llama.logit_scale": (1,),
        "llama.residual_scale": (1,),
        "llama.embedding_scale": (1,),
    },
    re.compile(r"(?!llama\.).+"),  # llama.cpp reads only keys under the architecture's name
)
