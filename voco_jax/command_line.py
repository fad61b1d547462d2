"""The command line of commands with a config: `--config=FILE --config.KEY=VALUE …`, options of their own, `--help`.

What is wrong in the file is said with the file and its line, what is wrong on the command line with the argument.
"""

import argparse
import ast
from collections.abc import Callable, Sequence
import difflib
import functools
import importlib.machinery
import inspect
from pathlib import Path
import re
import shutil
import sys
import textwrap
import traceback
import types
from typing import Any

import ml_collections
from ml_collections import ConfigDict

from voco_jax import configs
from voco_jax.chat_templates import CHAT_TEMPLATES, CUSTOM, TOKENIZER
from voco_jax.config import (
    GROUPS_AND_KEYS,
    KEYS,
    SOURCES,
    default_config,
    find_problem,
    flatten,
    message_of,
    set_value,
    unknown_key,
    with_all_fields,
)
from voco_jax.config_keys import SOURCE_KEYS
from voco_jax.errors import UserError
from voco_jax.keys import Key, type_in_words
from voco_jax.options import Parser
from voco_jax.terminal import shortened

_CONFIG, _KEY = "--config", "--config."
_LEFT = 44  # columns of a name in --help


def parse_arguments(
    argv: Sequence[str], add_arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None, about: str = ""
) -> tuple[ConfigDict, argparse.Namespace]:
    """The config of `--config=FILE --config.key=value …`, and a command's own arguments, which `add_arguments` adds.

    UserError says what is wrong, and names the nearest key. In the namespace `config` is the file, and `changes` has
    the text of each key that the command line sets. `--help` prints `about` (the command's docstring), the arguments
    and all config keys, and ends with status 0.
    """
    parser = _Parser(about)
    add_arguments(parser)
    arguments, others = parser.parse_known_args(argv[1:])
    arguments.changes = _changes(others, parser)
    if len(files := arguments.config or []) > 1:
        raise UserError(f"{_CONFIG} is given twice: {files[0]!r} and {files[1]!r}")
    if not files:
        raise UserError(f"{_CONFIG}=FILE is missing, for example {_CONFIG}=easyvqa")
    arguments.config = files[0]
    config = load_file(arguments.config)
    for key, text in arguments.changes.items():
        _change(config, key, text)
    if problem := find_problem(config):
        key, text = problem
        on_command_line = any(key == other or key.startswith(f"{other}.") for other in arguments.changes)
        raise UserError(f"{'--' if on_command_line else _where(arguments.config, key)}config.{key}: {text}")
    config.model.llama.rope_scaling = with_all_fields(config.model.llama.rope_scaling)
    return config, arguments


# ---- What stands on the command line ---------------------------------------------------------------------------


class _Parser(Parser):
    """`--help` lists the config keys too."""

    def __init__(self, about: str):
        width = max(72, min(120, shutil.get_terminal_size((110, 24)).columns))
        usage, _, description = about.strip().partition("\n")
        super().__init__(
            usage=usage, description=description.strip(), epilog=_all_keys_in_words(width), allow_abbrev=False,
            formatter_class=functools.partial(
                argparse.RawDescriptionHelpFormatter, width=width, max_help_position=_LEFT
            ),
        )  # fmt: skip
        self.add_argument(
            _CONFIG, metavar="FILE", action="append",
            help=f"a Python file whose get_config() returns the config; or one of {', '.join(configs.names())}",
        )  # fmt: skip
        self.add_argument(f"{_KEY}KEY", metavar="VALUE", help="changes one key; `('a', 'b')` for several values")

    def check_names(self, arguments: Sequence[str]) -> None:
        """Left to `_changes`: what is none of the parser's options may be a config key."""


def _changes(arguments: Sequence[str], parser: argparse.ArgumentParser) -> dict[str, str]:
    """Dotted key → text, of the arguments that are none of the parser's; UserError for what sets no config key."""
    changes, rest = {}, iter(arguments)
    for argument in rest:
        name, given, text = argument.partition("=")
        if match := re.fullmatch(r"--?(no)?config\.(.+)", name):
            is_switch = match[2] in KEYS and KEYS[match[2]].type is bool
            if not given:
                text = "false" if match[1] else "true" if is_switch else next(rest, "")
            changes[match[2]] = text
            continue
        options = [option for option in parser._option_string_actions if option[:2] == "--"]
        if argument.startswith("-"):
            known = [*(option[2:] for option in options), *(f"config.{key}" for key in KEYS)]
            likely = unknown_key(name.lstrip("-"), known, "--")
            raise UserError(f"{name}: {likely.replace('key', 'option', 1)}")
        is_config = argument.endswith(".py") or configs.find(argument)
        hint = f"did you mean {_CONFIG}={argument}?" if is_config else f"options: {', '.join(options)}"
        raise UserError(f"{argument!r} is not an option; {hint}")
    return changes


