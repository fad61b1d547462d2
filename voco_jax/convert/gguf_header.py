"""The header of a GGUF file: metadata by key, and where the tensors are; everything is checked against the format.

The reader of the `gguf` package is not used: it is slow and trusts all counts in the file. The format has no checksums,
so a damaged number or word that fits the rest goes unnoticed.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import dataclasses
import math
from pathlib import Path
import struct

import gguf
import numpy as np

from voco_jax.errors import UserError
from voco_jax.io.files import SourceFile

# Limits far above real files: a vocabulary of 256,000 tokens with its merges needs less than half
_LONGEST = 2**25  # bytes of the whole header
_MOST = 2**16  # keys; tensors
_LONGEST_KEY = 1000  # bytes
_LONGEST_NAME = 63  # bytes of a tensor's name, as llama.cpp allows

_Kind = gguf.GGUFValueType
_FORMATS: dict[int, str] = {
    _Kind.UINT8: "u1", _Kind.INT8: "i1", _Kind.UINT16: "<u2", _Kind.INT16: "<i2", _Kind.UINT32: "<u4",
    _Kind.INT32: "<i4", _Kind.FLOAT32: "<f4", _Kind.BOOL: "?", _Kind.UINT64: "<u8", _Kind.INT64: "<i8",
    _Kind.FLOAT64: "<f8",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a tensor is. `shape` is row-major, as in numpy; `begin` and `nbytes` locate its bytes in the file."""

    name: str
    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    begin: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Header:
    """`fields`: an int, float, bool or str by key, or a list of them."""

    file: SourceFile
    fields: dict[str, object]
    tensors: list[Entry]


