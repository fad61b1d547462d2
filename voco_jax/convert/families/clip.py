"""CLIP's vision towers: tensors, config keys and dimensions, as Hugging Face's `CLIPVisionModel` has them."""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from voco_jax.convert.config_keys import ANY, Keys, check_numbers, given, keys_of, section
from voco_jax.convert.rules import COPY, FROM_HEADS, HEAD_BIAS, KERNEL, PATCHES, Rule
from voco_jax.errors import UserError
from voco_jax.models.vit import ViTConfig

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
POOLING = ""  # nothing of the tower is passed over
SWITCHES = {"class_token": True, "patch_bias": False, "pre_layernorm": True}

# ViTConfig's names of activations by transformers'
ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}

KEYS = ANY | keys_of(
    "image_size patch_size hidden_size intermediate_size num_hidden_layers num_attention_heads layer_norm_eps "
    "initializer_range",
    {
        "model_type": ("clip_vision_model", "clip"),
        "hidden_act": tuple(ACTIVATIONS),
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

DEFAULTS = {  # transformers'
    "image_size": 224, "patch_size": 32, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "layer_norm_eps": 1e-5, "initializer_range": 0.02, "hidden_act": "quick_gelu",
}  # fmt: skip


def from_hf(fields: dict, file: Path, ignored: Collection[str] = (), **selected: Any) -> ViTConfig:
    """From `CLIPVisionConfig`'s fields, or a whole CLIP's; `selected`: ViTConfig's choices of features."""
    prefix, fields = tower_of(fields, file, WHOLE_KEYS, ignored)
    KEYS.check(fields, file, prefix, ignored)
    return config_of(fields, file, DEFAULTS, SWITCHES | selected)


def tower_of(fields: dict, file: Path, whole: Keys, ignored: Collection[str]) -> tuple[str, dict]:
    """(what to write before its keys, the vision tower's fields) of a tower's config, or of that of a `whole` model."""
    if not fields.get("vision_config"):
        return "", fields
    whole.check(fields, file, ignored=ignored)
    # What the first versions wrote beside it holds, where it says anything
    return "vision_config.", section(fields, "vision_config", file) | given(section(fields, "vision_config_dict", file))


def config_of(fields: dict, file: Path, defaults: dict, others: dict) -> ViTConfig:
    """The config for fields under transformers' names, which `KEYS` has checked; `others` are under ours."""
    values = defaults | {name: fields[name] for name in defaults if fields.get(name) is not None}
    activation = ACTIVATIONS[values.pop("hidden_act")]
    check_numbers(file, values, "vision")
    try:
        return ViTConfig(**values, hidden_act=activation, **others)
    except (TypeError, ValueError) as error:
        raise UserError(f"{file}: {error}") from None


def to_hf(config: ViTConfig) -> dict:
    return fields_of(config, DEFAULTS) | {"model_type": "clip_vision_model"}


def fields_of(config: ViTConfig, names: Iterable[str]) -> dict:
    """A tower's fields of these of transformers' names."""
    fields = {name: getattr(config, name) for name in names}
    (act,) = (theirs for theirs, ours in ACTIVATIONS.items() if ours == config.hidden_act)
    return fields | {"hidden_act": act, "num_channels": 3}
