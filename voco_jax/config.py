"""Configs: made from the list of keys (`config_keys.py`), checked, compared, and stored in run directories."""

import ast
from collections.abc import Iterable, Mapping, Sequence
import contextlib
import dataclasses
import difflib
import functools
import json
import operator
import os
import re
import shlex
from typing import Any

from ml_collections import ConfigDict

from voco_jax.config_keys import SOURCE_KEYS, Config
from voco_jax.errors import UserError
from voco_jax.io.atomic import write_text
from voco_jax.io.json_files import read_object
from voco_jax.io.paths import as_path
from voco_jax.keys import DEFAULT, all_keys, build, problem_of
from voco_jax.models import presets
from voco_jax.models.compressors import COMPRESSORS
from voco_jax.models.llama import RopeScaling
from voco_jax.terminal import shortened

VERSION = 2  # of config.json; version 1 says none
GROUPS_AND_KEYS = all_keys(Config())
SOURCES = ("data.train", "data.test")  # groups whose keys a config file chooses
KEYS = {name: key for name, key in GROUPS_AND_KEYS.items() if not dataclasses.is_dataclass(key.type)}
# Keys that runs made earlier may lack, with the value that means what those runs did.
ADDED_LATER = {
    name: key.default if key.rules.earlier is DEFAULT else key.rules.earlier
    for name, key in KEYS.items()
    if key.rules.earlier is not None
}
# Keys, and groups of keys, by the names that earlier runs have them under.
RENAMED = {key.rules.was: name for name, key in GROUPS_AND_KEYS.items() if key.rules.was}


def default_config() -> ConfigDict:
    """All keys with their defaults (`config_keys.py` lists them). A config file changes those that differ; the command
    line, any: `--config.optim.learning_rate=1e-3`."""
    return ConfigDict(dataclasses.asdict(Config()), convert_dict=True).lock()


def typed(config: ConfigDict) -> Config:
    """The same as frozen dataclasses, for code that takes a part of them: `typed(config).optim`.

    UserError for a language model, a vision tower or LoRA that cannot be.
    """
    return build(Config, config)


def source(kind: str, **keys) -> ConfigDict:
    """A source for `config.data.train` or `.test`: `source("llava", file="mix.json", images="pictures")`."""
    if kind not in SOURCE_KEYS:
        raise UserError(f"source: expected a kind of {', '.join(SOURCE_KEYS)}; found {kind!r}")
    known = {"weight": 1.0} | SOURCE_KEYS[kind]
    for key, value in keys.items():
        if key not in known:
            raise UserError(f"source {kind}: expected a key of {', '.join(known)}; found {key!r}")
        expected = float if key == "weight" else str
        if not isinstance(value, (int, float) if expected is float else str):
            raise UserError(f"source {kind}: {key}: expected {expected.__name__}, found {value!r}")
    return ConfigDict({"kind": kind} | known | keys)


def sources(**by_name: ConfigDict) -> ConfigDict:
    """Several sources, each under a name of your own; together they are a mixture."""
    return ConfigDict(by_name)


def sources_to_score(data: ConfigDict) -> ConfigDict:
    """The sources of `config.data.test`; easy-VQA's test split, where there are none and it alone is trained on."""
    kinds = {keys.kind for keys in data.train.values()}
    return data.test if data.test or kinds != {"easyvqa"} else sources(easyvqa=source("easyvqa", split="test"))


def llama_preset(name: str) -> ConfigDict:
    """Dimensions of a language model by name (`voco_jax/models/presets.py`), as a config of its own."""
    return ConfigDict(dataclasses.asdict(_preset(presets.LLAMA, "llama", name)), convert_dict=True)


def vision_preset(name: str) -> ConfigDict:
    """Dimensions of a vision tower by name."""
    return ConfigDict(dataclasses.asdict(_preset(presets.VIT, "vision", name)), convert_dict=True)


def _preset(table: dict, kind: str, name: str):
    if name not in table:
        raise UserError(f"{kind} preset: expected one of {', '.join(table)}; found {name!r}")
    return table[name]


def save_config(config: ConfigDict, path: str | os.PathLike) -> None:
    """The file is whole, or as it was: written apart and renamed, or in one piece to a bucket. UserError for one that
    `load_config` would not take."""
    path = as_path(path)
    try:
        text = _as_json(stored_form(config))
    except UserError as error:
        raise UserError(f"{path}: cannot be written: {error}") from None
    write_text(path, text)


def stored_form(config: ConfigDict) -> dict:
    """What runs and checkpoints store of a config: its keys, and the version of the list of keys."""
    return {"version": VERSION, **config.to_dict()}


