"""LLaVA's projectors: from the vision tower's features to the language model's embeddings."""

from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from voco_jax.models.linear import Linear


class Projector(nnx.Module):
    """Linear layers with exact (erf) GELU between, [..., D_vision · selected layers] to [..., D].

    Two are LLaVA-1.5's mlp2x_gelu, three mlp3x_gelu, and one is the first LLaVA's.
    """

    def __init__(
        self, in_features: int, out_features: int, num_layers: int = 2, *, use_bias: bool = True,
        dtype: Any = jnp.float32, param_dtype: Any = jnp.float32, rngs: nnx.Rngs,
    ):  # fmt: skip
        self.num_layers = num_layers
        kwargs: dict[str, Any] = dict(use_bias=use_bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        for i in range(1, num_layers + 1):
            inputs = in_features if i == 1 else out_features
            setattr(self, f"linear_{i}", Linear(inputs, out_features, **kwargs))

    def __call__(self, features: jax.Array) -> jax.Array:
        x = features
        for i in range(1, self.num_layers + 1):
            x = getattr(self, f"linear_{i}")(x if i == 1 else jax.nn.gelu(x, approximate=False))
        return x
