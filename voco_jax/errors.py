"""Errors that a user can mend: shown as one line, without a traceback."""

from collections.abc import Callable
import functools
import os
import select
import signal
import sys

from voco_jax import interrupts
from voco_jax.outages import passing, reason
from voco_jax.terminal import printable


class UserError(Exception):
    """Bad input. The message is one line that names the file, the key, what was expected and what was found."""

    status = 2  # that a command exits with

    def __str__(self) -> str:
        return printable(super().__str__())


class TryAgain(UserError):
    """Nobody has to mend anything: the same command may well succeed the next time (a machine was lost)."""

    status = 75  # EX_TEMPFAIL of sysexits.h; launch scripts start again on it


def cannot(line: str, error: BaseException) -> UserError:
    """The error to raise after a file system or a bucket has refused: `line` and the reason. `TryAgain` where the same
    may succeed later although nobody mends anything."""
    return (TryAgain if passing(error) else UserError)(f"{line}: {reason(error)}")


def exit_status(error: BaseException) -> int:
    """The exit status of a command that ends with an error."""
    known = getattr(error, "status", None)
    return known or (TryAgain if isinstance(error, OSError) and passing(error) else UserError).status


_PIPE_CLOSED = 128 + signal.SIGPIPE  # the exit status of commands that end by it


def _nobody_reads() -> bool:
    """Whether what reads the standard output has gone, as in `voco … | head`; then nothing more is written to it."""
    try:
        number = sys.stdout.fileno()
    except OSError:  # replaced by something that is no file
        return False
    poll = select.poll()
    poll.register(number, 0)  # an error is told without being asked for
    if gone := any(event & select.POLLERR for _, event in poll.poll(0)):
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return gone


def one_line_errors(main: Callable) -> Callable:
    """Decorator for the `main` of a command: an error that the user can mend is shown as one line, and the exit status
    is 2, or 75 where the same command may succeed later."""

    @functools.wraps(main)
    def wrapper(*args, **kwargs):
        try:
            with interrupts.at_once(False, signal.SIGINT):  # here it is caught, and what was begun tidied up
                result = main(*args, **kwargs)
                sys.stdout.flush()
                return result
        except (UserError, OSError) as error:  # OSError: disk full, no permission …; its text names the file
            if isinstance(error, BrokenPipeError) and _nobody_reads():
                sys.exit(_PIPE_CLOSED)
            about = isinstance(error, OSError) and error.filename
            print(f"error: {printable(f'{about}: {reason(error)}' if about else str(error))}", file=sys.stderr)
            sys.exit(exit_status(error))
        except KeyboardInterrupt:
            if interrupts.listening():
                interrupts.end(interrupts.INTERRUPTED, interrupts.interrupted())
            print(interrupts.interrupted(), file=sys.stderr)
            sys.exit(interrupts.INTERRUPTED)

    return wrapper
