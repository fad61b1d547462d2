"""LLaVA: what joins a vision tower and a language model; the released code's checkpoints, and Hugging Face's."""

from collections.abc import Collection
import dataclasses
from pathlib import Path
from typing import Any

from voco_jax.convert.config_keys import ANY, NONE, OFF, ONE, keys_of, section
from voco_jax.convert.families import llama
from voco_jax.convert.families.vision import family_of_tower, from_name, vision_family
from voco_jax.convert.rules import COPY, KERNEL, Rule
from voco_jax.errors import UserError
from voco_jax.models.llama import LlamaConfig
from voco_jax.models.vit import ViTConfig
from voco_jax.terminal import shortened

RULES = tuple(  # the projector's
    Rule(f"projector.linear_{i}.{ours}", "projector", f"linear_{i}.{theirs}", transform)
    for i in (1, 2, 3)
    for ours, theirs, transform in (("kernel", "weight", KERNEL), ("bias", "bias", COPY))
)

# Of a released LLaVA (or VoCo-LLaMA), beside those of its language model: how pictures come in.
OWN_KEYS = keys_of(
    "mm_vision_tower mm_vision_select_layer mm_projector_type image_aspect_ratio",
    {
        "mm_vision_select_feature": ("patch", "cls_patch"),
        "mm_use_im_start_end": OFF,
        "use_im_start_end": OFF,
        "sep_image_conv_front": OFF,
        "mm_patch_merge_type": ("flat",),
        "mm_resampler_type": NONE,
        "mm_spatial_pool_mode": NONE,
        "mm_spatial_pool_stride": ONE,
        "mm_spatial_pool_out_channels": NONE,
        "s2": OFF,
        "mm_vision_tower_interpolate": OFF,
        "mm_newline_position": ("no_token", None),
        "add_faster_video": OFF,
        "add_time_instruction": OFF,
        "mm_four_to_one": OFF,
        "mm_dense_connector_type": NONE,
    },
    (
        "mm_hidden_size|mm_use_im_patch_token|use_mm_proj|image_token_len",  # sizes are the tensors'; a spare token
        r"(tune|freeze|unfreeze)_\w+|freeze_backbone|pretrain_mm_\w+|\w+_lr|mm_tunable_parts|lora_\w+|version",
        r"image_grid_pinpoints|image_crop_resolution|image_split_resolution",  # of `anyres`, which is refused
        "s2_scales|s2_resize_output_to_scale_idx|s2_max_split_size",  # of `s2`
        "use_pos_skipping|pos_skipping_range|force_sample|vision_tower_pretrained|group_by_\\w+|is_multimodal",
    ),
)
KEYS = llama.KEYS | OWN_KEYS

# The top of transformers' LlavaConfig; `text_config` and `vision_config` have tables of their own.
HF_KEYS = ANY | keys_of(
    "text_config vision_config image_token_index image_token_id vision_feature_layer tie_word_embeddings",
    {
        "projector_hidden_act": ("gelu",),
        "multimodal_projector_bias": (True, False),
        "vision_feature_select_strategy": ("default", "full"),
        "image_grid_pinpoints": NONE,
        "use_image_newline_parameter": OFF,
    },
    ("image_seq_length", "vocab_size", "initializer_range", "text_config_dict", "hidden_size"),
)

# LLaVA-NeXT's and LLaVA-OneVision's look at tiles of a picture beside all of it. Here all of it is looked at, alone.
TILED_KEYS = HF_KEYS | keys_of(
    "image_grid_pinpoints vision_aspect_ratio video_token_index video_token_id use_image_newline_parameter", {}, ()
)
IMAGE_NEWLINE = ("image_newline", "model.image_newline")  # the tensor that ends a row of patches of tiles
# model_type and class of each, by the format of `to-hf`
TILED = {
    "llava-next": ("llava_next", "LlavaNextForConditionalGeneration"),
    "llava-onevision": ("llava_onevision", "LlavaOnevisionForConditionalGeneration"),
}
# transformers' defaults by model_type
HF_DEFAULTS: dict[str, dict] = {
    "llava": {},
    "llava_next": {},
    "llava_onevision": {
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "text_config": {"model_type": "qwen2"},
        "vision_config": {
            "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "patch_size": 14,
            "image_size": 384, "num_hidden_layers": 26, "num_attention_heads": 16, "vision_use_head": False,
        },
    },
}  # fmt: skip

