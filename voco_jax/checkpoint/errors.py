"""Errors of Orbax, TensorStore and the file system, as one line each: is a checkpoint damaged, or only unreachable?"""

from collections.abc import Iterator
import contextlib
import errno
import inspect
import logging
import os
from pathlib import Path
import stat
import sys
import threading
import time

from voco_jax.errors import TryAgain, UserError, cannot
from voco_jax.io.files import check_regular
from voco_jax.io.paths import AnyPath, check_link, in_bucket
from voco_jax.outages import chain, error_number, http_code, may_be_of_another, passing, reason, status_of

# Errors that mean damage: something is missing, cannot be decoded, or has another form. All other errors only say that
# the checkpoint cannot be read now.
_DAMAGE_NUMBERS = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR}
_DAMAGE_STATUS = {"DATA_LOSS", "NOT_FOUND", "OUT_OF_RANGE", "FAILED_PRECONDITION", "INVALID_ARGUMENT"}
_DAMAGE_KINDS = (ValueError, LookupError, TypeError, AttributeError, NotImplementedError, RecursionError, EOFError)

_MOST_FILES = 100_000  # of a checkpoint
_MOST_JSON = 2**24  # bytes of a file that Orbax reads as JSON
_JSON = ("_METADATA", "_CHECKPOINT_METADATA", "_sharding", "metadata", "metrics")


class Damaged(UserError):
    """What is read of a checkpoint is not what was written."""


@contextlib.contextmanager
def read_errors(checkpoint: AnyPath, orbax_name: AnyPath) -> Iterator[None]:
    """For a block that reads a checkpoint: any error becomes `Damaged`, or UserError or TryAgain where the checkpoint
    cannot be read. `orbax_name` is the checkpoint's path in Orbax's messages."""
    try:
        with _quiet_rest(), _without_logs():
            yield
    except UserError:
        raise
    except Exception as error:  # Orbax raises all kinds
        if may_be_of_another(error):
            raise
        why = reason(error).replace(str(orbax_name.parent), str(checkpoint.parent))
        if is_damage(error):
            raise Damaged(f"{checkpoint}: the checkpoint is damaged: {why:.300}") from error
        kind = TryAgain if passing(error) else UserError
        raise kind(f"{checkpoint}: the checkpoint cannot be read: {why:.300}") from error


def check_files(checkpoint: AnyPath) -> None:
    """UserError for what Orbax would wait for (a pipe), read without end (a device, gigabytes of JSON, links to all
    directories) or take for missing (a broken link); OSError for what cannot be looked up."""
    if in_bucket(checkpoint):
        return
    check_link(checkpoint)
    left, seen, count = [Path(checkpoint)], set(), 0
    while left:
        here = left.pop()
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        for path in here.iterdir():
            check_link(path)
            status, count = os.stat(path), count + 1
            if count > _MOST_FILES:
                raise UserError(f"{checkpoint}: expected {_MOST_FILES} files at most, found more, also in {here}")
            if stat.S_ISDIR(status.st_mode):
                left.append(path)
                continue
            check_regular(path, status)
            is_json = path.name in _JSON or here.name == "array_metadatas"
            if is_json and status.st_size > _MOST_JSON:
                raise UserError(f"{path}: expected {_MOST_JSON} bytes at most, found {status.st_size}")


def is_damage(error: BaseException) -> bool:
    """Whether an error, with those that caused it, means that what was read is not what was written."""
    for link in chain(error):
        if (number := error_number(link)) is not None or isinstance(link, OSError):
            if number not in _DAMAGE_NUMBERS and not isinstance(link, FileNotFoundError):
                return False
        elif (code := http_code(link)) is not None:
            if code != 404:
                return False
        elif (status := status_of(link)) and status not in _DAMAGE_STATUS:
            return False
    return isinstance(error, (OSError, *_DAMAGE_KINDS))


def write_error(checkpoint: AnyPath, error: Exception) -> UserError:
    """The error to raise where a checkpoint cannot be written: UserError, or TryAgain if the next attempt may succeed.
    Raises the given error itself where it is one of these or comes from another process."""
    if isinstance(error, UserError) or may_be_of_another(error):
        raise error
    return cannot(f"{checkpoint}: the checkpoint cannot be written", error)


def await_writers(seconds: float = 10.0) -> None:
    """Wait for the threads of a failed save to end. Only a disk that does not answer keeps them."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(
        thread.name == "async_save" or type(thread).__module__.startswith("orbax") for thread in threading.enumerate()
    ):
        time.sleep(0.01)


class FailedSave(logging.Filter):
    """Notices at once, in Orbax's log, that a save in the background has failed.

    Of several processes, Orbax's own methods report it only after waiting for the others, which wait for this one.
    """

    error: BaseException | None = None

    def __init__(self) -> None:
        super().__init__()
        self._quiet = contextlib.ExitStack()

    def listen(self) -> None:
        self._quiet.enter_context(_quiet_rest())
        logging.getLogger("absl").addFilter(self)

    def close(self) -> None:
        if self.error is None:  # after an error, its threads have still to end
            logging.getLogger("absl").removeFilter(self)
            self._quiet.close()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1] is not None and "orbax" in record.pathname:
            self.error = self.error or record.exc_info[1]
            return False  # no stack trace: the error is shown as one line
        return True


@contextlib.contextmanager
def _without_logs() -> Iterator[None]:
    """Without Orbax's own log of what it raises."""

    def is_ours(record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname

    logger = logging.getLogger("absl")
    logger.addFilter(is_ours)
    try:
        yield
    finally:
        logger.removeFilter(is_ours)


@contextlib.contextmanager
def _quiet_rest():
    """Without the stack traces of arrays that Orbax drops after the first one that cannot be read or written."""
    before, logger = sys.unraisablehook, logging.getLogger("asyncio")

    def hook(unraisable):
        error, reader = unraisable.exc_value, unraisable.object
        late = reader is None and isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
        dropped = inspect.iscoroutine(reader) and "orbax" in reader.cr_code.co_filename
        if not (late or dropped):
            before(unraisable)

    def is_news(record: logging.LogRecord) -> bool:
        return "exception was never retrieved" not in record.getMessage()

    sys.unraisablehook = hook
    logger.addFilter(is_news)
    yield
    if sys.unraisablehook is hook:  # not where a block inside this one has failed
        sys.unraisablehook = before  # not after a failure: the dropped arrays may end at any later time
    logger.removeFilter(is_news)
