"""What Orbax, TensorStore and the file system raise where a checkpoint is written or read, each in kinds of its own:
one line, and whether the checkpoint is damaged or only cannot be reached."""

from collections.abc import Callable, Iterator
import contextlib
import errno
import inspect
import logging
import os
from pathlib import Path
import sys
import threading
import time
import traceback
from typing import NoReturn

from voco_jax.errors import TryAgain, UserError, cannot
from voco_jax.io.files import check_regular
from voco_jax.io.paths import AnyPath, check_link, in_bucket
from voco_jax.outages import chain, error_number, http_code, may_be_of_another, passing, reason, status_of

# Of what was read and is not what was written: it is not there, cannot be decoded, or has another form. All else keeps
# a checkpoint from being read, and leaves open what is in it.
_DAMAGE_NUMBERS = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR}
_DAMAGE_STATUS = {"DATA_LOSS", "NOT_FOUND", "OUT_OF_RANGE", "FAILED_PRECONDITION", "INVALID_ARGUMENT"}
_DAMAGE_KINDS = (ValueError, LookupError, TypeError, AttributeError, NotImplementedError, RecursionError, EOFError)


class Damaged(UserError):
    """A checkpoint that is not as it was written."""


@contextlib.contextmanager
def read_errors(checkpoint: AnyPath, orbax_name: AnyPath) -> Iterator[None]:
    """A block that reads a checkpoint, which Orbax knows by another name: `Damaged` where it is not as it was written,
    UserError or TryAgain where it cannot be read."""
    try:
        with _quiet_rest(), _without_logs():
            yield
    except UserError:
        raise
    except Exception as error:  # Orbax raises all kinds
        if may_be_of_another(error):
            raise
        damaged = is_damage(error)
        why = reason(error).replace(str(orbax_name.parent), str(checkpoint.parent))
        if damaged:
            raise Damaged(f"{checkpoint}: the checkpoint is damaged: {why:.300}") from error
        raise (TryAgain if passing(error) else UserError)(
            f"{checkpoint}: the checkpoint cannot be read: {why:.300}"
        ) from error


def check_files(checkpoint: AnyPath) -> None:
    """UserError where something else stands for one of its files (Orbax would wait for a pipe's writer) or a link leads
    nowhere, OSError where something in it cannot be looked up (Orbax takes it for missing)."""
    if in_bucket(checkpoint):
        return
    check_link(checkpoint)

    def refuse(error: OSError) -> NoReturn:
        raise error

    for directory, directories, files in os.walk(checkpoint, onerror=refuse):
        for name in files:
            path = Path(directory, name)
            check_link(path)
            check_regular(path, os.stat(path))
        for name in directories:
            os.stat(os.path.join(directory, name))


def is_damage(error: BaseException) -> bool:
    """Whether it says that what was read is not what was written, and nothing about it that it could not be read."""
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
    """What to raise where a checkpoint cannot be written: UserError, or TryAgain if the next attempt may succeed.
    Raises the error itself where it is one of these, or another process's."""
    if isinstance(error, UserError) or may_be_of_another(error):
        raise error
    return cannot(f"{checkpoint}: the checkpoint cannot be written", error)


def await_writers(seconds: float = 10.0) -> None:
    """Until the threads of a save that has failed have come to their end, which takes them no time but for a disk that
    does not answer."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(
        thread.name == "async_save" or type(thread).__module__.startswith("orbax") for thread in threading.enumerate()
    ):
        time.sleep(0.01)


class FailedSave(logging.Filter):
    """Hears of a save that fails while the loop goes on.

    Orbax's log has it at once. Its methods say so only after waiting for the other processes, which wait for this one.
    """

    error: BaseException | None = None
    _before: Callable | None = None  # what took care of errors of threads until `listen`

    def listen(self) -> None:
        self._quiet = contextlib.ExitStack()
        self._quiet.enter_context(_quiet_rest())
        logging.getLogger("absl").addFilter(self)
        self._before, threading.excepthook = threading.excepthook, self._end_of_thread

    def close(self) -> None:
        if self._before is not None and self.error is None:  # or its threads still have to come to their end
            logging.getLogger("absl").removeFilter(self)
            threading.excepthook = self._before
            self._quiet.close()

    def _end_of_thread(self, args) -> None:
        frames = traceback.extract_tb(args.exc_traceback)
        if any("orbax" in frame.filename for frame in frames):
            self.error = self.error or args.exc_value
        elif self._before is not None:
            self._before(args)

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1] is not None and "orbax" in record.pathname:
            self.error = self.error or record.exc_info[1]
            return False  # instead of its stack trace there will be a line
        return True


@contextlib.contextmanager
def _without_logs() -> Iterator[None]:
    """Orbax logs some of what it raises."""

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
    """Where one array cannot be read or written, Orbax drops the others, which end later with a stack trace each."""
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
    if sys.unraisablehook is hook:  # and not that of a block inside of this one, which has failed
        sys.unraisablehook = before  # only if all went well: nobody knows when the last of them ends
    logger.removeFilter(is_news)
