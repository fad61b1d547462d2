"""A record's conversations as samples. The index measures them beforehand and the pipeline loads them, both here."""

from collections.abc import Callable
import dataclasses
from typing import NamedTuple
import zlib

import numpy as np
from PIL import Image

from voco_jax.data.conversations import Encoder, Sample
from voco_jax.data.images import ImageProcessor
from voco_jax.data.packing import truncate
from voco_jax.data.records import (
    NO_ANSWER,
    TOO_LONG,
    WRONG_FORM,
    BadRecord,
    Clip,
    Frames,
    Picture,
    Record,
    Source,
)
from voco_jax.data.reports import Report
from voco_jax.data.turns import spread_video
from voco_jax.data.video import FrameSampling, VideoInfo, format_time, probe, read_frames, sample_times
from voco_jax.terminal import shortened


class Sampled(NamedTuple):
    """A conversation's sample, how many of its tokens were cut off, and a checksum of its answers: of the ids of all
    its labels, those that were cut off too."""

    sample: Sample
    cut: int
    answers: int


_REMEMBERED = 50_000  # encoded conversations: sets that ask the same questions again and again encode them once


@dataclasses.dataclass
class SampleMaker:
    """Turns records into samples of at most `row_length` tokens (0: any) about at most `max_images` images.

    `timestamps` puts each frame's time before it; `incomplete` takes what is there of clips that are cut off. Same
    record, same number of images and (but for the digits of a time stamp) of tokens, whatever `rng` gives to
    `frame_times`.
    """

    encoder: Encoder
    row_length: int
    max_images: int
    sampling: FrameSampling
    timestamps: bool = False
    incomplete: bool = False

    def __post_init__(self) -> None:
        self._encoded: dict[tuple, Sampled] = {}
        self._probed: tuple[Clip, VideoInfo] | None = None  # sets ask several questions about a clip, one after another

    def __getstate__(self):
        return self.__dict__ | {"_encoded": {}, "_probed": None}

    def read(self, source: Source, i: int, report: Report) -> tuple[Record, np.ndarray | None] | None:
        """(record i, its `frame_times`); None where it cannot be used, which the report counts."""
        try:
            record = source[i]
            return record, self.frame_times(record)
        except BadRecord as error:
            report.seen += 1
            report.add_skipped(error, source.where(i))
            return None

    def frame_times(self, record: Record, rng: np.random.Generator | None = None) -> np.ndarray | None:
        """Seconds at which the record's video is looked at; None for pictures. BadRecord for a video without frames."""
        if record.video is None:
            return None
        return sample_times(self._probe(record.video), self.sampling, rng)

    def _probe(self, video: Clip | Frames) -> VideoInfo:
        if not isinstance(video, Clip):
            return probe(video)
        clip = self._clip(video)
        found = self._probed  # other threads are here too
        if found is None or found[0] != clip:
            found = self._probed = clip, probe(clip)
        return found[1]

    def _clip(self, clip: Clip) -> Clip:
        return dataclasses.replace(clip, incomplete=True) if self.incomplete else clip

    def sample(self, record: Record, conversation: int, times: np.ndarray | None) -> Sampled:
        """One conversation's sample; BadRecord for one that cannot be used."""
        turns = record.conversations[conversation]
        num_images = len(record.images) if times is None else len(times)
        if num_images > self.max_images:
            limit = f"config.data.images_per_pack = {self.max_images}"
            raise BadRecord(TOO_LONG, f"images: expected at most {limit}, found {num_images}")
        key = (num_images, _text_of(turns), None if times is None or not self.timestamps else times.tobytes())
        found = self._encoded.get(key)  # other threads are here too, and one of them may clear it
        if found is None:
            if len(self._encoded) >= _REMEMBERED:
                self._encoded.clear()
            found = self._encoded[key] = self._sample(turns, num_images, times)
        return found

    def prompt(self, record: Record, conversation: int, times: np.ndarray | None) -> Sample:
        """A conversation up to its first answer, as a prompt; BadRecord for one whose images come only later."""
        turns = record.conversations[conversation]
        human = next((i for i, (role, _) in enumerate(_text_of(turns)) if role == "human"), len(turns))
        num_images = len(record.images) if times is None else len(times)
        return self.encoder.encode(self._with_frames(turns[: human + 1], times), num_images)

    def _with_frames(self, turns, times: np.ndarray | None):
        if times is None:
            return turns
        return spread_video(turns, [f"{format_time(t)} " if self.timestamps else "" for t in times])

    def _sample(self, turns, num_images: int, times: np.ndarray | None) -> Sampled:
        sample = self.encoder.encode(self._with_frames(turns, times), num_images)
        if not sample.labels.any():
            raise BadRecord(NO_ANSWER, "conversation: expected an answer, found none")
        kept = truncate(sample, self.row_length) if self.row_length else sample
        if kept is None:
            reason = f"an image or every answer beyond config.data.row_length = {self.row_length} tokens"
            raise BadRecord(TOO_LONG, f"conversation of {len(sample)} tokens: {reason}")
        answers = zlib.crc32(sample.tokens[sample.labels].tobytes())
        return Sampled(kept, len(sample) - len(kept), answers)

    def load_images(
        self, record: Record, times: np.ndarray | None, processor: ImageProcessor,
        on_warning: Callable[[str], None] | None = None, change: Callable[[Image.Image], Image.Image] | None = None,
    ) -> list[Image.Image]:  # fmt: skip
        """The record's pictures, or tiles of them, or its video's frames at `times`, in RGB; BadRecord for what cannot
        be read. `change` is applied to whole pictures and frames, before tiles are cut."""
        change = change or (lambda image: image)
        if record.video is not None and times is not None:
            video = self._clip(record.video) if isinstance(record.video, Clip) else record.video
            return [change(frame) for frame in read_frames(video, times)]
        images: list[Image.Image] = []
        opened: tuple[Picture, Image.Image] | None = None  # tiles of a picture follow each other
        for picture in record.images:
            whole = dataclasses.replace(picture, tile=None)
            if opened is None or opened[0] != whole:
                opened = whole, change(processor.load(whole, on_warning))
            images.append(opened[1] if picture.tile is None else processor.cut(opened[1], picture.tile))
        return images


def _text_of(turns) -> tuple:
    """What of a conversation its sample depends on; BadRecord where it is not of the form that it should have."""
    if not isinstance(turns, list):
        raise BadRecord(WRONG_FORM, f"conversation: expected a list of turns, found {shortened(turns)}")
    texts = [(turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None) for turn in turns]
    for i, (role, value) in enumerate(texts):
        if not isinstance(role, str) or not isinstance(value, str):
            raise BadRecord(
                WRONG_FORM, f"turn {i}: expected 'from' and 'value', both text; found {shortened(turns[i])}"
            )
    return tuple(texts)