# LLaVA's projectors that are linear layers with GELU between, by the number of those layers.
PROJECTORS = {"mlp2x_gelu": 2, "mlp3x_gelu": 3, "linear": 1, "mlp1x_gelu": 1}


def features(fields: dict, file: Path) -> dict[str, Any]:
    """ViTConfig's choices of features, as a released LLaVA config has them."""
    layers = _layers(fields, "mm_vision_select_layer", file)
    if len(layers) > 1:
        raise UserError(f"{file}: mm_vision_select_layer: expected one layer, found {shortened(list(layers))}")
    return {"select_layer": layers[0], "select_feature": fields.get("mm_vision_select_feature") or "patch"}


def projector_layers(fields: dict, file: Path) -> int:
    """Linear layers of the projector; without its key, one (the first LLaVA's). UserError for other kinds."""
    kind = fields.get("mm_projector_type") or "linear"
    if not isinstance(kind, str) or kind not in PROJECTORS:
        raise UserError(f"{file}: mm_projector_type: expected {', '.join(PROJECTORS)}; found {shortened(kind)}")
    return PROJECTORS[kind]


def _layers(fields: dict, key: str, file: Path) -> tuple[int, ...]:
    """One layer or several."""
    layers = fields.get(key)
    layers = -2 if layers is None else layers
    listed = layers if isinstance(layers, list) and layers else [layers]
    if any(isinstance(layer, bool) or not isinstance(layer, int) for layer in listed):
        raise UserError(f"{file}: {key}: expected a layer or a list of layers, found {shortened(layers)}")
    return tuple(listed)


def hf_vision(fields: dict, file: Path, ignored: Collection[str] = ()) -> ViTConfig:
    """Of `LlavaConfig`; without a vision_config it has transformers' default, ViT-L/14 at 336."""
    first, *others = _layers(fields, "vision_feature_layer", file)
    selected: dict[str, Any] = {"select_layer": first, "further_layers": tuple(others)}
    tower = section(fields, "vision_config", file)
    if tower:
        family = vision_family(tower, file, "vision_config.")
        vision = family.from_hf({"vision_config": tower}, file, ignored, **selected)
    else:
        vision = from_name("openai/clip-vit-large-patch14-336", file, **selected)
    strategy = fields.get("vision_feature_select_strategy") or "default"
    if strategy == "default" and not vision.class_token:
        why = "this vision tower has no class token, and 'default' would leave out the first patch"
        raise UserError(f"{file}: vision_feature_select_strategy: expected 'full', found 'default': {why}")
    feature = "cls_patch" if strategy == "full" and vision.class_token else "patch"
    return dataclasses.replace(vision, select_feature=feature)


def hf_strategy(vision: ViTConfig) -> str:
    """transformers' `vision_feature_select_strategy`: 'default' leaves out the first feature, the class token."""
    return "default" if vision.class_token and vision.select_feature == "patch" else "full"


def to_released(language_model: LlamaConfig, vision: ViTConfig, dtype: str, ids: dict, aspect_ratio: str) -> dict:
    """The released code's config.json; its vision tower stands beside it, in `vision_tower/`."""
    return llama.to_hf(language_model) | {
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
        "tokenizer_model_max_length": language_model.max_position_embeddings,
        "torch_dtype": dtype,
        **ids,
    }


def to_hf(
    text_config: dict, vision: ViTConfig, projector_bias: bool, dtype: str, ids: dict, image_token_id: int
) -> dict:  # fmt: skip
    """Of `LlavaForConditionalGeneration`, for a language model's config and a vision tower that is of some family."""
    family = family_of_tower(vision)
    assert family is not None
    layers = [vision.select_layer, *vision.further_layers]
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": text_config | {"torch_dtype": dtype} | ids,
        "vision_config": family.to_hf(vision) | {"torch_dtype": dtype},
        "image_token_index": image_token_id,
        "image_seq_length": vision.num_features,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": projector_bias,
        "vision_feature_layer": layers if len(layers) > 1 else layers[0],
        "vision_feature_select_strategy": hf_strategy(vision),
        "tie_word_embeddings": text_config["tie_word_embeddings"],
        "torch_dtype": dtype,
        **ids,
    }
