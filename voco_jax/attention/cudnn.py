"""Attention by cuDNN's fused kernel, through jax.nn: NVIDIA GPUs.

The compress stream is plain causal attention with images as batch, which the kernel skips half of. Packed text goes in
as a boolean mask, which jax turns into a bias of [R, 1, T, T] numbers: exact, but neither free of memory nor of the
bias's gradient, which cuDNN computes and nobody uses. Rows of one conversation (segment_ids None) need no mask. Under
remat the kernel runs twice, whatever the policy: its log-sum-exp has no name to be kept by.

cuDNN refuses rows of an odd length, and an image's segment has one at every even K (BOS, 576 patches, two tokens and
K VoCo tokens): `evenly` gives the kernel one place more, which nobody reads.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from voco_jax.attention.platform import platform
from voco_jax.attention.windows import Window, binding, refuse
from voco_jax.attention.xla import cached, each_chunk, full, joined, row_shape
from voco_jax.outages import first_line

__all__ = [
    "FUSED",
    "PLATFORM",
    "WINDOWS",
    "cached",
    "causal",
    "causal_after",
    "check",
    "chunked",
    "evenly",
    "full",
    "row_shape",
]

PLATFORM: str | None = "gpu"
FUSED: bool = True
WINDOWS: bool = False


def causal(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None = None, window: Window | None = None
) -> jax.Array:
    """Causal attention inside segments.

    ValueError: a window; not on a GPU; not 16-bit floats; a head size or library that cuDNN refuses.
    """
    refuse("cudnn", window)
    _check_request(q)
    try:
        return evenly(_fused)(q, k, v, segment_ids)
    except (NotImplementedError, RuntimeError) as error:  # what depends on the GPU and on cuDNN's version
        raise ValueError(f"attention: 'cudnn': {first_line(error)}") from error


def _check_request(q: jax.Array) -> None:
    _check_platform()
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"attention: 'cudnn' computes in bfloat16 or float16, found {q.dtype}: set model.dtype")
    if q.shape[-1] % 8:
        raise ValueError(f"attention: 'cudnn' needs heads of a multiple of 8 dimensions, found {q.shape[-1]}")


def causal_after(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array,
    before_k: jax.Array, before_v: jax.Array, before_ids: jax.Array,
) -> jax.Array:  # fmt: skip
    """Causal attention inside segments, after keys that stand before the row; ValueError as `causal`.

    All of it is a boolean mask, as packed text is.
    """
    _check_request(q)
    # Even lengths: one place more, which the queries before it never see, and one key more, which nobody sees
    T, A = q.shape[1], before_k.shape[1]
    pad = lambda x, length, **kwargs: jnp.pad(x, [(0, 0), (0, length % 2)] + [(0, 0)] * (x.ndim - 2), **kwargs)  # noqa: E731
    k, v, mask = joined(
        pad(k, T), pad(v, T), pad(segment_ids, T),
        pad(before_k, A), pad(before_v, A), pad(before_ids, A, constant_values=-1),
    )  # fmt: skip
    try:
        return _masked(pad(q, T), k, v, mask)[:, :T]
    except (NotImplementedError, RuntimeError) as error:
        raise ValueError(f"attention: 'cudnn': {first_line(error)}") from error


def chunked(q: jax.Array, k: jax.Array, v: jax.Array, chunk: int, window: int = 0) -> jax.Array:
    """Causal attention inside chunks of a row; ValueError as `causal`."""
    refuse("cudnn", binding(window, chunk))
    return each_chunk(partial(causal, segment_ids=None), q, k, v, chunk)


def check(
    *, heads: int, kv_heads: int, size: int, dtype: str, segment_length: int, row_length: int, training: bool,
    before_length: int = 0,
) -> None:  # fmt: skip
    """ValueError, one line, for what cuDNN on this GPU refuses: all streams' kernels are compiled, not run.

    It takes some seconds.
    """
    _check_platform()

    def attend(q, k, v, ids, *before):
        attended = causal_after(q, k, v, ids, *before) if before else causal(q, k, v, ids)
        return attended.astype(jnp.float32).sum()

    def arrays(length, *numbers):
        return [jax.ShapeDtypeStruct((1, length, n, size), dtype) for n in numbers]

    def ids(length):
        return jax.ShapeDtypeStruct((1, length), jnp.int32)

    streams: dict[str, tuple[int, Any, list]] = {
        "compress stream": (segment_length, None, []),
        "read stream": (row_length, ids(row_length) if training else None, []),
    }
    if before_length:
        before = [*arrays(before_length, kv_heads, kv_heads), ids(before_length)]
        streams["whole images"] = row_length, ids(row_length), before
    # jax has a check of its own and so has cuDNN, and some of both come when the gradient is made: later than `causal`
    for stream, (length, segment_ids, before) in streams.items():
        if not length:
            continue
        try:
            compiled = jax.jit(jax.grad(attend, (0, 1, 2)) if training else attend)
            compiled.lower(*arrays(length, heads, kv_heads, kv_heads), segment_ids, *before).compile()
        except Exception as error:  # jax's, XLA's and cuDNN's own kinds
            reason = first_line(error).removeprefix("attention: 'cudnn'").removeprefix(": ").strip()
            after = f" after {before_length}" if before else ""
            raise ValueError(
                f"attention: 'cudnn': {stream}, {length} tokens{after}, {heads} and {kv_heads} heads of {size} in "
                f"{dtype}: {reason}; model.attention = 'xla' computes the same"
            ) from error


def _check_platform() -> None:
    if (found := platform()) != "gpu":
        raise ValueError(
            f"attention: 'cudnn' needs an NVIDIA GPU, found platform {found!r}; "
            "model.attention = 'xla' computes the same"
        )


def evenly(attend: Callable) -> Callable:
    """`attend(q, k, v, segment_ids)`, a causal kernel for rows of an even length, as one for rows of any length.

    A row of odd length gets one place more at its end: the queries before it never see it, and its gradient is zero.
    """

    def attend_any(q, k, v, segment_ids=None):
        length = q.shape[1]
        if length % 2 == 0:
            return attend(q, k, v, segment_ids)
        q, k, v = (jnp.pad(x, [(0, 0), (0, 1), (0, 0), (0, 0)]) for x in (q, k, v))
        if segment_ids is not None:
            segment_ids = jnp.pad(segment_ids, [(0, 0), (0, 1)])
        return attend(q, k, v, segment_ids)[:, :length]

    return attend_any


def _fused(q, k, v, segment_ids):
    mask = None if segment_ids is None else (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="cudnn")


def _masked(q, k, v, mask):
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")
