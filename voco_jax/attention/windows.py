"""Sliding windows: how far back a query sees (Mistral v0.1, arXiv:2310.06825)."""

from typing import NamedTuple

import jax


class Window(NamedTuple):
    """A query at position p sees the keys of its segment from position p - size + 1 on.

    `positions` are integers [R, T]. Slots that text cannot see have places in a row, but no positions of their own, so
    places would not do.
    """

    size: int
    positions: jax.Array

    def visible(self) -> jax.Array:
        """Bool [R, 1, T, T]: not too far back."""
        distance = self.positions[:, :, None] - self.positions[:, None, :]
        return (distance < self.size)[:, None]


def binding(size: int, length: int) -> int:
    """A window's size for a sequence of `length` tokens; 0 where there is none (0), or it shows all of them."""
    return size if size < length else 0


def window_of(size: int, positions: jax.Array) -> Window | None:
    """A window over read rows of these positions [R, T]; None where it is not `binding`."""
    return Window(size, positions) if binding(size, positions.shape[1]) else None


def refuse(adapter: str, window: Window | int | None) -> None:
    """ValueError for a window (None, 0: there is none), in adapters whose kernel has none."""
    if window:
        size = window if isinstance(window, int) else window.size
        raise ValueError(f"attention: {adapter!r} has no sliding windows, found one of {size} tokens; 'xla' has them")
