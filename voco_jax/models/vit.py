"""CLIP's vision transformer: class token, learned positions, pre-norm layers, quick-GELU. Relatives are switches of
`ViTConfig`. Shapes: see the legend in `voco.py`."""

from collections.abc import Callable
import dataclasses
from typing import Any

import einops
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from voco_jax.attention import get_adapter
from voco_jax.keys import key
from voco_jax.models.linear import Linear, LinearGeneral
from voco_jax.models.stack import scan_layers, stack_layers
from voco_jax.parallel.mesh import IMAGES, constrain

FEATURES = ("patch", "cls_patch")


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Field names are those of Hugging Face's `CLIPVisionConfig`, and LLaVA's two choices of features.

    `select_layer` counts hidden states as Hugging Face does: 0 is the embeddings, -1 the last layer's output, and
    -2 (LLaVA) the one before. `select_feature` is 'patch' (class token dropped) or 'cls_patch'.
    """

    image_size: int = key(336, "pixels of a square picture's side", low=1, below=2**14)
    patch_size: int = key(14, "pixels of a patch's side", low=1, below=2**14)
    hidden_size: int = key(1024, "width of the residual stream", low=1, below=2**20)
    intermediate_size: int = key(4096, "width of the MLP", low=1, below=2**20)
    num_hidden_layers: int = key(24, "layers", low=1, below=2**12)
    num_attention_heads: int = key(16, "heads", low=1, below=2**14)
    layer_norm_eps: float = key(1e-5, "added to the variance in norms", low=0)
    initializer_range: float = key(0.02, "standard deviation of random first weights", low=0, on_load="free")
    position_init: str = key(
        "normal",
        "what position embeddings begin as: CLIP's noise, or 'sincos' (`sincos_positions`)",
        one_of=("normal", "sincos"),
    )
    select_layer: int = key(-2, "hidden states that are features: -1 the last layer's, -2 those before it (LLaVA)")
    select_feature: str = key("patch", "'patch', or 'cls_patch' with the class token", one_of=FEATURES)

    def __post_init__(self) -> None:
        for name, divisor in (("image_size", "patch_size"), ("hidden_size", "num_attention_heads")):
            if (found := getattr(self, name)) % getattr(self, divisor):
                raise ValueError(f"{name}: expected a multiple of {divisor} ({getattr(self, divisor)}), found {found}")
        if self.position_init == "sincos" and self.hidden_size % 4:
            raise ValueError(f"hidden_size: expected a multiple of 4, for 'sincos'; found {self.hidden_size}")
        if self.select_feature not in FEATURES:
            raise ValueError(f"select_feature: expected one of {', '.join(FEATURES)}; found {self.select_feature!r}")
        layers = self.num_hidden_layers
        if not -layers - 1 <= self.select_layer <= layers:
            raise ValueError(f"select_layer: expected {-layers - 1} to {layers}, found {self.select_layer}")

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_features(self) -> int:
        """Features an image: P, or P + 1 with the class token."""
        return self.num_patches + (self.select_feature == "cls_patch")

    @property
    def num_active_layers(self) -> int:
        """Layers below the selected hidden state; those above are kept (they belong to the checkpoint) but not run."""
        return self.select_layer % (self.num_hidden_layers + 1)

    def flops(self, images: int) -> float:
        """FLOPs of images through the layers that are run, forward; attention sees all patches. See `flops.py`."""
        tokens = self.num_patches + 1
        params = 4 * self.hidden_size**2 + 2 * self.hidden_size * self.intermediate_size
        patches = 2 * self.num_patches * 3 * self.patch_size**2 * self.hidden_size
        return images * (self.num_active_layers * tokens * (2 * params + 4 * self.hidden_size * tokens) + patches)


def sincos_positions(config: ViTConfig) -> np.ndarray:
    """Position embeddings to begin with, float32 [patches + 1, D]: sines and cosines of column and row; class token 0.

    A vision tower from scratch then knows from the first step on where a patch is. As in Beyer et al., Better plain
    ViT baselines for ImageNet-1k, arXiv:2205.01580, but trained on, and with frequencies for few patches.
    """
    side = config.image_size // config.patch_size
    frequencies = float(side) ** -np.linspace(0, 1, config.hidden_size // 4)  # down to one turn for 2π sides
    row, column = np.divmod(np.arange(side**2), side)
    angles = np.concatenate([np.outer(column, frequencies), np.outer(row, frequencies)], axis=1)
    patches = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    return np.concatenate([np.zeros((1, config.hidden_size)), patches]).astype(np.float32)


def quick_gelu(x: jax.Array) -> jax.Array:
    """x · sigmoid(1.702 x): the GELU approximation that OpenAI's CLIP was trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


