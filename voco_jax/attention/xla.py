"""Attention by XLA: any platform, any layout; what every other kernel is compared with."""

import jax
import jax.numpy as jnp


def causal(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """Causal attention inside segments: query i sees key j where j ≤ i and both stand in the same segment.

    Args:
      q: queries [B, T, N, H]; k, v: keys and values [B, T, G, H], N a multiple of G.
      segment_ids: integers [B, T], or None for one segment a row. Padding is a segment of its own like any other.

    Returns: [B, T, N, H]
    """
    mask = None if segment_ids is None else (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True)


def cached(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array) -> jax.Array:
    """One decoding step: each row's query sees the first `lengths` [B] places of its cache.

    Args:
      q: [B, 1, N, H]; k, v: [B, C, G, H] with C ≥ lengths.

    Returns: [B, 1, N, H]
    """
    visible = jnp.arange(k.shape[1]) < lengths[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=visible[:, None, None, :])
