"""Memory files: a `MemoryBank` on disk, as safetensors with metadata, of which nothing wrong is ever read.

    keys, values                  [N, K, L, G, H] BF16, F16, F32 or I8
    keys_scales, values_scales    [N, K, L, G] F32, with I8 only
    checksums                     [N, K] U32, of each token's keys, values and scales

Pictures come first in every tensor, so that some of them, or fewer tokens of each, are read without the others, and
files are joined without holding them in memory. The metadata has the model's fingerprint, what each memory is of, and
a checksum of the header itself. A file is written apart and renamed when it is whole.
"""

from collections.abc import Iterable, Iterator, Sequence
import dataclasses
import json
import math
import os
import struct
import zlib

import ml_dtypes
import numpy as np

from voco_jax.data.sources.roots import path_here
from voco_jax.errors import UserError
from voco_jax.infer.memory import Item, MemoryBank

SUFFIX = ".voco"
_FORMAT, _VERSION = "voco_jax.memory", "1"
_DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32),
    "I8": np.dtype(np.int8), "U32": np.dtype(np.uint32),
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LONGEST_HEADER = 1 << 30
_PIECE = 64 << 20  # bytes that are copied at once


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Where each tensor lies: fixed by the bank's shape and dtype."""

    shape: tuple[int, ...]  # of keys and of values: [N, K, L, G, H]
    dtype: np.dtype

    @property
    def tensors(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        tensors = {"keys": (self.dtype, self.shape), "values": (self.dtype, self.shape)}
        if self.dtype == np.int8:
            tensors |= {f"{name}_scales": (np.dtype(np.float32), self.shape[:4]) for name in ("keys", "values")}
        return tensors | {"checksums": (np.dtype(np.uint32), self.shape[:2])}

    def offsets(self) -> dict[str, tuple[int, int]]:
        """First byte and end of each tensor, from the end of the header on."""
        offsets, end = {}, 0
        for name, (dtype, shape) in self.tensors.items():
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            offsets[name] = begin, end
        return offsets

    @property
    def size(self) -> int:
        return self.offsets()["checksums"][1]


class MemoryFile:
    """A memory file, opened for reading: the header is read and checked at once, memories as they are asked for.

    UserError for what is no memory file, is cut off, or is not as it was written.
    """

    def __init__(self, file: str | os.PathLike):
        self.file = path_here(file)
        try:
            with open(self.file, "rb") as stream:
                self._begin(stream, os.fstat(stream.fileno()).st_size)
        except OSError as error:
            raise UserError(f"{self.file}: the memory file cannot be read: {error.strerror}") from None

    def _begin(self, stream, size: int) -> None:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
            raise UserError(f"{self.file}: not a memory file, or cut off: {size} bytes")
        text = stream.read(length)
        try:
            header = json.loads(text)
            metadata = header["__metadata__"]
            if metadata["format"] != _FORMAT:
                raise ValueError(metadata["format"])
        except (ValueError, LookupError, TypeError, RecursionError):
            raise UserError(f"{self.file}: not a memory file, or damaged in its header") from None
        if (version := metadata.get("version")) != _VERSION:
            raise UserError(f"{self.file}: expected a memory file of version {_VERSION}, found {version!r}")
        try:
            keys = header["keys"]
            self.items = tuple(Item(**item) for item in json.loads(metadata["items"]))
            self.model = str(metadata["model"])
            self._layout = _Layout(tuple(map(int, keys["shape"])), _DTYPES[keys["dtype"]])
            sound = text == _header(self._layout, self.items, self.model) and len(self.items) == self._layout.shape[0]
        except (ValueError, LookupError, TypeError, AttributeError):
            sound = False
        if not sound:  # it also fails where one letter of a path or one digit of a time is another
            raise UserError(f"{self.file}: the memory file is damaged: its header is not as it was written")
        self._data = 8 + length
        if (expected := self._data + self._layout.size) != size:
            what = "cut off" if size < expected else "damaged"
            raise UserError(f"{self.file}: the memory file is {what}: expected {expected} bytes, found {size}")

    def __len__(self) -> int:
        return len(self.items)

    @property
    def num_tokens(self) -> int:
        """K, tokens of a picture."""
        return self._layout.shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, K, L, G, H] of keys and of values."""
        return self._layout.shape

    @property
    def dtype(self) -> np.dtype:
        return self._layout.dtype

    def read(self, which: Sequence[int] | None = None, tokens: int | None = None, model: str | None = None):
        """The memories of some pictures, or all, with their first `tokens` tokens, or all, as a `MemoryBank`.

        UserError where a checksum says that they are not as they were written, or they are of another model than
        `model`.
        """
        if model is not None:
            self.check_model(model)
        if tokens is not None and not 1 <= tokens <= self.num_tokens:
            raise UserError(f"{self.file}: expected 1 … {self.num_tokens} tokens of a picture, found {tokens}")
        which = range(len(self)) if which is None else which
        tokens = self.num_tokens if tokens is None else tokens
        arrays = self._arrays()
        taken = {name: np.stack([arrays[name][i, :tokens] for i in which]) for name in arrays} if len(which) else {
            name: np.zeros((0, tokens, *array.shape[2:]), array.dtype) for name, array in arrays.items()
        }  # fmt: skip
        bank = _bank(taken, tuple(self.items[i] for i in which), self.model)
        found = _checksums(bank)
        for place, i in enumerate(which):
            if (found[place] != taken["checksums"][place]).any():
                raise UserError(
                    f"{self.file}: the memory file is damaged: {self.items[i].source}: keys and values are not as they "
                    "were written"
                )
        return bank

    def checksums(self) -> list[bytes]:
        """Of each picture's tokens, as they were written."""
        return [sums.tobytes() for sums in self._arrays()["checksums"]]

    def check_model(self, model: str) -> None:
        """UserError where another model's fingerprint stands in the file."""
        if self.model != model:
            raise UserError(
                f"{self.file}: a memory can only be read by the model that made it: expected model {model}, "
                f"found {self.model}; compress the pictures again"
            )

    def pieces(self, which: Sequence[int]) -> Iterator[MemoryBank]:
        """`read`, some pictures at a time."""
        count = max(1, _PIECE // max(1, self._layout.size // max(1, len(self))))
        for start in range(0, len(which), count):
            yield self.read(which[start : start + count])

    def _arrays(self) -> dict[str, np.ndarray]:
        offsets = self._layout.offsets()
        return {
            name: np.memmap(self.file, dtype, "r", self._data + offsets[name][0], shape)
            if math.prod(shape)
            else np.zeros(shape, dtype)
            for name, (dtype, shape) in self._layout.tensors.items()
        }


def save_memory(file: str | os.PathLike, bank: MemoryBank) -> None:
    """Write a memory file; one that is there is replaced when the new one is whole."""
    join_files(file, [bank])


def load_memory(file: str | os.PathLike, model: str | None = None, tokens: int | None = None) -> MemoryBank:
    """All of a memory file; `model` and `tokens` as `MemoryFile.read`'s."""
    return MemoryFile(file).read(tokens=tokens, model=model)


def join_files(file: str | os.PathLike, parts: Iterable["MemoryBank | tuple[MemoryFile, Sequence[int]]"]) -> None:
    """Write a memory file of banks and of some pictures of other files, in their order.

    The others are read a piece at a time, and checked. UserError where they do not go together.
    """
    file, parts = path_here(file), list(parts)
    kinds = [
        (part.model, part.keys.shape[1:], part.keys.dtype, "memory")
        if isinstance(part, MemoryBank)
        else (part[0].model, part[0].shape[1:], part[0].dtype, part[0].file)
        for part in parts
    ]
    for kind in kinds[1:]:
        for what, expected, found in zip(("model", "shape of a picture", "dtype"), kinds[0], kind, strict=False):
            if expected != found:
                way = "; voco_jax.compress --int8, or MemoryBank.to_int8() in Python, makes int8 of the others"
                way = way if what == "dtype" and "int8" in (expected, found) else ""
                raise UserError(f"{kind[3]}: expected {what} {expected} as in {kinds[0][3]}, found {found}{way}")
    items = [
        item
        for part in parts
        for item in (part.items if isinstance(part, MemoryBank) else [part[0].items[i] for i in part[1]])
    ]
    layout = _Layout((len(items), *kinds[0][1]), kinds[0][2])
    temporary = file.with_name(f".{file.name}.{os.getpid()}.new")
    try:
        with open(temporary, "wb") as stream:
            text = _header(layout, items, kinds[0][0])
            stream.write(struct.pack("<Q", len(text)) + text)
            start, done = 8 + len(text), 0
            for bank in _banks(parts):
                for name, array in (_tensors(bank) | {"checksums": _checksums(bank)}).items():
                    begin = layout.offsets()[name][0] + done * math.prod(array.shape[1:]) * array.dtype.itemsize
                    stream.seek(start + begin)
                    stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
                done += len(bank)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    except OSError as error:
        raise UserError(f"{file}: the memory file cannot be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _banks(parts) -> Iterator[MemoryBank]:
    for part in parts:
        if isinstance(part, MemoryBank):
            yield part
        else:
            yield from part[0].pieces(list(part[1]))


def _tensors(bank: MemoryBank) -> dict[str, np.ndarray]:
    tensors = {"keys": bank.keys, "values": bank.values}
    if bank.scales is not None:
        tensors |= {"keys_scales": bank.scales[0], "values_scales": bank.scales[1]}
    return tensors


def _bank(tensors: dict[str, np.ndarray], items: tuple[Item, ...], model: str) -> MemoryBank:
    scales = np.stack([tensors["keys_scales"], tensors["values_scales"]]) if "keys_scales" in tensors else None
    return MemoryBank(tensors["keys"], tensors["values"], items, model, scales)


def _checksums(bank: MemoryBank) -> np.ndarray:
    """CRC-32 of each token's bytes, uint32 [N, K]."""
    sums = np.zeros(bank.keys.shape[:2], np.uint32)
    for array in _tensors(bank).values():
        of_tokens = np.ascontiguousarray(array).reshape(*sums.shape, -1).view(np.uint8)
        for at in np.ndindex(sums.shape):
            sums[at] = zlib.crc32(of_tokens[at], int(sums[at]))
    return sums


def _header(layout: _Layout, items: Sequence[Item], model: str) -> bytes:
    """The one text for a file of this content: one that differs in a letter is damaged."""
    unknown = dataclasses.asdict(Item(""))
    described = [{k: v for k, v in dataclasses.asdict(i).items() if k == "source" or v != unknown[k]} for i in items]
    metadata = {
        "format": _FORMAT, "version": _VERSION, "model": model, "tokens": str(layout.shape[1]),
        "layers": str(layout.shape[2]), "items": json.dumps(described),
    }  # fmt: skip
    offsets = layout.offsets()
    header = {"__metadata__": metadata} | {
        name: {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": list(offsets[name])}
        for name, (dtype, shape) in layout.tensors.items()
    }
    metadata["checksum"] = f"{zlib.crc32(json.dumps(header).encode()):08x}"
    text = json.dumps(header).encode()
    return text + b" " * (-len(text) % 8)
