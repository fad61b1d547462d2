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
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from voco_jax.keys import key
from voco_jax.models.linear import Linear, LoRAConfig, LoRALinear
from voco_jax.models.stack import stack_layers
from voco_jax.parallel.mesh import PARAMS, ROWS, constrain

ROPE_TYPES = ("linear", "dynamic", "yarn", "llama3")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for a longer context; names and meanings are those of Hugging Face.

    'linear' divides all by `factor`. 'dynamic' changes nothing up to `max_position_embeddings`, and no model of ours
    goes beyond. 'llama3' (Llama 3.1) and 'yarn' (arXiv:2309.00071) divide those of long wavelengths, by their turns in
    the original context, and keep those of short ones; 'yarn' also multiplies cosines and sines by `attention_factor`
    (None: 0.1 ln(factor) + 1). ValueError for a type or a number that cannot be.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    rope_type: str = "llama3"
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self):
        if self.rope_type not in ROPE_TYPES:
            raise ValueError(f"rope_type must be one of {', '.join(ROPE_TYPES)}; found {self.rope_type!r}")
        if not 0 < self.factor < math.inf:
            raise ValueError(f"rope_scaling: factor must be above 0, found {self.factor}")
        if self.attention_factor is None:
            is_longer = self.rope_type == "yarn" and self.factor > 1
            object.__setattr__(self, "attention_factor", 0.1 * math.log(self.factor) + 1 if is_longer else 1.0)


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Field names are those of Hugging Face's `LlamaConfig`, but for `vocab_multiple`: how we store a vocabulary."""

    vocab_size: int = key(
        32000, "tokens that the model knows; at least as many as the tokenizer has", low=1, below=2**24
    )
    hidden_size: int = key(4096, "width of the residual stream (D)", low=1, below=2**20)
    intermediate_size: int = key(11008, "width of the MLP (F)", low=1, below=2**20)
    num_hidden_layers: int = key(32, "decoder layers", low=1, below=2**12)
    num_attention_heads: int = key(32, "query heads (N)", low=1, below=2**14)
    num_key_value_heads: int = key(32, "key and value heads (G), which query heads share", low=1, below=2**14)
    head_dim: int | None = key(None, "size of a head (H); None: hidden_size / num_attention_heads", low=1, below=2**14)
    max_position_embeddings: int = key(4096, "longest sequence, in tokens", low=1, below=2**31, on_load="free")
    rms_norm_eps: float = key(1e-5, "added to the mean square in norms", low=0)
    rope_theta: float = key(10000.0, "base of the rotary positions", low=1)
    rope_scaling: RopeScaling | None = key(None, "of the rotary positions, for longer sequences; None: none")
    tie_word_embeddings: bool = key(False, "the head is the embedding")
    initializer_range: float = key(0.02, "standard deviation of random first weights", low=0, on_load="free")
    vocab_multiple: int = key(
        1, "rows of embedding and head are padded to a multiple of it, so that they shard", low=1, below=2**24
    )

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

    @property
    def padded_vocab_size(self) -> int:
        """Rows that the embedding and the head have (V'); nothing ever looks at those from `vocab_size` on."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


def rope_frequencies(config: LlamaConfig) -> jax.Array:
    """Radians a position for each pair of head dimensions: [H/2], float32; see `RopeScaling`."""
    exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequencies = config.rope_theta**-exponents
    scaling = config.rope_scaling
    if scaling is None or scaling.rope_type == "dynamic":
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    if scaling.rope_type == "yarn":
        kept = _kept_by_yarn(config)
    else:
        wavelengths = 2 * math.pi / frequencies
        turns = scaling.original_max_position_embeddings / wavelengths
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        kept = jnp.clip(kept, 0.0, 1.0)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def _kept_by_yarn(config: LlamaConfig) -> jax.Array:
    """Of each frequency, the share that is not divided: from 1 down to 0 between two pairs of dimensions, [H/2]."""
    scaling, size = config.rope_scaling, config.head_dim

    def pair(turns: float) -> float:  # that makes so many turns in the original context
        wavelength = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        return size * math.log(wavelength) / (2 * math.log(config.rope_theta))

    first, last = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    if first == last:
        last += 0.001
    return 1 - jnp.clip((jnp.arange(size // 2, dtype=jnp.float32) - first) / (last - first), 0.0, 1.0)


def rope_tables(config: LlamaConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [..., T, 1, H], float32, for integer positions [..., T]; the first half of sines is negated."""
    angles = positions[..., None, None].astype(jnp.float32) * rope_frequencies(config)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if config.rope_scaling is not None and config.rope_scaling.attention_factor != 1:
        cos, sin = cos * config.rope_scaling.attention_factor, sin * config.rope_scaling.attention_factor
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)


