"""The bytes of memory files: safetensors, with what each memory is of, and checksums that hold all of it together.

    keys, values                  [N, K, L, G, H] BF16, F16, F32 or I8
    keys_scales, values_scales    [N, K, L, G] F32, with I8 only
    checksums                     [N, K] U32: CRC-32 of what a token's keys, values and scales are of, and of these
    items                         [bytes] U8: a line of JSON for each image

or, of a model that makes memories of embeddings, in place of keys and values

    embeddings                    [N, K, D] BF16, F16, F32 or I8
    embeddings_scales             [N, K] F32, with I8 only

An image is a picture, a frame of a video, or a tile of a picture, which may have many. What a token is of: the model,
dtype and shape, its image's line in `items`, and its place in the image. So no part of another image, file or model is
taken for this one's. The header's metadata has format, version, the kind of
memory, the model's fingerprint, K (and L), and checksums of `items` and of the header itself. A header is short, and
the lines of `items` are decoded one by one as they are asked for: a file of millions of pictures opens in little more
memory than `items` takes.

A file with tiles has version 4. One without them has version 3, as before there were tiles: programs of then refuse
the first by its version, and read the second. Versions 1 and 2 are read as well: they say nothing of the kind, and hold
keys and values. The items of version 1 are one text in the header, and its checksums are those of the tokens' bytes
alone.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import hashlib
import json
import math
from pathlib import Path
import re
import struct
import zlib

import numpy as np

from voco_jax.errors import UserError
from voco_jax.infer.memory import ARRAYS, AXES, Item, MemoryBank
from voco_jax.io.safetensors import DTYPES, NAMES, Entry, framed, header_text, parse_header, place
from voco_jax.models.compressors import KEYS_AND_VALUES
from voco_jax.terminal import shortened

VERSION, WITH_TILES = "3", "4"  # that are written
_WITH_KIND = (VERSION, WITH_TILES)
_FORMAT = "voco_jax.memory"
_FIELDS = dict.fromkeys(field.name for field in dataclasses.fields(Item)).keys()  # in their order
OF_MEMORIES = {name: DTYPES[name] for name in ("BF16", "F16", "F32", "I8")}
# What no honest file has more of
_LONGEST_HEADER = 1 << 16  # bytes, without the items of version 1
_LONGEST_ITEMS_1 = 1 << 30  # bytes, in a header of version 1
_LONGEST_ITEM = 1 << 20  # bytes of JSON: a path has 4096, and six for each where it is escaped
_LARGEST_TOKEN = 1 << 24  # keys: 175B models have 1.2 million
_MOST_TOKENS = 1 << 24  # of an image
_LATEST = 1e12  # seconds
_FINEST = 1 << 16  # rows of tiles

Read = Callable[[int, int], bytearray]  # (first byte, how many) of a file; `Damaged` where it has not so many


class Damaged(Exception):
    """What is wrong with a file's bytes, as the end of a message."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where each tensor lies: fixed by the bank's shape and dtype, and the bytes of its items."""

    shape: tuple[int, ...]  # of keys and of values, [N, K, L, G, H], or of embeddings, [N, K, D]
    dtype: np.dtype
    items_bytes: int | None  # None: they stand in the header, as in version 1
    kind: str = KEYS_AND_VALUES

    @property
    def tensors(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Dtype and shape of those that have a place for each image."""
        tensors = {name: (self.dtype, self.shape) for name in ARRAYS[self.kind]}
        if self.dtype == np.int8:
            tensors |= {f"{name}_scales": (np.dtype(np.float32), self.shape[:-1]) for name in ARRAYS[self.kind]}
        return tensors | {"checksums": (np.dtype(np.uint32), self.shape[:2])}

    def entries(self) -> dict[str, Entry]:
        """The tensors as the file's header has them, first byte and end counted from the end of the header on."""
        items = {} if self.items_bytes is None else {"items": (np.dtype(np.uint8), (self.items_bytes,))}
        return place((name, dtype, shape) for name, (dtype, shape) in (self.tensors | items).items())

    @property
    def size(self) -> int:
        return max(entry.end for entry in self.entries().values())

    def bytes_of(self, name: str) -> int:
        """Of one token in a tensor."""
        dtype, shape = self.tensors[name]
        return math.prod(shape[2:]) * dtype.itemsize

    @property
    def token_bytes(self) -> int:
        """Of one token in all tensors."""
        return sum(map(self.bytes_of, self.tensors))