def _change(config: ConfigDict, key: str, text: str) -> None:
    """Set a key to what a text says; UserError for a key that the config has not, and for text of another type."""
    known = flatten(config)
    is_literal = key in (*SOURCES, "model.llama.rope_scaling") and text.startswith("{")
    if key not in known and not is_literal:
        raise UserError(f"{_KEY}{key}: {unknown_key(key, known)}")
    expected = KEYS[key].type if key in KEYS else type(known[key])  # of a source
    try:
        value = ConfigDict(ast.literal_eval(text), convert_dict=True) if is_literal else _value(text, expected)
    except (ValueError, SyntaxError, KeyError, TypeError, RecursionError):
        raise UserError(f"{_KEY}{key}: expected {type_in_words(expected)}, found {text!r}") from None
    with config.ignore_type():
        set_value(config, key, value)


def _value(text: str, expected: Any) -> Any:
    """A text as a value of a type; ValueError, SyntaxError or KeyError where it is none."""
    if expected in (str, str | None):
        return None if text == "None" and expected is not str else text
    if expected is bool:
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
    if expected in (int, float):
        return expected(text)
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        if "tuple[str" not in str(expected) or not re.fullmatch(r"[\w.]+", text):
            raise
        value = text  # --config.train.freeze=vision_tower is a tuple of one
    return value if value is None or isinstance(value, tuple | list) or "None" in str(expected) else (value,)


# ---- The config file -------------------------------------------------------------------------------------------


def load_file(path: str) -> ConfigDict:
    """What a file's `get_config()` returns; of `FILE.py:text` its `get_config(text)`. UserError names file and line.

    Where there is no such file, `path` is the name of one of `voco_jax.configs`.
    """
    file, parameter = _find(path)
    loader = importlib.machinery.SourceFileLoader("config_file", str(file))
    module = types.ModuleType(loader.name)
    module.__file__ = str(file)
    try:
        loader.exec_module(module)
        if not callable(get_config := getattr(module, "get_config", None)):
            raise UserError(f"{file}: expected a function get_config() that returns the config, found none")
        try:
            inspect.signature(get_config).bind(*parameter)
        except TypeError as error:
            given = ":".join([str(file), *parameter])
            raise UserError(f"{_CONFIG}={given}: get_config{inspect.signature(get_config)}: {error}") from None
        config = get_config(*parameter)
        if not isinstance(config, ConfigDict):
            raise UserError(
                f"{file}: get_config() returned {shortened(config)}; expected default_config() with changes"
            )
        return config.lock()
    except SyntaxError as error:
        place = f"{error.filename}, line {error.lineno}" if error.filename else str(file)
        raise UserError(f"{place}: {error.msg}") from error
    except Exception as error:  # what is mistyped in a config file may be of any kind: a name, an import, a value
        place, frames = _place(error.__traceback__, file)
        text = _key_error(error)
        if text is None:
            text, bare = message_of(error), isinstance(error, KeyError | AssertionError)
            text = f"{type(error).__name__}: {text}".rstrip(": ") if bare or not text else text
        prefix = "" if not frames and isinstance(error, UserError) else f"{place}: "
        raise UserError(f"{prefix}{text}") from error


