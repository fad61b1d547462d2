"""Memory files: a `MemoryBank` on disk (`memory_format.py`). All that is read is checked against checksums.

Some of the images, or fewer tokens of each, can be read without the others, and files are joined without holding them
in memory. One process at a time writes a file, under another name, and renames it when it is complete. An opened file
stays readable when another one replaces it.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import errno
import functools
import itertools
import os
from pathlib import Path
from typing import BinaryIO, TypeVar
import weakref

import numpy as np

from voco_jax.data.sources.roots import path_here
from voco_jax.errors import TryAgain, UserError, cannot
from voco_jax.infer.memory import ARRAYS, AXES, MemoryBank, check_tokens, count_of_pictures, pictures_of, size_of
from voco_jax.infer.memory_format import (
    OF_MEMORIES,
    VERSION,
    WITH_TILES,
    Contents,
    Damaged,
    Layout,
    begun,
    checksums,
    header,
    is_shape,
    line_of,
    read_contents,
    same_head,
    tensors_of,
)
from voco_jax.io.atomic import open_for_writing
from voco_jax.io.files import open_regular
from voco_jax.io.locks import locked
from voco_jax.io.paths import as_path, state_of
from voco_jax.models.compressors import KEYS_AND_VALUES
from voco_jax.terminal import count_of

SUFFIX = ".voco"
PATIENCE = 10.0  # seconds that one writer waits for another
_PIECE = 64 << 20  # bytes that are read and checked, or copied, at once
_IMAGES = 1 << 14  # at most in a piece

T = TypeVar("T")


class DamagedMemory(UserError):
    """A memory file's bytes are not those that were written. (What cannot be read is another UserError.)"""


