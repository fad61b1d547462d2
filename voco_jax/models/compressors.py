"""Compressors outside the language model, for comparison (the paper's Table 1): pooling and a Q-Former.

Both turn an image's P projected features into M embeddings that stand in the read stream as ordinary tokens.
"""

from flax import nnx
import jax
import jax.numpy as jnp

from voco_jax.models.linear import Linear
from voco_jax.models.stack import scan_layers, stack_layers


class AveragePool(nnx.Module):
    """Mean over M equal runs of patches (M = 1: the whole image), then Linear: [..., P, D] to [..., M, D]."""

    def __init__(self, num_tokens: int, hidden_size: int, *, dtype, param_dtype, rngs: nnx.Rngs):
        self.num_tokens = num_tokens
        self.linear = Linear(hidden_size, hidden_size, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, features: jax.Array) -> jax.Array:
        *lead, num_patches, hidden_size = features.shape
        if num_patches % self.num_tokens:
            raise ValueError(f"average pooling: {num_patches} patches do not divide into {self.num_tokens} tokens")
        runs = features.reshape(*lead, self.num_tokens, num_patches // self.num_tokens, hidden_size)
        return self.linear(runs.mean(axis=-2))


class QFormerLayer(nnx.Module):
    """Pre-norm self-attention among the queries, cross-attention to the image, GELU MLP."""

    def __init__(self, hidden_size: int, num_heads: int, *, dtype, param_dtype, rngs: nnx.Rngs):
        kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        def attention():
            return nnx.MultiHeadAttention(
                num_heads=num_heads, in_features=hidden_size, qkv_features=hidden_size, decode=False, **kwargs
            )

        self.norm_self = nnx.LayerNorm(hidden_size, **kwargs)
        self.self_attention = attention()
        self.norm_cross = nnx.LayerNorm(hidden_size, **kwargs)
        self.cross_attention = attention()
        self.norm_mlp = nnx.LayerNorm(hidden_size, **kwargs)
        self.fc1 = Linear(hidden_size, 4 * hidden_size, **kwargs)
        self.fc2 = Linear(4 * hidden_size, hidden_size, **kwargs)

    def __call__(self, queries: jax.Array, features: jax.Array) -> jax.Array:
        queries = queries + self.self_attention(self.norm_self(queries))
        queries = queries + self.cross_attention(self.norm_cross(queries), features)
        return queries + self.fc2(jax.nn.gelu(self.fc1(self.norm_mlp(queries))))


class QFormer(nnx.Module):
    """BLIP-2's compressor: M learned queries read the image's features: [..., P, D] to [..., M, D]."""

    def __init__(
        self, num_tokens: int, hidden_size: int, num_heads: int, num_layers: int, *, dtype, param_dtype, rngs: nnx.Rngs
    ):
        kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.dtype = dtype
        self.queries = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (num_tokens, hidden_size), param_dtype))
        self.norm_features = nnx.LayerNorm(hidden_size, **kwargs)
        self.layers = stack_layers(
            lambda rngs: QFormerLayer(hidden_size, num_heads, dtype=dtype, param_dtype=param_dtype, rngs=rngs),
            num_layers,
            rngs,
        )
        self.norm = nnx.LayerNorm(hidden_size, **kwargs)
        self.linear = Linear(hidden_size, hidden_size, **kwargs)

    def __call__(self, features: jax.Array) -> jax.Array:
        *lead, num_patches, hidden_size = features.shape
        features = self.norm_features(features.reshape(-1, num_patches, hidden_size))
        queries = jnp.broadcast_to(self.queries[...].astype(self.dtype), (len(features), *self.queries.shape))
        queries, _ = scan_layers(lambda layer, x, _: (layer(x, features), None), queries, self.layers, dtype=self.dtype)
        return self.linear(self.norm(queries)).reshape(*lead, -1, hidden_size)
