"""Llama decoder layers: RMSNorm, rotary positions, grouped key/value heads, SwiGLU.

Shape legend for the whole package:
  B rows   T tokens of a read row   I images of a row   S tokens of one compress segment   P patches of an image
  K VoCo tokens of an image   D hidden size   F MLP width   N query heads   G key/value heads   H head size
  V vocabulary

A layer is given as its parts (`project_kv`, `project_q`, `finish`) rather than as one call, because two streams run
through it and what stands between the parts, which keys a query may see, is the subject of `voco.py`.
"""

import dataclasses
import math

from flax import nnx
import jax
import jax.numpy as jnp

from voco_jax.models.linear import Linear, LinearGeneral
from voco_jax.models.stack import stack_layers


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's frequency scaling (Hugging Face's `rope_type: llama3`)."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Field names are those of Hugging Face's `LlamaConfig`."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int | None = None
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self):
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, found {self.head_dim}")


def rope_frequencies(config: LlamaConfig) -> jax.Array:
    """Radians a position for each pair of head dimensions: [H/2], float32.

    With `rope_scaling`, wavelengths longer than the original context are divided by `factor`, short ones are left
    alone, and those between are interpolated (Llama 3.1).
    """
    exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequencies = config.rope_theta**-exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_position_embeddings / wavelengths
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = jnp.clip(smooth, 0.0, 1.0)
    return frequencies * (smooth + (1 - smooth) / scaling.factor)


def rope_tables(config: LlamaConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [..., T, 1, H/2] in float32 for integer positions [..., T]."""
    angles = positions[..., None, None].astype(jnp.float32) * rope_frequencies(config)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate heads [..., T, heads, H]; dimension i is paired with i + H/2, as in Hugging Face's Llama."""
    cos, sin = tables
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


class LlamaLayer(nnx.Module):
    """One pre-norm decoder layer in two parts, before and after attention."""

    def __init__(self, config: LlamaConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
        c = config
        init = nnx.initializers.normal(c.initializer_range)
        # Every layer adds to the residual stream twice; smaller outputs keep its variance level with depth (GPT-2).
        init_out = nnx.initializers.normal(c.initializer_range / math.sqrt(2 * c.num_hidden_layers))

        def linear(shape_in, shape_out, kernel_init=init):
            axis = (-2, -1) if isinstance(shape_in, tuple) else -1
            return LinearGeneral(
                shape_in, shape_out, axis=axis, use_bias=False, kernel_init=kernel_init,
                dtype=dtype, param_dtype=param_dtype, rngs=rngs,
            )  # fmt: skip

        def norm():
            return nnx.RMSNorm(c.hidden_size, epsilon=c.rms_norm_eps, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        self.input_layernorm = norm()
        self.q_proj = linear(c.hidden_size, (c.num_attention_heads, c.head_dim))
        self.k_proj = linear(c.hidden_size, (c.num_key_value_heads, c.head_dim))
        self.v_proj = linear(c.hidden_size, (c.num_key_value_heads, c.head_dim))
        self.o_proj = linear((c.num_attention_heads, c.head_dim), c.hidden_size, init_out)
        self.post_attention_layernorm = norm()
        self.gate_proj = linear(c.hidden_size, c.intermediate_size)
        self.up_proj = linear(c.hidden_size, c.intermediate_size)
        self.down_proj = linear(c.intermediate_size, c.hidden_size, init_out)

    def project_kv(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys before rotary positions and values, each [B, T, G, H]."""
        y = self.input_layernorm(x_BTD)
        return self.k_proj(y), self.v_proj(y)

    def project_q(self, x_BTD: jax.Array) -> jax.Array:
        """Queries before rotary positions: [B, T, N, H]."""
        return self.q_proj(self.input_layernorm(x_BTD))

    def finish(self, x_BTD: jax.Array, attended_BTNH: jax.Array) -> jax.Array:
        """Residual stream after attention's output projection and the SwiGLU MLP."""
        x_BTD = x_BTD + self.o_proj(attended_BTNH)
        y = self.post_attention_layernorm(x_BTD)
        return x_BTD + self.down_proj(jax.nn.silu(self.gate_proj(y)) * self.up_proj(y))


class Llama(nnx.Module):
    """Embedding, stacked layers, final norm and (tied or untied) head. `layers` parameters are [num_layers, ...]."""

    def __init__(self, config: LlamaConfig, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.dtype = dtype
        init = nnx.initializers.normal(config.initializer_range)
        self.embed_tokens = nnx.Embed(
            config.vocab_size, config.hidden_size, embedding_init=init, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.layers = stack_layers(
            lambda rngs: LlamaLayer(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs),
            config.num_hidden_layers,
            rngs,
        )
        self.norm = nnx.RMSNorm(
            config.hidden_size, epsilon=config.rms_norm_eps, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        if not config.tie_word_embeddings:
            self.lm_head = Linear(
                config.hidden_size, config.vocab_size, use_bias=False, kernel_init=init,
                dtype=dtype, param_dtype=param_dtype, preferred_element_type=jnp.float32, rngs=rngs,
            )  # fmt: skip

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """Next-token logits [B, T, V] in float32, never rounded to the type of the computation."""
        hidden_BTD = self.norm(hidden_BTD)
        if self.config.tie_word_embeddings:
            embedding_VD = self.embed_tokens.embedding[...].astype(self.dtype)
            return jnp.einsum("...d,vd->...v", hidden_BTD, embedding_VD, preferred_element_type=jnp.float32)
        return self.lm_head(hidden_BTD)
