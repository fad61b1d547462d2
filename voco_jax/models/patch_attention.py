"""Where a layer looks among an image's patches: the VoCo tokens of the compress stream, or text that reads it whole.

The fused kernels give no probabilities, so these are computed beside them, for the few queries that are asked about.
They are of the scores of patches alone: they sum to 1, however much of a token's attention is on the image.
"""

import jax
import jax.numpy as jnp

from voco_jax.models.read import WholeLayout


def look_compressed(q: jax.Array, k: jax.Array, num_voco_tokens: int, patches: slice) -> jax.Array:
    """Of the compress stream's segments, rotated queries [B, I, S, N, H] and keys [B, I, S, G, H]: where the VoCo
    tokens look, their mean, [B, I, P] float32."""
    return _attention(q[:, :, -num_voco_tokens:], k[:, :, patches]).mean(2)


def look_whole(
    q: jax.Array, image_k: jax.Array, queries: jax.Array, layout: WholeLayout, patches: slice, images: tuple[int, int]
) -> jax.Array:
    """Where the text tokens at `queries` [R, Q] (-1: none) look that read images whole, their mean, [B, I, P] float32.

    q [R, T, N, H] and image_k [R, N·S, G, H] are rotated; `images` is (B, I). Zeros for an image nobody looks at.
    """
    (num_rows, most), (B, num_images) = layout.images.shape, images
    places = jnp.maximum(queries, 0)
    q = jnp.take_along_axis(q, places[..., None, None], axis=1)
    keys = image_k.reshape(num_rows, most, -1, *image_k.shape[2:])[:, :, patches]
    looks = _attention(jnp.broadcast_to(q[:, None], (num_rows, most, *q.shape[1:])), keys)  # [R, N, Q, P]
    ids = jnp.where(queries >= 0, jnp.take_along_axis(layout.segment_ids, places, axis=1), -2)
    counts = (layout.image_segments[..., None] == ids[:, None]).astype(looks.dtype)  # [R, N, Q]
    which = jax.nn.one_hot(layout.images, num_images, dtype=looks.dtype).reshape(B, -1, num_images)
    total = jnp.einsum("rnq,rnqp->rnp", counts, looks).reshape(B, -1, looks.shape[-1])
    number = jnp.einsum("bni,bn->bi", which, counts.sum(-1).reshape(B, -1))
    return jnp.einsum("bni,bnp->bip", which, total) / jnp.maximum(number, 1)[..., None]


def _attention(q: jax.Array, k: jax.Array) -> jax.Array:
    """Queries [.., .., Q, N, H] and keys [.., .., P, G, H] to the mean over heads of the softmax, [.., .., Q, P]."""
    *lead, num_queries, heads, size = q.shape
    groups = k.shape[-2]
    q = q.reshape(*lead, num_queries, groups, heads // groups, size)
    scores = jnp.einsum("...qgnh,...pgh->...qgnp", q, k, preferred_element_type=jnp.float32) / size**0.5
    return jax.nn.softmax(scores, axis=-1).mean((-3, -2))
