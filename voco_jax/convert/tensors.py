"""Tensors that stay in their files until they are read."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
import contextlib
import dataclasses
import math
import os
from pathlib import Path
import reprlib

import ml_dtypes
import numpy as np

from voco_jax.errors import UserError, cannot
from voco_jax.io.files import open_regular

_AHEAD = 2**29  # bytes of arrays in the making
_LARGEST = 2**40  # values of a tensor
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": BFLOAT16}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint: `read()` brings its values into memory, a new array each time."""

    shape: tuple[int, ...]
    dtype: np.dtype
    file: Path
    read: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


class SourceFile:
    """A checkpoint's file, open for as long as one of its tensors is there: the bytes that are read are of the file
    whose header was, though another may have taken its name."""

    def __init__(self, path: Path):
        self.path = path
        with readable(path):
            self.stream = open_regular(path)
            self.size = os.fstat(self.stream.fileno()).st_size

    def read(self, offset: int, length: int) -> bytes:
        """UserError where there are not so many bytes."""
        content = bytearray(length)
        self.read_into(memoryview(content), offset)
        return bytes(content)

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill a view of bytes; several threads may. UserError as above."""
        done = 0
        while done < len(view):
            with readable(self.path):
                count = os.preadv(self.stream.fileno(), [view[done:]], offset + done)
            if not count:
                raise UserError(f"{self.path}: truncated: expected {len(view)} bytes at {offset}, found {done}")
            done += count


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """UserError or TryAgain for an error of the disk or of permissions, which says nothing of what the file holds."""
    try:
        yield
    except OSError as error:
        raise cannot(f"{path}: cannot be read", error) from None


def raw_tensor(
    file: SourceFile,
    offset: int,
    shape: tuple[int, ...],
    dtype: np.dtype,
    check: Callable[[memoryview], None] = lambda _: None,
) -> Tensor:
    """A tensor that lies in a file as it lies in memory: row-major, little-endian. `check` is given its bytes.

    Read, not memory-mapped: mapped pages stay with the process, and a checkpoint may be larger than the memory.
    """

    def read() -> np.ndarray:
        array = np.empty(shape, dtype)
        view = memoryview(array.reshape(-1).view(np.uint8))
        file.read_into(view, offset)
        check(view)
        return array

    return Tensor(shape, dtype, file.path, read)


def check_shape(shape: object) -> tuple[int, ...]:
    """A shape out of a file; ValueError for what is none, or is no checkpoint's: 0 × 10¹⁸ has no values, but a size."""
    if not isinstance(shape, list | tuple) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"expected a shape, found {reprlib.repr(shape)}")
    if len(shape) > 8 or math.prod(max(n, 1) for n in shape) > _LARGEST:
        raise ValueError(f"expected a shape of at most 8 dimensions and {_LARGEST} values, found {reprlib.repr(shape)}")
    return tuple(shape)


def has_nonfinite(array: np.ndarray) -> bool:
    """Whether a value is infinite or no number: its exponent's bits are all ones (no temporary in a wider type)."""
    bits, exponent = {
        np.dtype(np.float16): (np.uint16, 0x7C00),
        BFLOAT16: (np.uint16, 0x7F80),
        np.dtype(np.float32): (np.uint32, 0x7F800000),
    }[array.dtype]
    flat = array.reshape(-1).view(bits)
    step = 1 << 20  # stays in the cache
    return any(((flat[i : i + step] & exponent) == exponent).any() for i in range(0, len(flat), step))


def transpose(matrix: np.ndarray) -> np.ndarray:
    """The contiguous transpose of [rows, columns], a few rows at a time: four times as fast as numpy's own copy."""
    result = np.empty(matrix.shape[::-1], matrix.dtype)
    for start in range(0, len(matrix), 16):
        result[:, start : start + 16] = matrix[start : start + 16].T
    return result


def read_ahead(reads: Iterable[tuple[int, Callable[[], np.ndarray]]]) -> Iterator[np.ndarray]:
    """What the calls of (bytes, call) return, in their order; two run in threads while the caller uses the last.

    Large arrays are made one at a time: three of them, and their copies, would be the memory of a small machine.
    """
    reads = collections.deque(reads)
    with ThreadPoolExecutor(2) as pool:
        running, held = collections.deque(), 0
        while reads or running:
            while reads and (not running or held + reads[0][0] + sum(size for size, _ in running) <= _AHEAD):
                size, read = reads.popleft()
                running.append((size, pool.submit(read)))
            held, future = running.popleft()
            yield future.result()
            del future


def same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two contiguous arrays have one dtype, one shape and the same bytes."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    x, y = (array.reshape(-1).view(np.uint8) for array in (a, b))
    step = 1 << 20  # stays in the cache
    return all(np.array_equal(x[i : i + step], y[i : i + step]) for i in range(0, len(x), step))


def worst_difference(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference of two values, in float32; NaN if there is one that both do not have alike."""
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
    """Whether a file name in some file leads out of that file's directory."""
    return os.path.isabs(name) or ".." in Path(name).parts


def inside(directory: Path, name: str) -> Path:
    """The file `name` of a directory; UserError for names that lead out of it (an index is data, and may say so).

    Links in the directory are the user's own and are followed: Hugging Face's cache is made of them.
    """
    if name_leads_out(name):
        raise UserError(f"{directory}: {name!r} is named, which is outside of the directory")
    return directory / name
