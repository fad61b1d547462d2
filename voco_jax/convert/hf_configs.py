"""Hugging Face's and LLaVA's `config.json`, to our dataclasses and back; what we do not compute is refused."""

from collections.abc import Collection
import dataclasses
import math
from pathlib import Path

from voco_jax.convert.config_keys import CLIP, CLIP_VISION, LLAMA, Keys, section
from voco_jax.convert.rope import rope_of_hf, rope_to_hf
from voco_jax.errors import UserError
from voco_jax.models import presets
from voco_jax.models.llama import LlamaConfig, RopeScaling
from voco_jax.models.vit import ViTConfig
from voco_jax.terminal import shortened

# What LLaVA's configs call a vision tower that is not part of the checkpoint.
HUB_TOWERS = {
    "openai/clip-vit-large-patch14-336": "clip-vit-l-14-336",
    "openai/clip-vit-large-patch14": "clip-vit-l-14",
}

# LLaVA's projectors that are linear layers with GELU between, by the number of those layers.
PROJECTORS = {"mlp2x_gelu": 2, "linear": 1, "mlp1x_gelu": 1}

# Fields of ViTConfig that CLIPVisionConfig has not: LLaVA's choices, and what only a training from scratch asks for.
NOT_CLIPS = {"select_layer", "select_feature", "position_init"}


# The largest dimensions that a run's config takes
_MOST = {
    key: below - 1
    for below, keys in {
        2**12: "num_hidden_layers",
        2**14: "num_attention_heads num_key_value_heads head_dim image_size patch_size",
        2**20: "hidden_size intermediate_size",
        2**24: "vocab_size",
    }.items()
    for key in keys.split()
}
_LEAST = 1e-30  # of fractions, which are float32 in the end
_FRACTIONS = (
    "rms_norm_eps", "layer_norm_eps", "initializer_range", "rope_theta", "factor", "low_freq_factor",
    "high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "r", "lora_alpha",
)  # fmt: skip


def check_numbers(file: Path, values: dict, what: str) -> None:
    """UserError for a dimension that is no whole number above zero, or another number that is none at all; and for
    those that no model has, with which there would be no end of layers or no number of values."""
    for key, value in values.items():
        if isinstance(value, bool) and key == "tie_word_embeddings":
            continue
        whole, most = key not in _FRACTIONS, _MOST.get(key, 2**31 - 1)
        kinds, expected = (int, "a whole number above 0") if whole else ((int, float), "a number above 0")
        if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < math.inf:
            raise UserError(f"{file}: {what}.{key}: expected {expected}, found {shortened(value)}")
        if value > most if whole else not _LEAST <= value <= 1 / _LEAST:
            expected = f"at most {most}" if whole else f"a number of {_LEAST} to {1 / _LEAST}"
            raise UserError(f"{file}: {what}.{key}: expected {expected}, found {shortened(value)}")


