"""Where records come from: one class a kind of source, chosen and described by the config.

A source is a sequence: `len(source)`, `source[i]` gives a `Record` or raises BadRecord, the same in every process;
`where(i)` names it in messages, `fingerprint()` changes when the data does.
"""

from collections.abc import Sequence
import math

from ml_collections import ConfigDict

from voco_jax.data.sources.array_records import ArrayRecordSource
from voco_jax.data.sources.easyvqa import EasyVqaSource
from voco_jax.data.sources.llava import LlavaSource, VideoQuestionSource
from voco_jax.data.sources.tfds import TfdsSource
from voco_jax.errors import UserError

SOURCES = {
    "easyvqa": EasyVqaSource,
    "llava": LlavaSource,
    "video_qa": VideoQuestionSource,
    "array_record": ArrayRecordSource,
    "tfds": TfdsSource,
}


def open_sources(config: ConfigDict, key: str) -> tuple[Sequence, list[float]]:
    """The sources of `config.data.<key>` (train or test), by name, and their weights; UserError names what is wrong.

    Of the rest of the config `data.limits` is read.
    """
    from voco_jax.config import SOURCE_KEYS  # here: worker processes import this module, and need no flax

    sources, weights = [], []
    for name, keys in sorted(config.data[key].items()):
        if keys.kind not in SOURCES:
            raise UserError(f"config.data.{key}.{name}.kind: expected one of {', '.join(SOURCES)}; found {keys.kind!r}")
        if not 0 <= keys.weight < math.inf:
            raise UserError(f"config.data.{key}.{name}.weight: expected a number of 0 or more, found {keys.weight!r}")
        if {*keys} - {"kind", "weight"} != {*SOURCE_KEYS[keys.kind]}:
            expected = ", ".join(SOURCE_KEYS[keys.kind])
            found = ", ".join(sorted({*keys} - {"kind", "weight"}))
            raise UserError(f"config.data.{key}.{name}: a {keys.kind} has the keys {expected}; found {found}")
        arguments = {k: v for k, v in keys.items() if k not in ("kind", "weight")}
        if keys.kind in ("llava", "video_qa"):
            arguments["row_bytes"] = config.data.limits.row_bytes
        try:
            sources.append(SOURCES[keys.kind](**arguments))
        except UserError as error:
            raise UserError(f"config.data.{key}.{name}: {error}") from None
        weights.append(keys.weight)
    if not sources:
        raise UserError(f"config.data.{key}: expected at least one source, found none")
    return sources, weights
