"""The names of config keys: what each means, and which one somebody had in mind."""

from collections.abc import Callable, Iterable
import difflib
import functools
import inspect
import re


def meanings(source: Callable | type, name: str = "config", prefix: str = "") -> dict[str, str]:
    """Dotted key (behind `prefix`) → the comment beside its first assignment, or that in the lines above it.

    `source` is a function with lines `config.key = value  # meaning`, or a dataclass with lines
    `key: type = value  # meaning` (then `name` is empty).

    >>> def f():
    ...     config.seed = 0  # of all
    ...     # Beside pictures,
    ...     # too
    ...     config.optim.text = "a # b"
    >>> meanings(f)
    {'seed': 'of all', 'optim.text': 'Beside pictures, too'}
    """
    found: dict[str, str] = {}
    above: list[str] = []
    assigned = re.compile(rf"\s+{name}\.([\w.]+) = " if name else r"    (\w+): [^=]+ = ")
    for line in inspect.getsource(source).splitlines():
        code, comment = _split(line)
        if (match := assigned.match(code)) and prefix + match[1] not in found:
            found[prefix + match[1]] = comment or " ".join(above)
        above = [*above, comment] if not code.strip() and comment else []
    return found


def _split(line: str) -> tuple[str, str]:
    """Code and comment of a line; a # in a text is not a comment's."""
    match = re.match(r"""((?:[^#'"]|'[^']*'|"[^"]*")*)(?:#\s*(.*))?$""", line)
    return (match[1], (match[2] or "").strip()) if match else (line, "")


def unknown_key(key: str, known: Iterable[str], prefix: str = "config.") -> str:
    """What to say of a key (dotted) that is none: the nearest of those that there are, or that it is a group.

    >>> unknown_key("optim.lr", ["optim.learning_rate", "optim.name"])
    'no such key; did you mean config.optim.learning_rate?'
    """
    known = sorted(known)
    match = re.match(r"(data\.(train|test))\.[^.]+", key)
    if match and not any(other.startswith(f"{match[0]}.") for other in known):
        return f"no such source; a config file adds one: {prefix}{match[1]} = sources(NAME=source(KIND, …))"
    if any(other.startswith(f"{key}.") for other in known):
        return f"is a group of keys, for example {prefix}{next(k for k in known if k.startswith(f'{key}.'))}"
    groups = {other[: dot.start()] for other in known for dot in re.finditer(r"\.", other)}
    nearest = max([*known, *sorted(groups)], key=functools.partial(_nearness, key), default="")
    if _nearness(key, nearest) < 0.7:
        return "no such key; --help lists all"
    return f"no such key; did you mean {prefix}{nearest}?"


def _nearness(key: str, other: str) -> float:
    """Of two dotted keys: how alike their last parts are ('lr' stands for 'learning_rate'), and less their groups."""
    (*groups, last), (*other_groups, other_last) = key.lower().split("."), other.split(".")
    words = other_last.split("_")
    alike = difflib.SequenceMatcher(None, last, other_last).ratio()
    if len(words) > 1 and last in ("".join(word[0] for word in words), "".join(words)):
        alike = 0.9
    elif key.replace(".", "_") == other.replace(".", "_") or key.replace(".", "_") == other.replace(".", "_"):
        alike = 1.0
    elif last in words or other_last in last.split("_"):
        alike = max(alike, 0.75)
    return alike + 0.2 * difflib.SequenceMatcher(None, ".".join(groups), ".".join(other_groups)).ratio()