def _find(path: str) -> tuple[Path, list[str]]:
    """The file that `--config` names, and the text behind its colon."""
    name, *parameter = [path] if Path(path).exists() else path.split(":", 1)
    file = Path(name) if Path(name).is_file() else configs.find(name)
    if file is None:
        found = "is a directory" if Path(name).is_dir() else "not found"
        near = difflib.get_close_matches(name, configs.names(), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(
            f"{_CONFIG}={path}: {found}; expected a Python file or one of {', '.join(configs.names())}{hint}"
        )
    return file, parameter


def _place(trace: types.TracebackType | None, file: Path) -> tuple[str, list]:
    """'FILE, line N' of the config file, or of one beside it, that an error comes from; and the frames from there."""
    frames = [(frame, line) for frame, line in traceback.walk_tb(trace)]
    directory = file.resolve().parent
    for i, (frame, line) in reversed([*enumerate(frames)]):
        if Path(frame.f_code.co_filename).resolve().parent == directory:
            return f"{frame.f_code.co_filename}, line {line}", [frame for frame, _ in frames[i:]]
    return str(file), []


def _key_error(error: Exception) -> str | None:
    """What is wrong with a key that a file sets or reads, where ml_collections raised an error of it; else None."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    theirs = [
        frame for frame in frames if frame.f_code.co_filename.startswith(str(Path(ml_collections.__file__).parent))
    ]
    for frame in reversed(theirs):
        group, name = frame.f_locals.get("self"), frame.f_locals.get("key", frame.f_locals.get("attribute"))
        if isinstance(group, ConfigDict) and isinstance(name, str):
            break
    else:
        return None
    values = [value for frame in frames for value in frame.f_locals.values() if isinstance(value, ConfigDict)]
    roots = [value for value in values if "workdir" in value]
    found = [(root, path) for root in roots if (path := _path(root, group)) is not None]
    root, prefix = found[0] if found else (default_config(), "")
    key = f"{prefix}.{name}".lstrip(".")
    if name not in group:
        return f"config.{key}: {unknown_key(key, flatten(root))}"
    if isinstance(error, TypeError) and "value" in frame.f_locals:
        expected_type = GROUPS_AND_KEYS[key].type if key in GROUPS_AND_KEYS else type(group[name])  # of a source
        expected = "sources(NAME=source(…))" if key in SOURCES else type_in_words(expected_type)
        return f"config.{key}: expected {expected}, found {shortened(frame.f_locals['value'])}"
    return None


def _path(root: ConfigDict, group: ConfigDict) -> str | None:
    """Where a group stands in a config; None for nowhere."""
    if root is group:
        return ""
    for name, value in root.items():
        if isinstance(value, ConfigDict) and (path := _path(value, group)) is not None:
            return f"{name}.{path}".rstrip(".")
    return None


def _where(path: str, key: str) -> str:
    """'FILE, line N: ' of the last line that sets a key, in the file or in one beside it that it has imported."""
    file, _ = _find(path)
    imported = [Path(name) for module in [*sys.modules.values()] if (name := getattr(module, "__file__", None))]
    beside = [path for path in imported if path.resolve().parent == file.resolve().parent]
    for parts in (key.split("."), key.split(".")[:-1]):  # the key, or the group that it came with
        for source in (file, *beside):
            if line := _line(source, parts):
                return f"{source}, line {line}: "
    return f"{file}: "


def _line(source: Path, parts: list[str]) -> int:
    """The last line of a file that assigns a key to a config, or to a group of it, whatever that is called; 0: none."""
    found = (0, 0)
    for node in ast.walk(ast.parse(source.read_bytes())):
        if isinstance(node, ast.Assign):
            for names in (ast.unparse(target).split(".")[1:] for target in node.targets):
                if names and names == parts[-len(names) :]:
                    found = max(found, (len(names), node.lineno))
    return found[1]


# ---- Help ------------------------------------------------------------------------------------------------------


def _all_keys_in_words(width: int) -> str:
    """All config keys with their defaults, in their groups; the kinds of sources, and the templates."""
    kinds = [(kind, ", ".join([*keys, "weight"])) for kind, keys in SOURCE_KEYS.items()]
    return "\n".join(
        [
            "Config keys with their defaults:",
            *_group("", width),
            "",
            "Sources for config.data.train and config.data.test, in a config file: sources(NAME=source(KIND, KEY=…))",
            *_columns(kinds, width),
            "",
            *textwrap.wrap(f"Templates: {', '.join((*CHAT_TEMPLATES, CUSTOM, TOKENIZER))}", width),
        ]
    )


def _group(prefix: str, width: int) -> list[str]:
    """Lines of a group: its keys, then the groups in it."""
    keys, groups = [], []
    for name, key in GROUPS_AND_KEYS.items():
        if name.startswith(prefix) and "." not in name.removeprefix(prefix):
            if name in KEYS:
                keys.append((f"--config.{name}={_shown(key)}", key.rules.explanation))
            else:
                heading = f"config.{name}: {key.rules.explanation}"
                groups += ["", *textwrap.wrap(heading, width), *_group(f"{name}.", width)]
    return _columns(keys, width) + groups


def _shown(key: Key) -> str:
    if key.name in SOURCES:
        named = (f"{name}=source({keys['kind']!r})" for name, keys in key.default.items())
        return f"sources({', '.join(named)})"
    return repr(key.default)


def _columns(rows: Sequence[tuple[str, str]], width: int, left: int = _LEFT) -> list[str]:
    """Names on the left, what they mean on the right; below a name that is too long."""
    lines = []
    for name, text in rows:
        wrapped = textwrap.wrap(text, width - left) or [""]
        if len(name) + 4 > left:
            lines.append(f"  {name}")
            lines += [" " * left + line for line in wrapped if line]
        else:
            lines.append(f"  {name}".ljust(left) + wrapped[0])
            lines += [" " * left + line for line in wrapped[1:]]
    return [line.rstrip() for line in lines]
