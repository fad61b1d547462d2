"""VoCo-LLaMA as two causal streams that advance layer by layer.

In the paper, text may look at an image's K VoCo tokens and never at the image, by a mask over one long sequence.
That sequence falls apart, exactly, into two ordinary causal ones:

    compress   BOS  V₁ … V_P  ▁ \\n  VoCo₁ … VoCo_K         one segment an image; images never see each other
                                        │ keys (before rotary positions) and values, at every layer
    read                              slot₁ … slot_K  \\n  A chat between … USER: … ASSISTANT: …

At every layer the keys and values of a slot are taken from the compress stream's VoCo tokens, its key rotated to the
slot's own position; all else is causal attention with segment ids. Rotary positions are relative, so this is the
released model's function, to rounding. The slots' keys and values are an image's `Memory`, all that has to be kept to
answer any question about it; training computes it and inference may have stored it, and both then run the same code.

Without VoCo compression (`compressor` 'none', 'average_pool', 'qformer') visual tokens are embeddings that stand in
the read stream like words, and there is no compress stream: LLaVA, and the paper's external compressors.
"""

import dataclasses
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from voco_jax import attention
from voco_jax.models.compressors import AveragePool, QFormer
from voco_jax.models.llama import Llama, LlamaConfig, apply_rope, rope_tables
from voco_jax.models.projector import Projector
from voco_jax.models.stack import apply_if, scan_layers
from voco_jax.models.vit import ViT, ViTConfig

COMPRESSORS = ("voco", "none", "average_pool", "qformer")


@dataclasses.dataclass(frozen=True)
class VoCoConfig:
    """Everything that fixes the function a checkpoint computes, and how to compute it.

    prefix_ids and suffix_ids are what the tokenizer makes of the text before and between image and VoCo tokens
    (Llama's: BOS, and `▁ \\n`); voco_token_id is the one id that all K VoCo tokens share.
    """

    llama: LlamaConfig
    vision: ViTConfig
    compressor: str = "voco"
    num_voco_tokens: int = 1
    voco_token_id: int = 32000
    prefix_ids: tuple[int, ...] = (1,)
    suffix_ids: tuple[int, ...] = (28705, 13)
    num_compressed_tokens: int = 1
    num_qformer_layers: int = 2
    dtype: str = "float32"
    param_dtype: str = "float32"
    attention: str = "xla"
    unroll_layers: bool = False

    def __post_init__(self):
        attention.get_adapter(self.attention)  # a name that does not exist shows itself here
        if self.compressor not in COMPRESSORS:
            raise ValueError(f"compressor must be one of {', '.join(COMPRESSORS)}; found {self.compressor!r}")
        if self.compressor == "voco" and self.num_voco_tokens < 1:
            raise ValueError(f"num_voco_tokens must be at least 1, found {self.num_voco_tokens}")
        if self.compressor == "qformer" and self.llama.hidden_size % self.llama.num_attention_heads:
            raise ValueError(
                f"qformer: hidden_size {self.llama.hidden_size} is no multiple of num_attention_heads "
                f"{self.llama.num_attention_heads}"
            )
        if not 0 <= self.voco_token_id < self.llama.vocab_size:
            raise ValueError(f"voco_token_id {self.voco_token_id} is outside a vocabulary of {self.llama.vocab_size}")

    @property
    def num_visual_tokens(self) -> int:
        """Places of the read stream that one image takes: K slots, or embeddings."""
        if self.compressor == "voco":
            return self.num_voco_tokens
        return self.vision.num_features if self.compressor == "none" else self.num_compressed_tokens

    @property
    def compress_length(self) -> int:
        """Tokens of one image's segment of the compress stream (S); 0 where there is none."""
        if self.compressor != "voco":
            return 0
        return len(self.prefix_ids) + self.vision.num_features + len(self.suffix_ids) + self.num_voco_tokens


class Memory(NamedTuple):
    """What is kept of each row's images: VoCo keys (before rotary positions) and values, each [L, B, I·K, G, H]."""

    keys: jax.Array
    values: jax.Array


class Cache(NamedTuple):
    """Keys (rotated) and values of the read stream, each [L, B, C, G, H]; the first `lengths` [B] places are filled."""

    keys: jax.Array
    values: jax.Array
    lengths: jax.Array


class Read(NamedTuple):
    """A batch of read rows, all integers [R, T]; R/B consecutive rows share the images of one of B rows (often R = B).

    Token ids, positions, and segments (tokens see only their own segment). `visual` is -1 for text; for a visual
    token its index among its row's I·M visual tokens, image by image (M: `VoCoConfig.num_visual_tokens`).
    """

    tokens: jax.Array
    positions: jax.Array
    segment_ids: jax.Array
    visual: jax.Array


