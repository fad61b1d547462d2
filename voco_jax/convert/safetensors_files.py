"""Safetensors files, read and written one tensor at a time.

The safetensors library maps whole files (mapped pages count as the process's memory) and writes from a dict that holds
all tensors at once; neither streams. The format is small: eight bytes of header length, a JSON header, the tensors.
https://huggingface.co/docs/safetensors
"""

from collections.abc import Iterable
import json
import math
from pathlib import Path
import struct

import numpy as np

from voco_jax.convert.tensors import BFLOAT16, Tensor, raw_tensor, read_ahead
from voco_jax.errors import UserError

_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": BFLOAT16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_OTHERS = {"I64": np.dtype(np.int64), "I32": np.dtype(np.int32), "F64": np.dtype(np.float64)}  # buffers, not weights
_LONGEST_HEADER = 100_000_000  # as the safetensors library allows


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """Tensors by name. UserError for a file that is damaged or truncated, or holds a dtype without place here."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(_LONGEST_HEADER, size - 8):
            raise UserError(f"{file}: not a safetensors file, or truncated: a header of {length} bytes in {size}")
        try:
            header = json.loads(stream.read(length), object_pairs_hook=_no_doubles)
            header.pop("__metadata__", None)
            entries = {
                name: (entry["dtype"], tuple(map(int, entry["shape"])), *map(int, entry["data_offsets"]))
                for name, entry in header.items()
            }
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise UserError(f"{file}: damaged safetensors header: {type(error).__name__}: {error}") from None
    tensors, last = {}, 0
    for name, (dtype_name, shape, begin, end) in sorted(entries.items(), key=lambda entry: entry[1][2:]):
        dtype = (_DTYPES | _OTHERS).get(dtype_name)
        if dtype is None:
            raise UserError(f"{file}: {name}: expected dtype {', '.join(_DTYPES)}; found {dtype_name}")
        if begin < last or min(shape, default=0) < 0:
            raise UserError(f"{file}: {name}: overlaps another tensor, or has a negative dimension")
        last = end
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise UserError(f"{file}: {name}: {end - begin} bytes do not make {dtype_name} {list(shape)}")
        if 8 + length + end > size:
            raise UserError(f"{file}: truncated: {name} ends at byte {8 + length + end}, the file has {size}")
        tensors[name] = raw_tensor(file, 8 + length + begin, shape, dtype)
    return tensors


def _no_doubles(pairs: list[tuple[str, object]]) -> dict:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} doubled")
    return content


def write_safetensors(file: Path, tensors: Iterable[tuple[str, Tensor]], progress) -> None:
    """Write tensors in their order; `progress(bytes)` after each. The next are read while one is written."""
    tensors = list(tensors)
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors:
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb", buffering=0) as stream:
        _write(stream, struct.pack("<Q", len(text)) + text)
        arrays = read_ahead((tensor.nbytes, tensor.read) for _, tensor in tensors)
        for (name, tensor), array in zip(tensors, arrays, strict=True):
            if array.shape != tensor.shape or array.dtype != tensor.dtype:
                raise ValueError(f"{name}: announced {tensor.dtype} {tensor.shape}, read {array.dtype} {array.shape}")
            _write(stream, memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8)))
            progress(tensor.nbytes)


def _write(stream, data) -> None:
    view = memoryview(data)
    while view:
        view = view[stream.write(view) :]


def read_index(index: Path) -> dict[str, str]:
    """File by tensor name of a `*.index.json`."""
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: expected an object with 'weight_map': {type(error).__name__}: {error}") from None
