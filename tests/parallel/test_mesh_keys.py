"""What a mesh does not divide is named by the config key that says how long it is."""

import dataclasses

import jax
import pytest

from voco_jax.errors import UserError
from voco_jax.models.build import abstract_model
from voco_jax.models.linear import LoRAConfig
from voco_jax.models.llama import LlamaConfig
from voco_jax.models.vit import ViTConfig
from voco_jax.models.voco import VoCoConfig
from voco_jax.parallel.mesh import AXES
from voco_jax.parallel.sharding import dimension_key, param_shardings, param_spec

LLAMA = LlamaConfig(
    vocab_size=97, hidden_size=48, intermediate_size=52, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=3, head_dim=10,
)  # fmt: skip
VISION = ViTConfig(
    image_size=28, patch_size=14, hidden_size=44, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4
)
MODEL = VoCoConfig(LLAMA, VISION, voco_token_id=3)
LENGTHS = {
    "config.model.llama.hidden_size": {48, 4 * 48},  # a Q-Former's MLP
    "config.model.llama.intermediate_size": {52},
    "config.model.llama.num_attention_heads": {6, 6 * 10},  # LoRA's have heads and their size as one
    "config.model.llama.num_key_value_heads": {3, 3 * 10},
    "config.model.llama.vocab_multiple": {97},
    "config.model.vision.hidden_size": {44, 2 * 44},  # two selected layers side by side
    "config.model.vision.intermediate_size": {36},
    "config.model.vision.num_attention_heads": {4},
}


SIGLIP = dict(
    vision=dataclasses.replace(VISION, class_token=False, patch_bias=True, pre_layernorm=False, further_layers=(0,)),
    projector_layers=3,
)  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [dict(compressor=name) for name in ("voco", "average_pool", "qformer")] + [SIGLIP, dict(projector_bias=False)],
    ids=["voco", "average_pool", "qformer", "SigLIP, two layers", "no biases"],
)
def test_every_dimension_that_is_spread_has_a_key(changes):
    lora = LoRAConfig(2, 4.0, LoRAConfig.TARGETS)
    _, params = abstract_model(dataclasses.replace(MODEL, lora=lora, **changes))
    seen = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        for place, axes in enumerate(param_spec(name)):
            if axes is not None:
                seen.add(key := dimension_key(name, place))
                assert leaf.shape[place] in LENGTHS[key], (name, place, key)
    assert seen == LENGTHS.keys()


@pytest.mark.parametrize(
    ("sizes", "changes", "message"),
    [
        (dict(tensor=3), {}, "llama.vocab_multiple: .*embedding .*: expected a multiple of 3.* 97 rows; it pads"),
        (
            dict(tensor=2), dict(vocab_multiple=2),
            r"config.model.llama.num_key_value_heads: llama.layers.k_proj.kernel \[2, 48, 3, 10\]: expected a multiple "
            "of 2, the devices along mesh.tensor; found 3$",
        ),
        (dict(fsdp=5), {}, "llama.hidden_size: .* a multiple of 5, .* along mesh.fsdp × mesh.frame; found 48"),
        (dict(fsdp=2, frame=8), dict(hidden_size=64), "config.model.vision.hidden_size: .* of 16, .* found 44"),
        (
            dict(tensor=4), dict(vocab_multiple=4, intermediate_size=54),
            "config.model.llama.intermediate_size: llama.layers.down_proj.kernel .*: expected a multiple of 4.* 54",
        ),
    ],
)  # fmt: skip
def test_what_does_not_divide(sizes, changes, message):
    mesh = jax.sharding.AbstractMesh(tuple({**dict.fromkeys(AXES, 1), **sizes}.values()), AXES)
    _, params = abstract_model(dataclasses.replace(MODEL, llama=dataclasses.replace(LLAMA, **changes)))
    with pytest.raises(UserError, match=message) as error:
        param_shardings(mesh, params)
    assert "\n" not in str(error.value)
