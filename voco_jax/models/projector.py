"""LLaVA-1.5's projector (mlp2x_gelu): from the vision tower's features to the language model's embeddings."""

from flax import nnx
import jax
import jax.numpy as jnp

from voco_jax.models.linear import Linear


class Projector(nnx.Module):
    """Linear, exact (erf) GELU, Linear: [..., D_vision] to [..., D]."""

    def __init__(self, in_features: int, out_features: int, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs):
        kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.linear_1 = Linear(in_features, out_features, **kwargs)
        self.linear_2 = Linear(out_features, out_features, **kwargs)

    def __call__(self, features: jax.Array) -> jax.Array:
        return self.linear_2(jax.nn.gelu(self.linear_1(features), approximate=False))