def is_shape(shape: Sequence, kind: str) -> bool:
    """Whether a bank's arrays may have it: [N, K, L, G, H] or [N, K, D], of which N alone may be 0 or of any size."""
    if len(shape) != len(AXES[kind]) or not all(type(size) is int for size in shape):
        return False
    num, tokens, *of_token = shape
    possible = 0 <= num < 2**62 and 1 <= tokens <= _MOST_TOKENS and min(of_token) >= 1
    return possible and math.prod(of_token) <= _LARGEST_TOKEN


# ---- Items ---------------------------------------------------------------------------------------------------------


class Items:
    """What each image of a file is, decoded when it is asked for; UserError then for what is no item."""

    def __init__(self, file: Path, text: bytearray, starts: np.ndarray, ends: np.ndarray, escaped: bool):
        self._file, self._text, self._starts, self._ends, self._escaped = file, text, starts, ends, escaped

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[Item]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, which: int) -> Item:  # type: ignore[override]  # nobody asks for slices
        try:
            text = self.line(which).decode("ascii")
            return item_of(json.loads(json.loads(f'"{text}"') if self._escaped else text))
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError, RecursionError):
            raise UserError(f"{self._file}: item {which}: not readable as JSON") from None
        except ValueError as error:
            raise UserError(f"{self._file}: item {which}: {error}") from None

    def line(self, i: int) -> bytes:
        """As it stands in the file."""
        return bytes(self._text[self._starts[i] : self._ends[i]])


def item_of(fields: object) -> Item:
    """Of a JSON value; ValueError for what is none."""
    if not isinstance(fields, dict) or "source" not in fields or not fields.keys() <= _FIELDS:
        raise ValueError("expected source, sha256, time and tile, found other fields")
    for name in ("source", "sha256"):
        if not isinstance(fields.get(name, ""), str):
            raise ValueError(f"{name}: expected text, found {type(fields[name]).__name__}")
    time = fields.get("time")
    if time is not None:
        number = isinstance(time, int | float | np.integer | np.floating) and not isinstance(time, bool)
        if not number or not abs(time) < _LATEST:
            raise ValueError(f"time: expected seconds, found {shortened(time)}")
        time = float(time)
    tile = fields.get("tile")
    if tile is not None:
        if not _is_tile(tile):
            raise ValueError(f"tile: expected [row, column, n] of n × n, found {shortened(tile)}")
        if time is not None:
            raise ValueError("tile: expected none of a frame, which has a time")
        tile = tuple(map(int, tile))
    return Item(fields["source"], fields.get("sha256", ""), time, tile)


def _is_tile(tile: object) -> bool:
    if not isinstance(tile, list | tuple) or len(tile) != 3:
        return False
    if not all(isinstance(number, int | np.integer) and not isinstance(number, bool) for number in tile):
        return False
    row, column, n = tile
    return 0 <= row < n and 0 <= column < n and n <= _FINEST


def line_of(item: Item) -> bytes:
    """JSON of an item, with the end of the line. UserError for what is none."""
    try:
        item = item_of({name: getattr(item, name) for name in _FIELDS})
    except ValueError as error:
        raise UserError(f"memory of {item.source!r:.80}: {error}") from None
    fields = {name: getattr(item, name) for name in _FIELDS}
    text = json.dumps({name: value for name, value in fields.items() if name == "source" or value not in ("", None)})
    if len(text) >= _LONGEST_ITEM:
        raise UserError(f"memory of {item.source!r:.80}: expected a name of less than {_LONGEST_ITEM} bytes")
    return text.encode() + b"\n"


# ---- Checksums -----------------------------------------------------------------------------------------------------


def begun(layout: Layout, model: str, lines: Sequence[bytes]) -> list[int]:
    """Checksums of what each image is of: those of its tokens go on from them."""
    about = zlib.crc32(json.dumps([model, NAMES[layout.dtype], *layout.shape[1:]]).encode() + b"\n")
    return [zlib.crc32(line, about) for line in lines]


def checksums(tensors: dict[str, np.ndarray], begun: Sequence[int] | None, first: int = 0) -> np.ndarray:
    """CRC-32 of each token from the `first` of its image on, uint32 [n, k]; `begun` is None in version 1."""
    n, k = next(iter(tensors.values())).shape[:2]
    sums = [0] * (n * k)
    if begun is not None:
        places = [struct.pack("<I", place) for place in range(first, first + k)]
        sums = [zlib.crc32(place, one) for one in begun for place in places]
    for array in tensors.values():
        tokens = np.ascontiguousarray(array).reshape(n * k, math.prod(array.shape[2:])).view(np.uint8)
        sums = [zlib.crc32(token.data, sum_) for token, sum_ in zip(tokens, sums, strict=True)]
    return np.array(sums, np.uint32).reshape(n, k)


