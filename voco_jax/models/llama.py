"""Llama: RMSNorm, rotary positions, grouped key/value heads, SwiGLU. Relatives are switches of `LlamaConfig`.

A layer has parts (`project_kv`, `project_q`, `finish`) instead of one call: two streams run through it, and what is
between the parts, which keys a query may see, is the subject of `voco.py`. Shapes: see the legend there.
"""

from collections.abc import Collection
import dataclasses
import math
from typing import Any

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from voco_jax.keys import key
from voco_jax.models.linear import Linear, LoRAConfig, LoRALinear
from voco_jax.models.stack import stack_layers
from voco_jax.models.tiling import materialize, silu_times, swap_halves
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

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise ValueError(f"rope_type: expected one of {', '.join(ROPE_TYPES)}; found {self.rope_type!r}")
        if not 0 < self.factor < math.inf:
            raise ValueError(f"factor: expected a number above 0, found {self.factor}")
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
    head_dim: int = key(0, "size of a head (H); 0: hidden_size / num_attention_heads", low=0, below=2**14)
    max_position_embeddings: int = key(4096, "longest sequence, in tokens", low=1, below=2**31, on_load="free")
    rms_norm_eps: float = key(1e-5, "added to the mean square in norms", low=0)
    rope_theta: float = key(10000.0, "base of the rotary positions", low=1)
    rope_scaling: RopeScaling | None = key(None, "of the rotary positions, for longer sequences; None: none")
    tie_word_embeddings: bool = key(False, "the head is the embedding")
    qkv_bias: bool = key(False, "queries, keys and values have biases (Qwen2)", earlier=False)
    qk_norm: bool = key(False, "each head's queries and keys are normed before rotary positions (Qwen3)", earlier=False)
    sliding_window: int = key(
        0, "a token sees so many positions, its own among them (Mistral v0.1); 0: all before it",
        low=0, below=2**31, earlier=0,
    )  # fmt: skip
    initializer_range: float = key(0.02, "standard deviation of random first weights", low=0, on_load="free")
    vocab_multiple: int = key(
        1, "rows of embedding and head are padded to a multiple of it, so that they shard", low=1, below=2**24
    )

    def __post_init__(self) -> None:
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.num_attention_heads % self.num_key_value_heads:
            expected = f"expected a multiple of num_key_value_heads ({self.num_key_value_heads})"
            raise ValueError(f"num_attention_heads: {expected}, found {self.num_attention_heads}")
        if self.head_dim < 2 or self.head_dim % 2:  # 0: fewer dimensions than heads
            raise ValueError(f"head_dim: expected an even number from 2, for rotary positions; found {self.head_dim}")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and of the head (V'); those from `vocab_size` on are never used."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    def projections(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of each matrix product of a decoder layer."""
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        width, mlp = self.hidden_size, self.intermediate_size
        return {
            "q_proj": (width, queries), "k_proj": (width, keys), "v_proj": (width, keys), "o_proj": (queries, width),
            "gate_proj": (width, mlp), "up_proj": (width, mlp), "down_proj": (mlp, width),
        }  # fmt: skip

    def layer_params(self, lora: LoRAConfig | None = None, names: Collection[str] | None = None) -> int:
        """Parameters of one decoder layer's matrix products, or of some by name, LoRA's among them."""
        chosen = {name: sizes for name, sizes in self.projections().items() if names is None or name in names}
        low_rank = sum(lora.rank * sum(sizes) for name, sizes in chosen.items() if name in lora.targets) if lora else 0
        return sum(inputs * outputs for inputs, outputs in chosen.values()) + low_rank

    def layers_flops(self, tokens: int, context: int, lora: LoRAConfig | None = None) -> float:
        """FLOPs of tokens through all layers, forward, `context` tokens a causal row; see `flops.py`."""
        attention = 2 * self.num_attention_heads * self.head_dim * context
        return tokens * self.num_hidden_layers * (2 * self.layer_params(lora) + attention)

    def head_flops(self, tokens: int) -> float:
        """FLOPs of tokens through the head, forward."""
        return tokens * 2 * self.hidden_size * self.vocab_size


def rope_frequencies(config: LlamaConfig) -> jax.Array:
    """Radians per position for each pair of head dimensions: [H/2], float32; see `RopeScaling`."""
    exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequencies = config.rope_theta**-exponents
    scaling = config.rope_scaling
    if scaling is None or scaling.rope_type == "dynamic":
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    if scaling.rope_type == "yarn":
        kept = _kept_by_yarn(config, scaling)
    else:
        wavelengths = 2 * math.pi / frequencies
        turns = scaling.original_max_position_embeddings / wavelengths
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        kept = jnp.clip(kept, 0.0, 1.0)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def _kept_by_yarn(config: LlamaConfig, scaling: RopeScaling) -> jax.Array:
    """Of each frequency, the share that is not divided: from 1 down to 0 between two pairs of dimensions, [H/2]."""
    size = config.head_dim

    def pair(turns: float) -> float:  # the pair of dimensions that makes so many turns in the original context
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
    factor = None if config.rope_scaling is None else config.rope_scaling.attention_factor
    if factor not in (None, 1):
        cos, sin = cos * factor, sin * factor
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)


