"""Attention by cuDNN's fused kernel, through jax.nn: NVIDIA GPUs.

The compress stream is plain causal attention with images as batch, which the kernel skips half of. Packed text goes in
as a boolean mask, which jax turns into a bias of [R, 1, T, T] numbers: exact, but neither free of memory nor of the
bias's gradient, which cuDNN computes and nobody uses. Rows of one conversation (segment_ids None) need no mask. Under
remat the kernel runs twice, whatever the policy: its log-sum-exp has no name to be kept by.
"""

from functools import partial

import jax
import jax.numpy as jnp

from voco_jax.attention.platform import platform
from voco_jax.attention.xla import cached, each_chunk, row_shape

__all__ = ["cached", "causal", "chunked", "row_shape"]


def causal(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """As `xla.causal`. ValueError: not on a GPU; not 16-bit floats; a head size, T or library that cuDNN refuses."""
    if (found := platform()) != "gpu":
        raise ValueError(f"attention 'cudnn' needs an NVIDIA GPU, found platform {found!r}; model.attention = 'xla'")
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"attention 'cudnn' computes in bfloat16 or float16, found {q.dtype}: set model.dtype")
    if q.shape[-1] % 8:
        raise ValueError(f"attention 'cudnn' needs heads of a multiple of 8 dimensions, found {q.shape[-1]}")
    if segment_ids is not None and q.shape[1] % 2:
        raise ValueError(
            f"attention 'cudnn' needs rows of an even number of tokens, found {q.shape[1]}: change data.row_length"
        )
    mask = None if segment_ids is None else (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    try:
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="cudnn")
    except (NotImplementedError, RuntimeError) as error:  # what depends on the GPU and on cuDNN's version
        raise ValueError(f"attention 'cudnn': {error}") from error


def chunked(q: jax.Array, k: jax.Array, v: jax.Array, chunk: int) -> jax.Array:
    """As `xla.chunked`; ValueError as `causal`."""
    return each_chunk(partial(causal, segment_ids=None), q, k, v, chunk)
