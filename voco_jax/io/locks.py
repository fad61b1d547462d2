"""Locks between processes: they go with the process that holds them, however it ends.

with holding(run / ".lock", "runs/a: another process is training in it"): ...   # a file that stays, or a directory
with locked(file, patience=10) as real: ...                                      # a file that is replaced whole
lock(stream.fileno(), file)                                                      # a file that is open already
"""

from collections.abc import Iterator
import contextlib
import fcntl
import os
from pathlib import Path
import time

from voco_jax.errors import TryAgain, UserError, cannot
from voco_jax.io.files import check_regular


def lock(descriptor: int, path: str | os.PathLike) -> bool:
    """Lock an open file or directory until it is closed; False where another process, or descriptor, has locked it.

    UserError where the file system has no locks; `path` is for this message.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError as error:
        raise cannot(f"{path}: the file system does not lock files", error) from None


@contextlib.contextmanager
def holding(path: Path, refusal: str) -> Iterator[int]:
    """Hold a directory, or a file that is created where it is missing, against all others for the time of the block.

    Gives the open descriptor. UserError with the text `refusal` where another process holds it, and for what is neither
    a file nor a directory.
    """
    is_directory = path.is_dir()
    # Without waiting: a pipe would wait for its other end
    flags = os.O_RDONLY if is_directory else os.O_RDWR | os.O_CREAT | os.O_NONBLOCK
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
    try:
        if not is_directory:
            check_regular(path, os.fstat(descriptor))
        if not lock(descriptor, path):
            raise UserError(refusal)
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(file: Path, patience: float) -> Iterator[Path]:
    """Gives the real path of a file (links followed), there or not, for the one process that may replace it now.

    The lock is a file beside it, `.<name>.lock`, so that all names of one directory (links, mounts, letters that the
    file system takes for the same) come to one lock; it goes with the block. TryAgain where another has it for more
    than `patience` seconds; UserError where the path is a directory, a device or a pipe, or cannot be locked.
    """
    try:
        real = Path(os.path.realpath(file))
        with contextlib.suppress(FileNotFoundError):
            check_regular(file, os.stat(real))
        beside = real.with_name(f".{real.name}.lock")
        descriptor = _acquire(file, beside, time.monotonic() + patience)
    except (OSError, ValueError) as error:  # ValueError: no path at all
        raise cannot(f"{file}: cannot be written", error) from None
    try:
        yield real
    finally:
        # While it is still locked: who waits for it sees then that it is gone, and makes a new one
        beside.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(file: Path, beside: Path, deadline: float) -> int:
    """The locked descriptor of the lock file."""
    # Without waiting, and not through a link: in a directory that others write to, these may lie in wait
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    while True:
        descriptor, held = os.open(beside, flags, 0o666), False
        try:
            check_regular(beside, os.fstat(descriptor))
            held = _lock_file(descriptor, beside)
        finally:
            if not held:
                os.close(descriptor)
        if held:
            return descriptor
        if time.monotonic() > deadline:
            raise TryAgain(f"{file}: another process is writing it")
        time.sleep(0.02)


def _lock_file(descriptor: int, path: Path) -> bool:
    """Whether it could be locked and is still the file at this path (the process that held it before deletes it)."""
    try:
        return lock(descriptor, path) and os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False
    except UserError as refusal:
        if not isinstance(refusal, TryAgain):  # else another may have it locked
            path.unlink(missing_ok=True)
        raise
