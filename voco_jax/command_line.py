"""The command line of commands with a config: `--config=FILE --config.KEY=VALUE …`, options of their own, `--help`.

What is wrong in the file is said with the file and its line, what is wrong on the command line with the argument.
"""

import ast
from collections.abc import Callable, Iterator, Sequence
import contextlib
import importlib.machinery
import importlib.util
import inspect
from pathlib import Path
import re
import shutil
import sys
import textwrap
import traceback
from types import TracebackType

from absl import flags
import ml_collections
from ml_collections import ConfigDict, config_flags

from voco_jax import configs
from voco_jax.chat_templates import CHAT_TEMPLATES
from voco_jax.config import GROUPS_AND_KEYS, KEYS, SOURCES, default_config, find_problem, flatten, one_line, unknown_key
from voco_jax.config_keys import SOURCE_KEYS
from voco_jax.errors import UserError
from voco_jax.keys import Key, in_one_line, type_in_words

_CONFIG, _KEY = "--config", "--config."
_HELP = ("-h", "-help", "--help", "--helpshort", "--helpfull")


def parse_command_line(argv: Sequence[str]) -> ConfigDict:
    """The config of `--config=FILE --config.key=value …`; UserError says what is wrong, and names the nearest key."""
    return parse_flags(argv, lambda values: None)[0]


def parse_flags(
    argv: Sequence[str], define: Callable[[flags.FlagValues], None], about: str = ""
) -> tuple[ConfigDict, flags.FlagValues]:
    """`parse_command_line` for a command with flags of its own, which `define` adds to the ones for the config.

    `--help` prints `about` (the command's docstring), its flags and all config keys, and ends with status 0.
    """
    values = flags.FlagValues()
    define(values)
    if any(argument in _HELP for argument in argv[1:]):
        print(help_text(about, values))
        sys.exit(0)
    file, rest = _take_config(argv)
    names = sorted(values)
    _check_names(rest, names)
    if file is None:
        raise UserError("command line: --config=FILE is missing, for example --config=easyvqa")
    config = load_file(file)
    _check_keys(rest, config)
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=rest)
        values(rest)
        changed = config_flags.get_override_values(values["config"])
    except flags.Error as error:
        raise UserError(f"command line: {_flag_error(error, rest, config)}") from error
    except Exception as error:  # of a value that ml_collections cannot take
        raise UserError(f"command line: {one_line(error)}") from error
    if problem := find_problem(config):
        key, text = problem
        where = "--" if any(key == other or key.startswith(f"{other}.") for other in changed) else _where(file, key)
        raise UserError(f"{where}config.{key}: {text}")
    return config, values


def config_file(argv: Sequence[str]) -> str:
    """What `--config` of a command line says."""
    return _take_config(argv)[0] or ""


# ---- What stands on the command line ---------------------------------------------------------------------------


