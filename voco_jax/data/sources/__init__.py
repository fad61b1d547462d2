"""Where records come from, the beginning of sources → index → plan → pipeline → batches.

A kind of source is a class (`records.Source`) whose constructor takes its keys of `config_keys.SOURCE_KEYS`.
"""

from collections.abc import Callable
import math
from typing import TYPE_CHECKING

from voco_jax.data.records import Source
from voco_jax.data.sources.array_records import ArrayRecordSource
from voco_jax.data.sources.easyvqa import EasyVqaSource
from voco_jax.data.sources.llava import LlavaSource, VideoQuestionSource
from voco_jax.data.sources.tfds import TfdsSource
from voco_jax.data.sources.tiled import TiledSource
from voco_jax.errors import UserError

if TYPE_CHECKING:
    from voco_jax.config_keys import DataConfig

SOURCES: dict[str, Callable[..., Source]] = {
    "easyvqa": EasyVqaSource,
    "llava": LlavaSource,
    "video_qa": VideoQuestionSource,
    "array_record": ArrayRecordSource,
    "tfds": TfdsSource,
}
_OF_JSON_ROWS = ("llava", "video_qa")  # which take `data.limits.row_bytes` too


def open_sources(data: "DataConfig", key: str) -> tuple[list[Source], list[float]]:
    """The sources of `config.data.<key>` (train or test), by name, and their weights; UserError names what is wrong.

    Of the rest of `config.data` only `limits` and `image_grid` are read.
    """
    from voco_jax.config_keys import SOURCE_KEYS  # here, as worker processes import this module, and need no flax

    sources, weights = [], []
    for name, keys in sorted(getattr(data, key).items()):
        where = f"config.data.{key}.{name}"
        if keys.kind not in SOURCES:
            raise UserError(f"{where}.kind: expected one of {', '.join(SOURCES)}; found {keys.kind!r}")
        if not 0 <= keys.weight < math.inf:
            raise UserError(f"{where}.weight: expected a number of 0 or more, found {keys.weight!r}")
        arguments = {k: v for k, v in keys.items() if k not in ("kind", "weight")}
        expected = SOURCE_KEYS[keys.kind]
        if arguments.keys() != expected.keys():
            found = ", ".join(sorted(arguments))
            raise UserError(f"{where}: a {keys.kind} has the keys {', '.join(expected)}; found {found}")
        limits = {"row_bytes": data.limits.row_bytes} if keys.kind in _OF_JSON_ROWS else {}
        try:
            sources.append(SOURCES[keys.kind](**arguments, **limits))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if data.image_grid > 1:
            sources[-1] = TiledSource(sources[-1], data.image_grid)
        weights.append(keys.weight)
    if not sources:
        raise UserError(f"config.data.{key}: expected at least one source, found none")
    return sources, weights