def apply_rope(x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate heads [..., T, heads, H]; dimension i is paired with i + H/2, as in Hugging Face's Llama."""
    cos, sin = tables
    return (x.astype(jnp.float32) * cos + swap_halves(x).astype(jnp.float32) * sin).astype(x.dtype)


class LlamaLayer(nnx.Module):
    """One pre-norm decoder layer in two parts, before and after attention; with LoRA on the projections it names."""

    def __init__(self, config: LlamaConfig, lora: LoRAConfig | None, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        c = config
        init = nnx.initializers.normal(c.initializer_range)
        # Every layer adds to the residual stream twice; smaller outputs keep its variance level with depth (GPT-2).
        init_out = nnx.initializers.normal(c.initializer_range / math.sqrt(2 * c.num_hidden_layers))

        def linear(
            shape_in: int | tuple[int, int], shape_out: int | tuple[int, int], kernel_init=init, use_bias=False
        ) -> LoRALinear:
            return LoRALinear(
                shape_in, shape_out, use_bias=use_bias, kernel_init=kernel_init, dtype=dtype, param_dtype=param_dtype,
                rngs=rngs,
            )  # fmt: skip

        def norm(size: int) -> nnx.RMSNorm:
            return nnx.RMSNorm(size, epsilon=c.rms_norm_eps, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        self.input_layernorm = norm(c.hidden_size)
        self.q_proj = linear(c.hidden_size, (c.num_attention_heads, c.head_dim), use_bias=c.qkv_bias)
        self.k_proj = linear(c.hidden_size, (c.num_key_value_heads, c.head_dim), use_bias=c.qkv_bias)
        self.v_proj = linear(c.hidden_size, (c.num_key_value_heads, c.head_dim), use_bias=c.qkv_bias)
        self.o_proj = linear((c.num_attention_heads, c.head_dim), c.hidden_size, init_out)
        if c.qk_norm:
            self.q_norm, self.k_norm = norm(c.head_dim), norm(c.head_dim)
        self.has_qk_norm = c.qk_norm
        self.post_attention_layernorm = norm(c.hidden_size)
        self.gate_proj = linear(c.hidden_size, c.intermediate_size)
        self.up_proj = linear(c.hidden_size, c.intermediate_size)
        self.down_proj = linear(c.intermediate_size, c.hidden_size, init_out)
        if lora is not None:  # last: it changes no other parameter's random numbers
            for name in lora.targets:
                getattr(self, name).add_lora(lora, rngs)

    def project_kv(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Hidden states [R, T, D] to keys, before rotary positions, and values, each [R, T, G, H]."""
        y = materialize(self.input_layernorm(x))
        k = self.k_proj(y)
        return self.k_norm(k) if self.has_qk_norm else k, self.v_proj(y)

    def project_q(self, x: jax.Array) -> jax.Array:
        """Hidden states [R, T, D] to queries, before rotary positions: [R, T, N, H]."""
        q = self.q_proj(materialize(self.input_layernorm(x)))
        return self.q_norm(q) if self.has_qk_norm else q

    def finish(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        """Hidden states [R, T, D] and attention's output [R, T, N, H] to the layer's output: projection, SwiGLU MLP."""
        x = x + checkpoint_name(self.o_proj(attended), "attention_out")
        y = materialize(self.post_attention_layernorm(x))
        gate, up = checkpoint_name(self.gate_proj(y), "gate"), checkpoint_name(self.up_proj(y), "up")
        return x + self.down_proj(materialize(silu_times(gate, up)))


class Llama(nnx.Module):
    """Embedding, stacked layers, final norm and (tied or untied) head. `layers` parameters are [num_layers, ...]."""

    def __init__(
        self, config: LlamaConfig, lora: LoRAConfig | None = None, *,
        dtype: Any = jnp.float32, param_dtype: Any = jnp.float32, rngs: nnx.Rngs,
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

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Embeddings [R, T, D] of token ids [R, T].

        Over a mesh every device looks up its columns for all tokens, then sends rows home. So D numbers a token travel
        and not the table, and gradients are summed in the table's own precision where they stay.
        """
        if jax.sharding.get_abstract_mesh().empty:
            return self.embed_tokens(tokens)
        table = constrain(self.embed_tokens.embedding[...], None, PARAMS)
        x = jnp.take(table, constrain(tokens, "data"), axis=0).astype(self.dtype)
        x = constrain(constrain(x, "data", None, PARAMS), "data", None, "fsdp")
        return constrain(x, ROWS)

    def head(self) -> jax.Array:
        """The matrix [D, V'] from normalised hidden states to logits, as it is stored."""
        return self.embed_tokens.embedding[...].T if self.config.tie_word_embeddings else self.lm_head.kernel[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [R, T, D] to logits [R, T, V], float32: never rounded to `dtype`, and none for V' - V."""
        hidden = self.norm(hidden)
        if self.config.tie_word_embeddings:
            embedding = self.embed_tokens.embedding[...].astype(self.dtype)
            logits = jnp.einsum("...d,vd->...v", hidden, embedding, preferred_element_type=jnp.float32)
        else:
            logits = self.lm_head(hidden)
        return logits[..., : self.config.vocab_size]
