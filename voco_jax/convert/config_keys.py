"""The keys of other projects' configs: which are computed, which are harmless, and that all others are refused.

One table a kind of file. `computed` keys are read where the model's dimensions are made, `expected` ones may only have
values with which the function is the one we compute, and `harmless` names cannot change it. A key that is null is not
set. Any other key may change what the model computes, and is an error; `--ignore-key` is the user's word that it does
not.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
import dataclasses
import math
from pathlib import Path
import re

from voco_jax.convert.findings import listing
from voco_jax.errors import UserError
from voco_jax.terminal import shortened


@dataclasses.dataclass(frozen=True)
class Keys:
    """What is known of one kind of file. `harmless` are patterns of whole names."""

    computed: frozenset[str]
    expected: Mapping[str, tuple]
    harmless: re.Pattern

    def __or__(self, other: "Keys") -> "Keys":
        """The keys of both; where they differ, as the other has it."""
        harmless = re.compile(f"{self.harmless.pattern}|{other.harmless.pattern}")
        expected = {key: values for key, values in self.expected.items() if key not in other.computed}
        return Keys(self.computed | other.computed, expected | other.expected, harmless)

    def problems(self, fields: Mapping, prefix: str = "", ignored: Collection[str] = ()) -> list[str]:
        """A phrase for each key that is refused; `prefix` is what stands before their names.

        Another model has other keys: of it only its type is named.
        """
        if fields.get("model_type") and "model_type" in self.expected and len(fields) > 1:
            wrong = self.problems({"model_type": fields["model_type"]}, prefix)
            if wrong:
                return wrong
        found = []
        for key, value in fields.items():
            if value is None:
                continue
            if key in self.expected:
                if not any(value == allowed for allowed in self.expected[key]):
                    expected = " or ".join(map(repr, self.expected[key]))
                    found.append(f"{prefix}{key}: expected {expected}, found {shortened(value)}{_WHY.get(key, '')}")
            elif key not in self.computed and not self.harmless.fullmatch(key) and key not in ignored:
                unknown = "unknown, and may change what the model computes"
                found.append(f"{prefix}{key}: {unknown}; found {shortened(value)} (harmless? --ignore-key {key})")
        return found

    def check(self, fields: Mapping, file: Path, prefix: str = "", ignored: Collection[str] = ()) -> None:
        """UserError, one line, for all keys that are refused."""
        problems = self.problems(fields, prefix, ignored)
        if problems:
            raise UserError(f"{file}: {listing(problems)}")


def section(fields: Mapping, key: str, file: Path) -> dict:
    """An object inside a config; an empty one where it is missing or null."""
    value = fields.get(key) or {}
    if not isinstance(value, dict):
        raise UserError(f"{file}: {key}: expected an object, found {value!r}")
    return value


def _keys(computed: str, expected: Mapping[str, tuple], harmless: Iterable[str]) -> Keys:
    return Keys(frozenset(computed.split()), expected, re.compile("|".join(harmless)))


_WHY = {"quantization_config": " (quantized weights are not read; dequantize and save them first)"}
_OFF = (False, None)
_NONE = (None,)
_ONE = (1, None)

# What transformers' PretrainedConfig writes, or wrote, of any model: bookkeeping, what is returned, how text is drawn.
_ANY = _keys(
    "model_type",
    {
        "quantization_config": _NONE,
        "compression_config": _NONE,
        "pruned_heads": ({}, None),
        "is_encoder_decoder": _OFF,
        "add_cross_attention": _OFF,
        "cross_attention_hidden_size": _NONE,
        "tie_encoder_decoder": _OFF,
    },
    (
        "_name_or_path|name_or_path|_commit_hash|architectures|auto_map|transformers_version|torch_dtype|dtype",
        r"_?attn_implementation\w*|_flash_attn\w*|_use_flash\w*|use_flash_attention(_2)?|use_flash_attn|flash_attention",
        r"use_cache|gradient_checkpointing|use_return_dict|return_dict\w*|torchscript|use_bfloat16|tf_legacy_loss",
        r"output_(attentions|hidden_states|scores|logits)|is_decoder|ignore_index|tokenizer_class|prefix|problem_type",
        r"finetuning_task|id2label|label2id|num_labels|task_specific_params|(bos|eos|pad|sep|decoder_start)_token_id",
        r"(bos|eos|pad|unk)_token|chunk_size_feed_forward|model_max_length|max_sequence_length|tokenizer_\w+",
        r"(max|min)(_new)?_(length|tokens)|do_sample|early_stopping|num_beams|num_beam_groups|diversity_penalty",
        r"temperature|top_k|top_p|typical_p|min_p|repetition_penalty|length_penalty|penalty_alpha|num_return_sequences",
        r"(encoder_)?no_repeat_ngram_size|bad_words_ids|forced_(bos|eos)_token_id|remove_invalid_values",
        r"exponential_decay_length_penalty|(begin_)?suppress_tokens|renormalize_logits|guidance_scale|generation_config",
        r"force_words_ids|forced_decoder_ids|constraints|sequence_bias|epsilon_cutoff|eta_cutoff|low_memory|max_time",
        r"encoder_repetition_penalty|(cache|compile|watermarking)_config|cache_implementation|cache_dir|stop_strings",
        r"(attention|hidden|activation|resid|embd|classifier|feat_proj)?_?(dropout|pdrop)(_prob)?",
        r"attention_probs_dropout_prob|initializer_factor|unsloth\w*|transformers\.js_config",
    ),
)

LLAMA = _ANY | _keys(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "max_position_embeddings rms_norm_eps rope_theta rope_scaling rope_parameters original_max_position_embeddings "
    "tie_word_embeddings initializer_range max_sequence_length",
    {
        "model_type": ("llama", "llava_llama", "llava"),
        "hidden_act": ("silu",),
        "attention_bias": _OFF,
        "mlp_bias": _OFF,
        "bias": _OFF,
        "qkv_bias": _OFF,
        "sliding_window": _NONE,
        "use_sliding_window": _OFF,
        "partial_rotary_factor": _ONE,
        "rope_interleaved": _OFF,
        "qk_norm": _OFF,
        "use_qk_norm": _OFF,
        "attention_multiplier": _NONE,  # 1 would be no neutral value: it stands for 1 / sqrt(head_dim)
        "embedding_multiplier": _ONE,
        "residual_multiplier": _ONE,
        "logits_scaling": _ONE,
        "logit_scale": _ONE,
        "attn_logit_softcapping": _NONE,
        "final_logit_softcapping": _NONE,
        "num_experts": (0, 1, None),
        "num_local_experts": (0, 1, None),
    },
    ("pretraining_tp", "max_window_layers|is_llama_config|pad_to_multiple_of|neftune_noise_alpha|bf16|fp16|tf32"),
)

# A released LLaVA's (or VoCo-LLaMA's): Llama's, and how pictures come in.
LLAVA = LLAMA | _keys(
    "mm_vision_tower mm_vision_select_layer mm_projector_type image_aspect_ratio",
    {
        "mm_vision_select_feature": ("patch", "cls_patch"),
        "mm_use_im_start_end": _OFF,
        "use_im_start_end": _OFF,
        "sep_image_conv_front": _OFF,
        "mm_patch_merge_type": ("flat",),
        "mm_resampler_type": _NONE,
        "mm_spatial_pool_mode": _NONE,
        "mm_spatial_pool_stride": _ONE,
        "mm_spatial_pool_out_channels": _NONE,
        "s2": _OFF,
        "mm_vision_tower_interpolate": _OFF,
        "mm_newline_position": ("no_token", None),
        "add_faster_video": _OFF,
        "add_time_instruction": _OFF,
        "mm_four_to_one": _OFF,
        "mm_dense_connector_type": _NONE,
    },
    (
        "mm_hidden_size|mm_use_im_patch_token|use_mm_proj|image_token_len",  # sizes are the tensors'; a spare token
        r"(tune|freeze|unfreeze)_\w+|freeze_backbone|pretrain_mm_\w+|\w+_lr|mm_tunable_parts|lora_\w+|version",
        r"image_grid_pinpoints|image_crop_resolution|image_split_resolution",  # of `anyres`, which is refused
        "s2_scales|s2_resize_output_to_scale_idx|s2_max_split_size",  # of `s2`
        "use_pos_skipping|pos_skipping_range|force_sample|vision_tower_pretrained|group_by_\\w+|is_multimodal",
    ),
)

# The top of transformers' LlavaConfig; `text_config` and `vision_config` have tables of their own.
LLAVA_HF = _ANY | _keys(
    "text_config vision_config image_token_index image_token_id vision_feature_layer tie_word_embeddings",
    {
        "projector_hidden_act": ("gelu",),
        "multimodal_projector_bias": (True,),
        "vision_feature_select_strategy": ("default", "full"),
        "image_grid_pinpoints": _NONE,
        "use_image_newline_parameter": _OFF,
    },
    ("image_seq_length", "vocab_size", "initializer_range", "text_config_dict", "hidden_size"),
)

CLIP_VISION = _ANY | _keys(
    "image_size patch_size hidden_size intermediate_size num_hidden_layers num_attention_heads layer_norm_eps "
    "initializer_range",
    {
        "model_type": ("clip_vision_model", "clip"),
        "hidden_act": ("quick_gelu",),
        "num_channels": (3,),
        "attention_bias": (True, None),
        "tie_word_embeddings": (True, False, None),
    },
    ("projection_dim", "vocab_size", r"encoder_(layerdrop)", "logit_scale_init_value"),
)
CLIP = _ANY | _keys(  # a whole CLIP, of which we take the vision tower
    "vision_config vision_config_dict",
    {"model_type": ("clip_vision_model", "clip"), "tie_word_embeddings": (True, False, None)},
    ("text_config", "text_config_dict", "projection_dim", "logit_scale_init_value", "initializer_range"),
)

# An entry `rope_scaling` or `rope_parameters`; a type leaves unread what it does not need, as transformers does.
ROPE = _keys(
    "rope_type type rope_theta factor original_max_position_embeddings low_freq_factor high_freq_factor beta_fast "
    "beta_slow attention_factor mscale mscale_all_dim truncate",
    {"partial_rotary_factor": _ONE},
    ("finetuned",),
)

# PEFT's adapter_config.json.
ADAPTER = _keys(
    "r lora_alpha alpha_pattern rank_pattern use_rslora use_dora base_model_name_or_path",
    {
        "peft_type": ("LORA",),
        "bias": ("none",),
        "fan_in_fan_out": _OFF,
        "lora_bias": _OFF,
        # Others change the base's own weights when training begins
        "init_lora_weights": (True, False, "gaussian", "orthogonal", None),
        "layer_replication": (None, []),
        "trainable_token_indices": _NONE,
        "target_parameters": (None, []),
        "enable_lora": _NONE,
        "alora_invocation_tokens": _NONE,
        "use_qalora": _OFF,
        "use_bdlora": _OFF,
        "loftq_config": ({}, None),
        "eva_config": _NONE,
        "corda_config": _NONE,
        "arrow_config": _NONE,
        "lora_ga_config": _NONE,
        "megatron_config": _NONE,
        "monteclora_config": _NONE,
    },
    (
        "auto_mapping|inference_mode|revision|task_type|target_modules|exclude_modules|layers_to_transform",
        "layers_pattern|lora_dropout|modules_to_save|megatron_core|qalora_group_size|peft_version|runtime_config",
        "ensure_weight_tying|ephemeral_gpu_offload|merge_weights",
    ),
)

# GGUF's metadata; `general.architecture` is checked first.
GGUF = _keys(
    "general.architecture llama.context_length llama.embedding_length llama.feed_forward_length llama.block_count "
    "llama.attention.head_count llama.attention.head_count_kv llama.attention.layer_norm_rms_epsilon "
    "llama.attention.key_length llama.attention.value_length llama.attention.scale llama.rope.freq_base "
    "llama.rope.dimension_count llama.rope.scale_linear llama.rope.scaling.type llama.rope.scaling.factor "
    "llama.rope.scaling.original_context_length llama.rope.scaling.yarn_beta_fast llama.rope.scaling.yarn_beta_slow",
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
    (
        r"(?!llama\.).+",  # of a model, llama.cpp reads the keys under its architecture's name only
        r"llama\.(vocab_size|tensor_data_layout|rope\.scaling\.finetuned|leading_dense_block_count)",
    ),
)


def _is_list_of(kind: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(type(item) is kind for item in value)


_WHOLE = "a whole number", lambda value: type(value) is int and value >= 0
_NUMBER = "a number", lambda value: type(value) is float and math.isfinite(value)
_FLAG = "true or false", lambda value: type(value) is bool
_TEXT = "text", lambda value: type(value) is str

# What GGUF's keys that count are, as the format's description has them: in words, and whether a value is one.
GGUF_KINDS: Mapping[str, tuple[str, Callable[[object], bool]]] = {
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
