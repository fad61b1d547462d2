"""CLIP's vision transformer: class token, learned positions, pre-norm layers, quick-GELU. Relatives (SigLIP) are
switches of `ViTConfig`. Shapes: see the legend in `voco.py`."""

from collections.abc import Callable
import dataclasses
import itertools
from typing import Any

import einops
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from voco_jax.attention import get_adapter
from voco_jax.keys import DEFAULT, key
from voco_jax.models.linear import Linear, LinearGeneral
from voco_jax.models.stack import scan_layers, stack_layers
from voco_jax.parallel.mesh import IMAGES, constrain

FEATURES = ("patch", "cls_patch")


def quick_gelu(x: jax.Array) -> jax.Array:
    """x · sigmoid(1.702 x): the GELU approximation that OpenAI's CLIP was trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Field names are those of Hugging Face's `CLIPVisionConfig`, LLaVA's choices of features, and switches.

    The defaults of the switches are CLIP's. SigLIP and SigLIP 2 of fixed resolution have no class token and no norm
    below the layers, a bias of the patch embedding, and 'gelu_tanh'.

    `select_layer` counts hidden states as Hugging Face does: 0 is the embeddings, -1 the last layer's output, and
    -2 (LLaVA) the one before. `select_feature` is 'patch' (class token dropped) or 'cls_patch'. No hidden state has
    passed the tower's last norm: neither in transformers 5, whose CLIP and SigLIP do not tie hidden_states[-1] to
    last_hidden_state, nor in the released LLaVA code.

    Where the image's side is no multiple of the patch's, the pixels left over at the right and below are not seen.
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
    further_layers: tuple[int, ...] = key(
        (), "further hidden states, whose features are appended to select_layer's, in this order", earlier=DEFAULT
    )
    select_feature: str = key("patch", "'patch', or 'cls_patch' with the class token", one_of=FEATURES)
    class_token: bool = key(True, "a class token before the patches", earlier=DEFAULT)
    patch_bias: bool = key(False, "a bias of the patch embedding", earlier=DEFAULT)
    pre_layernorm: bool = key(True, "a norm between the embeddings and the first layer", earlier=DEFAULT)
    hidden_act: str = key("quick_gelu", "activation of the MLPs", one_of=(*ACTIVATIONS,), earlier=DEFAULT)

    def __post_init__(self) -> None:
        object.__setattr__(self, "further_layers", tuple(self.further_layers))
        if self.image_size < self.patch_size:
            expected = f"expected at least patch_size ({self.patch_size})"
            raise ValueError(f"image_size: {expected}, found {self.image_size}")
        if self.hidden_size % self.num_attention_heads:
            expected = f"expected a multiple of num_attention_heads ({self.num_attention_heads})"
            raise ValueError(f"hidden_size: {expected}, found {self.hidden_size}")
        if self.position_init == "sincos" and self.hidden_size % 4:
            raise ValueError(f"hidden_size: expected a multiple of 4, for 'sincos'; found {self.hidden_size}")
        if self.select_feature not in FEATURES:
            raise ValueError(f"select_feature: expected one of {', '.join(FEATURES)}; found {self.select_feature!r}")
        if self.select_feature == "cls_patch" and not self.class_token:
            raise ValueError("select_feature: expected 'patch', as there is no class token; found 'cls_patch'")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act: expected one of {', '.join(ACTIVATIONS)}; found {self.hidden_act!r}")
        layers = self.num_hidden_layers
        for name, layer in (("select_layer", self.select_layer), *(("further_layers", i) for i in self.further_layers)):
            if not -layers - 1 <= layer <= layers:
                raise ValueError(f"{name}: expected {-layers - 1} to {layers}, found {layer}")

    @property
    def side(self) -> int:
        """Patches along a side of an image."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.side**2

    @property
    def num_tokens(self) -> int:
        """Tokens of the layers: the patches, and the class token."""
        return self.num_patches + self.class_token

    @property
    def num_features(self) -> int:
        """Features an image: P, or P + 1 with the class token."""
        return self.num_patches + (self.select_feature == "cls_patch")

    @property
    def feature_size(self) -> int:
        """Width of a feature: that of the residual stream, as often as hidden states are selected."""
        return self.hidden_size * (1 + len(self.further_layers))

    @property
    def selected_layers(self) -> tuple[int, ...]:
        """The selected hidden states, counted from the embeddings (0), in the order of the features."""
        return tuple(i % (self.num_hidden_layers + 1) for i in (self.select_layer, *self.further_layers))

    @property
    def num_active_layers(self) -> int:
        """Layers below the selected hidden states; others are kept (they belong to the checkpoint) but not run."""
        return max(self.selected_layers)

    def flops(self, images: int) -> float:
        """FLOPs of images through the layers that are run, forward; attention sees all patches. See `flops.py`."""
        tokens = self.num_tokens
        params = 4 * self.hidden_size**2 + 2 * self.hidden_size * self.intermediate_size
        patches = 2 * self.num_patches * 3 * self.patch_size**2 * self.hidden_size
        return images * (self.num_active_layers * tokens * (2 * params + 4 * self.hidden_size * tokens) + patches)


