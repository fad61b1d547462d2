"""Hugging Face's and LLaVA's `config.json`, to our dataclasses and back; what we do not compute is refused."""

import dataclasses
import math
from pathlib import Path

from voco_jax.errors import UserError
from voco_jax.models import presets
from voco_jax.models.llama import LlamaConfig, RopeScaling
from voco_jax.models.vit import ViTConfig

# What LLaVA's configs call a vision tower that is not part of the checkpoint.
HUB_TOWERS = {
    "openai/clip-vit-large-patch14-336": "clip-vit-l-14-336",
    "openai/clip-vit-large-patch14": "clip-vit-l-14",
}

# Fields of ViTConfig that CLIPVisionConfig has not: LLaVA's choices, and what only a training from scratch asks for.
NOT_CLIPS = {"select_layer", "select_feature", "position_init"}


def _expect(file: Path, fields: dict, **expected) -> None:
    """UserError for a key whose value is none of those we compute; a missing key has the default, the first."""
    for key, values in expected.items():
        found = fields.get(key, values[0])
        if isinstance(found, dict | list) or found not in values:
            raise UserError(f"{file}: {key}: expected {' or '.join(map(repr, values))}, found {found!r}")


_FRACTIONS = (
    "rms_norm_eps", "layer_norm_eps", "initializer_range", "rope_theta", "factor", "low_freq_factor",
    "high_freq_factor",
)  # fmt: skip


def _check_numbers(file: Path, values: dict, what: str) -> None:
    """UserError for a dimension that is no whole number above zero, or another number that is none at all."""
    for key, value in values.items():
        if isinstance(value, bool) and key == "tie_word_embeddings":
            continue
        whole = key not in _FRACTIONS
        kinds, expected = (int, "a whole number above 0") if whole else ((int, float), "a number above 0")
        if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < math.inf:
            raise UserError(f"{file}: {what}.{key}: expected {expected}, found {value!r}")


def section(fields: dict, key: str, file: Path) -> dict:
    """An object inside a config; an empty one where it is missing or null."""
    value = fields.get(key) or {}
    if not isinstance(value, dict):
        raise UserError(f"{file}: {key}: expected an object, found {value!r}")
    return value


def llama_from_hf(fields: dict, file: Path) -> LlamaConfig:
    """From `LlamaConfig`'s fields (LLaVA's own config has them too, among others); defaults are transformers'."""
    # Other architectures have the same tensors, and compute something else with them.
    _expect(file, fields, model_type=("llama", "llava_llama", "llava"), sliding_window=(None,))
    _expect(file, fields, attention_bias=(False, None), mlp_bias=(False, None), hidden_act=("silu",))
    fields = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "initializer_range": 0.02} | fields
    rope = section(fields, "rope_parameters", file)  # transformers 5; before it, rope_theta and rope_scaling
    theta = rope.get("rope_theta", fields.get("rope_theta", 10000.0))
    scaling = rope or section(fields, "rope_scaling", file)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise UserError(f"{file}: rope_type: expected 'default' or 'llama3', found {kind!r}")
    names = {field.name for field in dataclasses.fields(LlamaConfig)} - {"rope_theta", "rope_scaling", "vocab_multiple"}
    defaults = {"intermediate_size": 11008, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
    values = defaults | {"vocab_size": 32000} | {name: fields[name] for name in names if fields.get(name) is not None}
    values.setdefault("num_key_value_heads", values["num_attention_heads"])
    _check_numbers(file, values | {"rope_theta": theta}, "llama")
    try:
        rope_scaling = None
        if kind == "llama3":
            numbers = {field.name: scaling[field.name] for field in dataclasses.fields(RopeScaling)}
            _check_numbers(file, numbers, "rope_scaling")
            rope_scaling = RopeScaling(**numbers)
        return LlamaConfig(**values, rope_theta=float(theta), rope_scaling=rope_scaling)
    except KeyError as error:
        raise UserError(f"{file}: rope_scaling: key {error} is missing") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{file}: {error}") from None


def vision_from_hf(fields: dict, file: Path, select_layer, select_feature: str) -> ViTConfig:
    """From `CLIPVisionConfig`'s fields, or a whole CLIP's."""
    fields = section(fields, "vision_config", file) or fields
    _expect(file, fields, model_type=("clip_vision_model", "clip"), hidden_act=("quick_gelu",), num_channels=(3,))
    names = {field.name for field in dataclasses.fields(ViTConfig)} - NOT_CLIPS
    defaults = {  # transformers'
        "image_size": 224, "patch_size": 32, "hidden_size": 768, "intermediate_size": 3072,
        "num_hidden_layers": 12, "num_attention_heads": 12,
    }  # fmt: skip
    values = defaults | {name: fields[name] for name in names if fields.get(name) is not None}
    _check_numbers(file, values, "vision")
    try:
        return ViTConfig(**values, select_layer=select_layer, select_feature=select_feature)
    except (TypeError, ValueError) as error:
        raise UserError(f"{file}: {error}") from None


def features_of_llava(fields: dict, file: Path) -> tuple[int, str]:
    """(layer, 'patch' or 'cls_patch') that a released LLaVA config selects; UserError for projectors unlike ours."""
    _expect(
        file,
        fields,
        mm_projector_type=("mlp2x_gelu",),
        mm_vision_select_feature=("patch", "cls_patch"),
        mm_use_im_start_end=(False,),
        mm_patch_merge_type=("flat",),
    )
    return _layer(fields, "mm_vision_select_layer", file), fields.get("mm_vision_select_feature", "patch")


def _layer(fields: dict, key: str, file: Path) -> int:
    layer = fields.get(key, -2)
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise UserError(f"{file}: {key}: expected one layer, found {layer!r}")
    return layer


def features_of_llava_hf(fields: dict, file: Path) -> tuple[int, str]:
    _expect(
        file,
        fields,
        projector_hidden_act=("gelu",),
        multimodal_projector_bias=(True,),
        vision_feature_select_strategy=("default", "full"),
    )
    strategy = fields.get("vision_feature_select_strategy", "default")
    return _layer(fields, "vision_feature_layer", file), {"default": "patch", "full": "cls_patch"}[strategy]


def vision_of_llava_hf(fields: dict, file: Path, select_layer: int, select_feature: str) -> ViTConfig:
    """Of `LlavaConfig`; without a vision_config it has transformers' default, ViT-L/14 at 336."""
    if not fields.get("vision_config"):
        return vision_of_hub("openai/clip-vit-large-patch14-336", file, select_layer, select_feature)
    return vision_from_hf(section(fields, "vision_config", file), file, select_layer, select_feature)


def vision_of_hub(name: str, file: Path, select_layer: int, select_feature: str) -> ViTConfig:
    if name not in HUB_TOWERS:
        raise UserError(f"{file}: mm_vision_tower {name!r} is not known; give it with --vision-tower DIR")
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
        fields["rope_scaling"] = {"rope_type": "llama3", **scaling}
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
