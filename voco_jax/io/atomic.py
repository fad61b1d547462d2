"""Files and directories that are whole or not there: written under another name, and renamed once the disk has them.

    write_text(run / "config.json", text)                      # or write_bytes
    with open_for_writing(file) as stream: ...                 # a binary stream
    with replacing(file) as temporary: draw(temporary)         # for libraries that take a path
    with new_directory(destination) as temporary: ...          # a directory that must not exist yet

The path has at every moment the old content or the new, also after a power failure. Processes that may write one file
at once take turns (`locks.locked`), or say `shared=True`.
"""

from collections.abc import Iterator
import contextlib
import errno
import os
from pathlib import Path
import secrets
import shutil
import tempfile
import time
from typing import BinaryIO

from voco_jax.errors import UserError
from voco_jax.io.paths import AnyPath, in_bucket


def temporary_name(file: Path) -> Path:
    """The name of a file until it is whole, beside it; what is there is left of a process that was killed."""
    return file.with_name(f".{file.name}.new")


@contextlib.contextmanager
def replacing(file: AnyPath, *, shared: bool = False, synced: bool = True) -> Iterator[Path]:
    """Gives a path to write to. After the block what was written there takes the place of `file`; if the block raises,
    it is deleted, and `file` is as it was.

    The path is `temporary_name(file)`, or, of a file in a bucket, in a temporary directory of this machine. A link at
    `file` is replaced, not followed. `shared`: several processes may write `file` at once, each under a name of its own
    (`.<name>.<8 hex digits>.new`); what killed ones leave, nobody overwrites. `synced`: wait for the disk.

    An OSError names a file, also that of a full disk. UserError where a directory is in the way.
    """
    if in_bucket(file):
        with tempfile.TemporaryDirectory() as directory:
            temporary = Path(directory) / file.name
            yield temporary
            file.write_bytes(temporary.read_bytes())
        return
    file = Path(file)
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}.new") if shared else temporary_name(file)
    if temporary.is_dir():
        raise UserError(f"{temporary}: expected a file, found a directory")
    try:
        temporary.unlink(missing_ok=True)
        yield temporary
        if synced:
            sync(temporary)
        temporary.replace(file)
        if synced:
            sync(file.parent)
    except OSError as error:
        if error.filename is None:  # as of write(2)
            error.filename = str(file)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def open_for_writing(file: AnyPath, *, shared: bool = False, synced: bool = True) -> Iterator[BinaryIO]:
    """A binary stream, which may seek; what is written is the file after the block. Otherwise as `replacing`."""
    with replacing(file, shared=shared, synced=synced) as temporary, open(temporary, "xb") as stream:
        yield stream


def write_bytes(file: AnyPath, content: bytes, *, shared: bool = False, synced: bool = True) -> None:
    """Write a whole file, as `replacing`; to a bucket in one piece."""
    if in_bucket(file):
        file.write_bytes(content)
        return
    with replacing(file, shared=shared, synced=synced) as temporary:
        temporary.write_bytes(content)


def write_text(file: AnyPath, text: str, *, shared: bool = False, synced: bool = True) -> None:
    """Write a whole file in UTF-8, as `write_bytes`."""
    write_bytes(file, text.encode(), shared=shared, synced=synced)


def sync(path: Path) -> None:
    """Wait until the disk has what was written to a file, or the names in a directory."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # file systems of other machines may have no fsync for directories
            raise
    finally:
        os.close(descriptor)


# ---- Directories ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def new_directory(destination: Path) -> Iterator[Path]:
    """A directory to write into that is called `destination` after the block; if the block raises, it is deleted.

    UserError where there is something already.
    """
    check_is_new(destination)
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{destination.name[:80]}.", dir=destination.parent))
    try:
        yield temporary
        os.umask(mask := os.umask(0))  # there is no other way to read it
        temporary.chmod(0o777 & ~mask)  # mkdtemp's are the owner's alone
        for path in (temporary, *temporary.rglob("*")):
            sync(path)
        check_is_new(destination)
        temporary.rename(destination)
        sync(destination.parent)
    except BaseException:
        _remove(temporary)
        raise


def _remove(directory: Path) -> None:
    """Delete a directory, and what threads that have not heard of the end yet (TensorStore's) write into it after that:
    until nothing has come for some tenths of a second."""
    quiet = 0
    for _ in range(50):
        shutil.rmtree(directory, ignore_errors=True)
        quiet = 0 if directory.exists() else quiet + 1
        if quiet == 4:
            return
        time.sleep(0.1)


def check_is_new(destination: Path) -> None:
    """UserError if there is something already."""
    if destination.exists() or destination.is_symlink():
        raise UserError(f"{destination}: exists already; nothing was changed")


def check_space(destination: Path, needed: int) -> None:
    """UserError if the disk of a directory that may not exist yet has fewer than `needed` bytes free."""
    parent = next(p for p in destination.absolute().parents if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UserError(f"{destination}: {needed / 1e9:.1f} GB are needed on the disk, {free / 1e9:.1f} GB are free")