def sincos_positions(config: ViTConfig) -> np.ndarray:
    """Position embeddings to begin with, float32 [tokens, D]: sines and cosines of column and row; class token 0.

    A vision tower from scratch then knows from the first step on where a patch is. As in Beyer et al., Better plain
    ViT baselines for ImageNet-1k, arXiv:2205.01580, but trained on, and with frequencies for few patches.
    """
    side = config.side
    frequencies = float(side) ** -np.linspace(0, 1, config.hidden_size // 4)  # down to one turn for 2π sides
    row, column = np.divmod(np.arange(side**2), side)
    angles = np.concatenate([np.outer(column, frequencies), np.outer(row, frequencies)], axis=1)
    patches = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    return np.concatenate([np.zeros((int(config.class_token), config.hidden_size)), patches]).astype(np.float32)


class ViTLayer(nnx.Module):
    """Pre-norm encoder layer: full attention, then an MLP, all with biases."""

    def __init__(self, config: ViTConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        c = config
        heads = (c.num_attention_heads, c.hidden_size // c.num_attention_heads)
        kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        init = nnx.initializers.normal(c.initializer_range)
        self.activation = ACTIVATIONS[c.hidden_act]
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
        return x + self.fc2(self.activation(self.fc1(self.layer_norm2(x))))


class ViT(nnx.Module):
    """Pictures to features: `pixel_values` [..., height, width, 3] to [..., features, D_vision · selected layers]."""

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
        self.patch_embedding = Linear(
            3 * c.patch_size**2, c.hidden_size, use_bias=c.patch_bias, kernel_init=init, **kwargs
        )
        if c.class_token:
            self.class_embedding = nnx.Param(init(rngs.params(), (c.hidden_size,), param_dtype))
        positions = init(rngs.params(), (c.num_tokens, c.hidden_size), param_dtype)
        if c.position_init == "sincos":
            positions = jnp.asarray(sincos_positions(c), param_dtype)
        self.position_embedding = nnx.Param(positions)
        if c.pre_layernorm:
            self.pre_layernorm = nnx.LayerNorm(c.hidden_size, epsilon=c.layer_norm_eps, **kwargs)
        self.layers = stack_layers(
            lambda rngs: ViTLayer(c, dtype=dtype, param_dtype=param_dtype, rngs=rngs), c.num_hidden_layers, rngs
        )
        # Part of every checkpoint; only the last, pooled output, which LLaVA does not use, passes through it.
        self.post_layernorm = nnx.LayerNorm(c.hidden_size, epsilon=c.layer_norm_eps, **kwargs)

    def __call__(self, pixel_values: jax.Array) -> jax.Array:
        c = self.config
        *lead, height, width, channels = pixel_values.shape
        if (height, width, channels) != (c.image_size, c.image_size, 3):
            raise ValueError(
                f"pixel_values: expected [..., {c.image_size}, {c.image_size}, 3], found {list(pixel_values.shape)}"
            )
        seen = c.side * c.patch_size
        patches = einops.rearrange(
            pixel_values.reshape(-1, height, width, 3)[:, :seen, :seen].astype(self.dtype),
            "b (rows p) (columns q) c -> b (rows columns) (p q c)",
            p=c.patch_size,
            q=c.patch_size,
        )
        x = self.patch_embedding(patches)
        if c.class_token:
            token = jnp.broadcast_to(self.class_embedding[...].astype(self.dtype), (x.shape[0], 1, c.hidden_size))
            x = jnp.concatenate([token, x], axis=1)
        x = x + self.position_embedding[...].astype(self.dtype)
        if c.pre_layernorm:
            x = self.pre_layernorm(x)

        states = {0: constrain(x, IMAGES)}
        for start, end in itertools.pairwise(sorted({0, *c.selected_layers})):  # one loop after another
            states[end], _ = scan_layers(
                lambda layer, x, _: (constrain(layer(x, self.attention.full), IMAGES), None), states[start],
                self.layers, start=start, count=end, dtype=self.dtype, unroll=self.unroll, remat=self.remat,
            )  # fmt: skip
        x = jnp.concatenate([states[layer] for layer in c.selected_layers], axis=-1)
        if c.class_token and c.select_feature == "patch":
            x = x[:, 1:]
        return x.reshape(*lead, *x.shape[1:])
