"""The rows of a JSON array or of a JSONL file, one by one: the file stays on disk, only where its rows lie is kept.

mix665k is a gigabyte of JSON and several as Python objects, which every worker process would hold.
"""

from array import array
import atexit
from collections.abc import Callable
import hashlib
import json
import os
from pathlib import Path
import re
import shutil
import tempfile
from typing import BinaryIO, cast

import numpy as np

from voco_jax.data.records import BROKEN_JSON, NOT_UTF8, TOO_LONG, BadRecord
from voco_jax.errors import TryAgain, UserError, cannot
from voco_jax.io.files import open_regular
from voco_jax.io.paths import AnyPath, as_path, bucket_errors, in_bucket, state_of
from voco_jax.outages import passing, reason

MOST_ROW = 2**20  # bytes, by default
LEAST_ROW = 16  # bytes of a row on average: a question and its answer are more
_MANY = 10_000  # rows, of which the average is taken
_PIECE = 2**20  # bytes that are read at once
_BLANK = 64  # bytes: lines that are shorter are looked at, whether there is anything in them
_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\n\r]*")  # JSON's


class JsonRows:
    """`rows[i]` is a row as Python objects; BadRecord for one that is not JSON or not UTF-8.

    The rows of a JSONL file are its lines but for empty ones. A JSON array has to be whole: where its syntax breaks
    nobody can tell where the next row begins, so that is a UserError with the place. A row of more than `most` bytes is
    a BadRecord, whose message says that `option` sets the limit.
    """

    def __init__(self, file: str | os.PathLike, most: int = MOST_ROW, option: str = ""):
        if not file:
            raise UserError("file: expected a .json or .jsonl file, found none")
        self.file, self.most, self._option = as_path(file), most, option
        try:
            with bucket_errors(self.file, but=FileNotFoundError):
                self._local = _copy_of(self.file) if in_bucket(self.file) else self.file
                with open_regular(self._local) as stream:
                    self._status = state_of(os.fstat(stream.fileno()))
                    self.spans = _row_spans(stream, self.file)
        except OSError as error:
            kind = TryAgain if passing(error) else UserError
            raise kind(f"{file}: {reason(error)}; expected a .json or .jsonl file") from None
        if not len(self.spans):
            raise UserError(f"{file}: expected rows, as a JSON array or one a line; found none")
        self._descriptor: tuple[int, int] | None = None

    def __len__(self):
        return len(self.spans)

    def __getitem__(self, i: int):
        start, end = self.spans[i].tolist()
        if end - start > self.most:
            hint = f"set {self._option}, or " if self._option else ""
            message = f"expected a row of {self.most} bytes at most, found {end - start}: {hint}shorten the row"
            raise BadRecord(TOO_LONG, message)
        try:
            content = os.pread(self._fd(), end - start, start)
        except OSError as error:  # of the disk: it is no fault of this row
            raise cannot(f"{self.file}: cannot be read", error) from None
        if len(content) < end - start:
            raise UserError(f"{self.file}: was cut off while it was read")
        content = content.removeprefix(_BOM)
        try:
            return json.loads(content.decode())
        except UnicodeDecodeError as error:
            raise BadRecord(NOT_UTF8, f"expected UTF-8, found byte {content[error.start]:#x}") from None
        except (ValueError, RecursionError) as error:
            place = f" at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else ""
            raise BadRecord(BROKEN_JSON, f"{getattr(error, 'msg', error)}{place}") from None

    def places(self) -> list[str]:
        """Where each row is, for messages: the line that it begins in, or its number where rows share a line."""
        ends = np.flatnonzero(np.frombuffer(self._local.read_bytes(), np.uint8) == ord("\n"))
        lines = np.searchsorted(ends, self.spans[:, 0])
        what, numbers = ("line", lines) if len(np.unique(lines)) == len(self) else ("row", np.arange(len(self)))
        return [f"{what} {number + 1}" for number in numbers.tolist()]

    def _fd(self) -> int:
        """The descriptor of this process; after a fork or in a worker the file is opened again."""
        if self._descriptor is None or self._descriptor[0] != os.getpid():
            with open_regular(self._local) as stream:
                if state_of(os.fstat(stream.fileno())) != self._status:
                    raise UserError(f"{self.file}: was replaced while it was read; start again")
                self._descriptor = os.getpid(), os.dup(stream.fileno())
        return self._descriptor[1]

    def __getstate__(self):
        return self.__dict__ | {"_descriptor": None}

    def fingerprint(self) -> str:
        """Changes when the file does, or the longest row that is read."""
        most = "" if self.most == MOST_ROW else f" {self.most}"
        if in_bucket(self.file):
            with open(self._local, "rb") as stream:
                return f"{self.file} {hashlib.file_digest(stream, 'sha256').hexdigest()}{most}"
        file = Path(self.file)
        status = file.stat()
        return f"{file.resolve()} {status.st_size} {status.st_mtime_ns}{most}"