class ViTLayer(nnx.Module):
    """Pre-norm encoder layer: full attention, then an MLP with quick-GELU, all with biases."""

    def __init__(self, config: ViTConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        c = config
        heads = (c.num_attention_heads, c.hidden_size // c.num_attention_heads)
        kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        init = nnx.initializers.normal(c.initializer_range)
        self.layer_norm1 = nnx.LayerNorm(c.hidden_size, epsilon=c.layer_norm_eps, **kwargs)
        self.q_proj = LinearGeneral(c.hidden_size, heads, kernel_init=init, **kwargs)
        self.k_proj = LinearGeneral(c.hidden_size, heads, kernel_init=init, **kwargs)
        self.v_proj = LinearGeneral(c.hidden_size, heads, kernel_init=init, **kwargs)
        self.out_proj = LinearGeneral(heads, c.hidden_size, axis=(-2, -1), kernel_init=init, **kwargs)
        self.layer_norm2 = nnx.LayerNorm(c.hidden_size, epsilon=c.layer_norm_eps, **kwargs)
        self.fc1 = Linear(c.hidden_size, c.intermediate_size, kernel_init=init, **kwargs)
        self.fc2 = Linear(c.intermediate_size, c.hidden_size, kernel_init=init, **kwargs)

    def __call__(self, x: jax.Array, attend: Callable[..., jax.Array]) -> jax.Array:
        """Hidden states [images, T, D] to the next ones; `attend` is an adapter's `full`."""
        y = self.layer_norm1(x)
        x = x + self.out_proj(attend(self.q_proj(y), self.k_proj(y), self.v_proj(y)))
        return x + self.fc2(quick_gelu(self.fc1(self.layer_norm2(x))))


class ViT(nnx.Module):
    """Pictures to features: `pixel_values` [..., height, width, 3] to [..., features, D_vision]."""

    def __init__(
        self,
        config: ViTConfig,
        *,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        attention: str = "xla",
        unroll: bool = False,
        remat: str = "none",
        rngs: nnx.Rngs,
    ):
        c = self.config = config
        self.dtype, self.unroll, self.remat = dtype, unroll, remat
        self.attention = get_adapter(attention)
        kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        init = nnx.initializers.normal(c.initializer_range)
        # A convolution whose stride is its size is one matrix product on flattened patches (row, column, channel).
        self.patch_embedding = Linear(3 * c.patch_size**2, c.hidden_size, use_bias=False, kernel_init=init, **kwargs)
        self.class_embedding = nnx.Param(init(rngs.params(), (c.hidden_size,), param_dtype))
        positions = init(rngs.params(), (c.num_patches + 1, c.hidden_size), param_dtype)
        if c.position_init == "sincos":
            positions = jnp.asarray(sincos_positions(c), param_dtype)
        self.position_embedding = nnx.Param(positions)
        self.pre_layernorm = nnx.LayerNorm(c.hidden_size, epsilon=c.layer_norm_eps, **kwargs)
        self.layers = stack_layers(
            lambda rngs: ViTLayer(c, dtype=dtype, param_dtype=param_dtype, rngs=rngs), c.num_hidden_layers, rngs
        )
        # Part of every CLIP checkpoint; only the pooled output, which LLaVA does not use, passes through it.
        self.post_layernorm = nnx.LayerNorm(c.hidden_size, epsilon=c.layer_norm_eps, **kwargs)

    def __call__(self, pixel_values: jax.Array) -> jax.Array:
        c = self.config
        *lead, height, width, channels = pixel_values.shape
        if (height, width, channels) != (c.image_size, c.image_size, 3):
            raise ValueError(
                f"pixel_values: expected [..., {c.image_size}, {c.image_size}, 3], found {list(pixel_values.shape)}"
            )
        patches = einops.rearrange(
            pixel_values.reshape(-1, height, width, 3).astype(self.dtype),
            "b (rows p) (columns q) c -> b (rows columns) (p q c)",
            p=c.patch_size,
            q=c.patch_size,
        )
        x = self.patch_embedding(patches)
        class_token = jnp.broadcast_to(self.class_embedding[...].astype(self.dtype), (x.shape[0], 1, c.hidden_size))
        x = jnp.concatenate([class_token, x], axis=1) + self.position_embedding[...].astype(self.dtype)
        x = constrain(self.pre_layernorm(x), IMAGES)

        x, _ = scan_layers(
            lambda layer, x, _: (constrain(layer(x, self.attention.full), IMAGES), None), x, self.layers,
            count=c.num_active_layers, dtype=self.dtype, unroll=self.unroll, remat=self.remat,
        )  # fmt: skip
        if c.select_feature == "patch":
            x = x[:, 1:]
        return x.reshape(*lead, *x.shape[1:])
