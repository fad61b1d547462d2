"""The parser of every command's options: what is wrong is one line, and names the nearest option."""

import argparse
from collections.abc import Sequence
import difflib
import itertools
from pathlib import Path
import sys
from typing import Any, NoReturn

from voco_jax.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse's parser, which raises a UserError instead of ending the process, and keeps a description's lines."""

    def __init__(self, **kwargs: Any):
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter} | kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]  # overloads
        arguments = sys.argv[1:] if args is None else list(args)
        self.check_names(arguments)
        return super().parse_known_args(arguments, namespace)

    def check_names(self, arguments: Sequence[str]) -> None:
        """UserError for an unknown option, or one whose value is empty: a variable of the shell that is not set.

        argparse alone would first ask for the required options that are missing.
        """
        if self._subparsers is not None:  # what follows the command is for its own parser
            arguments = list(itertools.takewhile(lambda argument: argument.startswith("-"), arguments))
        expects_value = ""  # the option whose value an argument may be
        for argument in itertools.takewhile(lambda argument: argument != "--", arguments):
            name, equals, value = argument.partition("=")
            action = self._option_string_actions.get(name)
            is_name = name.startswith("--") and " " not in name
            if is_name and not any(option.startswith(name) for option in self._option_string_actions):
                near = difflib.get_close_matches(name, self._option_string_actions, n=1)
                raise UserError(f"{name}: no such option; {f'did you mean {near[0]}?' if near else '--help lists all'}")
            empty = name if action and equals and not value else "" if argument else expects_value
            if empty:
                raise UserError(f"{empty}: expected a value, found ''")
            if action and action.nargs != 0 and not equals:
                expects_value = name
            elif expects_value and self._option_string_actions[expects_value].nargs not in ("+", "*"):
                expects_value = ""

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


def check_out(out: Path, *suffixes: str) -> None:
    """UserError where `--out` is no file that can be written, before anything is read; `suffixes` are those allowed."""
    if suffixes and out.suffix.lower() not in suffixes:
        raise UserError(f"--out: expected a file ending in {' or '.join(suffixes)}, found {out}")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UserError(f"--out: expected a file in a directory that is there, found {out}")


def at_least_1(text: str) -> int:
    """The type of an option that is a number of things."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, found {text}")
    return int(text)
