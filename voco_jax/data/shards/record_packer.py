"""A record of a source made ready to be kept: every file it names read, wholly decoded and put inside; or BadRecord."""

from collections.abc import Callable
import dataclasses
import io
from pathlib import Path
from typing import Any

from PIL import Image

from voco_jax.data.images import load_image
from voco_jax.data.records import (
    NOT_UTF8,
    TOO_LARGE,
    UNREADABLE_VIDEO,
    WRONG_FORM,
    BadRecord,
    Clip,
    Frames,
    Picture,
    Record,
    Source,
)
from voco_jax.data.sources.array_records import pack_record
from voco_jax.data.sources.roots import check_file, open_file, unread
from voco_jax.data.turns import check_turns, split_system, spread_video
from voco_jax.data.video import FrameSampling, probe, read_frames, sample_times
from voco_jax.io.paths import AnyPath

JPEG_QUALITY = 95
MAX_BYTES = 2**30  # of a file in a record


@dataclasses.dataclass(frozen=True)
class RecordPacker:
    """Makes the bytes of a shard's record. Files named in it are read, wholly decoded, and kept as they are encoded.

    image_root, video_root: pictures and videos are named by their path from there. max_side: pixels; a picture that is
    longer is scaled down (0: any may be). sampling: of the frames kept in place of a clip; None keeps the clip.
    incomplete: of a clip that is cut off, what is there is taken.
    """

    source: Source
    image_root: AnyPath | None = None
    video_root: AnyPath | None = None
    max_side: int = 0
    sampling: FrameSampling | None = None
    incomplete: bool = False

    def __call__(self, i: int, on_warning: Callable[[str, str], Any]) -> bytes:
        """The i-th record; BadRecord. `on_warning` is called with kind and name of unusual pictures."""
        record = self.source[i]
        check_conversations(record)
        images = [self._picture(_file(picture), on_warning) for picture in record.images]
        video = None if record.video is None else self._video(_file(record.video))
        try:
            return pack_record(Record(images, video, record.conversations, self.source.where(i), record.kinds))
        except UnicodeError as error:
            raise BadRecord(NOT_UTF8, f"text that is not valid Unicode: {error}") from None
        except (ValueError, TypeError, OverflowError) as error:
            raise BadRecord(WRONG_FORM, f"cannot be kept: {error}") from None

    def _picture(self, file: Path, on_warning) -> Picture:
        data = read_file(file, TOO_LARGE)
        name = _name(file, self.image_root)
        image = load_image(Picture(data=data, name=str(file)), lambda kind: on_warning(kind, name))
        if self.max_side and max(image.size) > self.max_side:
            data = self._encode(image, name)
        return Picture(data=data, name=name)

    def _video(self, file: Path) -> Clip | Frames:
        check_file(file)
        clip, name = Clip(file, incomplete=self.incomplete), _name(file, self.video_root)
        if self.sampling is None:
            data = read_file(file, UNREADABLE_VIDEO)
            check_clip(clip)
            return Clip(data=data, name=name)
        times = sample_times(probe(clip), self.sampling)
        pictures = [Picture(data=self._encode(image, name)) for image in read_frames(clip, times)]
        return Frames(pictures, times.tolist(), name)

    def _encode(self, image: Image.Image, name: str) -> bytes:
        if self.max_side and max(image.size) > self.max_side:
            scale = self.max_side / max(image.size)
            width, height = (max(1, round(side * scale)) for side in image.size)
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        content = io.BytesIO()
        try:
            image.save(content, "JPEG", quality=JPEG_QUALITY)
        except OSError:
            raise BadRecord(TOO_LARGE, f"{name}: {image.width} × {image.height} pixels, too many for JPEG") from None
        return content.getvalue()


def check_conversations(record: Record) -> None:
    """BadRecord unless every conversation is one, with markers for the record's pictures or video."""
    for conversation in record.conversations:
        _, turns = split_system(conversation)
        if record.video is None:
            check_turns(turns, len(record.images))
        else:
            check_turns(spread_video(turns, [""]), 1)


def check_clip(clip: Clip) -> None:
    """BadRecord unless the clip can be opened and its first frame decoded."""
    probe(clip)
    read_frames(clip, [0.0])


def read_file(file: Path, kind: str) -> bytes:
    """The bytes of a file that data names; BadRecord, of `kind` for one that is too large."""
    with open_file(file) as stream:
        if (size := stream.seek(0, io.SEEK_END)) > MAX_BYTES:
            raise BadRecord(kind, f"{file}: {size / 2**30:.1f} GiB, more than the {MAX_BYTES / 2**30:g} of a record")
        stream.seek(0)
        try:
            return stream.read()
        except Exception as error:
            raise unread(file, error) from None


def _file(encoded: Picture | Clip | Frames) -> Path:
    """The file of a picture or clip, as sources of JSON rows have them."""
    assert not isinstance(encoded, Frames) and encoded.file is not None
    return encoded.file


def _name(file: Path, root: Path | None) -> str:
    return (file.relative_to(root) if root is not None and file.is_relative_to(root) else file).as_posix()
