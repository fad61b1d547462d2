"""Safetensors: the format's header, and files that are read and written one tensor at a time.

The safetensors library maps whole files (mapped pages count as the process's memory, and a file that another program
cuts off kills the process) and writes from a dict that holds all tensors at once. So only its format is used, which is
small: eight bytes of header length, a JSON header, the tensors. https://huggingface.co/docs/safetensors
"""

import collections
from collections.abc import Callable, Iterable, Mapping
import json
import math
from pathlib import Path
import struct
from typing import NamedTuple

import numpy as np

from voco_jax.errors import UserError
from voco_jax.io.files import SourceFile
from voco_jax.io.json_files import parse, read_object
from voco_jax.io.tensors import BFLOAT16, Tensor, check_shape, raw_tensor, read_ahead
from voco_jax.terminal import shortened

DTYPES = {
    "F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": BFLOAT16, "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64), "I32": np.dtype(np.int32), "I8": np.dtype(np.int8), "U32": np.dtype(np.uint32),
    "U8": np.dtype(np.uint8),
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_WEIGHTS = ("F32", "F16", "BF16")
_BUFFERS = ("I64", "I32", "F64")  # which checkpoints hold too, but never as weights
_LONGEST_HEADER = 2**23  # bytes, of more than 50,000 tensors
_MOST_BRACKETS = 2**18  # three for each tensor
_LONGEST_NAME = 1000  # characters


# ---- The header ----------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """What the header says of a tensor: `begin` and `end` are bytes, counted from the end of the header."""

    dtype: str  # one of DTYPES, or unknown
    shape: tuple[int, ...]
    begin: int
    end: int


def place(tensors: Iterable[tuple[str, np.dtype, tuple[int, ...]]]) -> dict[str, Entry]:
    """Where tensors (name, dtype, shape) lie that are written one behind the other."""
    entries, end = {}, 0
    for name, dtype, shape in tensors:
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = Entry(NAMES[dtype], tuple(shape), begin, end)
    return entries


def header_text(metadata: Mapping[str, str], entries: Mapping[str, Entry]) -> bytes:
    """The header's JSON."""
    tensors = {
        name: {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [entry.begin, entry.end]}
        for name, entry in entries.items()
    }
    return json.dumps({"__metadata__": dict(metadata)} | tensors).encode()


def framed(text: bytes) -> bytes:
    """All that stands before the tensors: the header's length, and the header with spaces up to a multiple of 8."""
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def parse_header(text: bytes) -> tuple[dict[str, str], dict[str, Entry]]:
    """(metadata, tensors by name) of a header's JSON. ValueError for anything that the format does not have.

    Whether the tensors overlap, leave gaps or are in the file is not known yet.
    """
    if (brackets := text.count(b"[") + text.count(b"{")) > _MOST_BRACKETS:
        raise ValueError(f"expected at most {_MOST_BRACKETS} brackets, found {brackets}")
    header = parse(text.decode(), _no_doubles)
    if not isinstance(header, dict):
        raise ValueError(f"expected an object, found {type(header).__name__}")
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__: expected an object of texts")
    "".join([*header, *metadata, *metadata.values()]).encode()  # UnicodeEncodeError, a ValueError, for half characters
    return metadata, {name: _parse_entry(name, entry) for name, entry in header.items()}


def _parse_entry(name: str, entry: object) -> Entry:
    if len(name) > _LONGEST_NAME:
        raise ValueError(f"expected names of at most {_LONGEST_NAME} characters, found one of {len(name)}")
    expected = {"dtype", "shape", "data_offsets"}
    if not isinstance(entry, dict) or entry.keys() != expected or not isinstance(entry["dtype"], str):
        raise ValueError(f"{name}: expected dtype, shape and data_offsets, found {shortened(entry)}")
    offsets = entry["data_offsets"]
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(i) is int and i >= 0 for i in offsets):
        raise ValueError(f"{name}: data_offsets: expected begin and end, found {shortened(offsets)}")
    try:
        return Entry(entry["dtype"], check_shape(entry["shape"]), *offsets)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _no_doubles(pairs: list[tuple[str, object]]) -> dict:
    content = dict(pairs)
    if len(content) != len(pairs):
        ((twice, _),) = collections.Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{twice[:_LONGEST_NAME]} doubled")
    return content


# ---- Checkpoints ---------------------------------------------------------------------------------------------------


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name, still in their file. UserError for a file that is damaged or truncated, and for other dtypes
    than F32, F16, BF16 and those of buffers."""
    file = SourceFile(path)
    start = file.read(0, min(8, file.size))
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else file.size
    if length > file.size - 8:
        raise UserError(f"{path}: not a safetensors file, or truncated: a header of {length} bytes in {file.size}")
    if length > _LONGEST_HEADER:
        raise UserError(f"{path}: expected a header of at most {_LONGEST_HEADER} bytes, found {length}")
    try:
        _, entries = parse_header(file.read(8, length))
    except ValueError as error:
        raise UserError(f"{path}: damaged safetensors header: {error}") from None
    tensors, last = {}, 0
    for name, (dtype, shape, begin, end) in sorted(entries.items(), key=lambda entry: entry[1][2:]):
        if dtype not in _WEIGHTS + _BUFFERS:
            raise UserError(f"{path}: {name}: expected dtype {', '.join(_WEIGHTS)}; found {dtype}")
        if begin != last:  # the format has no gaps
            fault = "overlaps another tensor" if begin < last else f"there is a gap of {begin - last} bytes before it"
            raise UserError(f"{path}: {name}: {fault}")
        last = end
        if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
            raise UserError(f"{path}: {name}: {end - begin} bytes do not make {dtype} {list(shape)}")
        if 8 + length + end > file.size:
            raise UserError(f"{path}: truncated: {name} ends at byte {8 + length + end}, the file has {file.size}")
        tensors[name] = raw_tensor(file, 8 + length + begin, shape, DTYPES[dtype])
    if 8 + length + last != file.size:
        raise UserError(f"{path}: the tensors end at byte {8 + length + last}, the file has {file.size}")
    return tensors


def write_safetensors(file: Path, tensors: Iterable[tuple[str, Tensor]], progress: Callable[[int], object]) -> None:
    """Write tensors in their order; `progress(bytes)` after each. The next are read while one is written, so memory
    holds a few of them at most."""
    tensors = list(tensors)
    entries = place((name, tensor.dtype, tensor.shape) for name, tensor in tensors)
    with open(file, "wb") as stream:
        stream.write(framed(header_text({"format": "pt"}, entries)))
        arrays = read_ahead((tensor.nbytes, tensor.read) for _, tensor in tensors)
        for (name, tensor), array in zip(tensors, arrays, strict=True):
            if array.shape != tensor.shape or array.dtype != tensor.dtype:
                raise ValueError(f"{name}: announced {tensor.dtype} {tensor.shape}, read {array.dtype} {array.shape}")
            stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            progress(tensor.nbytes)


def read_index(index: Path) -> dict[str, str]:
    """File by tensor name of a `*.index.json`. UserError for one of another form."""
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) and 0 < len(file) <= _LONGEST_NAME and len(name) <= _LONGEST_NAME
        for name, file in weight_map.items()
    ):
        raise UserError(f"{index}: expected an object with 'weight_map', an object of file names")
    return weight_map
