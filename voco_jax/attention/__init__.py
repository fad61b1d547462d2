"""Attention kernels behind one interface, chosen by name.

An adapter is a module with four functions (shapes and limits in `xla.py`, the adapter for any platform):

    causal(q, k, v, segment_ids)      the read stream: causal attention inside the segments of a row
    chunked(q, k, v, chunk)           the compress stream: rows of images, each `chunk` tokens, causal in itself
    row_shape(num_segments, chunk)    how the kernel likes images laid out in rows: (images a row, places a row)
    cached(q, k, v, positions)        inference: queries against a cache

An adapter that cannot honour a request raises ValueError; nothing falls back.

| adapter  | platform                  | causal, chunked                   | rows of images          |
|----------|---------------------------|-----------------------------------|-------------------------|
| `xla`    | any                       | every pair of tokens              | one image, no padding   |
| `splash` | TPU; CPU, interpreted     | only blocks with a visible pair   | several images, padding |
| `cudnn`  | NVIDIA GPU, 16-bit floats | fused; packed text through a bias | one image, no padding   |

Decoding and short prompts are XLA's everywhere, because none of the fused kernels is made for a few queries a row:
reading the weights and the cache once is all there is to it. Long prompts are `causal`, of whole rows.

Under an ambient mesh (`jax.set_mesh`) rows are sharded over data and fsdp, rows of images over frame too, heads over
tensor.
"""

import jax

from voco_jax.attention import cudnn, splash, xla

ADAPTERS = {"xla": xla, "splash": splash, "cudnn": cudnn}
PLATFORMS = {"xla": None, "splash": "tpu", "cudnn": "gpu"}  # where it is of use; None: anywhere


def get_adapter(name: str):
    """The adapter of that name; ValueError names those there are."""
    if name not in ADAPTERS:
        raise ValueError(f"attention {name!r} is unknown; there are: {', '.join(sorted(ADAPTERS))}")
    return ADAPTERS[name]


def is_fused(name: str) -> bool:
    """Whether an adapter's `causal` is one kernel, which never has all scores in memory."""
    return name in ("splash", "cudnn")


def check_platform(name: str) -> None:
    """ValueError where an adapter is not for this machine's devices (splash on a CPU, interpreted, is for tests)."""
    needed, found = PLATFORMS[name], jax.default_backend()
    if needed not in (None, found):
        raise ValueError(f"attention {name!r} needs a {needed}, found {found}; 'xla' computes the same anywhere")


def interpreted(name: str) -> str:
    """What to say of an adapter whose kernel this machine's devices only interpret; '' of any other."""
    if name != "splash" or jax.default_backend() != "cpu":
        return ""
    return "attention 'splash' is only interpreted on a CPU, many times slower than 'xla', which computes the same"


def check_kernels(name: str, **shapes) -> None:
    """ValueError, at set-up, for what an adapter's library refuses only once it compiles: `cudnn.check` has the
    arguments. The other adapters say all that they refuse when a step is traced."""
    if name == "cudnn":
        cudnn.check(**shapes)
