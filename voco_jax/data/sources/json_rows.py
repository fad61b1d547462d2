"""The rows of a JSON array or of a JSONL file, one by one: the file stays on disk, only where its rows lie is kept.

mix665k is a gigabyte of JSON and several as Python objects, which every worker process would hold.
"""

import atexit
import hashlib
import json
import os
from pathlib import Path
import tempfile

import numpy as np

from voco_jax.data.records import BROKEN_JSON, NOT_UTF8, BadRecord
from voco_jax.errors import UserError
from voco_jax.storage import as_path, bucket_errors, in_bucket

_BOM = b"\xef\xbb\xbf"


class JsonRows:
    """`rows[i]` is a row as Python objects; BadRecord for one that is not JSON or not UTF-8.

    The rows of a JSONL file are its lines but for empty ones. A JSON array has to be whole: where its syntax breaks
    nobody can tell where the next row begins, so that is a UserError with the place.
    """

    def __init__(self, file: str | os.PathLike):
        if not file:
            raise UserError("file: expected a .json or .jsonl file, found none")
        self.file = as_path(file)
        try:
            with bucket_errors(self.file, but=FileNotFoundError):
                content = self.file.read_bytes()
        except OSError as error:
            raise UserError(f"{file}: {error.strerror or 'not found'}; expected a .json or .jsonl file") from None
        self._local = _kept(content) if in_bucket(self.file) else self.file
        lines = self.file.suffix == ".jsonl" or not _is_array(content)  # of .jsonl the first row may be the broken one
        self.spans = _line_spans(content) if lines else _array_spans(content, self.file)
        if not len(self.spans):
            raise UserError(f"{file}: expected a JSON array or a row a line, found none")
        self._descriptor: tuple[int, int] | None = None

    def __len__(self):
        return len(self.spans)

    def __getitem__(self, i: int):
        start, end = self.spans[i].tolist()
        content = os.pread(self._fd(), end - start, start).removeprefix(_BOM)
        try:
            return json.loads(content.decode())
        except UnicodeDecodeError as error:
            raise BadRecord(NOT_UTF8, f"expected UTF-8, found byte {content[error.start]:#x}") from None
        except (ValueError, RecursionError) as error:
            raise BadRecord(BROKEN_JSON, f"{error}") from None

    def _fd(self) -> int:
        """Of this process: after a fork or in a worker the file is opened anew."""
        if self._descriptor is None or self._descriptor[0] != os.getpid():
            self._descriptor = os.getpid(), os.open(self._local, os.O_RDONLY)
        return self._descriptor[1]

    def __getstate__(self):
        return self.__dict__ | {"_descriptor": None}

    def fingerprint(self) -> str:
        """Changes when the file does."""
        if in_bucket(self.file):
            with open(self._local, "rb") as stream:
                return f"{self.file} {hashlib.file_digest(stream, 'sha256').hexdigest()}"
        status = self.file.stat()
        return f"{self.file.resolve()} {status.st_size} {status.st_mtime_ns}"


def _kept(content: bytes) -> Path:
    """A file of this machine with what a bucket's file holds, for as long as this process lives: rows are read one by
    one, here and in worker processes."""
    with tempfile.NamedTemporaryFile(prefix="voco_jax-", suffix=".json", delete=False) as stream:
        stream.write(content)
    atexit.register(_remove, stream.name, os.getpid())
    return Path(stream.name)


def _remove(file: str, made_by: int) -> None:
    if os.getpid() == made_by:
        Path(file).unlink(missing_ok=True)


def _is_array(content: bytes) -> bool:
    return content[:4096].removeprefix(_BOM).lstrip()[:1] == b"["


def _line_spans(content: bytes) -> np.ndarray:
    """[n, 2], where lines that are not empty begin and end."""
    ends = np.flatnonzero(np.frombuffer(content, np.uint8) == ord("\n"))
    if not content.endswith(b"\n"):
        ends = np.append(ends, len(content))
    spans = np.stack([np.append(0, ends[:-1] + 1), ends], axis=1) if len(ends) else np.zeros((0, 2), np.int64)
    keep = [bool(content[start:end].removeprefix(_BOM).strip()) for start, end in spans.tolist()]
    return spans[np.array(keep, bool)]


def _array_spans(content: bytes, file: Path) -> np.ndarray:
    """[n, 2], where an array's elements begin and end.

    JSON's syntax is ASCII, so Latin-1, whose characters are the bytes, does for finding it.
    """
    text = content.decode("latin-1")
    decoder = json.JSONDecoder(strict=False, parse_int=str)  # a number of too many digits spoils its own row only
    decode, space = decoder.raw_decode, json.decoder.WHITESPACE.match
    spans = []
    at = space(text, text.index("[") + 1).end()
    try:
        while not (text[at : at + 1] == "]" and not spans):
            _, end = decode(text, at)
            spans.append((at, end))
            at = space(text, end).end()
            if text[at : at + 1] == "]":
                break
            if text[at : at + 1] != ",":
                raise ValueError("expected , or ]")
            at = space(text, at + 1).end()
        if (at := space(text, at + 1).end()) < len(text):
            raise ValueError("expected nothing after the array")
    except (ValueError, RecursionError) as error:
        reason = f"{getattr(error, 'msg', error)}, at byte {at}, after {len(spans)} rows"
        raise UserError(f"{file}: not readable as a JSON array: {reason}") from None
    return np.array(spans, np.int64).reshape(-1, 2)
