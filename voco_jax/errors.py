"""Errors that a user can mend: shown as one line, without a traceback."""

from collections.abc import Callable
import functools
import re
import signal
import sys

from voco_jax import interrupts


class UserError(Exception):
    """Bad input. The message is one line that names the file, the key, what was expected and what was found."""

    status = 2  # that a command exits with

    def __str__(self) -> str:
        return printable(super().__str__())


class TryAgain(UserError):
    """Nobody has to mend anything: the same command may well succeed the next time (a machine was lost)."""

    status = 75  # EX_TEMPFAIL of sysexits.h; launch scripts start again on it


# Control characters, line separators, halves of characters (names that are not UTF-8), and what turns the direction of
# the text that follows. Joiners, which emoji and some scripts are made with, stay.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, keep: str = "") -> str:
    """Text from a file, for a terminal or a log: in one line, and nothing in it is obeyed (colours, titles, cursor).

    Control characters but those to `keep` are escaped as Python does.

    >>> printable("a\\x1b[2Jb\\nc")
    'a\\\\x1b[2Jb\\\\nc'
    """
    return _UNPRINTABLE.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)


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
