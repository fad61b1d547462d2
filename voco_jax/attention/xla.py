"""Attention by XLA: any platform, any layout; what every other kernel is compared with. Functions as in `Adapter`."""

from collections.abc import Callable
import functools

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from voco_jax.attention import blocks
from voco_jax.attention.platform import platform
from voco_jax.attention.windows import Window, binding, window_of
from voco_jax.parallel.mesh import AXES, axis_size

PLATFORM: str | None = None
FUSED: bool = False
WINDOWS: bool = True
QUERIES = 512  # of a prompt, that attend to a cache at once


def causal(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None = None, window: Window | None = None
) -> jax.Array:
    """Causal attention inside segments and windows."""
    if window is None and _in_blocks(q):
        return blocks.attend(q, k, v, segment_ids, causal=True)
    mask = None if segment_ids is None else (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    if window is not None:
        mask = window.visible() if mask is None else mask & window.visible()
    return checkpoint_name(jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True), "context")


def causal_after(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array,
    before_k: jax.Array, before_v: jax.Array, before_ids: jax.Array,
) -> jax.Array:  # fmt: skip
    """Causal attention inside segments, after keys that stand before the row."""
    k, v, mask = joined(k, v, segment_ids, before_k, before_v, before_ids)
    return checkpoint_name(jax.nn.dot_product_attention(q, k, v, mask=mask), "context")


def joined(k, v, segment_ids, before_k, before_v, before_ids) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Keys and values of `causal_after` in one row [R, A + T, G, H], and its mask [R, 1, T, A + T]."""
    ids = jnp.concatenate([before_ids, segment_ids], axis=1)
    T, places = segment_ids.shape[1], jnp.arange(ids.shape[1])
    is_earlier = places <= jnp.arange(T)[:, None] + before_ids.shape[1]
    mask = is_earlier & (segment_ids[..., None] == ids[:, None])
    return jnp.concatenate([before_k, k], axis=1), jnp.concatenate([before_v, v], axis=1), mask[:, None]


def full(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attention of all queries to all keys."""
    if _in_blocks(q):
        return blocks.attend(q, k, v, None, causal=False)
    return jax.nn.dot_product_attention(q, k, v)


def chunked(q: jax.Array, k: jax.Array, v: jax.Array, chunk: int, window: int = 0) -> jax.Array:
    """Causal attention inside chunks of a row; padding's outputs are zeros."""
    inside = window_of(window, jnp.arange(chunk)[None])
    return each_chunk(functools.partial(causal, window=inside), q, k, v, chunk)


def row_shape(num_segments: int, chunk: int) -> tuple[int, int]:
    """One segment a row, no padding."""
    return 1, chunk


def cached(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, window: int = 0) -> jax.Array:
    """Queries against a cache, `QUERIES` of them at a time."""

    def attend(q, positions):
        places = jnp.arange(k.shape[1])
        visible = places <= positions[..., None]
        if binding(window, k.shape[1]):
            visible &= places > positions[..., None] - window
        return jax.nn.dot_product_attention(q, k, v, mask=visible[:, None])

    if q.shape[1] <= QUERIES:
        return attend(q, positions)
    # The scores of all queries of a long prompt would be [R, N, T, C] numbers
    parts = [slice(start, start + QUERIES) for start in range(0, q.shape[1], QUERIES)]
    return jnp.concatenate([attend(q[:, part], positions[:, part]) for part in parts], axis=1)


def check(**shapes: object) -> None:
    """Nothing is refused."""


def each_chunk(attend: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array, chunk: int) -> jax.Array:
    """`chunked` by a causal kernel that takes one segment a row: `attend(q, k, v)` of [R·segments, chunk, …]."""
    num_rows, length = q.shape[:2]
    used = length // chunk * chunk
    if not used:
        raise ValueError(f"attention: a row of {length} places does not hold a segment of {chunk} tokens")
    attended = attend(*(x[:, :used].reshape(-1, chunk, *x.shape[2:]) for x in (q, k, v)))
    return jnp.pad(attended.reshape(num_rows, used, *q.shape[2:]), ((0, 0), (0, length - used), (0, 0), (0, 0)))


def _in_blocks(q: jax.Array) -> bool:
    """Whether rows are long enough for blocks to pay, on one CPU; elsewhere they never do."""
    alone = axis_size(*AXES) == 1
    return alone and platform() == "cpu" and q.shape[1] > blocks.BLOCK