class VoCoLlama(nnx.Module):
    """Vision tower, projector and language model, joined."""

    def __init__(self, config: VoCoConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        kwargs = dict(dtype=jnp.dtype(c.dtype), param_dtype=jnp.dtype(c.param_dtype), rngs=rngs)
        self.attention = attention.get_adapter(c.attention)
        self.vision_tower = ViT(c.vision, unroll=c.unroll_layers, **kwargs)
        self.projector = Projector(c.vision.hidden_size, c.llama.hidden_size, **kwargs)
        self.llama = Llama(c.llama, **kwargs)
        if c.compressor == "average_pool":
            self.compressor = AveragePool(c.num_compressed_tokens, c.llama.hidden_size, **kwargs)
        elif c.compressor == "qformer":
            self.compressor = QFormer(
                c.num_compressed_tokens, c.llama.hidden_size, c.llama.num_attention_heads, c.num_qformer_layers,
                **kwargs,
            )  # fmt: skip

    # ---- The public functions: one for training, three for inference -------------------------------------------

    def __call__(self, read: Read, pixel_values: jax.Array | None) -> jax.Array:
        """Next-token logits [B, T, V] (float32) of read rows and their own images [B, I, height, width, 3]."""
        features = self.encode_images(pixel_values) if pixel_values is not None and pixel_values.shape[1] else None
        return self.forward(read, features)

    def encode_images(self, pixel_values: jax.Array) -> jax.Array:
        """Visual embeddings [B, I, P, D] of pictures [B, I, height, width, 3] (one token with external compressors)."""
        features = self.projector(self.vision_tower(pixel_values))
        if self.config.compressor in ("average_pool", "qformer"):
            features = self.compressor(features)
        return features

    def forward(self, read: Read, features: jax.Array | None) -> jax.Array:
        """As `__call__`, from visual embeddings [B, I, P, D]."""
        compress = (
            self._compress_inputs(features) if self.config.compressor == "voco" and features is not None else None
        )
        _, hidden, _, _ = self._run(compress, read, self._read_inputs(read, features))
        return self.llama.logits(hidden)

    def compress(self, features: jax.Array) -> Memory:
        """The memory of the images whose embeddings are [B, I, P, D]."""
        self._require_voco("compress")
        _, _, memory, _ = self._run(self._compress_inputs(features))
        return memory

    def compress_logits(self, features: jax.Array) -> jax.Array:
        """Logits [B, I, S, V] of the compress stream itself: no use but to compare with other implementations."""
        self._require_voco("compress_logits")
        hidden, _, _, _ = self._run(self._compress_inputs(features), whole_last_layer=True)
        return self.llama.logits(hidden)

    def prefill(self, read: Read, lengths: jax.Array, visual: Memory | jax.Array | None) -> tuple[jax.Array, Cache]:
        """Read prompts [B, T] of the given lengths (the rest is padding on the right), one conversation a row.

        `visual` is the images' `Memory`, or their embeddings without VoCo compression, or None for text alone.
        Returns the logits [B, V] of each prompt's last token and the cache, whose capacity is T.
        """
        memory, features = (visual, None) if isinstance(visual, Memory) else (None, visual)
        _, hidden, _, (keys, values) = self._run(None, read, self._read_inputs(read, features), memory)
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
        return self.llama.logits(last)[:, 0], Cache(keys, values, lengths)

    def decode(self, tokens: jax.Array, positions: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """One step: tokens [B] at positions [B] join the cache; returns the logits [B, V] and the cache."""
        read = Read(
            tokens[:, None], positions[:, None], jnp.ones_like(tokens)[:, None], -jnp.ones_like(tokens)[:, None]
        )
        _, hidden, _, (keys, values) = self._run(None, read, self._read_inputs(read, None), cache=cache)
        return self.llama.logits(hidden)[:, 0], Cache(keys, values, cache.lengths + 1)

    # ---- Inputs of the streams ---------------------------------------------------------------------------------

    def _compress_inputs(self, features: jax.Array) -> jax.Array:
        """[B, I, P, D] to segments [B, I, S, D]: prefix, image, suffix, K VoCo tokens."""
        c = self.config
        num_rows, num_images, _, hidden_size = features.shape

        def text(ids):
            embedded = self.llama.embed_tokens(jnp.array(ids, jnp.int32))
            return jnp.broadcast_to(embedded, (num_rows, num_images, len(ids), hidden_size))

        suffix = (*c.suffix_ids, *(c.voco_token_id,) * c.num_voco_tokens)
        return jnp.concatenate([text(c.prefix_ids), features, text(suffix)], axis=2)

    def _read_inputs(self, read: Read, features: jax.Array | None) -> jax.Array:
        """Embeddings [B, T, D]; without VoCo compression the visual tokens' come from the images' [B, I, M, D]."""
        embedded = self.llama.embed_tokens(read.tokens)
        if self.config.compressor == "voco" or features is None:
            return embedded
        return fill_visual(embedded, features.reshape(len(features), -1, features.shape[-1]), read.visual)

    def _require_voco(self, what: str):
        if self.config.compressor != "voco":
            raise ValueError(f"{what}: a model with compressor {self.config.compressor!r} has no compress stream")

    # ---- The two streams ---------------------------------------------------------------------------------------

    def _run(
        self,
        compress: jax.Array | None,
        read: Read | None = None,
        read_embeddings: jax.Array | None = None,
        memory: Memory | None = None,
        cache: Cache | None = None,
        *,
        whole_last_layer: bool = False,
    ):
        """Run the streams that are given through all layers.

        compress [B, I, S, D] makes the memory that `read` uses; without it, `memory` is what was kept of an earlier
        run. With `cache`, `read` is one token a row that joins it. Returns (compress hidden states, read hidden
        states, memory, (keys, values) of the read stream), None where there is nothing.
        """
        c, adapter = self.config, self.attention
        K, last = c.num_voco_tokens, c.llama.num_hidden_layers - 1
        compress_rope = None if compress is None else rope_tables(c.llama, jnp.arange(compress.shape[2]))
        read_rope = None if read is None else rope_tables(c.llama, read.positions)

        def body(layer, carry, kept, index):
            compress, x = carry
            memory, cached = kept
            if compress is not None:
                k, v = layer.project_kv(compress)
                memory = tuple(m[:, :, -K:].reshape(len(m), -1, *m.shape[3:]) for m in (k, v))

                def advance(compress):
                    q = apply_rope(layer.project_q(compress), compress_rope)
                    q, k_, v_ = (m.reshape(-1, *m.shape[2:]) for m in (q, apply_rope(k, compress_rope), v))
                    return layer.finish(compress, adapter.causal(q, k_, v_).reshape(*compress.shape[:3], *q.shape[2:]))

                # Nobody reads what the compress stream's last layer would put out: its K and V are all it is for.
                compress = apply_if(whole_last_layer or index != last, advance, compress)
            if x is None:
                return (compress, x), (memory, None)
            q = apply_rope(layer.project_q(x), read_rope)
            k, v = layer.project_kv(x)
            if memory is not None:
                k, v = (fill_visual(text, visual, read.visual) for text, visual in zip((k, v), memory, strict=True))
            k = apply_rope(k, read_rope)
            if cached is None:
                attended = adapter.causal(q, k, v, read.segment_ids)
            else:
                k, v = (append(old, new, cache.lengths) for old, new in zip(cached, (k, v), strict=True))
                attended = adapter.cached(q, k, v, cache.lengths + 1)
            return (compress, layer.finish(x, attended)), (memory, (k, v))

        kept = (memory, None if cache is None else (cache.keys, cache.values))
        (compress, x), (memory, keys_values) = scan_layers(
            body, (compress, read_embeddings), self.llama.layers, kept, unroll=c.unroll_layers
        )
        return compress, x, None if memory is None else Memory(*memory), keys_values


def fill_visual(text: jax.Array, visual: jax.Array, index: jax.Array) -> jax.Array:
    """`text` [R, T, ...] with row `index` [R, T] of `visual` [B, M, ...] wherever that is not negative.

    R is a multiple of B: R/B consecutive read rows share one row of images.
    """
    R, T, *rest = text.shape
    if R % len(visual):
        raise ValueError(f"{R} read rows cannot share the images of {len(visual)} rows")
    places = jnp.maximum(index, 0).reshape(len(visual), -1)
    taken = jax.vmap(lambda rows, i: rows[i])(visual, places).reshape(R, T, *rest)
    return jnp.where(index.reshape(R, T, *(1,) * len(rest)) >= 0, taken, text)


def append(old: jax.Array, new: jax.Array, lengths: jax.Array) -> jax.Array:
    """`new` [B, 1, ...] written into `old` [B, C, ...] at each row's place `lengths` [B]."""
    return jax.vmap(lambda o, n, at: jax.lax.dynamic_update_slice_in_dim(o, n, at, axis=0))(old, new, lengths)
