"""Where records come from. A record is some pictures and the conversations about them."""

from collections.abc import Sequence
import dataclasses
from pathlib import Path

from voco_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Record:
    """Pictures (files) and conversations, each about all of them: lists of turns in LLaVA's form."""

    images: Sequence[Path]
    conversations: Sequence[list[dict]]


def load_records(source: str, split: str) -> list[Record]:
    """Records of a source by name."""
    from voco_jax.data import easyvqa

    sources = {"easyvqa": easyvqa.load}  # each refuses a split that it does not have
    if source not in sources:
        raise UserError(f"data.source: expected one of {', '.join(sources)}; found {source!r}")
    return sources[source](split)
