"""How an image's embeddings reach the text, by `config.model.compressor`: one class each, one table.

| name            | class          | what is in the read stream for an image                  | what compresses      |
|-----------------|----------------|----------------------------------------------------------|----------------------|
| `voco`          | `VoCo`         | K slots, whose keys and values the compress stream makes | the language model   |
| `voco_embedding`| `VoCoEmbedding`| K embeddings, as tokens: the VoCo tokens' last hidden    | the language model,  |
|                 |                | states, normed and projected                             | then Linear          |
| `none`          | `Uncompressed` | all P embeddings, as tokens (LLaVA)                      | nothing              |
| `average_pool`  | `AveragePool`  | M means of patches, as tokens (the paper's Table 1)      | a mean, then Linear  |
| `qformer`       | `QFormer`      | M queries that read the image, as tokens (Table 1)       | a transformer beside |

The first two have a compress stream, and what it makes of an image is the image's memory: keys and values of K tokens
at all layers, or K embeddings.

All of them train by the same loss. To add one, write a subclass of `Compressor` and name it in `COMPRESSORS`; the rest
of the package asks the class and never compares names.
"""

from typing import TYPE_CHECKING, Any, ClassVar

from flax import nnx
import jax
import jax.numpy as jnp

from voco_jax.models.linear import Linear
from voco_jax.models.stack import scan_layers, stack_layers

if TYPE_CHECKING:
    from voco_jax.models.config import VoCoConfig


KEYS_AND_VALUES, EMBEDDINGS = "keys and values", "embeddings"  # the kinds of memory, as files and messages name them


class Compressor(nnx.Module):
    """What lies between the projector and the language model; as a class, what there is to know of it in advance."""

    memory_kind: ClassVar[str] = ""  # of what a compress stream makes of images, to be kept; '': there is none
    has_weights: ClassVar[bool] = False  # it has parameters of its own, which only its own training makes
    has_voco_tokens: ClassVar[bool] = False  # VoCo tokens are in the text; their embedding trains, frozen or not

    def __init__(self, config: "VoCoConfig", **kwargs: Any):
        """`kwargs` are dtype, param_dtype and rngs, for weights; this one has none."""

    def __call__(self, features: jax.Array) -> jax.Array:
        """Embeddings of images [..., P, D] to those that go into a stream: [..., P, D] or [..., M, D]."""
        return features

    def embed(self, hidden: jax.Array) -> jax.Array:
        """VoCo tokens' last hidden states [..., D] to the embeddings [..., D] that are the memory, of that kind."""
        return hidden

    @classmethod
    def check(cls, config: "VoCoConfig") -> None:
        """ValueError for a config that this compressor cannot be made of."""

    @classmethod
    def num_visual_tokens(cls, config: "VoCoConfig") -> int:
        """Places of the read stream that one image takes (M)."""
        return config.num_compressed_tokens

    @classmethod
    def keeps_text(cls, num_voco_tokens: int) -> bool:
        """Whether every image and newline stays where the text has it, as in LLaVA's own prompts."""
        return False


class VoCo(Compressor):
    """The paper's: the language model itself compresses an image into K VoCo tokens, in the compress stream."""

    memory_kind = KEYS_AND_VALUES
    has_voco_tokens = True

    @classmethod
    def check(cls, config: "VoCoConfig") -> None:
        if config.num_voco_tokens < 1:
            raise ValueError(f"num_voco_tokens: expected at least 1, found {config.num_voco_tokens}")

    @classmethod
    def num_visual_tokens(cls, config: "VoCoConfig") -> int:
        return config.num_voco_tokens


class VoCoEmbedding(VoCo):
    """VoCo tokens whose last hidden states, normed and projected, are read as tokens: D numbers each are the memory.

    The projection begins as the identity, as AutoCompressors read last hidden states (arXiv:2305.14788), times the
    standard deviation of first weights: embeddings are then as large as those of words.
    """

    memory_kind = EMBEDDINGS
    has_weights = True

    def __init__(self, config: "VoCoConfig", *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        c, kwargs = config.llama, dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        def scaled_identity(key: jax.Array, shape: tuple[int, int], dtype: Any, **_: Any) -> jax.Array:
            return c.initializer_range * jnp.eye(shape[0], shape[1], dtype=dtype)

        self.norm = nnx.RMSNorm(c.hidden_size, epsilon=c.rms_norm_eps, **kwargs)
        self.linear = Linear(c.hidden_size, c.hidden_size, kernel_init=scaled_identity, **kwargs)

    def embed(self, hidden: jax.Array) -> jax.Array:
        return self.linear(self.norm(hidden))


class Uncompressed(Compressor):
    """LLaVA: all embeddings are read. Text may have VoCo tokens, so that the model can be compared with a VoCo one."""

    has_voco_tokens = True

    @classmethod
    def num_visual_tokens(cls, config: "VoCoConfig") -> int:
        return config.vision.num_features

    @classmethod
    def keeps_text(cls, num_voco_tokens: int) -> bool:
        return not num_voco_tokens


class AveragePool(Compressor):
    """Mean over M equal runs of patches (M = 1: the whole image), then Linear: [..., P, D] to [..., M, D]."""

    has_weights = True

    def __init__(self, config: "VoCoConfig", **kwargs: Any):
        self.num_tokens = config.num_compressed_tokens
        self.linear = Linear(config.llama.hidden_size, config.llama.hidden_size, **kwargs)

    def __call__(self, features: jax.Array) -> jax.Array:
        *lead, num_patches, hidden_size = features.shape
        if num_patches % self.num_tokens:
            expected = f"expected a divisor of the {num_patches} patches"
            raise ValueError(f"num_compressed_tokens: {expected}, found {self.num_tokens}")
        runs = features.reshape(*lead, self.num_tokens, num_patches // self.num_tokens, hidden_size)
        return self.linear(runs.mean(axis=-2))


class QFormerLayer(nnx.Module):
    """Pre-norm self-attention among the queries, cross-attention to the image, GELU MLP."""

    def __init__(self, hidden_size: int, num_heads: int, **kwargs: Any):
        def attention() -> nnx.MultiHeadAttention:
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


class QFormer(Compressor):
    """BLIP-2's: M learned queries read the image's features: [..., P, D] to [..., M, D]."""

    has_weights = True

    def __init__(self, config: "VoCoConfig", *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        kwargs = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        hidden_size, shape = config.llama.hidden_size, (config.num_compressed_tokens, config.llama.hidden_size)
        heads = config.llama.num_attention_heads
        self.dtype = dtype
        self.queries = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), shape, param_dtype))
        self.norm_features = nnx.LayerNorm(hidden_size, **kwargs)
        self.layers = stack_layers(
            lambda rngs: QFormerLayer(hidden_size, heads, dtype=dtype, param_dtype=param_dtype, rngs=rngs),
            config.num_qformer_layers,
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

    @classmethod
    def check(cls, config: "VoCoConfig") -> None:
        if config.llama.hidden_size % config.llama.num_attention_heads:
            expected = f"expected a multiple of num_attention_heads ({config.llama.num_attention_heads}), for 'qformer'"
            raise ValueError(f"llama.hidden_size: {expected}; found {config.llama.hidden_size}")


COMPRESSORS: dict[str, type[Compressor]] = {
    "voco": VoCo,
    "voco_embedding": VoCoEmbedding,
    "none": Uncompressed,
    "average_pool": AveragePool,
    "qformer": QFormer,
}
