"""Read rows: what a batch says of the read stream, and other ways to read the same rows.

`first_tokens` reads fewer VoCo tokens of each image than the rows have places for. `whole_layout` reads images whole:
an image's compress segment, BOS, patches, what follows them and VoCo tokens, is word for word the beginning of the
uncompressed prompt. So the text of a read row need only see all of the segment's keys and values, in place of its
slots, at the positions of the longer prompt:

    compress   BOS  V₁ … V_P  ▁ \\n  VoCo₁ … VoCo_K
                └───────── all S, as keys ────────┐
    whole                      (slots hidden)     \\n  system prompt  question  answer

With one image at the front of a conversation this is the model with compressor 'none' on the same text. Of several
images each is computed apart, as in the compress stream. An image that comes after text is not read whole.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

HIDDEN = 0  # the segment of padding, and of slots that nobody may see


class Read(NamedTuple):
    """A batch of read rows, all integers [R, T]; R/B consecutive rows share one row's images (often R = B)."""

    tokens: jax.Array  # ids
    positions: jax.Array
    segment_ids: jax.Array | None  # tokens see only their own segment; None: one segment a row
    slot_index: jax.Array | None  # of a visual token: which of its row's I·M, image by image; of text -1 (None: all)


class WholeLayout(NamedTuple):
    """A read row's text beside N images that stand before it, whole. Integers; [R, N] of images, [R, T] of tokens."""

    positions: jax.Array
    segment_ids: jax.Array
    images: jax.Array  # [R, N] which of the row's images
    image_segments: jax.Array  # [R, N] the segment that sees it; -1: none
    first_positions: jax.Array  # [R, N] of its first token
    taught: jax.Array  # [R, T] bool: text of conversations whose images are all there


def first_tokens(read: Read, num_tokens: jax.Array, slots_per_image: int) -> Read:
    """The same rows as a model that compresses to fewer tokens reads them: the first `num_tokens` [R or B] of each
    image's slots. The others are hidden, and what stands behind them closes up."""
    if read.slot_index is None:
        return read
    R, T = read.slot_index.shape
    segment_ids = _segment_ids(read)
    num_tokens = jnp.repeat(num_tokens, R // len(num_tokens))[:, None]
    hidden = (read.slot_index >= 0) & (read.slot_index % slots_per_image >= num_tokens)
    before = jnp.cumsum(hidden, axis=1)
    # Of a segment's hidden slots, those before a token: the row's, less what earlier segments have
    starts = jax.vmap(lambda x, s: jax.ops.segment_min(x, s, T + 1))(before - hidden, segment_ids)
    before -= jnp.take_along_axis(starts, segment_ids, axis=1)
    positions = jnp.where(hidden, 0, read.positions - before)
    return read._replace(positions=positions, segment_ids=jnp.where(hidden, HIDDEN, segment_ids))


def whole_layout(read: Read, slots_per_image: int, most: int, segment_length: int) -> WholeLayout:
    """Where images of `segment_length` tokens (S) stand whole, in rows with room for `most` of them (N).

    Conversations are taken in the row's order. One whose images do not find room, or that has text before an image, is
    not `taught`: its outputs mean nothing.
    """
    segment_ids = _segment_ids(read)
    T = segment_ids.shape[1]
    slot_index = jnp.full_like(read.tokens, -1) if read.slot_index is None else read.slot_index
    is_slot = (slot_index >= 0) & (segment_ids != HIDDEN)
    is_first = is_slot & (slot_index % slots_per_image == 0)

    def of_segment(reduce, x):
        found = jax.vmap(lambda x, s: reduce(x, s, T + 1))(x, segment_ids)
        return jnp.take_along_axis(found, segment_ids, axis=1)

    slots, images = (of_segment(jax.ops.segment_sum, x.astype(jnp.int32)) for x in (is_slot, is_first))
    number = jnp.cumsum(is_first, axis=1)
    last_number = of_segment(jax.ops.segment_max, jnp.where(is_first, number, 0))
    slots_end = of_segment(jax.ops.segment_max, jnp.where(is_slot, read.positions + 1, 0))
    is_whole = (images > 0) & (last_number <= most) & (slots_end == slots) & (segment_ids != HIDDEN)

    places = jnp.argsort(~is_first, axis=1, stable=True)[:, :most]
    at = lambda x: jnp.take_along_axis(x, places, axis=1)  # noqa: E731
    earlier = at(read.positions) // jnp.maximum(at(slots) // jnp.maximum(at(images), 1), 1)  # images before it
    return WholeLayout(
        positions=jnp.where(is_whole, read.positions - slots + images * segment_length, read.positions),
        segment_ids=jnp.where(slot_index >= 0, HIDDEN, segment_ids),
        images=jnp.where(at(is_first), at(slot_index) // slots_per_image, 0),
        image_segments=jnp.where(at(is_first & is_whole), at(segment_ids), -1),
        first_positions=earlier * segment_length,
        taught=is_whole & (slot_index < 0),
    )


def whole_places(read: Read, slots_per_image: int, most: int) -> jax.Array:
    """Bool [R, T]: text of conversations with images that are read whole in rows with room for `most` images."""
    return whole_layout(read, slots_per_image, most, 0).taught


def _segment_ids(read: Read) -> jax.Array:
    return jnp.ones_like(read.tokens) if read.segment_ids is None else read.segment_ids
