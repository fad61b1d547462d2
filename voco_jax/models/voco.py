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
import functools
from typing import NamedTuple

import einops
from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from voco_jax import attention
from voco_jax.models.compressors import AveragePool, QFormer
from voco_jax.models.linear import LoRAConfig
from voco_jax.models.llama import Llama, LlamaConfig, apply_rope, rope_tables
from voco_jax.models.projector import Projector
from voco_jax.models.stack import REMAT, scan_layers
from voco_jax.models.vit import ViT, ViTConfig
from voco_jax.parallel.mesh import IMAGES, ROWS, axis_size, constrain

COMPRESSORS = ("voco", "none", "average_pool", "qformer")
LONG_PROMPT = 512  # tokens from which on a fused kernel reads a prompt


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
    projector_layers: int = 2
    dtype: str = "float32"
    param_dtype: str = "float32"
    attention: str = "xla"
    remat: str = "none"
    unroll_layers: bool = False
    lora: LoRAConfig | None = None

    def __post_init__(self):
        attention.get_adapter(self.attention)  # a name that does not exist shows itself here
        if self.remat != "none" and self.remat not in REMAT:
            raise ValueError(f"remat must be one of none, {', '.join(REMAT)}; found {self.remat!r}")
        if self.compressor not in COMPRESSORS:
            raise ValueError(f"compressor must be one of {', '.join(COMPRESSORS)}; found {self.compressor!r}")
        if self.projector_layers < 1:
            raise ValueError(f"projector_layers must be at least 1, found {self.projector_layers}")
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

    def check_kernels(self, row_length: int, *, training: bool) -> None:
        """ValueError, at set-up, where the attention kernel's library refuses this model, or read rows so long."""
        attention.check_kernels(
            self.attention, heads=self.llama.num_attention_heads, kv_heads=self.llama.num_key_value_heads,
            size=self.llama.head_dim, dtype=self.dtype, segment_length=self.compress_length, row_length=row_length,
            training=training,
        )  # fmt: skip


class Memory(NamedTuple):
    """What is kept of each row's images: VoCo keys (before rotary positions) and values, each [L, B, I·K, G, H]."""

    keys: jax.Array
    values: jax.Array

    def __repr__(self) -> str:
        return f"Memory(keys {self.keys.dtype}{list(self.keys.shape)}, values of the same shape)"


class Cache(NamedTuple):
    """Keys (rotated) and values of the read stream, each [L, R, C, G, H]; a row's token of position p is at place p."""

    keys: jax.Array
    values: jax.Array


class Read(NamedTuple):
    """A batch of read rows, all integers [R, T]; R/B consecutive rows share the images of one of B rows (often R = B).

    Token ids, positions, and segments (tokens see only their own segment). `slot_index` is -1 for text; for a visual
    token its index among its row's I·M visual tokens, image by image (M: `VoCoConfig.num_visual_tokens`).
    """

    tokens: jax.Array
    positions: jax.Array
    segment_ids: jax.Array
    slot_index: jax.Array


