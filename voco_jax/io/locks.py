"""One writer at a time of a file that is replaced whole, in however many processes and under however many names."""

from collections.abc import Iterator
import contextlib
import fcntl
import os
from pathlib import Path
import time

from voco_jax.errors import TryAgain, cannot
from voco_jax.io.files import check_regular


@contextlib.contextmanager
def locked(file: Path, patience: float) -> Iterator[Path]:
    """Gives the real path of a file (links followed), there or not, which no other process or thread locks meanwhile.

    The lock is a file beside it, `.<name>.lock`, so that all names of one directory (links, mounts, letters that the
    file system takes for the same) come to one lock; it goes with the block. TryAgain where another has it for more
    than `patience` seconds; UserError where the path is a directory, a device or a pipe, or cannot be locked.
    """
    try:
        real = Path(os.path.realpath(file))
        with contextlib.suppress(FileNotFoundError):
            check_regular(file, os.stat(real))
        lock = real.with_name(f".{real.name}.lock")
        descriptor = _acquire(file, lock, time.monotonic() + patience)
    except (OSError, ValueError) as error:  # ValueError: no path at all
        raise cannot(f"{file}: cannot be written", error) from None
    try:
        yield real
    finally:
        # While it is still locked: who waits for it sees then that it is gone, and makes a new one
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(file: Path, lock: Path, deadline: float) -> int:
    """The locked descriptor of the lock file."""
    # Without waiting, and not through a link: in a directory that others write to, these may lie in wait
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    while True:
        descriptor, held = os.open(lock, flags, 0o666), False
        try:
            check_regular(lock, os.fstat(descriptor))
            held = _lock(descriptor, lock)
        finally:
            if not held:
                os.close(descriptor)
        if held:
            return descriptor
        if time.monotonic() > deadline:
            raise TryAgain(f"{file}: another process is writing it")
        time.sleep(0.02)


def _lock(descriptor: int, lock: Path) -> bool:
    """Whether it is locked now, and still the file of this path: who had it before has deleted it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), os.stat(lock, follow_symlinks=False))
    except (BlockingIOError, FileNotFoundError):
        return False
    except OSError as error:
        refusal = cannot(f"{lock}: the file system does not lock files", error)
        if not isinstance(refusal, TryAgain):  # else another may have it locked
            lock.unlink(missing_ok=True)
        raise refusal from None
