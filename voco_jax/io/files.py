"""The one opener of files that are read, on this machine or in a bucket: regular files only, and of bounded size."""

from collections.abc import Iterator
import contextlib
import io
import os
from pathlib import Path
import stat
from typing import BinaryIO

from voco_jax.errors import UserError, cannot
from voco_jax.io.paths import AnyPath, as_path, in_bucket

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: str | AnyPath) -> BinaryIO:
    """A file, opened for reading. UserError for a directory, a pipe or a device: opening a pipe would wait for its
    writer, and a device may never end. Other errors are the file system's (OSError, FileNotFoundError among them) or
    the bucket's."""
    path = as_path(path) if isinstance(path, str) else path  # names that are not UTF-8 are found in directories
    if in_bucket(path):
        return path.open("rb")
    # Without waiting: a pipe opens at once, and is told by its kind. Links are followed.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        check_regular(path, os.fstat(descriptor))
        os.set_blocking(descriptor, True)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def check_regular(path: str | os.PathLike, status: os.stat_result) -> None:
    """UserError for the status of anything but a regular file."""
    if not stat.S_ISREG(status.st_mode):
        found = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise UserError(f"{path}: expected a file, found {found}")


def read_bytes(path: str | AnyPath, most: int | None = None) -> bytes:
    """A whole file. UserError for one of more than `most` bytes, of which no more is read, and as `open_regular`."""
    with open_regular(path) as stream:
        if most is None:
            return stream.read()
        content = stream.read(most + 1)
        if len(content) > most:
            size = stream.seek(0, io.SEEK_END)
            raise UserError(f"{path}: expected {most} bytes at most, found {size}")
        return content


def read_text(path: str | AnyPath, most: int | None = None) -> str:
    """A whole file in UTF-8, as `read_bytes`; UnicodeDecodeError, a ValueError, for any other."""
    return read_bytes(path, most).decode()


class SourceFile:
    """A checkpoint's file, open for as long as one of its tensors is there: the bytes that are read are of the file
    whose header was, though another may have taken its name."""

    def __init__(self, path: Path):
        self.path = path
        with readable(path):
            self.stream = open_regular(path)
            self.size = os.fstat(self.stream.fileno()).st_size

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes at `offset`; UserError for a file that is shorter."""
        content = bytearray(length)
        self.read_into(memoryview(content), offset)
        return bytes(content)

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill a view of bytes, in any thread; UserError as `read`."""
        done = 0
        while done < len(view):
            with readable(self.path):
                count = os.preadv(self.stream.fileno(), [view[done:]], offset + done)
            if not count:
                raise UserError(f"{self.path}: truncated: expected {len(view)} bytes at {offset}, found {done}")
            done += count


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """UserError or TryAgain for an error of the disk or of permissions, which says nothing of what the file holds."""
    try:
        yield
    except OSError as error:
        raise cannot(f"{path}: cannot be read", error) from None