class VoCoLlama(nnx.Module):
    """Vision tower, projector and language model, joined."""

    def __init__(self, config: VoCoConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        kwargs = dict(dtype=jnp.dtype(c.dtype), param_dtype=jnp.dtype(c.param_dtype), rngs=rngs)
        self.attention = attention.get_adapter(c.attention)
        self.vision_tower = ViT(c.vision, unroll=c.unroll_layers, remat=c.remat, **kwargs)
        self.projector = Projector(c.vision.hidden_size, c.llama.hidden_size, c.projector_layers, **kwargs)
        self.llama = Llama(c.llama, c.lora, **kwargs)
        if c.compressor == "average_pool":
            self.compressor = AveragePool(c.num_compressed_tokens, c.llama.hidden_size, **kwargs)
        elif c.compressor == "qformer":
            self.compressor = QFormer(
                c.num_compressed_tokens, c.llama.hidden_size, c.llama.num_attention_heads, c.num_qformer_layers,
                **kwargs,
            )  # fmt: skip

    # ---- The public functions: for training, and for inference --------------------------------------------------

    def __call__(self, read: Read, pixel_values: jax.Array | None) -> jax.Array:
        """Next-token logits [R, T, V] (float32) of read rows and their images [B, I, height, width, 3]."""
        return self.llama.logits(self.hidden(read, pixel_values))

    def hidden(self, read: Read, pixel_values: jax.Array | None) -> jax.Array:
        """As `__call__`, before the final norm and the head: [R, T, D]."""
        features = self.encode_images(pixel_values) if pixel_values is not None and pixel_values.shape[1] else None
        return self._hidden(read, features)

    def read(self, read: Read, memory: Memory) -> jax.Array:
        """As `hidden`, of rows whose images were compressed before, into a memory [L, B, I·K, G, H]."""
        self._require_voco("read")
        _, hidden, _ = self._run(None, read, self._read_inputs(read, None), memory=memory)
        return hidden

    def encode_images(self, pixel_values: jax.Array) -> jax.Array:
        """Visual embeddings [B, I, P, D] of pictures [B, I, height, width, 3] (one token with external compressors)."""
        features = self.projector(self.vision_tower(by_device(pixel_values)))
        if self.config.compressor in ("average_pool", "qformer"):
            features = self.compressor(features)
        return constrain(by_row(features, *pixel_values.shape[:2]), ROWS, "frame")

    def forward(self, read: Read, features: jax.Array | None) -> jax.Array:
        """As `__call__`, from visual embeddings [B, I, P, D]."""
        return self.llama.logits(self._hidden(read, features))

    def _hidden(self, read: Read, features: jax.Array | None) -> jax.Array:
        compress = self._compress_rows(features) if self.config.compressor == "voco" and features is not None else None
        _, hidden, _ = self._run(compress, read, self._read_inputs(read, features))
        return hidden

    def compress(self, features: jax.Array) -> Memory:
        """The memory of the images whose embeddings are [B, I, P, D]."""
        self._require_voco("compress")
        _, _, memory = self._run(self._compress_rows(features))
        return memory

    def compress_logits(self, features: jax.Array) -> jax.Array:
        """Logits [B, I, S, V] of the compress stream itself: no use but to compare with other implementations."""
        self._require_voco("compress_logits")
        rows = self._compress_rows(features)
        hidden, _, _ = self._run(rows, whole_last_layer=True)
        segments = hidden[:, : rows.segments_per_row * self.config.compress_length]
        return self.llama.logits(
            by_row(segments.reshape(-1, self.config.compress_length, hidden.shape[-1]), *rows.images)
        )

    def fill(self, memory: Memory, slots: jax.Array, cache: Cache | None = None) -> Cache:
        """Memories into a cache: place p of row r is slot `slots[r, p]` of [R, C]; where that is -1, what `cache` has.

        R/B consecutive rows share the images of one of the memory's B rows. Without `cache` a new one is made, empty
        but for the slots. Keys are rotated to the places that they come to.
        """
        self._require_voco("fill")
        cache = self.empty_cache(*slots.shape) if cache is None else cache
        at_places = rope_tables(self.config.llama, jnp.arange(slots.shape[1]))
        is_slot = (slots >= 0)[..., None, None]

        def filled(old, visual, rotate):
            taken = fill_slots(jnp.zeros_like(old), visual.astype(old.dtype), slots)
            return jnp.where(is_slot, rotate(taken), old)

        keys = jax.vmap(functools.partial(filled, rotate=lambda k: apply_rope(k, at_places)))(cache.keys, memory.keys)
        values = jax.vmap(functools.partial(filled, rotate=lambda v: v))(cache.values, memory.values)
        return Cache(*(constrain(x, None, ROWS, None, "tensor") for x in (keys, values)))

    def empty_cache(self, rows: int, places: int) -> Cache:
        """A cache of R rows of C places in which nothing stands yet."""
        c = self.config.llama
        shape = (c.num_hidden_layers, rows, places, c.num_key_value_heads, c.head_dim)
        empty = constrain(jnp.zeros(shape, self.config.dtype), None, ROWS, None, "tensor")
        return Cache(empty, empty)

    def extend(
        self, tokens: jax.Array, positions: jax.Array, cache: Cache,
        slot_index: jax.Array | None = None, features: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:  # fmt: skip
        """Text joins the cache: tokens [R, T] at `positions` (ascending; -1: padding), each seeing all up to its own.

        A prompt, a later turn or a single token to be continued; the slots are there already (`fill`) and cost
        nothing here. Without VoCo compression images are tokens too: `slot_index` [R, T] as in `Read`, of `features`
        [B, I, P, D]. Every place up to a token's position must have been filled. Returns hidden states [R, T, D], as
        `hidden` does, and the cache.
        """
        capacity = cache.keys.shape[2]
        # Padding is written beyond the end, which is nowhere; each at a place of its own, so that places are distinct
        places = jnp.where(positions >= 0, positions, capacity + jnp.arange(tokens.shape[1]))
        write = jax.vmap(lambda old, new, at: old.at[at].set(new, mode="drop", unique_indices=True))
        given, whole = positions, self._reads_whole_rows(tokens.shape[1], capacity)
        if whole:
            empty = jnp.full((len(tokens), capacity), -1)
            tokens, is_text = write(jnp.zeros_like(empty), tokens, places), write(empty, positions, places) >= 0
            slot_index = None if slot_index is None else write(empty, slot_index, places)
            positions = jnp.broadcast_to(jnp.arange(capacity), empty.shape)
            segment_ids = (positions <= given.max(axis=1, keepdims=True)).astype(jnp.int32)
        rope = rope_tables(self.config.llama, positions)

        def body(layer, carry, index):
            x, *cached = carry
            q = apply_rope(layer.project_q(x), rope)
            k, v = layer.project_kv(x)
            new, old = (apply_rope(k, rope), v), [c[index] for c in cached]
            if whole:
                k, v = (jnp.where(is_text[..., None, None], n, o) for n, o in zip(new, old, strict=True))
                attended = self.attention.causal(q, k, v, segment_ids)
            else:
                k, v = (write(o, n, places) for n, o in zip(new, old, strict=True))
                attended = self.attention.cached(q, k, v, positions)
            x = constrain(layer.finish(x, attended), ROWS)
            return (x, *(c.at[index].set(here) for c, here in zip(cached, (k, v), strict=True))), None

        read = Read(tokens, positions, None, slot_index)
        (x, *cached), _ = scan_layers(
            body, (self._read_inputs(read, features), *cache), self.llama.layers,
            jnp.arange(self.config.llama.num_hidden_layers),
            dtype=jnp.dtype(self.config.dtype), unroll=self.config.unroll_layers,
        )  # fmt: skip
        if whole:
            x = jnp.take_along_axis(x, jnp.maximum(given, 0)[..., None], axis=1)
        return x, Cache(*cached)

    def _reads_whole_rows(self, tokens: int, places: int) -> bool:
        """Whether so many tokens are read as whole rows of the cache, what is there already among them.

        A fused kernel takes whole rows only. For long prompts it is worth computing some places for nothing.
        """
        return attention.is_fused(self.config.attention) and tokens >= LONG_PROMPT and 4 * places <= 5 * tokens

    # ---- Inputs of the streams ---------------------------------------------------------------------------------

    def _compress_rows(self, features: jax.Array) -> "CompressRows":
        """[B, I, P, D] to segments (prefix, image, suffix, K VoCo tokens), laid out over rows as the kernel likes them.

        Images stay on the device that has their embeddings: a device's images, and no others, share its rows.
        """
        c = self.config
        images, hidden_size = features.shape[:2], features.shape[-1]
        features = by_device(features)
        n = len(features)
        per_row, length = self.attention.row_shape(n // axis_size(*IMAGES), c.compress_length)

        def text(ids):
            embedded = self.llama.embed_tokens(jnp.array(ids, jnp.int32))
            return jnp.broadcast_to(embedded, (n, len(ids), hidden_size))

        suffix = (*c.suffix_ids, *(c.voco_token_id,) * c.num_voco_tokens)
        x = jnp.concatenate([text(c.prefix_ids), features, text(suffix)], axis=1)
        x = x.reshape(n // per_row, per_row * c.compress_length, hidden_size)
        x = constrain(jnp.pad(x, [(0, 0), (0, length - x.shape[1]), (0, 0)]), IMAGES)
        return CompressRows(x, per_row, images)

    def _read_inputs(self, read: Read, features: jax.Array | None) -> jax.Array:
        """Embeddings [B, T, D]; without VoCo compression the visual tokens' come from the images' [B, I, M, D]."""
        embedded = self.llama.embed(read.tokens)
        if self.config.compressor == "voco" or features is None:
            return embedded
        return fill_slots(embedded, features.reshape(len(features), -1, features.shape[-1]), read.slot_index)

    def _require_voco(self, what: str):
        if self.config.compressor != "voco":
            raise ValueError(f"{what}: a model with compressor {self.config.compressor!r} has no compress stream")

    # ---- The two streams ---------------------------------------------------------------------------------------

    def _run(
        self,
        compress: "CompressRows | None",
        read: Read | None = None,
        read_embeddings: jax.Array | None = None,
        *,
        memory: Memory | None = None,
        whole_last_layer: bool = False,
    ):
        """Run the streams that are given through all layers; compress makes the memory that `read` uses, if not given.

        Returns (compress hidden states [rows, C, D], read hidden states, the memory made), None where there is nothing.
        """
        c, adapter = self.config, self.attention
        K, S = c.num_voco_tokens, c.compress_length
        rows, segments = (None, None) if compress is None else (compress.rows, compress)
        compress_rope = None if rows is None else rope_tables(c.llama, jnp.arange(rows.shape[1]) % S)
        read_rope = None if read is None else rope_tables(c.llama, read.positions)

        def body(layer, carry, kept, *, keys_and_values_only=False):
            compress, x = carry
            made = None
            if compress is not None:
                k, v = layer.project_kv(compress)
                kept = made = tuple(segments.slots(m, S, K) for m in (k, v))
                if not keys_and_values_only:
                    q = checkpoint_name(apply_rope(layer.project_q(compress), compress_rope), "query")
                    k, v = checkpoint_name(apply_rope(k, compress_rope), "key"), checkpoint_name(v, "value")
                    compress = constrain(layer.finish(compress, adapter.chunked(q, k, v, S)), IMAGES)
            if x is None:
                return (compress, x), made
            q = checkpoint_name(apply_rope(layer.project_q(x), read_rope), "query")
            k, v = layer.project_kv(x)
            if kept is not None:
                k, v = (fill_slots(text, visual, read.slot_index) for text, visual in zip((k, v), kept, strict=True))
            k, v = checkpoint_name(apply_rope(k, read_rope), "key"), checkpoint_name(v, "value")
            x = constrain(layer.finish(x, adapter.causal(q, k, v, read.segment_ids)), ROWS)
            return (compress, x), made

        # Nobody reads what the compress stream's last layer would put out: its K and V are all it is for.
        shorten = compress is not None and not whole_last_layer
        (compress, x), made = scan_layers(
            body, (rows, read_embeddings), self.llama.layers, memory,
            last=functools.partial(body, keys_and_values_only=True) if shorten else None,
            dtype=jnp.dtype(c.dtype), unroll=c.unroll_layers, remat=c.remat,
        )  # fmt: skip
        return compress, x, None if made is None else Memory(*made)


class CompressRows(NamedTuple):
    """The compress stream's input: `rows` [rows, C, D], each with some images' segments, then padding.

    Images are in the order of `by_device`.
    """

    rows: jax.Array
    segments_per_row: int
    images: tuple[int, int]  # B, I

    def slots(self, x: jax.Array, segment_length: int, num_tokens: int) -> jax.Array:
        """The last places of each segment of [rows, C, G, H]: [B, I·K, G, H], on all devices that share the rows."""
        ends = [(i + 1) * segment_length for i in range(self.segments_per_row)]
        x = jnp.stack([x[:, end - num_tokens : end] for end in ends], axis=1)
        x = by_row(x.reshape(-1, num_tokens, *x.shape[3:]), *self.images)
        # Over the frame axis this is where a row's frames meet, and all that ever travels of them.
        return constrain(x.reshape(len(x), -1, *x.shape[3:]), ROWS, None, "tensor")


def by_device(x: jax.Array) -> jax.Array:
    """Images [B, I, ...] to [B·I, ...], ordered (row shard, frame shard, row, image): each device's in one piece."""
    x = einops.rearrange(x, "(r b) (f i) ... -> (r f b i) ...", r=axis_size(*ROWS), f=axis_size("frame"))
    return constrain(x, IMAGES)


def by_row(x: jax.Array, num_rows: int, num_images: int) -> jax.Array:
    """The way back: [B·I, ...] to [B, I, ...]."""
    r, f = axis_size(*ROWS), axis_size("frame")
    return einops.rearrange(x, "(r f b i) ... -> (r b) (f i) ...", r=r, f=f, b=num_rows // r, i=num_images // f)


def fill_slots(text: jax.Array, visual: jax.Array, slot_index: jax.Array) -> jax.Array:
    """`text` [R, T, ...] with row `slot_index` [R, T] of `visual` [B, M, ...] wherever that is not negative.

    R is a multiple of B: R/B consecutive read rows share one row of images.
    """
    R, T, *rest = text.shape
    if R % len(visual):
        raise ValueError(f"{R} read rows cannot share the images of {len(visual)} rows")
    places = jnp.maximum(slot_index, 0).reshape(len(visual), -1)
    taken = jax.vmap(lambda rows, i: rows[i])(visual, places).reshape(R, T, *rest)
    return jnp.where(slot_index.reshape(R, T, *(1,) * len(rest)) >= 0, taken, text)
