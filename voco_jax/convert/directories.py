"""Output directories that are whole or not there."""

from collections.abc import Iterator
import contextlib
import os
from pathlib import Path
import shutil
import tempfile

from voco_jax.errors import UserError


@contextlib.contextmanager
def new_directory(destination: Path) -> Iterator[Path]:
    """A directory that takes its name when all went well, and is gone when not."""
    check_is_new(destination)
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{destination.name[:80]}.", dir=destination.parent))
    try:
        yield temporary
        os.umask(mask := os.umask(0))  # there is no other way to read it
        temporary.chmod(0o777 & ~mask)  # mkdtemp's are the owner's alone
        _sync(temporary)
        check_is_new(destination)
        temporary.rename(destination)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_is_new(destination: Path) -> None:
    """UserError if there is something already."""
    if destination.exists() or destination.is_symlink():
        raise UserError(f"{destination}: exists already; nothing was changed")


def check_space(destination: Path, needed: int) -> None:
    """UserError where the disk cannot hold the bytes that are about to be written."""
    parent = next(p for p in destination.absolute().parents if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UserError(f"{destination}: {needed / 1e9:.1f} GB are needed on the disk, {free / 1e9:.1f} GB are free")


def _sync(directory: Path) -> None:
    """Wait until the disk has all of it: a name must not outlive a power failure that its contents do not."""
    for path in (directory, *directory.rglob("*")):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