def read_header(path: Path) -> Header:
    """UserError for a damaged or truncated file, and for other formats."""
    file = SourceFile(path)
    cursor = _Cursor(file)
    if file.size < 24 or cursor.bytes(4) != b"GGUF":
        raise UserError(f"{path}: not a GGUF file")
    version, num_tensors, num_keys = cursor.unpack("<IQQ")
    if version not in (2, 3):
        raise UserError(f"{path}: expected version 2 or 3 of GGUF in little-endian order, found {version}")
    if max(num_tensors, num_keys) > _MOST:
        raise UserError(f"{path}: expected at most {_MOST} tensors and keys, found {num_tensors} and {num_keys}")
    fields = {}
    for _ in range(num_keys):
        key = cursor.name("a key", _LONGEST_KEY)
        if key in fields:
            raise UserError(f"{path}: key {key!r} appears twice")
        (kind,) = cursor.unpack("<I")
        fields[key] = cursor.value(key, kind)
    described = [_describe(cursor) for _ in range(num_tensors)]
    alignment = fields.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= 2**20 or alignment & (alignment - 1):
        raise UserError(f"{path}: general.alignment: expected a power of two, found {alignment!r}")
    data = -(-cursor.at // alignment) * alignment
    return Header(file, fields, _placed(file, described, data, alignment))


def _describe(cursor: "_Cursor") -> tuple[str, tuple[int, ...], gguf.GGMLQuantizationType, int]:
    """(name, shape, type, offset) of a tensor."""
    path, name = cursor.file.path, cursor.name("a tensor's name", _LONGEST_NAME)
    (dimensions,) = cursor.unpack("<I")
    if not 1 <= dimensions <= 4:
        raise UserError(f"{path}: {name}: expected 1 to 4 dimensions, found {dimensions}")
    *sizes, kind, offset = cursor.unpack(f"<{dimensions}QIQ")
    if not all(0 < size < 2**31 for size in sizes):
        raise UserError(f"{path}: {name}: expected dimensions above 0, found {sizes}")
    try:
        return name, tuple(reversed(sizes)), gguf.GGMLQuantizationType(kind), offset
    except ValueError:
        raise UserError(f"{path}: {name}: unknown type {kind}") from None


def _placed(file: SourceFile, described: list[tuple], data: int, alignment: int) -> list[Entry]:
    """The tensors. They follow each other in the header's order, from byte `data` to the end of the file."""
    entries, end, names = [], data, set()
    for name, shape, kind, offset in described:
        if name in names:
            raise UserError(f"{file.path}: tensor {name} appears twice")
        names.add(name)
        of_block, nbytes = gguf.GGML_QUANT_SIZES[kind]
        if shape[-1] % of_block:
            raise UserError(f"{file.path}: {name}: rows of {shape[-1]} do not divide into blocks of {kind.name}")
        nbytes *= math.prod(shape) // of_block
        begin = -(-end // alignment) * alignment
        if data + offset != begin:
            raise UserError(
                f"{file.path}: {name}: expected at byte {begin}, after the tensor before; found at {data + offset}"
            )
        end = begin + nbytes
        if end > file.size:
            raise UserError(f"{file.path}: truncated: {name} ends at byte {end}, the file has {file.size}")
        entries.append(Entry(name, shape, kind, begin, nbytes))
    if file.size not in (end, -(-end // alignment) * alignment):
        raise UserError(f"{file.path}: the tensors end at byte {end}, the file has {file.size}")
    return entries


class _Cursor:
    """Reads the header from front to back. UserError beyond the end of the file, or beyond `_LONGEST` bytes."""

    def __init__(self, file: SourceFile):
        self.file, self.at = file, 0
        self._data = file.read(0, min(file.size, _LONGEST))

    def _skip(self, length: int) -> int:
        """Move `length` bytes on; returns the old position."""
        at, self.at = self.at, self.at + length
        if self.at > len(self._data):
            if self.at > self.file.size:
                raise UserError(f"{self.file.path}: truncated, or damaged: its header ends at byte {self.at} or later")
            raise UserError(f"{self.file.path}: expected a header of at most {_LONGEST} bytes")
        return at

    def bytes(self, length: int) -> bytes:
        at = self._skip(length)
        return self._data[at : self.at]

    def unpack(self, form: str) -> tuple:
        return struct.unpack_from(form, self._data, self._skip(struct.calcsize(form)))

    def name(self, what: str, most: int) -> str:
        """A name in ASCII without spaces, of at most `most` bytes."""
        (length,) = self.unpack("<Q")
        if not 0 < length <= most:
            raise UserError(f"{self.file.path}: {what} expected to have 1 to {most} bytes, found {length}")
        name = self.bytes(length)
        if not all(33 <= byte <= 126 for byte in name):
            raise UserError(f"{self.file.path}: {what} expected in ASCII, found {name[:100]!r}")
        return name.decode()

    def value(self, key: str, kind: int) -> object:
        if kind == _Kind.STRING:
            return self._texts(key, 1)[0]
        if kind != _Kind.ARRAY:
            return self._numbers(key, kind, 1)[0]
        kind, count = self.unpack("<IQ")
        if kind == _Kind.STRING:
            return self._texts(key, count)
        return self._numbers(key, kind, count)

    def _numbers(self, key: str, kind: int, count: int) -> list:
        if kind not in _FORMATS:  # arrays of arrays too: no known key has one
            raise UserError(f"{self.file.path}: {key}: unknown type {kind}")
        dtype = np.dtype(_FORMATS[kind])
        at = self._skip(count * dtype.itemsize)
        if kind == _Kind.BOOL and not set(self._data[at : self.at]) <= {0, 1}:
            raise UserError(f"{self.file.path}: {key}: expected 0 or 1 (true or false), found another number")
        return np.frombuffer(self._data, dtype, count, at).tolist()

    def _texts(self, key: str, count: int) -> list[str]:
        data, size, length_of = self._data, len(self._data), struct.Struct("<Q").unpack_from
        if self.at + 8 * count > size:
            self._skip(8 * count)
        texts, at = [], self.at
        for _ in range(count):
            (length,) = length_of(data, at) if at + 8 <= size else (0,)
            begin, at = at + 8, at + 8 + length
            if at > size:
                self._skip(at - self.at)
            texts.append(data[begin:at])
        self.at = at
        try:
            return [text.decode() for text in texts]
        except UnicodeDecodeError as error:
            raise UserError(f"{self.file.path}: {key}: expected text in UTF-8: {error}") from None
