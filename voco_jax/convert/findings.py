"""Errors and warnings about tensors' values, collected while they are converted."""

from pathlib import Path

import numpy as np

from voco_jax.convert.tensors import cast, has_nonfinite
from voco_jax.errors import UserError


class Findings:
    """Collects tensors with values that are not finite (an error), and casts that overflowed (a warning)."""

    def __init__(self) -> None:
        self._nonfinite: set[str] = set()
        self._overflowed: dict[str, int] = {}

    def check(self, name: str, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """The values in another dtype."""
        if has_nonfinite(values):
            self._nonfinite.add(name)
        values, overflowed = cast(values, dtype)
        if overflowed:
            self._overflowed[name] = overflowed
        return values

    def finish(self, path: Path) -> list[str]:
        """The warnings. UserError for values that are not finite."""
        if self._nonfinite:
            raise UserError(f"{path}: values that are not finite in {listing(sorted(self._nonfinite))}")
        return [f"{name}: {count} values became infinite" for name, count in sorted(self._overflowed.items())]


def listing(items: list[str], at_most: int = 8) -> str:
    """`a; b; c; and 4 more`"""
    rest = len(items) - at_most
    return "; ".join(items[:at_most]) + (f"; and {rest} more" if rest > 0 else "")
