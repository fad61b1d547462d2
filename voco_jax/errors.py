"""Errors that a user can mend: shown as one line, without a traceback."""

from collections.abc import Callable
import functools
import sys


class UserError(Exception):
    """Bad input. The message is one line that names the file, the key, what was expected and what was found."""


def one_line_errors(main: Callable) -> Callable:
    """Decorator for a command line's `main`: an error that the user can mend is one line, exit status 2."""

    @functools.wraps(main)
    def wrapper(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except (UserError, OSError) as error:  # OSError: disk full, no permission …; its text names the file
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    return wrapper
