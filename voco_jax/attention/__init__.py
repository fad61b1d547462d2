"""Where attention is decided: every layer of the vision tower and of the language model computes it by an adapter.

`config.model.attention` names the adapter, `get_adapter` finds it, and `Adapter` says what one must do. Which keys a
query may see depends on the function alone: `full` (the vision tower), `chunked` (the compress stream), `causal` (the
read stream), `causal_after` (text that reads images whole) or `cached` (inference). `models/vit.py` and
`models/voco.py` call them. (The Q-Former is a baseline, and has Flax's own attention.) To add a kernel, write a module
with the same functions and name it in `ADAPTERS`.

| adapter  | platform                  | causal, chunked                   | rows of images          |
|----------|---------------------------|-----------------------------------|-------------------------|
| `xla`    | any                       | every pair of tokens              | one image, no padding   |
| `splash` | TPU; CPU, interpreted     | only blocks with a visible pair   | several images, padding |
| `cudnn`  | NVIDIA GPU, 16-bit floats | fused; packed text through a bias | one image, no padding   |

An adapter that cannot honour a request raises ValueError; nothing falls back. `full` and `cached` are XLA's in every
adapter: the fused kernels are not made for a few queries a row, as in decoding and short prompts, where reading the
weights and the cache once is the whole cost. Long prompts are read by `causal`, as whole rows of the cache. Sliding
windows are XLA's alone.

Under an ambient mesh (`jax.set_mesh`) rows are sharded over data and fsdp, rows of images over frame too, heads over
tensor. Shapes are those of the legend in `models/voco.py`.
"""

from typing import Protocol

import jax

from voco_jax.attention import cudnn, splash, xla
from voco_jax.attention.windows import Window


class Adapter(Protocol):
    """One attention kernel. Queries are not scaled; N, their heads, are a multiple of G, those of keys and values."""

    PLATFORM: str | None  # 'tpu' or 'gpu', where the kernel is of use; None: anywhere
    FUSED: bool  # `causal` is one kernel, which never has all scores in memory
    WINDOWS: bool  # sliding windows are computed; where not, `causal` and `chunked` raise ValueError for them

    def full(self, q: jax.Array, k: jax.Array, v: jax.Array, /) -> jax.Array:
        """All queries see all keys: q [R, T, N, H], k and v [R, T, G, H] to [R, T, N, H]."""

    def causal(
        self, q: jax.Array, k: jax.Array, v: jax.Array, /, segment_ids: jax.Array | None = None,
        window: Window | None = None,
    ) -> jax.Array:  # fmt: skip
        """Query i sees key j where j ≤ i, both are in the same segment, and j is in i's window; shapes as `full`.

        segment_ids are integers [R, T]; None means one segment a row. Padding is a segment like any other.
        """

    def causal_after(
        self, q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array,
        before_k: jax.Array, before_v: jax.Array, before_ids: jax.Array, /,
    ) -> jax.Array:  # fmt: skip
        """As `causal`, but queries also see the keys that stand before the row, of their own segment.

        before_k and before_v are [R, A, G, H], before_ids integers [R, A]; keys of an id that no query has are seen by
        nobody.
        """

    def chunked(self, q: jax.Array, k: jax.Array, v: jax.Array, /, chunk: int, window: int = 0) -> jax.Array:
        """Causal attention inside segments of `chunk` tokens that follow each other from a row's start.

        A query sees the last `window` tokens up to it (0: all).

        q is [R, C, N, H], k and v are [R, C, G, H]: C // chunk segments, then C % chunk places of padding. Padding's
        outputs are finite and mean nothing.
        """

    def row_shape(self, num_segments: int, chunk: int, /) -> tuple[int, int]:
        """The best layout for one device's `num_segments` segments: (segments a row, places a row C).

        Segments a row divide num_segments; C is at least segments a row · chunk.
        """

    def cached(
        self, q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, /, window: int = 0
    ) -> jax.Array:  # fmt: skip
        """Queries [R, T, N, H] see the places of their row's cache [R, C, G, H] up to their own position, and it.

        A query sees the last `window` places up to its own (0: all).
        positions are integers [R, T]; -1 sees nothing, and its output is finite and means nothing.
        """

    def check(
        self, *, heads: int, kv_heads: int, size: int, dtype: str, segment_length: int, row_length: int, training: bool,
        before_length: int = 0,
    ) -> None:  # fmt: skip
        """ValueError, at set-up, for what the kernel's library would refuse only when a step is compiled.

        `size` is that of a head, `segment_length` that of a compress segment (0: no compress stream), `row_length`
        that of a read row; with `training` read rows are packed, and the gradients' kernels are checked too.
        `before_length` keys come before a row's in `causal_after` (0: it is not called).
        """


ADAPTERS: dict[str, Adapter] = {"xla": xla, "splash": splash, "cudnn": cudnn}


def get_adapter(name: str) -> Adapter:
    """The adapter of that name; ValueError lists the names there are."""
    if name not in ADAPTERS:
        raise ValueError(f"attention: expected one of {', '.join(ADAPTERS)}; found {name!r}")
    return ADAPTERS[name]


def check_platform(name: str) -> None:
    """ValueError where an adapter is not for this machine's devices (splash on a CPU, interpreted, is for tests)."""
    needed, found = get_adapter(name).PLATFORM, jax.default_backend()
    if needed not in (None, found):
        raise ValueError(f"attention: {name!r} needs a {needed}, found {found}; 'xla' computes the same anywhere")


def interpreted(name: str) -> str:
    """A warning about an adapter whose kernel this machine's devices only interpret; '' of any other."""
    if name != "splash" or jax.default_backend() != "cpu":
        return ""
    return "attention 'splash' is only interpreted on a CPU, many times slower than 'xla', which computes the same"
