"""Tensors that stay in their files until they are read."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
import dataclasses
import math
from pathlib import Path

import ml_dtypes
import numpy as np

from voco_jax.io.files import SourceFile
from voco_jax.terminal import shortened

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
        view = memoryview(array.reshape(-1).view(np.uint8).data)
        file.read_into(view, offset)
        check(view)
        return array

    return Tensor(shape, dtype, file.path, read)


def check_shape(shape: object) -> tuple[int, ...]:
    """A shape out of a file. ValueError for anything but a list of whole numbers, and for more dimensions or values
    than a checkpoint has (0 × 10¹⁸ has no values, but numpy refuses it)."""
    if not isinstance(shape, list | tuple) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"expected a shape, found {shortened(shape)}")
    if len(shape) > 8 or math.prod(max(n, 1) for n in shape) > _LARGEST:
        raise ValueError(f"expected a shape of at most 8 dimensions and {_LARGEST} values, found {shortened(shape)}")
    return tuple(shape)


def read_ahead(reads: Iterable[tuple[int, Callable[[], np.ndarray]]]) -> Iterator[np.ndarray]:
    """What the calls of (bytes, call) return, in their order; two run in threads while the caller uses the last.

    Large arrays are made one at a time: three of them, and their copies, would be the memory of a small machine.
    """
    left = collections.deque(reads)
    with ThreadPoolExecutor(2) as pool:
        running: collections.deque[tuple[int, Future[np.ndarray]]] = collections.deque()
        held = 0
        while left or running:
            while left and (not running or held + left[0][0] + sum(size for size, _ in running) <= _AHEAD):
                size, read = left.popleft()
                running.append((size, pool.submit(read)))
            held, future = running.popleft()
            yield future.result()
            del future
