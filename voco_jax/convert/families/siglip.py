"""SigLIP's vision towers, and those of SigLIP 2 whose resolution is fixed, as Hugging Face's `SiglipVisionModel`."""

from collections.abc import Collection
from pathlib import Path
import re
from typing import Any

from voco_jax.convert.config_keys import ANY, keys_of
from voco_jax.convert.families import clip
from voco_jax.convert.rules import COPY, Rule
from voco_jax.errors import UserError
from voco_jax.models.vit import ViTConfig
from voco_jax.terminal import shortened

RULES: tuple[Rule, ...] = (
    *(rule for rule in clip.RULES if not re.search("class_embedding|pre_layernorm", rule.ours)),
    Rule("vision_tower.patch_embedding.bias", "vision", "embeddings.patch_embedding.bias", COPY),
)
NOT_READ = r"text_model\..*|logit_(scale|bias)"  # of a whole SigLIP
POOLING = r"head\..*"  # pools the features to one vector
SWITCHES = {"class_token": False, "patch_bias": True, "pre_layernorm": False}

KEYS = ANY | keys_of(
    "image_size patch_size hidden_size intermediate_size num_hidden_layers num_attention_heads layer_norm_eps",
    {
        "model_type": ("siglip_vision_model", "siglip"),
        "hidden_act": tuple(clip.ACTIVATIONS),
        "num_channels": (3,),
        "tie_word_embeddings": (True, False, None),
    },
    ("vision_use_head|initializer_(range|factor)",),  # of the first weights
)
WHOLE_KEYS = ANY | keys_of(
    "vision_config", {"model_type": ("siglip",), "tie_word_embeddings": (True, False, None)}, ("text_config",)
)
DEFAULTS = {  # transformers'
    "image_size": 224, "patch_size": 16, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh",
}  # fmt: skip


def from_hf(fields: dict, file: Path, ignored: Collection[str] = (), **selected: Any) -> ViTConfig:
    """From `SiglipVisionConfig`'s fields, or a whole SigLIP's; `selected`: ViTConfig's choices of features.

    UserError for NaFlex towers, among others: SigLIP 2 also has these, which take pictures of any shape.
    """
    tower = fields.get("vision_config")
    for found in (fields, tower if isinstance(tower, dict) else {}):
        if "num_patches" in found or str(found.get("model_type")).startswith("siglip2"):
            where = "vision_config." if found is tower else ""
            raise UserError(
                f"{file}: {where}model_type: expected 'siglip_vision_model', whose resolution is fixed (SigLIP 2 has "
                f"such towers too); found {shortened(found.get('model_type'))}: NaFlex towers are not computed"
            )
    prefix, fields = clip.tower_of(fields, file, WHOLE_KEYS, ignored)
    KEYS.check(fields, file, prefix, ignored)
    return clip.config_of(fields, file, DEFAULTS, SWITCHES | selected)


def to_hf(config: ViTConfig) -> dict:
    return clip.fields_of(config, DEFAULTS) | {"vision_use_head": False, "model_type": "siglip_vision_model"}
