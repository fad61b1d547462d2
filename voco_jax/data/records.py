"""What a data source gives: a record, which is pictures or a clip with the conversations about them; or BadRecord."""

from collections.abc import Sequence
import dataclasses
import math
from pathlib import Path
from typing import Any, Protocol

from voco_jax.errors import UserError
from voco_jax.terminal import printable

# Why a record is skipped, as reports name it
BROKEN_JSON = "broken JSON"
NOT_UTF8 = "not UTF-8"
WRONG_FORM = "not a conversation"
NO_ANSWER = "no answer"
IMAGE_COUNT = "<image> count"
SPECIAL_TOKEN = "special token in the text"
OUTSIDE = "path outside the root"
MISSING = "missing file"
UNREADABLE_PICTURE = "unreadable picture"
TOO_LARGE = "picture too large"
UNREADABLE_VIDEO = "unreadable video"
TOO_LONG = "does not fit"
DAMAGED = "damaged shard"


class BadRecord(UserError):
    """A record that cannot be used: its kind, and one line that names file, what was expected and what was found.

    Training counts such records and goes on (`reports.py`). A command that asked for this record ends with the line.
    """

    def __init__(self, kind: str, message: str):
        super().__init__(kind, message)  # both, so that it can be pickled
        self.kind, self.message = kind, message

    def __str__(self):
        return printable(self.message)


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A file, or the bytes of one (then `name` is for messages)."""

    file: Path | None = None
    data: bytes | None = dataclasses.field(default=None, repr=False)
    name: str = ""

    def __str__(self):
        return self.name or str(self.file)


@dataclasses.dataclass(frozen=True)
class Picture(Encoded):
    """An encoded picture, or a tile of it: (row, column, n) of n × n; (0, 0, 1) is all of it."""

    tile: tuple[int, int, int] | None = None


def tiles_of(grid: int) -> tuple[tuple[int, int, int], ...]:
    """What is looked at of a picture, by `Picture.tile`: all of it, and from `grid` 2 on its tiles, row by row."""
    tiles = ((row, column, grid) for row in range(grid) for column in range(grid))
    return ((0, 0, 1), *(tiles if grid > 1 else ()))


@dataclasses.dataclass(frozen=True)
class Clip(Encoded):
    """An encoded video; `incomplete`: of a file that is cut off, what is there is the clip. After `until`, a time of
    `time.monotonic`, no more of it is read: BadRecord."""

    incomplete: bool = False
    until: float = math.inf


@dataclasses.dataclass(frozen=True)
class Frames:
    """Frames taken from a video beforehand, each an encoded picture, with the second at which each is shown."""

    pictures: Sequence[Picture]
    times: Sequence[float]
    name: str = ""  # of the video

    def __str__(self):
        return self.name or ", ".join(map(str, self.pictures))


@dataclasses.dataclass(frozen=True)
class Record:
    """Pictures, or one video, and conversations, each about all of them: lists of turns in LLaVA's form.

    `<image>` in a turn stands for a picture each, `<video>` for all frames of the video. `kinds` are of the
    conversations' questions, as a row has them: `voco evaluate` splits its table by them, and wants text. Empty where
    there are none.
    """

    images: Sequence[Picture] = ()
    video: Clip | Frames | None = None
    conversations: Sequence[list[dict]] = ()
    name: str = ""  # where it is, for messages: "mix665k.json[17]"
    kinds: Sequence[Any] = ()


class Source(Protocol):
    """Records in a fixed order, the same in every process. Worker processes get a pickled copy of the source."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Record:
        """The i-th record; BadRecord where it cannot be used."""

    def where(self, i: int) -> str:
        """The i-th record's name in messages: "mix665k.json[17]"."""

    def fingerprint(self) -> str:
        """A text that changes when the data does."""
