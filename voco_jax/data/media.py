"""Pictures or videos? By their content; `endings.py` is for looking for files."""

from pathlib import Path

from PIL import Image

from voco_jax.data.endings import PICTURES, VIDEOS, has_ending
from voco_jax.data.images import FORMATS, UNREADABLE
from voco_jax.data.picture_headers import asks_too_much
from voco_jax.data.records import BadRecord, Clip
from voco_jax.data.sources.roots import open_file
from voco_jax.data.video_file import open_video
from voco_jax.errors import UserError

PICTURE, ANIMATION, VIDEO, NEITHER = "picture", "animation", "video", "neither"


def kind_of(file: Path) -> str:
    """PICTURE, ANIMATION (a picture in several frames that can be looked at as a video: GIF, PNG, AVIF), VIDEO; NEITHER
    for a file that is not there or not readable as one of these."""
    try:
        with open_file(file) as stream:
            if asks_too_much(stream, whole=False):  # a picture that is refused when it is looked at
                return PICTURE
            with Image.open(stream, formats=FORMATS) as image:
                moves = image.format in ("GIF", "PNG", "AVIF") and getattr(image, "is_animated", False)
                return ANIMATION if moves else PICTURE
    except Image.DecompressionBombError:
        return PICTURE
    except BadRecord:
        return NEITHER
    except UNREADABLE:  # not a picture
        pass
    try:
        with open_video(Clip(file, incomplete=True)):
            return VIDEO
    except UserError:  # not readable, or nothing is installed to read it with
        return NEITHER


def is_video(file: Path) -> bool:
    """Whether a file is to be looked at as a video; one that cannot be read is what the ending of its name says."""
    kind = kind_of(file)
    if kind == NEITHER:
        return has_ending(file, VIDEOS) and not has_ending(file, PICTURES)
    return kind != PICTURE