def llama_from_hf(
    fields: dict, file: Path, keys: Keys = LLAMA, prefix: str = "", ignored: Collection[str] = ()
) -> LlamaConfig:
    """From `LlamaConfig`'s fields; defaults are transformers'. `keys`: what else stands among them (LLaVA's own)."""
    keys.check(fields, file, prefix, ignored)
    fields = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "initializer_range": 0.02} | _given(fields)
    theta, scaling = rope_of_hf(fields, file, fields["max_position_embeddings"], prefix, ignored)
    names = {field.name for field in dataclasses.fields(LlamaConfig)} - {"rope_theta", "rope_scaling", "vocab_multiple"}
    defaults = {"intermediate_size": 11008, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
    values = defaults | {"vocab_size": 32000} | {name: fields[name] for name in names if name in fields}
    values.setdefault("num_key_value_heads", values["num_attention_heads"])
    check_numbers(file, values | {"rope_theta": theta}, "llama")
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
        return LlamaConfig(**values, rope_theta=float(theta), rope_scaling=rope_scaling)
    except (TypeError, ValueError) as error:
        raise UserError(f"{file}: {error}") from None


def _given(fields: dict) -> dict:
    """The keys that are set: null is not."""
    return {key: value for key, value in fields.items() if value is not None}


def vision_from_hf(
    fields: dict, file: Path, select_layer, select_feature: str, ignored: Collection[str] = ()
) -> ViTConfig:
    """From `CLIPVisionConfig`'s fields, or a whole CLIP's."""
    prefix = ""
    if fields.get("vision_config"):
        CLIP.check(fields, file, ignored=ignored)
        # What the first versions wrote beside it holds, where it says anything
        fields = section(fields, "vision_config", file) | _given(section(fields, "vision_config_dict", file))
        prefix = "vision_config."
    CLIP_VISION.check(fields, file, prefix, ignored)
    names = {field.name for field in dataclasses.fields(ViTConfig)} - NOT_CLIPS
    defaults = {  # transformers'
        "image_size": 224, "patch_size": 32, "hidden_size": 768, "intermediate_size": 3072,
        "num_hidden_layers": 12, "num_attention_heads": 12,
    }  # fmt: skip
    values = defaults | {name: fields[name] for name in names if fields.get(name) is not None}
    check_numbers(file, values, "vision")
    try:
        return ViTConfig(**values, select_layer=select_layer, select_feature=select_feature)
    except (TypeError, ValueError) as error:
        raise UserError(f"{file}: {error}") from None


def features_of_llava(fields: dict, file: Path) -> tuple[int, str]:
    """(layer, 'patch' or 'cls_patch') that a released LLaVA config selects."""
    return _layer(fields, "mm_vision_select_layer", file), fields.get("mm_vision_select_feature") or "patch"


def projector_layers_of_llava(fields: dict, file: Path) -> int:
    """Linear layers of the projector; without its key, one (the first LLaVA's). UserError for other kinds."""
    kind = fields.get("mm_projector_type") or "linear"
    if not isinstance(kind, str) or kind not in PROJECTORS:
        raise UserError(f"{file}: mm_projector_type: expected {', '.join(PROJECTORS)}; found {shortened(kind)}")
    return PROJECTORS[kind]


def _layer(fields: dict, key: str, file: Path) -> int:
    layer = fields.get(key)
    layer = -2 if layer is None else layer
    if isinstance(layer, list) and len(layer) == 1:
        (layer,) = layer
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise UserError(f"{file}: {key}: expected one layer, found {shortened(layer)}")
    return layer


def features_of_llava_hf(fields: dict, file: Path) -> tuple[int, str]:
    """(layer, 'patch' or 'cls_patch') that a `LlavaConfig` selects."""
    strategy = fields.get("vision_feature_select_strategy") or "default"
    return _layer(fields, "vision_feature_layer", file), {"default": "patch", "full": "cls_patch"}[strategy]


def vision_of_llava_hf(
    fields: dict, file: Path, select_layer: int, select_feature: str, ignored: Collection[str] = ()
) -> ViTConfig:
    """Of `LlavaConfig`; without a vision_config it has transformers' default, ViT-L/14 at 336."""
    if not fields.get("vision_config"):
        return vision_of_hub("openai/clip-vit-large-patch14-336", file, select_layer, select_feature)
    return vision_from_hf({"vision_config": fields["vision_config"]}, file, select_layer, select_feature, ignored)


def vision_of_hub(name: str, file: Path, select_layer: int, select_feature: str) -> ViTConfig:
    if name not in HUB_TOWERS:
        raise UserError(f"{file}: mm_vision_tower {shortened(name)} is not known; give it with --vision-tower DIR")
    preset = presets.VIT[HUB_TOWERS[name]]
    try:
        return dataclasses.replace(preset, select_layer=select_layer, select_feature=select_feature)
    except ValueError as error:
        raise UserError(f"{file}: {error}") from None


# ---- Back ----------------------------------------------------------------------------------------------------------


def llama_to_hf(config: LlamaConfig) -> dict:
    """Fields that transformers before and after version 5 read."""
    fields = dataclasses.asdict(config)
    del fields["vocab_multiple"]  # padding is cut on the way out
    scaling = fields.pop("rope_scaling")
    if scaling is not None:
        fields["rope_scaling"] = rope_to_hf(config.rope_scaling)
    return fields | {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "model_type": "llama"}


def vision_to_hf(config: ViTConfig) -> dict:
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in NOT_CLIPS}
    return fields | {"hidden_act": "quick_gelu", "num_channels": 3, "model_type": "clip_vision_model"}


def config_to_llava(llama: LlamaConfig, vision: ViTConfig, dtype: str, ids: dict, aspect_ratio: str) -> dict:
    """The released code's config.json; its vision tower stands beside it, in `vision_tower/`."""
    return llama_to_hf(llama) | {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "mm_hidden_size": vision.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": "flat",
        "mm_vision_tower": "vision_tower",
        "mm_vision_select_layer": vision.select_layer,
        "mm_vision_select_feature": vision.select_feature,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "use_mm_proj": True,
        "image_aspect_ratio": "pad" if aspect_ratio == "pad" else "square",
        "tokenizer_model_max_length": llama.max_position_embeddings,
        "torch_dtype": dtype,
        **ids,
    }


def config_to_llava_hf(llama: LlamaConfig, vision: ViTConfig, dtype: str, ids: dict, image_token_id: int) -> dict:
    """Of `LlavaForConditionalGeneration`."""
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": llama_to_hf(llama) | {"torch_dtype": dtype} | ids,
        "vision_config": vision_to_hf(vision) | {"torch_dtype": dtype},
        "image_token_index": image_token_id,
        "image_seq_length": vision.num_features,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": vision.select_layer,
        "vision_feature_select_strategy": {"patch": "default", "cls_patch": "full"}[vision.select_feature],
        "tie_word_embeddings": llama.tie_word_embeddings,
        "torch_dtype": dtype,
        **ids,
    }
