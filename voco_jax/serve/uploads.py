"""Uploads (multipart/form-data): files are written into a directory while they come, so that memory does not grow with
them, and one is open at a time."""

import asyncio
from collections.abc import Iterator, Mapping
import contextlib
import logging
import os
from pathlib import Path
import shutil
import stat
import tempfile
import time
from typing import BinaryIO

from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from voco_jax.errors import UserError
from voco_jax.io.locks import holding
from voco_jax.serve.errors import ApiError, bad
from voco_jax.serve.limits import Media
from voco_jax.terminal import shortened

MOST_FILES = 1000
_MOST_HEADERS = 1 << 14  # bytes, of a part
_LONGEST_NAME = 1 << 12  # bytes
_PREFIX = "voco-serve-"
_NEW = 60.0  # seconds
_PIECE = 1 << 20  # bytes that are parsed and written at once

logging.getLogger("python_multipart").setLevel(logging.ERROR)  # strangers would fill the log


@contextlib.contextmanager
def work_directory() -> Iterator[Path]:
    """A temporary directory, locked for the time of the block."""
    # Where the server is being stopped, a thread may still write into it
    directory = tempfile.TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True)
    with directory as name, holding(Path(name), f"{name}: in use"):
        yield Path(name)


def delete_leftovers() -> None:
    """Delete the work directories of servers that were killed."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        # Others' may not be deleted, those that are used are locked, and one may be gone by now
        with contextlib.suppress(OSError, UserError):
            state = path.lstat()
            is_new = time.time() - state.st_mtime < _NEW  # and perhaps not locked yet
            if stat.S_ISDIR(state.st_mode) and state.st_uid == os.geteuid() and not is_new:
                with holding(path, f"{path}: in use"):
                    shutil.rmtree(path)


def is_multipart(content_type: str) -> bool:
    return content_type.partition(";")[0].strip().lower() == "multipart/form-data"


async def read_upload(request: Request, directory: Path) -> list[tuple[Media, str]]:
    """The parts 'file' of a body, each as a file in the directory, with the part 'name' of each, or ''. ApiError 400
    for a body that is not whole, or has anything else."""
    content_type = request.headers.get("content-type", "")
    try:
        _, options = parse_options_header(content_type)
        upload = _Upload(directory, options)
        try:
            await _feed(request, upload)
        finally:
            upload.close()
        return upload.found()
    except ValueError as error:  # the parser's are such too
        raise bad(f"multipart/form-data: {error}") from None
    except ClientDisconnect:
        raise ApiError(499, "the client went away") from None


async def _feed(request: Request, upload: "_Upload") -> None:
    piece = bytearray()
    async for part in request.stream():
        piece += part
        if len(piece) >= _PIECE:
            await asyncio.to_thread(upload.add, bytes(piece))
            piece.clear()
    await asyncio.to_thread(upload.add, bytes(piece))


class _Upload:
    """What has come of a body. ValueError for what is not expected."""

    def __init__(self, directory: Path, options: Mapping[bytes, bytes]):
        boundary = options.get(b"boundary", b"")
        if not 0 < len(boundary) <= 70:  # RFC 2046
            raise ValueError("expected a boundary of 1 … 70 characters in the content type")
        calls = (
            "part_begin", "part_data", "part_end", "header_field", "header_value", "header_end", "headers_finished",
            "end",
        )  # fmt: skip
        self._parser = MultipartParser(boundary, {f"on_{name}": getattr(self, f"_{name}") for name in calls})  # type: ignore[arg-type, misc]
        self._directory = directory
        self._files: list[Media] = []
        self._names: list[str] = []
        self._out: BinaryIO | None = None
        self._is_whole = False

    def add(self, piece: bytes) -> None:
        self._parser.write(piece)

    def close(self) -> None:
        if self._out is not None:
            self._out.close()
            self._out = None

    def found(self) -> list[tuple[Media, str]]:
        if not self._is_whole:
            raise ValueError("expected a boundary at the end, found the body cut off")
        if not self._files or len(self._names) not in (0, len(self._files)):
            raise ValueError(
                "expected one or several files as 'file', and a 'name' for each or none; "
                f"found {len(self._files)} and {len(self._names)}"
            )
        return list(zip(self._files, self._names or [""] * len(self._files), strict=True))

    # ---- What the parser calls ---------------------------------------------------------------------------------

    def _part_begin(self) -> None:
        self._headers: dict[bytes, bytes] = {}
        self._field, self._value, self._size = b"", b"", 0
        self._name = bytearray()

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]
        self._count(end - start)

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]
        self._count(end - start)

    def _count(self, size: int) -> None:
        self._size += size
        if self._size > _MOST_HEADERS:
            raise ValueError(f"expected at most {_MOST_HEADERS} bytes of headers of a part, found more")

    def _header_end(self) -> None:
        self._headers[self._field.lower()] = self._value
        self._field, self._value = b"", b""

    def _headers_finished(self) -> None:
        kind, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        part, is_file = options.get(b"name", b""), b"filename" in options
        if kind != b"form-data" or (part, is_file) not in ((b"file", True), (b"name", False)):
            what = "a file" if is_file else "no file"
            found = shortened(part.decode("utf-8", "replace"))
            raise ValueError(f"expected files as 'file' and texts as 'name', found {what} as {found}")
        if not is_file:
            return
        if len(self._files) == MOST_FILES:
            raise ValueError(f"expected at most {MOST_FILES} files, found more")
        number = len(self._files)
        path = self._directory / str(number)
        name = Path(options[b"filename"].decode("utf-8", "replace")).name[:100] or f"file {number}"
        label = self._headers.get(b"content-type", b"").partition(b";")[0].strip().lower().decode("latin-1")[:60]
        self._files.append(Media(path, None, name, label))
        self._out = open(path, "wb")  # noqa: SIM115 (`close` closes it)

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._out is not None:
            self._out.write(memoryview(data)[start:end])
        else:
            self._name += data[start:end]
            if len(self._name) > _LONGEST_NAME:
                raise ValueError(f"name: expected at most {_LONGEST_NAME} bytes, found more")

    def _part_end(self) -> None:
        if self._out is None:
            self._names.append(self._name.decode())
        self.close()

    def _end(self) -> None:
        self._is_whole = True