_MOST = 2**20  # bytes of a config as JSON
_MOST_KEYS, _MOST_GROUPS = 20_000, 2048  # each source being a group of six keys; more would take seconds


def _as_json(config: dict) -> str:
    """UserError for one of more than there is room for."""
    text = json.dumps(config, indent=2) + "\n"
    found = {
        _MOST: ("bytes", len(text)),
        _MOST_KEYS: ("keys", text.count('": ')),
        _MOST_GROUPS: ("groups of keys", text.count("{")),
    }
    for most, (unit, count) in found.items():
        if count > most:
            raise UserError(f"expected {most} {unit} at most, found {count}")
    return text


def load_config(path: str | os.PathLike) -> ConfigDict:
    """A config written by `save_config`; UserError names an unknown or missing key."""
    stored = read_object(path, "a run directory holds config.json, tokenizer/ and checkpoints/", _MOST)
    if "model_type" in stored:
        raise UserError(
            f"{path}: a checkpoint in Hugging Face's form, not a run; make one of it: "
            f"voco convert to-jax {shlex.quote(str(as_path(path).parent))} RUN"
        )
    return parse_config(stored, path)


def parse_config(stored: dict, name: str | os.PathLike) -> ConfigDict:
    """A config from its `stored_form`, of this version or an earlier one; UserError, which begins with a name, says
    which key is wrong."""
    config = default_config()
    try:
        _as_json(stored)
        version = stored.get("version", 1)
        if type(version) is not int or not 1 <= version <= VERSION:
            raise UserError(
                f"version: expected {VERSION} at most, found {shortened(version)}; it needs a newer voco_jax"
            )
        values = _by_key({key: value for key, value in stored.items() if key != "version"})
        if missing := sorted(KEYS.keys() - values.keys() - ADDED_LATER.keys()):
            raise UserError(f"key {missing[0]!r} is missing")  # of a new one, `earlier` in config_keys.py
        with config.unlocked(), config.ignore_type():
            for key, value in (ADDED_LATER | values).items():
                set_value(config, key, _from_json(key, value))
        check_config(config)
        typed(config)
    except (KeyError, AttributeError, TypeError, ValueError, ArithmeticError, RecursionError, UserError) as error:
        raise UserError(f"{name}: {message_of(error):.500}") from None
    return config


def _by_key(stored: dict, group: str = "") -> dict[str, Any]:
    """Dotted key → value of a stored config, under the names that keys have now. UserError for a key that is none."""
    values: dict[str, Any] = {}
    for part, value in stored.items():
        key = RENAMED.get(group + part, group + part)
        if key not in GROUPS_AND_KEYS or "." in part:
            raise UserError(f"config.{group}{part}: {unknown_key(group + part, KEYS)}")
        found = {key: value} if key in KEYS or not isinstance(value, dict) else _by_key(value, f"{key}.")
        if twice := sorted(values.keys() & found.keys()):
            raise UserError(f"config.{twice[0]}: expected it once, found it under its old name too")
        values |= found
    return values


def with_all_fields(rope_scaling: Mapping[str, Any] | None) -> ConfigDict | None:
    """A rope_scaling, of which a user may give a few fields, with the defaults of the others."""
    return None if rope_scaling is None else ConfigDict(dataclasses.asdict(RopeScaling(**rope_scaling)))


def _from_json(key: str, value: Any) -> Any:
    """The value that JSON has: sources, rotary positions and tuples are other types in a config."""
    if key in SOURCES:
        return sources(**{name: source(**keys) for name, keys in value.items()})
    if key == "model.llama.rope_scaling":
        return with_all_fields(value)
    if isinstance(value, list):
        return tuple(value)
    return float(value) if type(value) is int and KEYS[key].type is float else value


def value_of(config: ConfigDict, key: str) -> Any:
    """The value of a key by its dotted name; KeyError where there is none."""
    return functools.reduce(operator.getitem, key.split("."), config)


def set_value(config: ConfigDict, key: str, value: Any) -> None:
    """Of a key by its dotted name."""
    group, _, name = key.rpartition(".")
    (value_of(config, group) if group else config)[name] = value


def with_earlier_values(config: ConfigDict, stored: ConfigDict) -> ConfigDict:
    """A copy that goes on with what a stored config means by the keys in `ADDED_LATER`, where it does not ask for
    another value than the default."""
    asked, default, there = map(flatten, (config, default_config(), stored))
    kept = {key: old for key, old in ADDED_LATER.items() if there[key] == old != asked[key] == default[key]}
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(kept)
    return config


# ---- What can be wrong with a config -------------------------------------------------------------------------------


