"""CLIP's vision towers: tensors, config keys and dimensions, as Hugging Face's `CLIPVisionModel` has them."""

from collections.abc import Collection
import dataclasses
from pathlib import Path

from voco_jax.convert.config_keys import ANY, check_numbers, given, keys_of, section
from voco_jax.convert.rules import COPY, FROM_HEADS, HEAD_BIAS, KERNEL, PATCHES, Rule
from voco_jax.errors import UserError
from voco_jax.models import presets
from voco_jax.models.vit import ViTConfig
from voco_jax.terminal import shortened

RULES: tuple[Rule, ...] = (
    Rule("vision_tower.patch_embedding.kernel", "vision", "embeddings.patch_embedding.weight", PATCHES),
    Rule("vision_tower.class_embedding", "vision", "embeddings.class_embedding", COPY),
    Rule("vision_tower.position_embedding", "vision", "embeddings.position_embedding.weight", COPY),
    *(
        Rule(f"vision_tower.{ours}", "vision", theirs, transform)
        for name, their_name, weight, weight_transform, bias_transform in (
            ("pre_layernorm", "pre_layrnorm", "scale", COPY, COPY),  # CLIP's own spelling
            ("post_layernorm", "post_layernorm", "scale", COPY, COPY),
            ("layers.layer_norm1", "encoder.layers.{}.layer_norm1", "scale", COPY, COPY),
            ("layers.layer_norm2", "encoder.layers.{}.layer_norm2", "scale", COPY, COPY),
            ("layers.q_proj", "encoder.layers.{}.self_attn.q_proj", "kernel", KERNEL, HEAD_BIAS),
            ("layers.k_proj", "encoder.layers.{}.self_attn.k_proj", "kernel", KERNEL, HEAD_BIAS),
            ("layers.v_proj", "encoder.layers.{}.self_attn.v_proj", "kernel", KERNEL, HEAD_BIAS),
            ("layers.out_proj", "encoder.layers.{}.self_attn.out_proj", "kernel", FROM_HEADS, COPY),
            ("layers.fc1", "encoder.layers.{}.mlp.fc1", "kernel", KERNEL, COPY),
            ("layers.fc2", "encoder.layers.{}.mlp.fc2", "kernel", KERNEL, COPY),
        )
        for ours, theirs, transform in (
            (f"{name}.{weight}", f"{their_name}.weight", weight_transform),
            (f"{name}.bias", f"{their_name}.bias", bias_transform),
        )
    ),
)
NOT_READ = r"text_model\..*|text_projection\.weight|visual_projection\.weight|logit_scale"  # of a whole CLIP

KEYS = ANY | keys_of(
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
WHOLE_KEYS = ANY | keys_of(  # a whole CLIP, of which we take the vision tower
    "vision_config vision_config_dict",
    {"model_type": ("clip_vision_model", "clip"), "tie_word_embeddings": (True, False, None)},
    ("text_config", "text_config_dict", "projection_dim", "logit_scale_init_value", "initializer_range"),
)

# What LLaVA's configs call a vision tower that is not part of the checkpoint.
HUB_TOWERS = {
    "openai/clip-vit-large-patch14-336": "clip-vit-l-14-336",
    "openai/clip-vit-large-patch14": "clip-vit-l-14",
}

# Fields of ViTConfig that CLIPVisionConfig has not: LLaVA's choices, and what only a training from scratch asks for.
NOT_CLIPS = {"select_layer", "select_feature", "position_init"}


def from_hf(fields: dict, file: Path, select_layer, select_feature: str, ignored: Collection[str] = ()) -> ViTConfig:
    """From `CLIPVisionConfig`'s fields, or a whole CLIP's."""
    prefix = ""
    if fields.get("vision_config"):
        WHOLE_KEYS.check(fields, file, ignored=ignored)
        # What the first versions wrote beside it holds, where it says anything
        fields = section(fields, "vision_config", file) | given(section(fields, "vision_config_dict", file))
        prefix = "vision_config."
    KEYS.check(fields, file, prefix, ignored)
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


def from_name(name: str, file: Path, select_layer: int, select_feature: str) -> ViTConfig:
    if name not in HUB_TOWERS:
        raise UserError(f"{file}: mm_vision_tower {shortened(name)} is not known; give it with --vision-tower DIR")
    preset = presets.VIT[HUB_TOWERS[name]]
    try:
        return dataclasses.replace(preset, select_layer=select_layer, select_feature=select_feature)
    except ValueError as error:
        raise UserError(f"{file}: {error}") from None


def to_hf(config: ViTConfig) -> dict:
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in NOT_CLIPS}
    return fields | {"hidden_act": "quick_gelu", "num_channels": 3, "model_type": "clip_vision_model"}
