"""Safetensors files, read and written one tensor at a time.

The safetensors library maps whole files (mapped pages count as the process's memory) and writes from a dict that holds
all tensors at once; neither streams. The format is small: eight bytes of header length, a JSON header, the tensors.
https://huggingface.co/docs/safetensors
"""

from collections.abc import Iterable
import json
import math
from pathlib import Path
import reprlib
import struct

import numpy as np

from voco_jax.convert.tensors import BFLOAT16, SourceFile, Tensor, check_shape, raw_tensor, read_ahead
from voco_jax.errors import UserError
from voco_jax.io.json_files import parse, read_object

_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": BFLOAT16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_OTHERS = {"I64": np.dtype(np.int64), "I32": np.dtype(np.int32), "F64": np.dtype(np.float64)}  # buffers, not weights
_LONGEST_HEADER = 2**23  # bytes, of more than 50,000 tensors
_MOST_BRACKETS = 2**18  # three for each tensor
_LONGEST_NAME = 1000  # characters
_ENTRY = {"dtype", "shape", "data_offsets"}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name. UserError for a file that is damaged or truncated, or holds a dtype without place here."""
    file = SourceFile(path)
    start = file.read(0, min(8, file.size))
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else file.size
    if length > file.size - 8:
        raise UserError(f"{path}: not a safetensors file, or truncated: a header of {length} bytes in {file.size}")
    if length > _LONGEST_HEADER:
        raise UserError(f"{path}: expected a header of at most {_LONGEST_HEADER} bytes, found {length}")
    text = file.read(8, length)
    if (brackets := text.count(b"[") + text.count(b"{")) > _MOST_BRACKETS:
        raise UserError(f"{path}: expected at most {_MOST_BRACKETS} brackets in its header, found {brackets}")
    try:
        entries = _read_header(text)
    except ValueError as error:
        raise UserError(f"{path}: damaged safetensors header: {error}") from None
    tensors, last = {}, 0
    for name, (dtype_name, shape, begin, end) in sorted(entries.items(), key=lambda entry: entry[1][2:]):
        dtype = (_DTYPES | _OTHERS).get(dtype_name)
        if dtype is None:
            raise UserError(f"{path}: {name}: expected dtype {', '.join(_DTYPES)}; found {dtype_name}")
        if begin != last:  # the format has no gaps
            fault = "overlaps another tensor" if begin < last else f"there is a gap of {begin - last} bytes before it"
            raise UserError(f"{path}: {name}: {fault}")
        last = end
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise UserError(f"{path}: {name}: {end - begin} bytes do not make {dtype_name} {list(shape)}")
        if 8 + length + end > file.size:
            raise UserError(f"{path}: truncated: {name} ends at byte {8 + length + end}, the file has {file.size}")
        tensors[name] = raw_tensor(file, 8 + length + begin, shape, dtype)
    if 8 + length + last != file.size:
        raise UserError(f"{path}: the tensors end at byte {8 + length + last}, the file has {file.size}")
    return tensors


def _read_header(text: bytes) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """(dtype, shape, begin, end) by name. ValueError for anything else than the format has."""
    header = parse(text.decode(), _no_doubles)
    if not isinstance(header, dict):
        raise ValueError(f"expected an object, found {type(header).__name__}")
    about = header.pop("__metadata__", None)
    about = {} if about is None else about
    if not isinstance(about, dict) or not all(isinstance(value, str) for value in about.values()):
        raise ValueError("__metadata__: expected an object of texts")
    "".join([*header, *about, *about.values()]).encode()  # half characters are none of a name
    entries = {}
    for name, entry in header.items():
        if len(name) > _LONGEST_NAME:
            raise ValueError(f"expected names of at most {_LONGEST_NAME} characters, found one of {len(name)}")
        if not isinstance(entry, dict) or entry.keys() != _ENTRY or not isinstance(entry["dtype"], str):
            raise ValueError(f"{name}: expected dtype, shape and data_offsets, found {reprlib.repr(entry)}")
        offsets = entry["data_offsets"]
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(i) is int and i >= 0 for i in offsets):
            raise ValueError(f"{name}: data_offsets: expected begin and end, found {reprlib.repr(offsets)}")
        try:
            entries[name] = entry["dtype"], check_shape(entry["shape"]), *offsets
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return entries


def _no_doubles(pairs: list[tuple[str, object]]) -> dict:
    content = dict(pairs)
    if len(content) != len(pairs):
        seen = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"{twice[:_LONGEST_NAME]} doubled")
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
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) and 0 < len(file) <= _LONGEST_NAME and len(name) <= _LONGEST_NAME
        for name, file in weight_map.items()
    ):
        raise UserError(f"{index}: expected an object with 'weight_map', an object of file names")
    return weight_map