def check_config(config: ConfigDict) -> None:
    """UserError for a config that no run can have."""
    if problem := find_problem(config):
        raise UserError(f"config.{problem[0]}: {problem[1]}")


def find_problem(config: ConfigDict) -> tuple[str, str] | None:
    """(key, what is wrong with its value) of the first key that no run can have: unknown, of another type than its
    default, out of its range, or sources that are none."""
    for part in SOURCES:
        if wrong := _sources_problem(config, part):
            return wrong
    for name in flatten(config):
        if name not in KEYS and not name.startswith((*(f"{part}." for part in SOURCES), "model.llama.rope_scaling.")):
            return name, unknown_key(name, KEYS)
    for name, key in GROUPS_AND_KEYS.items():
        if name in SOURCES:
            continue
        if problem := problem_of(key, value_of(config, name)):
            return name, problem
    if problem := _rope_problem(config.model.llama.rope_scaling):
        return "model.llama.rope_scaling", problem
    compressor = COMPRESSORS.get(config.model.compressor)
    if config.model.num_voco_tokens < 1 and not (compressor and compressor.keeps_text(0)):
        return "model.num_voco_tokens", f"expected at least 1, found {config.model.num_voco_tokens}"
    return None


def _sources_problem(config: ConfigDict, part: str) -> tuple[str, str] | None:
    by_name = config.data[part.removeprefix("data.")]
    if not isinstance(by_name, ConfigDict):
        return part, f"expected sources(NAME=source(…)), found {shortened(by_name)}"
    if isinstance(by_name.get("kind"), str):
        return part, f"expected sources(NAME=source({by_name.kind!r}, …)), found a source without a name"
    for name, keys in by_name.items():
        if not isinstance(keys, ConfigDict) or "kind" not in keys:
            found = f"the keys {', '.join(keys)}" if isinstance(keys, ConfigDict) else shortened(keys)
            return f"{part}.{name}", f"expected a source, as source() makes it; found {found}"
    return None


def _rope_problem(scaling: ConfigDict | None) -> str:
    if scaling is None:
        return ""
    known = all_keys(RopeScaling())
    for name, value in scaling.items():
        if name not in known:
            return f"expected keys of {', '.join(known)}; found {name!r}"
        if problem := problem_of(known[name], value):
            return f"{name}: {problem}"
    try:
        RopeScaling(**scaling)
    except ValueError as error:
        return message_of(error)
    return ""


def unknown_key(key: str, known: Iterable[str], prefix: str = "config.") -> str:
    """What to say of a key (dotted) that is none: its new name, the nearest of those that there are, or that it is a
    group.

    >>> unknown_key("optim.lr", ["optim.learning_rate", "optim.name"])
    'no such key; did you mean config.optim.learning_rate?'
    """
    for old, new in RENAMED.items():
        if key == old or key.startswith(f"{old}."):
            return f"renamed to {prefix}{new}{key.removeprefix(old)}"
    known = sorted(known)
    match = re.match(r"(data\.(train|test))\.[^.]+", key)
    if match and not any(other.startswith(f"{match[0]}.") for other in known):
        return f"no such source; a config file adds one: {prefix}{match[1]} = sources(NAME=source(KIND, …))"
    if any(other.startswith(f"{key}.") for other in known):
        return f"is a group of keys, for example {prefix}{next(k for k in known if k.startswith(f'{key}.'))}"
    groups = {other[: dot.start()] for other in known for dot in re.finditer(r"\.", other)}
    key = key[:200]  # a file's may be of any length, and comparing takes its square
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


def first_difference(a: ConfigDict, b: ConfigDict, ignore: Sequence[str] = ()) -> tuple[str, object, object] | None:
    """(key, value in a, value in b) of the first key that differs; some keys, or groups of keys, do not count."""
    flat_a, flat_b = flatten(a), flatten(b)
    for key in sorted(flat_a.keys() | flat_b.keys()):
        if any(key == free or key.startswith(f"{free}.") for free in ignore):
            continue
        if flat_a.get(key) != flat_b.get(key):
            return key, flat_a.get(key), flat_b.get(key)
    return None


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, object]:
    """Dotted key → value; tuples as lists, as JSON has them."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def message_of(error: Exception) -> str:
    """What it says; a KeyError shows its argument as code, and ml_collections nests one in another."""
    while not isinstance(error, OSError) and error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    text = str(error if isinstance(error, OSError | SyntaxError) or not error.args else error.args[0])
    if text[:1] in "'\"" and text[-1:] == text[:1]:
        with contextlib.suppress(ValueError, SyntaxError):
            text = str(ast.literal_eval(text))
    return " ".join(text.split())