class MemoryFile:
    """A memory file, opened for reading: the header and the items are read and checked at once, memories on request.

    `items` says what each memory is of, `model` is the fingerprint of the model that made them, `version` that of the
    format. `kind`, `shape` and `dtype` are those of a `MemoryBank` of all of it, `size` the bytes of the file.

    DamagedMemory for what is not a memory file, is cut off, or differs from what was written; UserError for what cannot
    be read. TryAgain where another program writes into the file while it is read.
    """

    def __init__(self, file: str | os.PathLike):
        self.file = _path(file)
        with contextlib.ExitStack() as stack:
            opened = stack.enter_context(_Opened(self.file))
            self._contents: Contents = opened.checked(lambda: read_contents(self.file, opened.read, opened.size))
            self._opened: _Opened | None = opened
            self._state = opened.state
            self._close = weakref.finalize(self, stack.pop_all().close)
        layout = self._contents.layout
        self.items, self.model, self.version = self._contents.items, self._contents.model, self._contents.version
        self.kind, self.shape, self.dtype = layout.kind, layout.shape, layout.dtype
        self.num_tokens = self.shape[1]
        self.size = self._contents.head_bytes + layout.size

    def __len__(self) -> int:
        return len(self.items)

    def summary(self) -> str:
        """What it holds, in a line."""
        images, tokens, *token = self.shape
        pictures = sum(1 for _ in pictures_of(self.items)) if self.version == WITH_TILES else images
        numbers = (
            f"{token[0]} layers × {token[1]} × {token[2]}" if self.kind == KEYS_AND_VALUES else f"{token[0]} numbers"
        )
        layout = self._contents.layout
        token_bytes = layout.token_bytes - layout.bytes_of("checksums")
        return (
            f"{self.file}: {count_of_pictures(pictures, images)}, {count_of(tokens, 'token')} each, {self.dtype.name} "
            f"{self.kind}, {numbers}, {size_of(token_bytes)} a token, {size_of(self.size)}, model {self.model}"
        )

    def __enter__(self) -> "MemoryFile":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Keep no descriptor: what is read afterwards opens the file again. UserError then where it is another."""
        self._opened = None
        self._close()

    def read(
        self, which: Sequence[int] | None = None, tokens: int | None = None, model: str | None = None,
        kind: str | None = None,
    ) -> MemoryBank:  # fmt: skip
        """The memories of some images, or all, with their first `tokens` tokens, or all, as a `MemoryBank`.

        UserError where a checksum says that they are not as they were written, or they are of another model than
        `model` or not of the `kind` that it reads.
        """
        self.check_model(model, kind)
        check_tokens(f"{self.file}: tokens", tokens, self.num_tokens)
        places = range(len(self))
        which = places if which is None else [places[i] for i in which]
        with self._open() as opened:
            return self._read(opened, which, self.num_tokens if tokens is None else tokens)

    def check_model(
        self, model: str | None, kind: str | None, hint: str = "compress the pictures again"
    ) -> None:  # fmt: skip
        """UserError where the file is of another kind or another model (None: of any); `hint` says what to do."""
        if kind is not None and self.kind != kind:
            raise UserError(
                f"{self.file}: expected memories of {kind}, which this model reads; found {self.kind}; {hint}"
            )
        if model is not None and self.model != model:
            raise UserError(
                f"{self.file}: a memory can only be read by the model that made it: expected model {model}, "
                f"found {self.model}; {hint}"
            )

    def pieces(self, which: Sequence[int]) -> Iterator[MemoryBank]:
        """`read`, some images at a time."""
        count = self._piece(self.num_tokens)
        with self._open() as opened:
            for start in range(0, len(which), count):
                yield self._read(opened, which[start : start + count], self.num_tokens)

    @contextlib.contextmanager
    def _open(self) -> Iterator["_Opened"]:
        if self._opened is not None:
            yield self._opened
            return
        with _Opened(self.file) as opened:
            # The head too: a number of a file that is gone is given again, and clocks are coarse
            same = opened.state == self._state
            if not same or not opened.checked(lambda: same_head(self._contents, opened.read, opened.size)):
                raise TryAgain(f"{self.file}: the memory file was replaced while it was read")
            yield opened

    def _piece(self, tokens: int) -> int:
        """Images of so many tokens that are read at once."""
        return max(1, min(_IMAGES, _PIECE // (self._contents.layout.token_bytes * tokens)))

    def _read(self, opened: "_Opened", which: Sequence[int], tokens: int) -> MemoryBank:
        layout = self._contents.layout
        try:
            arrays = {
                name: np.empty((len(which), tokens, *shape[2:]), dtype)
                for name, (dtype, shape) in layout.tensors.items()
            }
        except MemoryError:
            size = len(which) * tokens * layout.token_bytes
            raise UserError(f"{self.file}: {len(which)} images are more than memory holds: {size} bytes") from None
        # Checked before more is read: there may be no end of wrong bytes
        step, of_image = self._piece(tokens), min(tokens, max(1, _PIECE // layout.token_bytes))
        for start, first in itertools.product(range(0, len(which), step), range(0, tokens, of_image)):
            part = slice(start, start + step), slice(first, first + of_image)
            piece = {name: array[part] for name, array in arrays.items()}
            opened.checked(functools.partial(self._fill, opened, piece, which[part[0]], first))
        names, items = ARRAYS[self.kind], tuple(self.items[i] for i in which)
        scales = {name: arrays[f"{name}_scales"] for name in names} if layout.dtype == np.int8 else None
        return MemoryBank({name: arrays[name] for name in names}, items, self.model, scales)

    def _fill(self, opened: "_Opened", piece: dict[str, np.ndarray], which: Sequence[int], first: int) -> None:
        """Read some images' tokens from the `first` on into arrays [n, tokens, …], all of them contiguous; Damaged
        where their checksums are others."""
        layout, entries = self._contents.layout, self._contents.layout.entries()
        for name, array in piece.items():
            rows, of_token = array.reshape(len(which), -1).view(np.uint8), layout.bytes_of(name)
            begin = self._contents.head_bytes + entries[name].begin + first * of_token
            for i, end in _runs(which, array.shape[1] == self.num_tokens):
                opened.read_into(rows[i:end].reshape(-1).data, begin + which[i] * self.num_tokens * of_token)
        tensors = {name: array for name, array in piece.items() if name != "checksums"}
        about = None if self.version == "1" else begun(layout, self.model, [self.items.line(i) for i in which])
        wrong = (checksums(tensors, about, first) != piece["checksums"]).any(axis=1)
        if wrong.any():
            source = self.items[which[int(wrong.argmax())]].source
            raise Damaged(f"the memory file is damaged: {source}: {self.kind} are not as they were written")


class _Opened:
    """An open file, read by place: as it was when it was opened, whatever takes its name."""

    def __init__(self, file: Path):
        self._file = file
        try:
            self._stream = open_regular(file)
        except (OSError, ValueError) as error:  # ValueError: no path at all
            raise _unread(file, error) from None
        status = os.fstat(self._stream.fileno())
        self.size, self.state = status.st_size, state_of(status)

    def __enter__(self) -> "_Opened":
        return self

    def __exit__(self, *_) -> None:
        self._stream.close()

    def checked(self, read: Callable[[], T]) -> T:
        """What `read()` gives; what is wrong with the file's bytes is a DamagedMemory."""
        try:
            try:
                return read()
            except Damaged as error:
                now = os.fstat(self._stream.fileno())
                if state_of(now) == self.state:
                    raise DamagedMemory(f"{self._file}: {error}") from None
                raise TryAgain(f"{self._file}: another program wrote into the memory file while it was read") from None
        except OSError as error:
            raise _unread(self._file, error) from None

    def read(self, begin: int, count: int) -> bytearray:
        found = bytearray(count)
        self.read_into(found, begin)
        return found

    def read_into(self, buffer: bytearray | memoryview, begin: int) -> None:
        """Fill a buffer of bytes; Damaged where the file has not so many."""
        # Read, not mapped: where a mapped file is cut off by another program, the process is killed
        rest = buffer.data if isinstance(buffer, np.ndarray) else memoryview(buffer)
        while rest:
            count = os.preadv(self._stream.fileno(), [rest], begin)
            if not count:
                raise Damaged("the memory file is cut off")
            rest, begin = rest[count:], begin + count