def apply_rope(x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate heads [..., T, heads, H]; dimension i is paired with i + H/2, as in Hugging Face's Llama."""
    cos, sin = tables
    turned = jnp.dot(x, half_turn(x.shape[-1], x.dtype), precision=jax.lax.Precision.HIGHEST)
    return (x.astype(jnp.float32) * cos + turned.astype(jnp.float32) * sin).astype(x.dtype)


def half_turn(size: int, dtype) -> jax.Array:
    """The matrix that swaps the halves of [..., size]; each result is one term, and so exact in any dtype.

    A TPU would have to move halves of its 128 lanes about for a slice or a roll, which takes longer than this product.
    """
    return jnp.roll(jnp.eye(size, dtype=dtype), size // 2, axis=0)


def whole(x: jax.Array) -> jax.Array:
    """`x`, computed once and written to memory; so is its gradient.

    XLA for TPUs would rather compute a norm or an activation again for each tile of the matrix product that takes it,
    which makes the product 10 to 40 % longer by the compiler's own estimate.
    """
    return jax.lax.optimization_barrier(x)


@jax.custom_vjp
def silu_times(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) · up, SwiGLU's activation; its gradients are made in one pass, each written once (see `whole`)."""
    return jax.nn.silu(gate) * up


def _silu_times_bwd(kept, gradient):
    *kept, gradient = whole((*kept, gradient))
    return whole(jax.vjp(lambda gate, up: jax.nn.silu(gate) * up, *kept)[1](gradient))


silu_times.defvjp(lambda gate, up: (silu_times(gate, up), (gate, up)), _silu_times_bwd)


class LlamaLayer(nnx.Module):
    """One pre-norm decoder layer in two parts, before and after attention; with LoRA on the projections it names."""

    def __init__(self, config: LlamaConfig, lora: LoRAConfig | None = None, *, dtype, param_dtype, rngs: nnx.Rngs):
        c = config
        init = nnx.initializers.normal(c.initializer_range)
        # Every layer adds to the residual stream twice; smaller outputs keep its variance level with depth (GPT-2).
        init_out = nnx.initializers.normal(c.initializer_range / math.sqrt(2 * c.num_hidden_layers))

        def linear(shape_in, shape_out, kernel_init=init):
            return LoRALinear(
                shape_in, shape_out, kernel_init=kernel_init, dtype=dtype, param_dtype=param_dtype, rngs=rngs
            )

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
        for name in lora.targets if lora is not None else ():  # last: they change no other parameter's random numbers
            getattr(self, name).add_lora(lora, rngs)

    def project_kv(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys before rotary positions and values, each [B, T, G, H]."""
        y = whole(self.input_layernorm(x_BTD))
        return self.k_proj(y), self.v_proj(y)

    def project_q(self, x_BTD: jax.Array) -> jax.Array:
        """Queries before rotary positions: [B, T, N, H]."""
        return self.q_proj(whole(self.input_layernorm(x_BTD)))

    def finish(self, x_BTD: jax.Array, attended_BTNH: jax.Array) -> jax.Array:
        """Residual stream after attention's output projection and the SwiGLU MLP."""
        x_BTD = x_BTD + checkpoint_name(self.o_proj(attended_BTNH), "attention_out")
        y = whole(self.post_attention_layernorm(x_BTD))
        gate, up = checkpoint_name(self.gate_proj(y), "gate"), checkpoint_name(self.up_proj(y), "up")
        return x_BTD + self.down_proj(whole(silu_times(gate, up)))


class Llama(nnx.Module):
    """Embedding, stacked layers, final norm and (tied or untied) head. `layers` parameters are [num_layers, ...]."""

    def __init__(
        self, config: LlamaConfig, lora: LoRAConfig | None = None, *,
        dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs,
    ):  # fmt: skip
        self.config = config
        self.dtype = dtype
        init = nnx.initializers.normal(config.initializer_range)
        self.embed_tokens = nnx.Embed(
            config.padded_vocab_size, config.hidden_size, embedding_init=init,
            dtype=dtype, param_dtype=param_dtype, rngs=rngs,
        )  # fmt: skip
        self.layers = stack_layers(
            lambda rngs: LlamaLayer(config, lora, dtype=dtype, param_dtype=param_dtype, rngs=rngs),
            config.num_hidden_layers,
            rngs,
        )
        self.norm = nnx.RMSNorm(
            config.hidden_size, epsilon=config.rms_norm_eps, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        if not config.tie_word_embeddings:
            self.lm_head = Linear(
                config.hidden_size, config.padded_vocab_size, use_bias=False, kernel_init=init,
                dtype=dtype, param_dtype=param_dtype, preferred_element_type=jnp.float32, rngs=rngs,
            )  # fmt: skip

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        """Embeddings [B, T, D] of token ids [B, T].

        Over a mesh every device looks its columns up for all tokens, and rows travel home: 4,096 numbers a token
        rather than the table, and gradients are summed in the table's own precision where they stay.
        """
        if jax.sharding.get_abstract_mesh().empty:
            return self.embed_tokens(tokens_BT)
        table = constrain(self.embed_tokens.embedding[...], None, PARAMS)
        x = jnp.take(table, constrain(tokens_BT, "data"), axis=0).astype(self.dtype)
        x = constrain(constrain(x, "data", None, PARAMS), "data", None, "fsdp")
        return constrain(x, ROWS)

    def head(self) -> jax.Array:
        """The matrix [D, V'] from normalised hidden states to logits, as it is stored."""
        return self.embed_tokens.embedding[...].T if self.config.tie_word_embeddings else self.lm_head.kernel[...]

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """Next-token logits [B, T, V] in float32, never rounded to the type of the computation; none for padding."""
        hidden_BTD = self.norm(hidden_BTD)
        if self.config.tie_word_embeddings:
            embedding_VD = self.embed_tokens.embedding[...].astype(self.dtype)
            logits = jnp.einsum("...d,vd->...v", hidden_BTD, embedding_VD, preferred_element_type=jnp.float32)
        else:
            logits = self.lm_head(hidden_BTD)
        return logits[..., : self.config.vocab_size]
