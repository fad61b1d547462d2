"""What a config key is: a field of a dataclass, with its default, type, range, explanation and what a change means.

`config_keys.py` lists all keys. One line there, or in a dataclass that it names, is all that a new key needs:

    log_every: int = key(20, "steps between lines of metrics.jsonl", low=1, on_resume="free", earlier=DEFAULT)

The default config, `--help`, the checks of values, stored configs and the rules for resuming all read that line.
`earlier` says what runs did that were trained before the key was added: without it their config.json is refused. A key
that gets another name has its old one in `was`, and `VERSION` in `config.py` goes up.
"""

from collections.abc import Mapping
import dataclasses
import types
import typing
from typing import Any, Literal, TypeVar

from ml_collections import ConfigDict

from voco_jax.errors import UserError
from voco_jax.terminal import shortened

T = TypeVar("T")

# What another value means where a training goes on:
# 'refused': an error. 'free': nothing, the steps done stay the same but for rounding. 'schedule': allowed if the steps
# done had the same learning rates. 'content': allowed if the records and their weights are the same.
OnResume = Literal["refused", "free", "schedule", "content"]
# What it means where the config.json of a run differs from the config that its checkpoint was written with:
# 'refused': an error, it would be another model. 'told': a line on standard error. 'free': nothing.
OnLoad = Literal["refused", "told", "free"]


DEFAULT: Any = object()  # in `earlier`: runs without the key did what the default does


@dataclasses.dataclass(frozen=True)
class Rules:
    """What is known of a key, or of a group of keys, beside its type and default. None: as the group around it.

    low, high, below: the range of a number; `high` is the largest value allowed, `below` the smallest that is not.
    one_of: all values that there are, where they are few and have names.
    earlier: the value that means what runs without the key did; None: every run has the key.
    was: the dotted name that earlier runs have it under.
    """

    explanation: str
    low: float | None = None
    high: float | None = None
    below: float | None = None
    one_of: tuple[str, ...] = ()
    on_resume: OnResume | None = None
    on_load: OnLoad | None = None
    earlier: Any = None
    was: str = ""


def key(default: T, explanation: str, **rules: Any) -> T:
    """A field of a dataclass that is a config key, with its `Rules`; a group of keys where `default` is a dataclass's
    instance."""
    return dataclasses.field(default_factory=lambda: default, metadata={"rules": Rules(explanation, **rules)})


@dataclasses.dataclass(frozen=True)
class Key:
    """A key in its place among all. `rules` have those of the groups around it where it has none of its own."""

    name: str  # dotted
    type: Any
    default: Any
    rules: Rules


def all_keys(config: Any, prefix: str = "", around: Rules | None = None) -> dict[str, Key]:
    """Dotted name → key, for every key of a dataclass's instance and, before its keys, every group; in their order."""
    around = around or Rules("", on_resume="refused", on_load="free")
    found, hints = {}, typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        rules = field.metadata.get("rules", Rules(""))
        inherited = {name: getattr(around, name) for name in ("on_resume", "on_load", "earlier")}
        rules = dataclasses.replace(rules, **{k: v for k, v in inherited.items() if getattr(rules, k) is None})
        name, default = prefix + field.name, getattr(config, field.name)
        found[name] = Key(name, hints[field.name], default, rules)
        if dataclasses.is_dataclass(hints[field.name]):
            found |= all_keys(default, f"{name}.", rules)
    return found


def build(cls: type[T], values: Mapping[str, Any], group: str = "config") -> T:
    """The dataclass of a group of keys and their values, and of the groups in it.

    UserError for values that do not fit together; the ValueError of a dataclass begins with the field's name.
    """
    hints = typing.get_type_hints(cls)
    fields = {name: _built(hints[name], value, f"{group}.{name}") for name, value in values.items()}
    try:
        return cls(**fields)
    except ValueError as error:
        raise UserError(f"{group}.{error}") from None


def _built(annotation: Any, value: Any, name: str) -> Any:
    for option in (annotation, *typing.get_args(annotation)):
        if isinstance(option, type) and dataclasses.is_dataclass(option) and value is not None:
            return build(option, value, name)
    return tuple(value) if isinstance(value, list) else value


# ---- Values -------------------------------------------------------------------------------------------------------

_WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "text", tuple: "a tuple"}
_ELEMENTS = {str: "texts", int: "integers", float: "numbers"}


def type_in_words(annotation: Any) -> str:
    """What a key of a type expects: 'an integer', 'None or text'."""
    if isinstance(annotation, types.UnionType):
        return " or ".join(["None", *(type_in_words(t) for t in typing.get_args(annotation) if t is not type(None))])
    annotation = typing.get_origin(annotation) or annotation
    return _WORDS.get(annotation, "a group of keys")


def problem_of(key: Key, value: Any) -> str:
    """What is wrong with a value, by the key's type and range; '' for nothing."""
    if not _is_of(value, key.type):
        return f"expected {type_in_words(key.type)}, found {shortened(value)}"
    elements = typing.get_args(key.type)[:1] if typing.get_origin(key.type) is tuple else ()
    for element in elements:
        if wrong := [x for x in value if not _is_of(x, element)]:
            return f"expected a tuple of {_ELEMENTS[element]}, found {shortened(wrong[0])} in it"
    rules = key.rules
    if rules.one_of and value not in rules.one_of:
        return f"expected one of {', '.join(rules.one_of)}; found {value!r}"
    if rules.low is None or value is None:
        return ""
    if rules.high is not None:
        return "" if rules.low <= value <= rules.high else f"expected {rules.low:g} to {rules.high:g}, found {value!r}"
    if rules.low <= value < (float("inf") if rules.below is None else rules.below):
        return ""
    beyond = "" if rules.below is None else f" and below {rules.below}"
    return f"expected at least {rules.low:g}{beyond}, found {value!r}"


def _is_of(value: Any, annotation: Any) -> bool:
    """Whether a value is of a type; an integer is a number too, a bool is neither, a list is a tuple in JSON."""
    if isinstance(annotation, types.UnionType):
        return any(_is_of(value, option) for option in typing.get_args(annotation))
    annotation = typing.get_origin(annotation) or annotation
    if isinstance(value, bool) or annotation is bool:
        return isinstance(value, bool) and annotation is bool
    if dataclasses.is_dataclass(annotation):
        return isinstance(value, ConfigDict)
    wider = {float: (int, float), tuple: (tuple, list)}
    return isinstance(value, wider.get(annotation, annotation))
