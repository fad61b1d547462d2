"""Helpers for the values of tensors, and for file names in a checkpoint's files."""

import os
from pathlib import Path

import numpy as np

from voco_jax.errors import UserError
from voco_jax.io.tensors import BFLOAT16


def has_nonfinite(array: np.ndarray) -> bool:
    """Whether a value is infinite or NaN: all bits of its exponent are 1. (Casting to a wider type takes memory.)"""
    bits, exponent = {
        np.dtype(np.float16): (np.uint16, 0x7C00),
        BFLOAT16: (np.uint16, 0x7F80),
        np.dtype(np.float32): (np.uint32, 0x7F800000),
    }[array.dtype]
    flat = array.reshape(-1).view(bits)
    step = 1 << 20  # stays in the cache
    return any(((flat[i : i + step] & exponent) == exponent).any() for i in range(0, len(flat), step))


def transpose(matrix: np.ndarray) -> np.ndarray:
    """The contiguous transpose of [rows, columns], a few rows at a time: four times as fast as numpy."""
    result = np.empty(matrix.shape[::-1], matrix.dtype)
    for start in range(0, len(matrix), 16):
        result[:, start : start + 16] = matrix[start : start + 16].T
    return result


def same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two contiguous arrays have one dtype, one shape and the same bytes."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    x, y = (array.reshape(-1).view(np.uint8) for array in (a, b))
    step = 1 << 20  # stays in the cache
    return all(np.array_equal(x[i : i + step], y[i : i + step]) for i in range(0, len(x), step))


def worst_difference(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference of two values, in float32; NaN where only one of them is NaN."""
    worst, step = 0.0, 1 << 20
    x, y = a.reshape(-1), b.reshape(-1)
    for i in range(0, len(x), step):
        p, q = (part[i : i + step].astype(np.float32) for part in (x, y))
        difference = np.abs(p - q)
        difference[(p == q) | (np.isnan(p) & np.isnan(q))] = 0  # infinities too
        worst = np.maximum(worst, difference.max())  # passes NaN on
    return float(worst)


def cast(array: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, int]:
    """(array in another dtype, how many finite values became infinite)."""
    if array.dtype == dtype:
        return array, 0
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    return result, int(np.isinf(result).sum() - np.isinf(array).sum())


def name_leads_out(name: str) -> bool:
    """Whether a file name leads out of its directory."""
    return os.path.isabs(name) or ".." in Path(name).parts


def inside(directory: Path, name: str) -> Path:
    """The file `name` of a directory. UserError for names that lead out of it, which an index may hold.

    Links in the directory are followed: Hugging Face's cache is made of them.
    """
    if name_leads_out(name):
        raise UserError(f"{directory}: {name!r} is named, which is outside of the directory")
    return directory / name