def _unread(file: Path, error: Exception) -> UserError:
    if getattr(error, "errno", None) == errno.ESTALE:  # a server of files has forgotten what was replaced
        return TryAgain(f"{file}: the memory file was replaced while it was read")
    return cannot(f"{file}: the memory file cannot be read", error)


def _path(file: str | os.PathLike) -> Path:
    return as_path(path_here(file))


def _runs(which: Sequence[int], whole: bool) -> Iterator[tuple[int, int]]:
    """Parts of `which` that lie side by side in the file: (first, end); of images that are not read whole, each."""
    first = 0
    for i in range(1, len(which) + 1):
        if i == len(which) or not whole or which[i] != which[i - 1] + 1:
            yield first, i
            first = i


# ---- Writing -------------------------------------------------------------------------------------------------------

Part = MemoryBank | tuple[MemoryFile, Sequence[int]]  # a bank, or some images of a file


def save_memory(file: str | os.PathLike, *parts: Part) -> None:
    """Write a memory file, mostly of one bank. An existing one is replaced when the new one is complete.

    TryAgain where another process writes the same file for long.
    """
    with writing(file) as real:
        write_memory(real, parts)


def load_memory(
    file: str | os.PathLike, model: str | None = None, tokens: int | None = None, kind: str | None = None
) -> MemoryBank:
    """All of a memory file; `model`, `tokens` and `kind` as `MemoryFile.read`'s."""
    with MemoryFile(file) as opened:
        return opened.read(tokens=tokens, model=model, kind=kind)


def writing(file: str | os.PathLike, patience: float | None = None) -> contextlib.AbstractContextManager[Path]:
    """`locked` for a memory file: a block that reads what is there and then replaces it, while no other writes it."""
    return locked(_path(file), PATIENCE if patience is None else patience)


def write_memory(real: Path, parts: Sequence[Part]) -> None:
    """Write a memory file of banks and of images of other files, within `writing`, which gives the path `real`.

    The others are read a piece at a time, and checked. UserError where they do not go together.
    """
    try:
        with open_for_writing(real) as stream:
            write_parts(stream, parts)
    except OSError as error:
        raise cannot(f"{real}: the memory file cannot be written", error) from error


def write_parts(stream: BinaryIO, parts: Sequence[Part]) -> None:
    """Write the bytes of a memory file, as `write_memory`, to a stream that is empty and may seek."""
    if not parts:
        raise UserError("memories: expected at least one, found none")
    model, kind, shape, dtype = _common(parts)
    text = bytearray()
    num, version = 0, VERSION
    for part in parts:
        for item in part.items if isinstance(part, MemoryBank) else map(part[0].items.__getitem__, part[1]):
            text += line_of(item)
            num, version = num + 1, version if item.tile is None else WITH_TILES
    layout = Layout((num, *shape), dtype, len(text), kind)
    head, entries = header(layout, model, text, version), layout.entries()
    stream.write(head)
    done = 0
    for bank in _banks(parts):
        tensors, lines = tensors_of(bank), list(map(line_of, bank.items))
        tensors["checksums"] = checksums(tensors, begun(layout, model, lines))
        for name, array in tensors.items():
            stream.seek(len(head) + entries[name].begin + done * layout.shape[1] * layout.bytes_of(name))
            stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        done += len(bank)
    stream.seek(len(head) + entries["items"].begin)
    stream.write(text)


def _common(parts: Sequence[Part]) -> tuple[str, str, tuple[int, ...], np.dtype]:
    """Model, kind, shape of a memory and dtype, which all parts have. UserError where they do not go together."""
    sources = [(part, "memory") if isinstance(part, MemoryBank) else (part[0], part[0].file) for part in parts]
    first, name = sources[0]
    model, kind, shape, dtype = first.model, first.kind, first.shape[1:], first.dtype
    for part, other in sources[1:]:
        for what, expected, found in (
            ("kind", kind, part.kind), ("model", model, part.model), ("shape of a memory", shape, part.shape[1:]),
            ("dtype", dtype, part.dtype),
        ):  # fmt: skip
            if expected != found:
                way = "; `voco compress --int8`, or MemoryBank.to_int8() in Python, makes int8 of the others"
                way = way if what == "dtype" and "int8" in (expected, found) else ""
                raise UserError(f"{other}: expected {what} {expected} as in {name}, found {found}{way}")
    if not isinstance(model, str):
        raise UserError(f"{name}: expected the fingerprint of a model, found {type(model).__name__}")
    if dtype not in OF_MEMORIES.values() or not is_shape([0, *shape], kind):
        known, axes = ", ".join(dtype.name for dtype in OF_MEMORIES.values()), ", ".join(AXES[kind][1:])
        raise UserError(f"{name}: expected {kind} of images [{axes}] in {known}; found {list(shape)} in {dtype}")
    return model, kind, shape, dtype


def _banks(parts: Sequence[Part]) -> Iterator[MemoryBank]:
    for part in parts:
        if isinstance(part, MemoryBank):
            yield part
        else:
            yield from part[0].pieces(part[1])
