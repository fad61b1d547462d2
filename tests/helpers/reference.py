"""The released code's checkpoint (tests/fixtures/reference) as a model of ours, and its golden values."""

from pathlib import Path
import shutil

from flax import nnx
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from voco_jax.models.llama import LlamaConfig
from voco_jax.models.vit import ViTConfig
from voco_jax.models.voco import VoCoConfig, VoCoLlama

DIRECTORY = Path(__file__).parents[1] / "fixtures" / "reference"
HEADS, HEAD_DIM, VISION_HEADS = 4, 8, 4

CONFIG = VoCoConfig(
    llama=LlamaConfig(
        vocab_size=32001,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
    ),
    vision=ViTConfig(
        image_size=42, hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=VISION_HEADS
    ),
    num_voco_tokens=2,
    suffix_ids=(13,),  # the golden rows have a bare newline between image and VoCo tokens
)


def copy_checkpoint(destination: Path) -> Path:
    """A copy of the checkpoint's directory, to be changed; its vision tower is a link."""
    destination.mkdir()
    for name in "config.json", "model.safetensors":
        shutil.copy(DIRECTORY / name, destination)
    (destination / "vision_tower").symlink_to(DIRECTORY / "vision_tower")
    return destination


def golden() -> dict[str, np.ndarray]:
    return dict(np.load(DIRECTORY / "golden.npz"))


def load_model(config: VoCoConfig = CONFIG) -> VoCoLlama:
    """The checkpoint in float32. Every parameter must be filled and every tensor used, exactly once."""
    tensors = {name: tensor.astype(np.float32) for name, tensor in load_file(DIRECTORY / "model.safetensors").items()}
    graphdef, state = nnx.split(nnx.eval_shape(lambda: VoCoLlama(config, rngs=nnx.Rngs(0))))

    def linear(name, *heads):
        kernel = tensors.pop(name + ".weight").T
        return {"kernel": kernel.reshape(*heads) if heads else kernel}

    def biased(name, kernel_shape=None, bias_shape=None):
        layer = linear(name, *(kernel_shape or ()))
        bias = tensors.pop(name + ".bias")
        return layer | {"bias": bias.reshape(bias_shape) if bias_shape else bias}

    def norm(name):
        return {"scale": tensors.pop(name + ".weight")}

    def layer_norm(name):
        return norm(name) | {"bias": tensors.pop(name + ".bias")}

    def stack(layers):
        first = layers[0]
        if isinstance(first, dict):
            return {key: stack([layer[key] for layer in layers]) for key in first}
        return np.stack(layers)

    def llama_layer(prefix):
        attention = prefix + ".self_attn."
        heads = (CONFIG.llama.hidden_size, HEADS, HEAD_DIM)
        return {
            **{n: norm(f"{prefix}.{n}") for n in ("input_layernorm", "post_attention_layernorm")},
            **{n: linear(attention + n, *heads) for n in ("q_proj", "k_proj", "v_proj")},
            "o_proj": linear(attention + "o_proj", HEADS, HEAD_DIM, CONFIG.llama.hidden_size),
            **{n: linear(f"{prefix}.mlp.{n}") for n in ("gate_proj", "up_proj", "down_proj")},
        }

    def vision_layer(prefix):
        attention, width = prefix + ".self_attn.", CONFIG.vision.hidden_size
        heads = (VISION_HEADS, width // VISION_HEADS)
        return {
            **{n: layer_norm(f"{prefix}.{n}") for n in ("layer_norm1", "layer_norm2")},
            **{n: biased(attention + n, (width, *heads), heads) for n in ("q_proj", "k_proj", "v_proj")},
            "out_proj": biased(attention + "out_proj", (*heads, width)),
            **{n: biased(f"{prefix}.mlp.{n}") for n in ("fc1", "fc2")},
        }

    vision = "model.vision_tower.vision_tower.vision_model."
    patches = tensors.pop(vision + "embeddings.patch_embedding.weight")  # [D, channel, row, column]
    params = {
        "llama": {
            "embed_tokens": {"embedding": tensors.pop("model.embed_tokens.weight")},
            "layers": stack([llama_layer(f"model.layers.{i}") for i in range(2)]),
            "norm": norm("model.norm"),
            "lm_head": linear("lm_head"),
        },
        "projector": {f"linear_{i + 1}": biased(f"model.mm_projector.{2 * i}") for i in range(2)},
        "vision_tower": {
            "class_embedding": tensors.pop(vision + "embeddings.class_embedding"),
            "patch_embedding": {"kernel": patches.transpose(2, 3, 1, 0).reshape(-1, len(patches))},
            "position_embedding": tensors.pop(vision + "embeddings.position_embedding.weight"),
            "pre_layernorm": layer_norm(vision + "pre_layrnorm"),
            "layers": stack([vision_layer(f"{vision}encoder.layers.{i}") for i in range(4)]),
            "post_layernorm": layer_norm(vision + "post_layernorm"),
        },
    }
    assert not tensors, f"unused tensors: {sorted(tensors)}"
    expected, found = nnx.to_pure_dict(state), params
    assert nnx.to_flat_state(nnx.State(expected)).paths == nnx.to_flat_state(nnx.State(found)).paths
    return nnx.merge(graphdef, _as_arrays(params))


def _as_arrays(tree):
    return {k: _as_arrays(v) if isinstance(v, dict) else jnp.asarray(v) for k, v in tree.items()}


def pixel_values() -> np.ndarray:
    """The golden pictures as [2 rows, 1 image, height, width, 3]."""
    return golden()["images"].transpose(0, 2, 3, 1)[:, None]
