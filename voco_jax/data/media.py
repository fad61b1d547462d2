"""Pictures or videos? By their content; `endings.py` is for looking for files."""

import math

from PIL import Image

from voco_jax.data.endings import PICTURES, VIDEOS, has_ending
from voco_jax.data.images import FORMATS, UNREADABLE
from voco_jax.data.picture_headers import asks_too_much
from voco_jax.data.records import BadRecord, Clip, Encoded
from voco_jax.data.sources.roots import open_encoded
from voco_jax.data.video_file import open_video
from voco_jax.errors import UserError
from voco_jax.io.paths import AnyPath

PICTURE, ANIMATION, VIDEO, NEITHER = "picture", "animation", "video", "neither"


def kind_of(file: AnyPath | Encoded) -> str:
    """PICTURE, ANIMATION (a picture in several frames that can be looked at as a video: GIF, PNG, AVIF), VIDEO; NEITHER
    for a file that is not there or not readable as one of these."""
    encoded = file if isinstance(file, Encoded) else Encoded(file)
    try:
        with open_encoded(encoded) as stream:
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
        until = encoded.until if isinstance(encoded, Clip) else math.inf
        with open_video(Clip(encoded.file, encoded.data, encoded.name, incomplete=True, until=until)) as video:
            return ANIMATION if video.is_a("gif", "apng") else VIDEO  # damaged
    except UserError:  # not readable, or nothing is installed to read it with
        return NEITHER


def is_video(file: AnyPath) -> bool:
    """Whether a file is to be looked at as a video; one that cannot be read is what the ending of its name says."""
    kind = kind_of(file)
    if kind == NEITHER:
        return has_ending(file, VIDEOS) and not has_ending(file, PICTURES)
    return kind != PICTURE