def tensors_of(bank: MemoryBank) -> dict[str, np.ndarray]:
    """As they are kept."""
    return bank.arrays | {f"{name}_scales": scales for name, scales in (bank.scales or {}).items()}


# ---- Header --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Contents:
    """What the beginning of a file says, and its items."""

    version: str
    model: str
    layout: Layout
    items: Items
    head_bytes: int  # before the tensors
    head: bytes  # a digest of them


def header(layout: Layout, model: str, items: bytes | bytearray, version: str = VERSION) -> bytes:
    """All before the tensors. UserError where the model's name is longer than any."""
    text = framed(_header(layout, model, f"{zlib.crc32(items):08x}", version))
    if len(text) > _LONGEST_HEADER:
        raise UserError(f"model: expected a fingerprint, found text of {len(model)} characters")
    return text


def _header(layout: Layout, model: str, items: str, version: str, checksum: str | None = None) -> bytes:
    """The one text for a file of this content: one that differs in a letter is damaged."""
    metadata = {"format": _FORMAT, "version": version}
    if version in _WITH_KIND:
        metadata["kind"] = layout.kind
    metadata |= {"model": model, "tokens": str(layout.shape[1])}
    if layout.kind == KEYS_AND_VALUES:
        metadata["layers"] = str(layout.shape[2])
    metadata["items"] = items
    entries = layout.entries()
    metadata["checksum"] = f"{zlib.crc32(header_text(metadata, entries)):08x}" if checksum is None else checksum
    return header_text(metadata, entries)


_BEGINNING = re.compile(rb'\{"__metadata__": \{"format": "%s", "version": "([^"\\]{1,20})", ' % _FORMAT.encode())


def read_contents(file: Path, read: Read, size: int) -> Contents:
    """Of a file of `size` bytes. Damaged where it is no memory file, cut off, or not as it was written."""
    length = struct.unpack("<Q", read(0, 8))[0] if size >= 8 else 0
    if not 2 <= length <= size - 8:
        raise Damaged(f"not a memory file, or cut off: {size} bytes")
    beginning = _BEGINNING.match(read(8, min(length, 1000)))
    if beginning is None:
        raise Damaged("not a memory file, or damaged in its header")
    version = beginning[1].decode(errors="replace")
    if version == "1":
        contents = _read_1(file, read, length, size)
    elif version in ("2", *_WITH_KIND):
        contents = _read_2(file, read, length, size, version)
    else:
        raise Damaged(f"expected a memory file of version 1 to {WITH_TILES}, found {version!r}")
    return contents


_CHANGED = "the memory file is damaged: its header is not as it was written"


def _read_2(file: Path, read: Read, length: int, size: int, version: str) -> Contents:
    """Version 2, or a later one, which says the kind too."""
    if length > _LONGEST_HEADER:
        raise Damaged(_CHANGED)
    text = bytes(read(8, length))
    layout, model, metadata = _parsed(text, version)
    # Also where one letter of a name is another
    if struct.pack("<Q", length) + text != framed(_header(layout, model, metadata["items"], version)):
        raise Damaged(_CHANGED)
    _check_size(layout, length, size)
    lines = _read_text(read, 8 + length + layout.entries()["items"].begin, layout.items_bytes or 0)
    num, checksum = lines.count(b"\n"), f"{zlib.crc32(lines):08x}"
    if checksum != metadata["items"] or num != layout.shape[0] or lines and lines[-1] != 10:
        raise Damaged("the memory file is damaged: what its items are is not as it was written")
    ends = np.flatnonzero(np.frombuffer(lines, np.uint8) == 10) + 1
    starts = np.concatenate([np.zeros(min(num, 1), np.intp), ends[:-1]])
    items = _items(file, lines, starts, ends, escaped=False)
    return Contents(version, model, layout, items, 8 + length, _digest(length, text))


_ITEMS_1, _AFTER_ITEMS_1 = b', "items": "', b'", "checksum": "'
_BETWEEN_ITEMS_1 = re.compile(rb'\}, (?=\{\\"source\\": )')  # in a name the quotation marks have more backslashes


