"""PyTorch's `*.bin` checkpoints, read without PyTorch and without running anything.

Such a file is a zip archive: a pickle that describes the tensors, and their values in one uncompressed member each. The
unpickler here knows what makes a state dict of tensors, and nothing else can be called.
"""

import collections
import io
import math
from pathlib import Path
import pickle
import struct
import zipfile

import numpy as np

from voco_jax.convert.tensors import BFLOAT16, Tensor, raw_tensor
from voco_jax.errors import UserError

_STORAGES = {
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": BFLOAT16,
    "DoubleStorage": np.dtype(np.float64),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
}


def read_torch(file: Path) -> dict[str, Tensor]:
    """Tensors by name. UserError for damaged files, and for any object that is not a plain tensor."""
    try:
        with zipfile.ZipFile(file) as archive:
            (pickled,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            members = {info.filename: info for info in archive.infolist()}
            state = _Unpickler(
                io.BytesIO(archive.read(pickled)), file, pickled.removesuffix("data.pkl"), members
            ).load()
    except _DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{file}: not a PyTorch checkpoint that can be read safely: {reason}") from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{file}: expected a dictionary of tensors, found {type(state).__name__}")
    return {str(name): tensor for name, tensor in state.items()}


# What reading a damaged archive, or unpickling whatever bytes, may raise.
_DAMAGE = (
    zipfile.BadZipFile, pickle.UnpicklingError, struct.error, EOFError, ArithmeticError, AttributeError, LookupError,
    MemoryError, NotImplementedError, RecursionError, TypeError, ValueError,
)  # fmt: skip


class _Unpickler(pickle.Unpickler):
    """Hands out nothing that the pickle could change: strings, and functions that are made anew each time."""

    def __init__(self, stream, file: Path, prefix: str, members: dict[str, zipfile.ZipInfo]):
        super().__init__(stream)
        self._file, self._prefix, self._members = file, prefix, members

    def find_class(self, module: str, name: str):
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda *arguments: self._tensor(*arguments)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, requires_grad, hooks: tensor
        if module == "torch" and name in _STORAGES:
            return name
        raise pickle.UnpicklingError(f"{module}.{name} is not among the things a state dict is made of")

    def persistent_load(self, pid):
        kind, storage, key, _, size = pid
        if kind != "storage" or storage not in _STORAGES:
            raise pickle.UnpicklingError(f"unknown storage {pid!r}")
        dtype = _STORAGES[storage]
        info = self._members[f"{self._prefix}data/{key}"]
        if info.compress_type != zipfile.ZIP_STORED or info.file_size < size * dtype.itemsize:
            raise pickle.UnpicklingError(f"storage {key}: compressed, or shorter than {size} values")
        return dtype, info, size

    def _tensor(self, storage, offset, shape, strides, *_):
        dtype, info, size = storage
        shape, strides = tuple(map(int, shape)), tuple(map(int, strides))
        if min((offset, *shape, *strides)) < 0 or len(shape) != len(strides):
            raise pickle.UnpicklingError(f"a tensor of shape {shape} and strides {strides} at {offset}")
        reach = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) if math.prod(shape) else 0
        if max(reach, math.prod(shape)) + offset > size:  # repeated values, too, could be any number
            raise pickle.UnpicklingError(f"a tensor of shape {shape} reaches beyond its storage")
        begin = _data_offset(self._file, info) + offset * dtype.itemsize
        row_major = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        if all(a == b for n, a, b in zip(shape, strides, row_major, strict=True) if n > 1):
            return raw_tensor(self._file, begin, shape, dtype)
        flat = raw_tensor(self._file, begin, (reach,), dtype)

        def read() -> np.ndarray:
            steps = tuple(stride * dtype.itemsize for stride in strides)
            return np.ascontiguousarray(np.lib.stride_tricks.as_strided(flat.read(), shape, steps))

        return Tensor(shape, dtype, self._file, read)


def _data_offset(file: Path, info: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: behind its local header, whose extra field may differ from the directory's."""
    with open(file, "rb") as stream:
        stream.seek(info.header_offset)
        header = stream.read(30)
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    return info.header_offset + 30 + name_length + extra_length
