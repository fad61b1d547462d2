"""VoCo-LLaMA as two causal streams that advance layer by layer.

In the paper, text may look at an image's K VoCo tokens and never at the image, by a mask over one long sequence.
That sequence falls apart, exactly, into two ordinary causal ones:

    compress   BOS  V₁ … V_P  ▁ \\n  VoCo₁ … VoCo_K         one segment an image; images never see each other
                                        │ keys (before rotary positions) and values, at every layer
    read                              slot₁ … slot_K  \\n  system prompt  question  answer

At every layer the keys and values of a slot are taken from the compress stream's VoCo tokens, its key rotated to the
slot's own position; all else is causal attention with segment ids. Rotary positions are relative, so this is the
released model's function, to rounding. The slots' keys and values are an image's `Memory`, all that has to be kept to
answer any question about it; training computes it and inference may have stored it, and both then run the same code.

A smaller memory ('voco_embedding') are the VoCo tokens' last hidden states, projected: the compress stream runs to its
end first, and they stand in the read stream like words. Other compressors (`compressors.py`) have no compress stream:
all their visual tokens are such embeddings. Images enter the language model in two places: `_compress_rows` and
`_read_inputs`.

Shapes, everywhere in models, attention and parallel:

    B  rows of images (packs)           R  read rows, a multiple of B      T  tokens of a read row
    I  images of a row                  P  embeddings of an image          S  tokens of a compress segment
    C  places of a compress row, or of a row of the cache                  L  decoder layers
    K  VoCo tokens of an image          M  places that an image takes in the read stream: K, P or others'
    D  hidden size    F  MLP width      N  query heads    G  key and value heads    H  head size
    V  vocabulary     V' the same, padded so that it divides over devices
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import einops
from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from voco_jax.attention import get_adapter
from voco_jax.attention.windows import binding, window_of
from voco_jax.models.compressors import COMPRESSORS, EMBEDDINGS, KEYS_AND_VALUES
from voco_jax.models.config import VoCoConfig
from voco_jax.models.llama import Llama, apply_rope, rope_tables
from voco_jax.models.patch_attention import look_compressed, look_whole
from voco_jax.models.projector import Projector
from voco_jax.models.read import Read, WholeLayout, whole_layout
from voco_jax.models.stack import scan_layers
from voco_jax.models.vit import ViT
from voco_jax.parallel.mesh import IMAGES, ROWS, axis_size, constrain

LONG_PROMPT = 512  # tokens from which on a fused kernel reads a prompt


class Memory(NamedTuple):
    """What is kept of images: their VoCo tokens' keys (before rotary positions) and values, each [L, B, I·K, G, H]."""

    keys: jax.Array
    values: jax.Array

    def __repr__(self) -> str:
        return f"Memory(keys {self.keys.dtype}{list(self.keys.shape)}, values of the same shape)"


class Cache(NamedTuple):
    """Keys (rotated) and values of the read stream, each [L, R, C, G, H]; the token of position p is at place p."""

    keys: jax.Array
    values: jax.Array


class ReadOutput(NamedTuple):
    """What the read stream leaves: `hidden` [R, T, D] before the final norm; where they are asked for, `layers`
    [L, R, T, D], the hidden states after each layer, and `attention` [L-1, B, I, P] (float32) to each image's patches.

    `attention` is a distribution over an image's patches (zeros where nobody looks at the image), the mean over heads
    and tokens that look: compressed the K VoCo tokens, whole the text's. The compress stream's last layer has none.
    """

    hidden: jax.Array
    layers: jax.Array | None = None
    attention: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Whole:
    """How text reads images whole (`read.py`): a read row has room for `most` of them.

    `constant`: nothing in this stream has a gradient. `slots_per_image`: of the rows, where they are another model's
    (None: K).
    """

    most: int
    constant: bool = False
    slots_per_image: int | None = None