def _read_1(file: Path, read: Read, length: int, size: int) -> Contents:
    """Version 1: the items are a text of JSON inside the header's, which is not parsed as a whole."""
    if length > _LONGEST_ITEMS_1:
        raise Damaged(_CHANGED)
    text = _read_text(read, 8, length)
    begin = text.find(_ITEMS_1, 0, _LONGEST_HEADER) + len(_ITEMS_1)
    end = text.find(_AFTER_ITEMS_1, begin)
    if begin < len(_ITEMS_1) or end < 0 or begin + length - end > _LONGEST_HEADER:
        raise Damaged(_CHANGED)
    without_items = bytes(text[:begin] + text[end:])
    layout, model, metadata = _parsed(without_items, "1")
    checksum = metadata["checksum"]
    expected = _header(layout, model, "", "1", checksum)
    spaces = len(without_items) - len(expected)
    rest = end + len(_AFTER_ITEMS_1) + len(checksum)  # from the quotation mark that ends it
    sum_ = zlib.crc32(text[rest : length - spaces], zlib.crc32(memoryview(text)[:end]))
    if f"{sum_:08x}" != checksum or without_items != expected + b" " * (-(length - spaces) % 8):
        raise Damaged(_CHANGED)
    _check_size(layout, length, size)
    num = layout.shape[0]
    if text[begin : begin + 1] != b"[" or text[end - 1 : end] != b"]" or (num == 0) != (end - begin == 2):
        raise Damaged(_CHANGED)
    between = _BETWEEN_ITEMS_1.finditer(text, begin, end)
    splits = np.fromiter((match.start() for match, _ in zip(between, range(num), strict=False)), np.int64)
    if num and len(splits) != num - 1:
        raise Damaged(_CHANGED)
    starts = np.concatenate([[begin + 1], splits + 3])[:num]
    ends = np.concatenate([splits + 1, [end - 1]])[:num]
    items = _items(file, text, starts, ends, escaped=True)
    return Contents("1", model, layout, items, 8 + length, _digest(length, text))


def same_head(contents: Contents, read: Read, size: int) -> bool:
    """Whether a file begins as the one with these contents: it has the same memories then."""
    if size != contents.head_bytes + contents.layout.size:
        return False
    length = struct.unpack("<Q", read(0, 8))[0]
    return length == contents.head_bytes - 8 and _digest(length, read(8, length)) == contents.head


def _digest(length: int, text: bytes | bytearray) -> bytes:
    return hashlib.sha256(struct.pack("<Q", length) + hashlib.sha256(text).digest()).digest()


def _parsed(text: bytes, version: str) -> tuple[Layout, str, dict]:
    """Layout, model and metadata of a short header, which is not compared yet with the one of this content."""
    try:
        metadata, entries = parse_header(text)
        kind, model = metadata["kind"] if version in _WITH_KIND else KEYS_AND_VALUES, metadata["model"]
        first = entries[ARRAYS[kind][0]]
        items_bytes = None if version == "1" else entries["items"].shape[0]
        if not is_shape(first.shape, kind) or not {"items", "checksum"} <= metadata.keys():
            raise ValueError
        return Layout(first.shape, OF_MEMORIES[first.dtype], items_bytes, kind), model, metadata
    except (ValueError, LookupError):
        raise Damaged(_CHANGED) from None


def _check_size(layout: Layout, length: int, size: int) -> None:
    if (expected := 8 + length + layout.size) != size:
        what = "cut off" if size < expected else "damaged"
        raise Damaged(f"the memory file is {what}: expected {expected} bytes, found {size}")


def _read_text(read: Read, begin: int, length: int) -> bytearray:
    """ASCII without NUL; where it is none, no more of it is read: a file may have holes of any size."""
    text = bytearray()
    for start in range(0, length, _LONGEST_ITEM):
        piece = read(begin + start, min(_LONGEST_ITEM, length - start))
        if not piece.isascii() or b"\0" in piece:
            raise Damaged("the memory file is damaged: what its items are is not as it was written")
        text += piece
    return text


def _items(file: Path, text: bytearray, starts: np.ndarray, ends: np.ndarray, escaped: bool) -> Items:
    if len(starts) and (ends - starts).max() > _LONGEST_ITEM:
        raise Damaged("the memory file is damaged: the name of an image is longer than any")
    return Items(file, text, starts, ends, escaped)
