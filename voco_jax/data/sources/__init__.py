"""Where records come from, the beginning of sources → index → plan → pipeline → batches.

A kind of source is a class (`records.Source`) whose constructor's parameters are its keys in the config.
"""

from collections.abc import Callable
import inspect
import math
from typing import TYPE_CHECKING

from voco_jax.data.records import Source
from voco_jax.data.sources.array_records import ArrayRecordSource
from voco_jax.data.sources.easyvqa import EasyVqaSource
from voco_jax.data.sources.llava import LlavaSource, VideoQuestionSource
from voco_jax.data.sources.tfds import TfdsSource
from voco_jax.errors import UserError

if TYPE_CHECKING:  # worker processes import this module, and need no flax
    from voco_jax.config_keys import DataConfig

SOURCES: dict[str, Callable[..., Source]] = {
    "easyvqa": EasyVqaSource,
    "llava": LlavaSource,
    "video_qa": VideoQuestionSource,
    "array_record": ArrayRecordSource,
    "tfds": TfdsSource,
}
_LIMITS = ("row_bytes",)  # parameters that all sources of a config take from `data.limits`


def keys_of(kind: str) -> list[str]:
    """The config's keys of a kind of source, beside `kind` and `weight`."""
    return [key for key in inspect.signature(SOURCES[kind]).parameters if key not in _LIMITS]


def open_sources(data: "DataConfig", key: str) -> tuple[list[Source], list[float]]:
    """The sources of `config.data.<key>` (train or test), by name, and their weights; UserError names what is wrong.

    Of the rest of `config.data` only `limits` is read.
    """
    sources, weights = [], []
    for name, keys in sorted(getattr(data, key).items()):
        where = f"config.data.{key}.{name}"
        if keys.kind not in SOURCES:
            raise UserError(f"{where}.kind: expected one of {', '.join(SOURCES)}; found {keys.kind!r}")
        if not 0 <= keys.weight < math.inf:
            raise UserError(f"{where}.weight: expected a number of 0 or more, found {keys.weight!r}")
        arguments = {k: v for k, v in keys.items() if k not in ("kind", "weight")}
        expected = keys_of(keys.kind)
        if {*arguments} != {*expected}:
            found = ", ".join(sorted(arguments))
            raise UserError(f"{where}: a {keys.kind} has the keys {', '.join(expected)}; found {found}")
        limits = {k: getattr(data.limits, k) for k in _LIMITS if k in inspect.signature(SOURCES[keys.kind]).parameters}
        try:
            sources.append(SOURCES[keys.kind](**arguments, **limits))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        weights.append(keys.weight)
    if not sources:
        raise UserError(f"config.data.{key}: expected at least one source, found none")
    return sources, weights