class VoCoLlama(nnx.Module):
    """Vision tower, projector and language model, joined."""

    def __init__(self, config: VoCoConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        kwargs: dict[str, Any] = dict(dtype=jnp.dtype(c.dtype), param_dtype=jnp.dtype(c.param_dtype), rngs=rngs)
        self.attention = get_adapter(c.attention)
        self.vision_tower = ViT(c.vision, attention=c.attention, unroll=c.unroll_layers, remat=c.remat, **kwargs)
        widths = c.vision.feature_size, c.llama.hidden_size
        self.projector = Projector(*widths, c.projector_layers, use_bias=c.projector_bias, **kwargs)
        self.llama = Llama(c.llama, c.lora, **kwargs)
        self.compressor = c.compressor_class(c, **kwargs)

    # ---- For training ------------------------------------------------------------------------------------------

    def __call__(self, read: Read, pixel_values: jax.Array | None) -> jax.Array:
        """Next-token logits [R, T, V] (float32) of read rows and their images [B, I, height, width, 3]."""
        return self.llama.logits(self.hidden(read, pixel_values))

    def hidden(self, read: Read, pixel_values: jax.Array | None) -> jax.Array:
        """As `__call__`, before the final norm and the head: [R, T, D]."""
        features = self.encode_images(pixel_values) if pixel_values is not None and pixel_values.shape[1] else None
        return self._hidden(read, features)

    def read(self, read: Read, memory: Memory | jax.Array) -> jax.Array:
        """As `hidden`, of rows whose images were compressed before: `memory` is what `compress` returned."""
        self._require_memory("read")
        slots, embeddings = (memory, None) if isinstance(memory, Memory) else (None, memory)
        return self._run(None, read, self._read_inputs(read, embeddings), memory=slots).read.hidden

    def encode_images(self, pixel_values: jax.Array) -> jax.Array:
        """Embeddings [B, I, P, D] of pictures [B, I, height, width, 3]; [B, I, M, D] with a compressor of its own."""
        features = self.compressor(self.projector(self.vision_tower(by_device(pixel_values))))
        return constrain(by_row(features, *pixel_values.shape[:2]), ROWS, "frame")

    def forward(self, read: Read, features: jax.Array | None) -> jax.Array:
        """As `__call__`, from visual embeddings [B, I, P, D]."""
        return self.llama.logits(self._hidden(read, features))

    def _hidden(self, read: Read, features: jax.Array | None) -> jax.Array:
        if features is not None and self.config.memory_kind == EMBEDDINGS:
            return self.read(read, self.compress(features))
        compress = self._compress_rows(features) if self.config.memory_kind and features is not None else None
        return self._run(compress, read, self._read_inputs(read, features)).read.hidden

    def streams(
        self, read: Read, pixel_values: jax.Array | None, *,
        compressed: bool = True, whole: Whole | None = None, layers: bool = False, queries: jax.Array | None = None,
    ) -> tuple[ReadOutput | None, ReadOutput | None]:  # fmt: skip
        """Read rows twice beside one compress stream: through the VoCo tokens (`compressed`) and, with `whole`, whole.

        `layers` and `queries` ask for what `ReadOutput` can have; queries are places [R, Q] of text tokens whose
        attention to the patches is wanted (-1: none). ValueError for `whole` or `queries` without a compress stream.
        """
        c = self.config
        if whole is not None or queries is not None:
            self._require_memory("streams with whole images")
        features = self.encode_images(pixel_values) if pixel_values is not None and pixel_values.shape[1] else None
        compress = self._compress_rows(features) if c.memory_kind and features is not None else None
        layout = None
        if whole is not None:
            layout = whole_layout(read, whole.slots_per_image or c.num_voco_tokens, whole.most, c.compress_length)
        constant = whole is not None and whole.constant
        run = functools.partial(self._run, whole=layout, constant=constant, layers=layers, queries=queries)
        if c.memory_kind == EMBEDDINGS and compress is not None:  # the compress stream ends before text reads it
            out = run(compress, read, self._read_inputs(read, None), compressed=False, run_last_layer=True)
            if not compressed:
                return None, out.whole
            inputs = self._read_inputs(read, self._embeddings(compress, out.rows))
            student = self._run(None, read, inputs, layers=layers).read
            return student._replace(attention=out.looked), out.whole
        out = run(compress, read, self._read_inputs(read, features), compressed=compressed)
        return out.read, out.whole

    def compress(self, features: jax.Array) -> Memory | jax.Array:
        """The memory of the images whose embeddings are [B, I, P, D]: keys and values, or embeddings [B, I, K, D]."""
        self._require_memory("compress")
        rows = self._compress_rows(features)
        if self.config.memory_kind == EMBEDDINGS:
            return self._embeddings(rows, self._run(rows, run_last_layer=True).rows)
        return self._run(rows).memory

    def _embeddings(self, compress: "CompressRows", hidden: jax.Array) -> jax.Array:
        """The images' embeddings [B, I, K, D], of the compress stream's last hidden states [compress rows, C, D]."""
        segments = compress.segments(hidden, self.config.compress_length)
        return constrain(self.compressor.embed(segments[:, :, -self.config.num_voco_tokens :]), ROWS)

    def compress_logits(self, features: jax.Array) -> jax.Array:
        """Logits [B, I, S, V] of the compress stream itself, to be compared with other implementations."""
        self._require_memory("compress_logits")
        rows = self._compress_rows(features)
        hidden = self._run(rows, run_last_layer=True).rows
        return self.llama.logits(rows.segments(hidden, self.config.compress_length))

    # ---- Inputs of the streams ---------------------------------------------------------------------------------

    def _compress_rows(self, features: jax.Array) -> "CompressRows":
        """Images' embeddings [B, I, P, D] to segments (prefix, image, suffix, K VoCo tokens), in the kernel's layout.

        Images stay on the device that has their embeddings: a device's images, and no others, share its rows.
        """
        c = self.config
        rows, images, _, hidden_size = features.shape
        features = by_device(features)
        n = len(features)
        per_row, length = self.attention.row_shape(n // axis_size(*IMAGES), c.compress_length)

        def text(ids: tuple[int, ...]) -> jax.Array:
            embedded = self.llama.embed_tokens(jnp.array(ids, jnp.int32))
            return jnp.broadcast_to(embedded, (n, len(ids), hidden_size))

        suffix = (*c.suffix_ids, *(c.voco_token_id,) * c.num_voco_tokens)
        x = jnp.concatenate([text(c.prefix_ids), features, text(suffix)], axis=1)
        x = x.reshape(n // per_row, per_row * c.compress_length, hidden_size)
        x = constrain(jnp.pad(x, [(0, 0), (0, length - x.shape[1]), (0, 0)]), IMAGES)
        return CompressRows(x, per_row, (rows, images))

    def _read_inputs(self, read: Read, features: jax.Array | None) -> jax.Array:
        """Embeddings [R, T, D]; those of visual tokens are the images', `features` [B, I, M, D], but for slots."""
        embedded = self.llama.embed(read.tokens)
        if self.config.memory_kind == KEYS_AND_VALUES or features is None or read.slot_index is None:
            return embedded
        visual = features.reshape(len(features), -1, features.shape[-1]).astype(embedded.dtype)  # of a file: any dtype
        return fill_slots(embedded, visual, read.slot_index)

    def _require_memory(self, what: str, *kinds: str) -> None:
        kinds = kinds or (KEYS_AND_VALUES, EMBEDDINGS)
        if self.config.memory_kind not in kinds:
            able = " or ".join(repr(name) for name, kind in COMPRESSORS.items() if kind.memory_kind in kinds)
            raise ValueError(f"compressor: {what} needs {able}, found {self.config.compressor!r}")

    # ---- The two streams ---------------------------------------------------------------------------------------

    def _run(
        self,
        compress: "CompressRows | None",
        read: Read | None = None,
        embedded: jax.Array | None = None,
        *,
        compressed: bool = True,
        memory: Memory | None = None,
        whole: WholeLayout | None = None,
        constant: bool = False,
        layers: bool = False,
        queries: jax.Array | None = None,
        run_last_layer: bool = False,
    ) -> "_Streams":
        """Run the given streams through all layers, side by side.

        `compress` makes the memory that `read`, whose inputs are `embedded` [R, T, D], uses if none is given; one of
        embeddings is made of its last hidden states, for which all of the last layer is run (`run_last_layer`). With
        `whole`, their layout, the same rows are read whole too (`constant`: without gradients); where not `compressed`,
        whole alone.
        """
        c, adapter, S = self.config, self.attention, self.config.compress_length
        looks = queries is not None and compress is not None
        looks_compressed = looks and (compressed or run_last_layer)
        patches = slice(len(c.prefix_ids), len(c.prefix_ids) + c.vision.num_features)  # of a segment
        if compress is not None:
            compress_rope = rope_tables(c.llama, jnp.arange(compress.rows.shape[1]) % S)
        if read is not None and compressed:
            read_rope = rope_tables(c.llama, read.positions)
            window = window_of(c.llama.sliding_window, read.positions)
        if whole is not None:
            c.check_whole(whole.positions.shape[1], whole.images.shape[1])
            whole_rope = rope_tables(c.llama, whole.positions)
            image_positions = whole.first_positions[..., None] + jnp.arange(S)  # [R, N, S]
            image_rope = rope_tables(c.llama, image_positions.reshape(len(image_positions), -1))
            image_segments = jnp.repeat(whole.image_segments, S, axis=1)

        def rotate(q, k, v, rope):  # named for remat policies
            q, k = apply_rope(q, rope), apply_rope(k, rope)
            return checkpoint_name(q, "query"), checkpoint_name(k, "key"), checkpoint_name(v, "value")

        def body(layer, carry, kept, *, keys_and_values_only=False):
            rows, x, w = carry
            made = looked = None
            images = []  # segments' keys and values, for text that reads them whole
            if compress is not None:
                k, v = layer.project_kv(rows)
                if c.memory_kind == KEYS_AND_VALUES:
                    kept = made = Memory(*(compress.slots(m, S, c.num_voco_tokens) for m in (k, v)))
                if whole is not None:
                    images = [compress.segments(m, S) for m in (k, v)]
                if not keys_and_values_only:
                    q, k, v = rotate(layer.project_q(rows), k, v, compress_rope)
                    rows = constrain(layer.finish(rows, adapter.chunked(q, k, v, S, c.llama.sliding_window)), IMAGES)
                    if looks_compressed:
                        looked = look_compressed(*(compress.segments(m, S) for m in (q, k)), c.num_voco_tokens, patches)
                elif looks_compressed:
                    looked = jnp.zeros((*compress.images, c.vision.num_features))
            if read is not None and compressed:
                q, (k, v) = layer.project_q(x), layer.project_kv(x)
                if kept is not None:
                    k, v = (fill_slots(text, slots, read.slot_index) for text, slots in zip((k, v), kept, strict=True))
                q, k, v = rotate(q, k, v, read_rope)
                x = constrain(layer.finish(x, adapter.causal(q, k, v, read.segment_ids, window)), ROWS)
            whole_looked = None
            if whole is not None:
                if constant:
                    layer, images = _constant(layer), [jax.lax.stop_gradient(m) for m in images]
                q, k, v = rotate(layer.project_q(w), *layer.project_kv(w), whole_rope)
                if compress is None:
                    attended = adapter.causal(q, k, v, whole.segment_ids)
                else:
                    image_k, image_v = (take_images(m, whole.images) for m in images)
                    image_k = apply_rope(image_k, image_rope)
                    before = image_k, image_v, image_segments
                    attended = adapter.causal_after(q, k, v, whole.segment_ids, *before)
                    if looks:
                        whole_looked = look_whole(q, image_k, queries, whole, patches, compress.images)
                w = constrain(layer.finish(w, attended), ROWS)
            return (rows, x, w), _OfLayer(made, *((x, w) if layers else (None, None)), looked, whole_looked)

        # Nobody reads the output of the compress stream's last layer: its keys and values are all it is for.
        shorten = compress is not None and not run_last_layer
        whole_input = None
        if whole is not None:
            whole_input = jax.lax.stop_gradient(embedded) if constant else embedded
        carry = (None if compress is None else compress.rows, embedded if compressed else None, whole_input)
        (rows, x, w), of_layers = scan_layers(
            body, carry, self.llama.layers, memory,
            last=functools.partial(body, keys_and_values_only=True) if shorten else None,
            dtype=jnp.dtype(c.dtype), unroll=c.unroll_layers, remat=c.remat,
        )  # fmt: skip
        seen, seen_whole = (None if s is None else s[:-1] for s in (of_layers.looked, of_layers.whole_looked))
        return _Streams(
            rows,
            ReadOutput(x, of_layers.read, seen) if read is not None and compressed else None,
            ReadOutput(w, of_layers.whole, seen_whole) if whole is not None else None,
            of_layers.memory,
            seen,
        )

    # ---- For inference: the read stream with a cache -----------------------------------------------------------

    def fill(self, memory: Memory, slots: jax.Array, cache: Cache | None = None) -> Cache:
        """Put memories into a cache: place p of row r gets slot `slots[r, p]`, or keeps what it has where that is -1.

        `slots` are integers [R, C]; R/B consecutive rows share the images of one of the memory's B rows. Without
        `cache` a new one is made, empty but for the slots. Keys are rotated to their new places.
        """
        self._require_memory("fill", KEYS_AND_VALUES)
        cache = self.empty_cache(*slots.shape) if cache is None else cache
        at_places = rope_tables(self.config.llama, jnp.arange(slots.shape[1]))
        is_slot = (slots >= 0)[..., None, None]

        def fill_layer(old: Cache, new: Memory) -> Cache:
            k, v = (fill_slots(jnp.zeros_like(o), n.astype(o.dtype), slots) for o, n in zip(old, new, strict=True))
            k, v = (jnp.where(is_slot, n, o) for n, o in zip((apply_rope(k, at_places), v), old, strict=True))
            return Cache(k, v)

        filled = jax.vmap(fill_layer)(cache, memory)
        return Cache(*(constrain(x, None, ROWS, None, "tensor") for x in filled))

    def empty_cache(self, rows: int, places: int) -> Cache:
        """An empty cache of R rows and C places."""
        c = self.config.llama
        shape = (c.num_hidden_layers, rows, places, c.num_key_value_heads, c.head_dim)
        empty = constrain(jnp.zeros(shape, self.config.dtype), None, ROWS, None, "tensor")
        return Cache(empty, empty)

    def extend(
        self, tokens: jax.Array, positions: jax.Array, cache: Cache,
        slot_index: jax.Array | None = None, features: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:  # fmt: skip
        """Read tokens [R, T] into the cache at `positions` (ascending; -1: padding); each sees all places up to it.

        They are a prompt, a later turn or a single token to be continued; the slots are there already (`fill`) and
        cost nothing here. Without slots images are tokens too: `slot_index` [R, T] as in `Read`, of `features`
        [B, I, M, D]. Every place up to a token's position must have been filled. Returns hidden states [R, T, D],
        before the final norm and the head, and the cache.
        """
        capacity = cache.keys.shape[2]
        # Padding is written beyond the end, so nowhere; each token at its own place, because places must be distinct
        places = jnp.where(positions >= 0, positions, capacity + jnp.arange(tokens.shape[1]))
        write = jax.vmap(lambda old, new, at: old.at[at].set(new, mode="drop", unique_indices=True))
        given, whole_rows = positions, self._reads_whole_rows(tokens.shape[1], capacity)
        if whole_rows:
            empty = jnp.full((len(tokens), capacity), -1)
            tokens, is_text = write(jnp.zeros_like(empty), tokens, places), write(empty, positions, places) >= 0
            slot_index = None if slot_index is None else write(empty, slot_index, places)
            positions = jnp.broadcast_to(jnp.arange(capacity), empty.shape)
            segment_ids = (positions <= given.max(axis=1, keepdims=True)).astype(jnp.int32)
        rope = rope_tables(self.config.llama, positions)
        window = window_of(self.config.llama.sliding_window, positions)

        def body(layer, carry, index):
            x, *cached = carry
            q = apply_rope(layer.project_q(x), rope)
            k, v = layer.project_kv(x)
            new, old = (apply_rope(k, rope), v), [c[index] for c in cached]
            if whole_rows:
                k, v = (jnp.where(is_text[..., None, None], n, o) for n, o in zip(new, old, strict=True))
                attended = self.attention.causal(q, k, v, segment_ids, window)
            else:
                k, v = (write(o, n, places) for n, o in zip(new, old, strict=True))
                attended = self.attention.cached(q, k, v, positions, self.config.llama.sliding_window)
            x = constrain(layer.finish(x, attended), ROWS)
            return (x, *(c.at[index].set(here) for c, here in zip(cached, (k, v), strict=True))), None

        read = Read(tokens, positions, None, slot_index)
        (x, *cached), _ = scan_layers(
            body, (self._read_inputs(read, features), *cache), self.llama.layers,
            jnp.arange(self.config.llama.num_hidden_layers),
            dtype=jnp.dtype(self.config.dtype), unroll=self.config.unroll_layers,
        )  # fmt: skip
        if whole_rows:
            x = jnp.take_along_axis(x, jnp.maximum(given, 0)[..., None], axis=1)
        return x, Cache(*cached)

    def _reads_whole_rows(self, tokens: int, places: int) -> bool:
        """Whether so many tokens are read as whole rows of the cache, together with what is there already.

        A fused kernel takes whole rows only. For long prompts it is worth computing some places for nothing.
        """
        windowed = binding(self.config.llama.sliding_window, places) and not self.attention.WINDOWS
        return self.attention.FUSED and not windowed and tokens >= LONG_PROMPT and 4 * places <= 5 * tokens


class _Streams(NamedTuple):
    """What the streams leave: the compress stream's hidden states [compress rows, C, D], what was read, and the memory
    that was made; None where there is nothing. `looked` is where the VoCo tokens look, `read.attention` too."""

    rows: Any
    read: Any  # ReadOutput or None: each caller knows which
    whole: Any
    memory: Any
    looked: Any


class _OfLayer(NamedTuple):
    """What a layer leaves beside the streams."""

    memory: Memory | None
    read: jax.Array | None
    whole: jax.Array | None
    looked: jax.Array | None
    whole_looked: jax.Array | None


class CompressRows(NamedTuple):
    """The compress stream's input: `rows` [compress rows, C, D], each with some images' segments, then padding.

    Images are in the order of `by_device`.
    """

    rows: jax.Array
    segments_per_row: int
    images: tuple[int, int]  # B, I

    def slots(self, x: jax.Array, segment_length: int, num_tokens: int) -> jax.Array:
        """The last K places of each segment, [compress rows, C, G, H] to [B, I·K, G, H], on all devices of a row."""
        ends = [(i + 1) * segment_length for i in range(self.segments_per_row)]
        x = jnp.stack([x[:, end - num_tokens : end] for end in ends], axis=1)
        x = by_row(x.reshape(-1, num_tokens, *x.shape[3:]), *self.images)
        # Over the frame axis this is where a row's frames meet, and all that ever travels of them.
        return constrain(x.reshape(len(x), -1, *x.shape[3:]), ROWS, None, "tensor")

    def segments(self, x: jax.Array, segment_length: int) -> jax.Array:
        """All places of each segment, [compress rows, C, ...] to [B, I, S, ...]."""
        x = x[:, : self.segments_per_row * segment_length].reshape(-1, segment_length, *x.shape[2:])
        return by_row(x, *self.images)


def by_device(x: jax.Array) -> jax.Array:
    """Images [B, I, ...] to [B·I, ...], ordered (row shard, frame shard, row, image): each device's in one piece."""
    x = einops.rearrange(x, "(r b) (f i) ... -> (r f b i) ...", r=axis_size(*ROWS), f=axis_size("frame"))
    return constrain(x, IMAGES)


def by_row(x: jax.Array, num_rows: int, num_images: int) -> jax.Array:
    """The way back: [B·I, ...] to [B, I, ...]."""
    r, f = axis_size(*ROWS), axis_size("frame")
    return einops.rearrange(x, "(r f b i) ... -> (r b) (f i) ...", r=r, f=f, b=num_rows // r, i=num_images // f)


def fill_slots(text: jax.Array, visual: jax.Array, slot_index: jax.Array) -> jax.Array:
    """`text` [R, T, ...], but where `slot_index` [R, T] is not -1 that row of `visual` [B, I·M, ...].

    R is a multiple of B: R/B consecutive read rows share one row of images. ValueError where it is not.
    """
    R, T, *rest = text.shape
    if R % len(visual):
        raise ValueError(f"{R} read rows cannot share the images of {len(visual)} rows")
    places = jnp.maximum(slot_index, 0).reshape(len(visual), -1)
    taken = jax.vmap(lambda rows, i: rows[i])(visual, places).reshape(R, T, *rest)
    return jnp.where(slot_index.reshape(R, T, *(1,) * len(rest)) >= 0, taken, text)


def take_images(segments: jax.Array, images: jax.Array) -> jax.Array:
    """Of segments [B, I, S, G, H] those of each read row's `images` [R, N], one after the other: [R, N·S, G, H]."""
    (R, N), (B, _, S, *rest) = images.shape, segments.shape
    taken = jax.vmap(lambda of_row, i: of_row[i])(segments, images.reshape(B, -1))
    return constrain(taken.reshape(R, N * S, *rest), ROWS, None, "tensor")


def _constant(module: nnx.Module) -> nnx.Module:
    """The same parameters without gradients."""
    graphdef, state = nnx.split(module)
    return nnx.merge(graphdef, jax.lax.stop_gradient(state))
