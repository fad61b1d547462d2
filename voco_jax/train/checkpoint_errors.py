"""What Orbax, TensorStore and the file system raise where a checkpoint is written or read, each in kinds of its own:
one line, and whether the checkpoint is damaged or only cannot be reached."""

from collections.abc import Iterator
import contextlib
import inspect
import logging
import sys
import threading
import traceback

from voco_jax.errors import UserError, first_line
from voco_jax.parallel.distributed import may_be_of_another
from voco_jax.storage import AnyPath

# What keeps a checkpoint from being read, and may be over the next time
_NO_DAMAGE = (PermissionError, ConnectionError, TimeoutError, MemoryError)
_NO_DAMAGE_WORDS = ("PERMISSION_DENIED", "Forbidden", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED")


class Damaged(UserError):
    """A checkpoint that is not as it was written."""


@contextlib.contextmanager
def read_errors(checkpoint: AnyPath, orbax_name: AnyPath) -> Iterator[None]:
    """A block that reads a checkpoint, which Orbax knows by another name: `Damaged` where it is not as it was written,
    UserError where it cannot be read."""
    try:
        with _quiet_rest():
            yield
    except Exception as error:  # Orbax raises all kinds, bare Exception among them
        if may_be_of_another(error):
            raise
        reason = f"{first_line(error).replace(str(orbax_name.parent), str(checkpoint.parent)):.300}"
        if isinstance(error, _NO_DAMAGE) or any(word in repr(error) for word in _NO_DAMAGE_WORDS):
            raise UserError(f"{checkpoint}: the checkpoint cannot be read: {reason}") from error
        raise Damaged(f"{checkpoint}: the checkpoint is damaged: {reason}") from error


@contextlib.contextmanager
def write_errors(checkpoint: AnyPath) -> Iterator[None]:
    """A block that writes a checkpoint; UserError where it cannot be written."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # TensorStore, Orbax and the file system have kinds of their own
        if may_be_of_another(error):
            raise
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        else:  # TensorStore tells the address and its own source lines too; the reason stands last
            reason, of_tensorstore, _ = first_line(error).partition(" [")
            reason = reason.rsplit(": ", 1)[-1] if of_tensorstore else reason
        raise UserError(f"{checkpoint}: the checkpoint cannot be written: {reason}") from error


class FailedSave(logging.Filter):
    """Hears of a save that fails while the loop goes on.

    Orbax's log has it at once. Its methods say so only after waiting for the other processes, which wait for this one.
    """

    error: BaseException | None = None
    _before = None

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
        else:
            self._before(args)

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1] is not None and "orbax" in record.pathname:
            self.error = self.error or record.exc_info[1]
            return False  # instead of its stack trace there will be a line
        return True


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
