"""Errors that a user can mend: shown as one line, without a traceback."""

from collections.abc import Callable
import functools
import signal
import sys

from voco_jax import interrupts
from voco_jax.terminal import printable


class UserError(Exception):
    """Bad input. The message is one line that names the file, the key, what was expected and what was found."""

    status = 2  # that a command exits with

    def __str__(self) -> str:
        return printable(super().__str__())


class TryAgain(UserError):
    """Nobody has to mend anything: the same command may well succeed the next time (a machine was lost)."""

    status = 75  # EX_TEMPFAIL of sysexits.h; launch scripts start again on it


def first_line(error: BaseException) -> str:
    """Of what an error says at its root, the first line; its name where it says nothing."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def one_line_errors(main: Callable) -> Callable:
    """Decorator for a command line's `main`: an error that the user can mend is one line, exit status 2."""

    @functools.wraps(main)
    def wrapper(*args, **kwargs):
        try:
            with interrupts.at_once(False, signal.SIGINT):  # here it is caught, and what was begun tidied up
                return main(*args, **kwargs)
        except (UserError, OSError) as error:  # OSError: disk full, no permission …; its text names the file
            print(f"error: {printable(str(error))}", file=sys.stderr)
            sys.exit(getattr(error, "status", UserError.status))
        except KeyboardInterrupt:
            if interrupts.listening():
                interrupts.end(interrupts.INTERRUPTED, interrupts.interrupted())
            print(interrupts.interrupted(), file=sys.stderr)
            sys.exit(interrupts.INTERRUPTED)

    return wrapper