def _take_config(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of `--config`, in one or two arguments, and the others."""
    file, rest, arguments = None, [], iter(argv)
    for argument in arguments:
        name, given, value = argument.partition("=")
        if name not in (_CONFIG, "-config"):
            rest.append(argument)
        elif file is not None:
            raise UserError(f"command line: {_CONFIG} is given twice: {file!r} and {value!r}")
        else:
            file = value if given else next(arguments, "")
            if not file:
                raise UserError(f"command line: {_CONFIG}: expected a file, found none")
    return file, rest


def _check_names(arguments: Sequence[str], own: Sequence[str]) -> None:
    """UserError for an argument that is no option at all."""
    option = False  # whether the argument before may have this one for its value
    for argument in arguments[1:]:
        name = re.sub("^--?", "", argument.partition("=")[0])
        known = name in own or name.removeprefix("no") in own or re.match(r"(no)?config\.", name)
        if argument.startswith("-") and not known and not _is_number(argument):
            likely = unknown_key(name, [*own, *(f"config.{key}" for key in flatten(default_config()))], "--")
            raise UserError(f"command line: {argument.partition('=')[0]}: {likely.replace('key', 'option', 1)}")
        if not argument.startswith("-") and not option:
            options = ", ".join([f"{_CONFIG}=FILE {_KEY}KEY=VALUE", *(f"--{name}" for name in own)])
            hint = f"did you mean {_CONFIG}={argument}?" if argument.endswith(".py") else f"use {options}"
            raise UserError(f"command line: {argument!r} is not an option; {hint}")
        option = argument.startswith("-") and "=" not in argument


def _is_number(text: str) -> bool:
    return re.fullmatch(r"-[\d.].*", text) is not None


def _check_keys(arguments: Sequence[str], config: ConfigDict) -> None:
    """UserError for `--config.KEY` with a key that the config has not."""
    known = flatten(config)
    for argument in arguments:
        match = re.match(r"--?(no)?config\.([^=]+)(=.*)?$", argument, re.DOTALL)
        if not match:
            continue
        key, value = match[2], match[3] or ""
        is_group = any(other.startswith(f"{key}.") for other in known) or key in ("data.train", "data.test")
        if key not in known and not (is_group and value.startswith("={")):
            raise UserError(f"command line: {_KEY}{key}: {unknown_key(key, known)}")


def _flag_error(error: Exception, arguments: Sequence[str], config: ConfigDict) -> str:
    """What absl says of a value, in our words where it is a key's."""
    match = re.match(r"flag --config\.([\w.]+)=", str(error))
    if not match or (key := match[1]) not in KEYS:
        return one_line(error)
    given = [a.partition("=")[2] for a in arguments if a.lstrip("-").startswith(f"config.{key}=")]
    return f"{_KEY}{key}: expected {type_in_words(KEYS[key].type)}, found {given[-1]!r}" if given else one_line(error)


# ---- The config file -------------------------------------------------------------------------------------------


def load_file(path: str) -> ConfigDict:
    """What a file's `get_config()` returns; of `FILE.py:text` its `get_config(text)`. UserError names file and line.

    Where there is no such file, `path` is the name of one of `voco_jax.configs`.
    """
    file, parameter = _find(path)
    loader = importlib.machinery.SourceFileLoader("config_file", str(file))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    try:
        loader.exec_module(module)
        if not callable(get_config := getattr(module, "get_config", None)):
            raise UserError(f"{file}: expected a function get_config() that returns the config, found none")
        with _no_arguments(file, get_config, parameter):
            config = get_config(*parameter)
        if not isinstance(config, ConfigDict):
            raise UserError(
                f"{file}: get_config() returned {in_one_line(config)}; expected default_config() with changes"
            )
        return config.lock()
    except SyntaxError as error:
        place = f"{error.filename}, line {error.lineno}" if error.filename else str(file)
        raise UserError(f"{place}: {error.msg}") from error
    except Exception as error:  # what is mistyped in a config file may be of any kind: a name, an import, a value
        place, frames = _place(error.__traceback__, file)
        text = _key_error(error, frames)
        if text is None:
            text, bare = one_line(error), isinstance(error, KeyError | AssertionError)
            text = f"{type(error).__name__}: {text}".rstrip(": ") if bare or not text else text
        prefix = "" if not frames and isinstance(error, UserError) else f"{place}: "
        raise UserError(f"{prefix}{text}") from error


def _find(path: str) -> tuple[Path, list[str]]:
    """The file that `--config` names, and the text behind its colon."""
    name, *parameter = [path] if Path(path).exists() else path.split(":", 1)
    file = Path(name) if Path(name).is_file() else configs.find(name)
    if file is None:
        found = "a directory" if Path(name).is_dir() else "no such file"
        raise UserError(
            f"{_CONFIG}={path}: expected a Python file or one of {', '.join(configs.names())}; found {found}"
        )
    return file, parameter


@contextlib.contextmanager
def _no_arguments(file: Path, get_config: Callable, parameter: list[str]) -> Iterator[None]:
    """UserError for a get_config() of other arguments than it is given."""
    try:
        inspect.signature(get_config).bind(*parameter)
    except TypeError as error:
        given = f"{file}:{parameter[0]}" if parameter else f"{file}"
        raise UserError(f"{_CONFIG}={given}: get_config{inspect.signature(get_config)}: {error}") from None
    yield


def _place(trace: TracebackType | None, file: Path) -> tuple[str, list]:
    """'FILE, line N' of the config file, or of one beside it, that an error comes from; and the frames from there."""
    frames = [(frame, line) for frame, line in traceback.walk_tb(trace)]
    directory = file.resolve().parent
    for i, (frame, line) in reversed([*enumerate(frames)]):
        if Path(frame.f_code.co_filename).resolve().parent == directory:
            return f"{frame.f_code.co_filename}, line {line}", [frame for frame, _ in frames[i:]]
    return str(file), []


def _key_error(error: Exception, frames: list) -> str | None:
    """What is wrong with a key that a file sets or reads, where ml_collections raised an error of it; else None."""
    ours = str(Path(ml_collections.__file__).parent)
    within = [frame for frame in frames[1:] if frame.f_code.co_filename.startswith(ours)]
    for frame in reversed(within):
        group, name = frame.f_locals.get("self"), frame.f_locals.get("key", frame.f_locals.get("attribute"))
        if isinstance(group, ConfigDict) and isinstance(name, str):
            break
    else:
        return None
    roots = [value for value in frames[0].f_locals.values() if isinstance(value, ConfigDict) and "workdir" in value]
    found = [(root, path) for root in roots if (path := _path(root, group)) is not None]
    # A group may have a name of its own there
    root, prefix = found[0] if found else (default_config(), _path_by_keys(default_config(), group) or "")
    key = f"{prefix}.{name}".lstrip(".")
    if name not in group:
        return f"config.{key}: {unknown_key(key, flatten(root))}"
    if isinstance(error, TypeError) and "value" in frame.f_locals:
        expected_type = GROUPS_AND_KEYS[key].type if key in GROUPS_AND_KEYS else type(group[name])  # of a source
        expected = "sources(NAME=source(…))" if key in SOURCES else type_in_words(expected_type)
        return f"config.{key}: expected {expected}, found {in_one_line(frame.f_locals['value'])}"
    return None


def _path(root: ConfigDict, group: ConfigDict) -> str | None:
    """Where a group stands in a config; None for nowhere."""
    if root is group:
        return ""
    for name, value in root.items():
        if isinstance(value, ConfigDict) and (path := _path(value, group)) is not None:
            return f"{name}.{path}".rstrip(".")
    return None


def _path_by_keys(root: ConfigDict, group: ConfigDict, prefix: str = "") -> str | None:
    """Where a group with the same keys stands."""
    for name, value in root.items():
        if isinstance(value, ConfigDict):
            if value.keys() == group.keys():
                return prefix + name
            if (path := _path_by_keys(value, group, f"{prefix}{name}.")) is not None:
                return path
    return None


def _where(path: str, key: str) -> str:
    """'FILE, line N: ' of the last line that sets a key, in the file or in one beside it that it has imported."""
    file, _ = _find(path)
    beside = [
        Path(module.__file__) for module in [*sys.modules.values()] if getattr(module, "__file__", None)
        and Path(module.__file__).resolve().parent == file.resolve().parent
    ]  # fmt: skip
    for parts in (key.split("."), key.split(".")[:-1]):  # the key, or the group that it came with
        for source in (file, *beside):
            if line := _line(source, parts):
                return f"{source}, line {line}: "
    return f"{file}: "


def _line(source: Path, parts: list[str]) -> int:
    """The last line of a file that assigns a key to a config, or to a group of it, whatever that is called; 0: none."""
    found = (0, 0)
    for node in ast.walk(ast.parse(source.read_bytes())):
        for target in node.targets if isinstance(node, ast.Assign) else ():
            names = ast.unparse(target).split(".")[1:]
            if names and names == parts[-len(names) :]:
                found = max(found, (len(names), node.lineno))
    return found[1]


# ---- Help ------------------------------------------------------------------------------------------------------


def help_text(about: str, values: flags.FlagValues) -> str:
    """Usage, what the command does, its own flags, and all config keys with their defaults, in their groups."""
    width = max(72, min(120, shutil.get_terminal_size((110, 24)).columns))
    usage, _, rest = about.strip().partition("\n")
    lines = [usage, *([rest.rstrip()] if rest else []), "", "Options:"]
    own = [
        (
            "--config=FILE",
            f"a Python file whose get_config() returns default_config() with changes; or {', '.join(configs.names())}",
        )
    ]
    own += [("--config.KEY=VALUE", "changes one key; `('a', 'b')` for several values")]
    for name in values:
        flag = values[name]
        default = f" (default {flag.default})" if flag.default not in (None, "", [], False) else ""
        own.append((f"--{name}" + ("" if flag.boolean else "=…"), f"{flag.help.splitlines()[0].rstrip(';')}{default}"))
    lines += _columns(own, width)
    lines += ["", "Config keys with their defaults:"]
    lines += _group("", width)
    lines += [
        "",
        "Sources for config.data.train and config.data.test, in a config file: sources(NAME=source(KIND, KEY=…))",
    ]
    lines += _columns([(kind, ", ".join([*keys, "weight"])) for kind, keys in SOURCE_KEYS.items()], width)
    lines += ["", *textwrap.wrap(f"Configs: {', '.join(configs.names())}", width)]
    lines += ["", f"Templates: {', '.join(CHAT_TEMPLATES)}, custom"]
    return "\n".join(lines)


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


def _columns(rows: Sequence[tuple[str, str]], width: int, left: int = 44) -> list[str]:
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
