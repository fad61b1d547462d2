"""Files that data names, on disk or in a bucket: only inside the directory that the user gave."""

from collections.abc import Iterator
import contextlib
import io
import os
from pathlib import Path, PurePosixPath
import shlex
from typing import BinaryIO
from urllib.parse import urlsplit
from urllib.request import url2pathname

from voco_jax.data.records import MISSING, OUTSIDE, BadRecord, Encoded
from voco_jax.errors import UserError
from voco_jax.io.files import check_regular, open_regular
from voco_jax.io.paths import AnyPath, file_state, in_bucket
from voco_jax.outages import reason
from voco_jax.terminal import shortened


def local_only(text: str, key: str, what: str) -> None:
    """UserError where the key's value is an address in a bucket; `what` tells what works with local files only."""
    if in_bucket(text):
        raise UserError(f"{key}: {text}: {what} from local files only; copy them first (gcloud storage cp -r)")


def inside(root: AnyPath, name) -> AnyPath:
    """The file that a row calls `name`, below `root`; BadRecord for a path that leads out of it.

    Links that stand in the root are the user's own, and followed: data cannot make them.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise BadRecord(OUTSIDE, f"expected the path of a file, found {shortened(name)}")
    inner = name.removeprefix(f"{root}/") if in_bucket(root) else name
    path = PurePosixPath(inner)
    if path.is_absolute() and path.is_relative_to(root):
        path = path.relative_to(root)
    if path.is_absolute() or ".." in path.parts or "://" in inner:
        raise BadRecord(OUTSIDE, f"expected a path inside {root}, found {shortened(name)}")
    return root / path


def local_path(text: str) -> str:
    """The path of a `file://` URL, or any other text as it is. BadRecord for what lies on a web server.

    >>> local_path("file:///tmp/a%20b.png"), local_path("a:b.png")
    ('/tmp/a b.png', 'a:b.png')
    """
    scheme, separator, _ = text.partition("://")
    if not separator or scheme.lower() not in ("file", "http", "https", "ftp"):
        return text
    if scheme.lower() == "file":
        return url2pathname(urlsplit(text).path)
    raise BadRecord(MISSING, f"{text}: web addresses are not fetched; download it first: curl -LO {shlex.quote(text)}")


def path_here(text: str | os.PathLike) -> Path:
    """A path of this machine, from a command line; also of a `file://` URL. UserError for an address of another."""
    text = local_path(os.fspath(text))
    if in_bucket(text):
        raise UserError(f"{text}: expected a path of this machine; gcloud storage cp -r copies from and to buckets")
    return Path(text)


def check_file(file: AnyPath) -> None:
    """BadRecord unless `file` is there and is a file: opening a pipe would wait for ever."""
    with _reading(file):
        if not in_bucket(file):
            check_regular(file, file.stat())
        elif not file.is_file():
            raise UserError(f"{file}: expected a file, found something else") if file.exists() else FileNotFoundError


def open_file(file: AnyPath, *, whole: bool = False) -> BinaryIO:
    """A file that data names, to be read; BadRecord for one that is not there, or cannot be read.

    `whole`: it is read here and now, in one go."""
    with _reading(file):
        if not whole:
            return open_regular(file)
        with open_regular(file) as stream:
            return io.BytesIO(stream.read())


def open_encoded(encoded: Encoded, *, whole: bool = False) -> BinaryIO:
    """`open_file` of a picture's or a clip's file, or its bytes as a file."""
    return open_file(encoded.file, whole=whole) if encoded.data is None else io.BytesIO(encoded.data)


def state(file: AnyPath) -> tuple:
    """A value that changes when the file is replaced or written into; BadRecord where it cannot be read."""
    with _reading(file):
        return file_state(file)


@contextlib.contextmanager
def _reading(file: AnyPath) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise BadRecord(MISSING, f"{file}: not found") from None
    except BadRecord:
        raise
    except UserError as error:
        raise BadRecord(MISSING, str(error)) from None
    except Exception as error:
        raise unread(file, error) from None


def unread(file: AnyPath, error: Exception) -> Exception:
    """The BadRecord of an error in reading; of a bucket's clients, which have a kind each, of any."""
    if in_bucket(file) or isinstance(error, OSError | ValueError):
        return BadRecord(MISSING, f"{file}: {reason(error)}")
    return error