def _copy_of(file: AnyPath) -> Path:
    """A file of this machine with what a bucket's file holds, for as long as this process lives: rows are read one by
    one, here and in worker processes."""
    with (
        open_regular(file) as source,
        tempfile.NamedTemporaryFile(prefix="voco_jax-", suffix=".json", delete=False) as stream,
    ):
        shutil.copyfileobj(source, stream, _PIECE)
    atexit.register(_remove, stream.name, os.getpid())
    return Path(stream.name)


def _remove(file: str, made_by: int) -> None:
    if os.getpid() == made_by:
        Path(file).unlink(missing_ok=True)


def _row_spans(stream: BinaryIO, file: AnyPath) -> np.ndarray:
    """[n, 2], the bytes at which rows begin and end. UserError for a broken array, and for rows that are too small."""
    head = stream.read(4096).removeprefix(_BOM).lstrip()
    stream.seek(0)
    lines = file.suffix == ".jsonl" or not head.startswith(b"[")  # of .jsonl the first row may be the broken one
    return _line_spans(stream, file) if lines else array_spans(stream.read().decode("latin-1"), file)


def _check_sizes(rows: int, size: int, file: AnyPath) -> None:
    """UserError for rows that are so small that their places would take more memory than the file."""
    if size < LEAST_ROW * rows:
        raise UserError(f"{file}: expected rows of questions, found {rows} rows of {size / rows:.1f} bytes")


def _line_spans(stream: BinaryIO, file: AnyPath) -> np.ndarray:
    """`_row_spans` of a JSONL file: its lines, without blank ones."""
    found, start, at = [], 0, 0
    while piece := stream.read(_PIECE):
        ends = np.flatnonzero(np.frombuffer(piece, np.uint8) == ord("\n")) + at
        at += len(piece)
        if len(ends):
            spans = np.stack([np.append(start, ends[:-1] + 1), ends], axis=1)
            found.append(spans[spans[:, 1] > spans[:, 0]])
            start = int(ends[-1]) + 1
            if len(found[-1]) > _MANY:
                _check_sizes(len(found[-1]), len(piece), file)
    spans = np.concatenate([*found, np.array([(start, at)] if start < at else [], np.int64).reshape(-1, 2)])

    def is_blank(start: int, end: int) -> bool:
        stream.seek(start)
        return not stream.read(end - start).removeprefix(_BOM).strip()

    # A line that is blank is short, or looked at because it could be
    short = np.flatnonzero(spans[:, 1] - spans[:, 0] < _BLANK)
    blank = [i for i in short.tolist() if is_blank(*spans[i].tolist())]
    return np.delete(spans, blank, axis=0)


def array_spans(text: str, file: AnyPath) -> np.ndarray:
    """`_row_spans` of a JSON array.

    JSON's syntax is ASCII, so Latin-1, whose characters are the bytes, does for finding it.
    """
    decoder = json.JSONDecoder(strict=False, parse_int=str)  # a number of too many digits spoils its own row only
    decode = decoder.raw_decode
    space = cast(Callable[[str, int], re.Match[str]], _SPACE.match)  # which matches anywhere
    spans = array("q")
    at = checked = space(text, text.index("[") + 1).end()
    try:
        while not (text[at : at + 1] == "]" and not spans):
            _, end = decode(text, at)
            spans.extend((at, end))
            if len(spans) % (2 * _MANY) == 0:
                _check_sizes(_MANY, end - checked, file)
                checked = end
            at = space(text, end).end()
            if text[at : at + 1] == "]":
                break
            if text[at : at + 1] != ",":
                raise ValueError("expected , or ]")
            at = space(text, at + 1).end()
        if (at := space(text, at + 1).end()) < len(text):
            raise ValueError("expected nothing after the array")
    except (ValueError, RecursionError) as error:
        reason = f"{getattr(error, 'msg', error)}, at byte {at}, after {len(spans) // 2} rows"
        raise UserError(f"{file}: not readable as a JSON array: {reason}") from None
    return np.array(spans, np.int64).reshape(-1, 2)
