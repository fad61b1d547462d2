"""The pictures and clips of requests, checked: what they are is found out from their bytes, and told to the client in
one line where it is not what was asked for. `fetch` gives the bytes.

Strangers send them. They are decoded in threads (`decode`), so that the server goes on answering, and only two at a
time, so that memory is bounded: one takes at most 1 GiB beside its pixels (docs/security.md).
"""

import asyncio
from collections.abc import Callable, Sequence
import concurrent.futures
import dataclasses
import re
import time
from typing import ParamSpec, TypeVar
import warnings

import numpy as np

from voco_jax.data.images import FORMATS, ImageProcessor
from voco_jax.data.media import ANIMATION, NEITHER, PICTURE, VIDEO, kind_of
from voco_jax.data.records import UNREADABLE_PICTURE, Clip, Picture
from voco_jax.data.sources.roots import open_encoded
from voco_jax.data.video import FrameSampling, probe, read_frames, sample_times
from voco_jax.data.video_file import INCOMPLETE_HINT
from voco_jax.errors import UserError
from voco_jax.serve.fetch import Network, fetch
from voco_jax.serve.limits import Media, MediaError, MediaLimits

__all__ = [
    "Checked", "Media", "MediaError", "MediaLimits", "Network", "check_picture", "check_video", "decode", "fetch",
]  # fmt: skip

P = ParamSpec("P")
T = TypeVar("T")

# Pillow's, of odd sizes and EXIF: strangers would fill the log
warnings.filterwarnings("ignore", module=r"PIL\.")

_DECODERS = concurrent.futures.ThreadPoolExecutor(2, thread_name_prefix="decoder")


@dataclasses.dataclass(frozen=True)
class Checked:
    """What the model is shown: `ImageEncoder.encode_pixels` takes `squares`.

    squares: grey levels [size, size, 3], uint8: of a picture its tiles, of a clip the frames that are taken.
    times: of a clip, the seconds at which these are shown; of a picture None.
    """

    squares: Sequence[np.ndarray]
    times: np.ndarray | None = None


async def decode(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`check_picture` or `check_video`, in one of the decoders' threads. A call that is cancelled while it waits for a
    thread is not begun."""
    future = _DECODERS.submit(call, *args, **kwargs)
    return await asyncio.wrap_future(future)


def check_picture(media: Media, processor: ImageProcessor) -> Checked:
    """A picture, decoded and prepared as the run's pictures are; of an animated one the first frame.

    MediaError for what is not a picture, cannot be decoded, is larger than the processor's limits, or is labelled as
    something else.
    """
    try:
        squares = processor.squares(Picture(media.file, media.data, media.name))
    except UserError as error:
        found = ""
        if getattr(error, "kind", "") == UNREADABLE_PICTURE:
            found = {VIDEO: "a video", NEITHER: _other(media)}.get(kind_of(media), "")
        expected = f"expected a picture ({', '.join(FORMATS)})"
        raise MediaError(f"{media}: {expected}, found {found}" if found else str(error)) from None
    if not (media.label.startswith("video/") and kind_of(media) == ANIMATION):
        _check_label(media, "image", "a picture")
    return Checked(squares)


def check_video(media: Media, processor: ImageProcessor, sampling: FrameSampling, limits: MediaLimits) -> Checked:
    """The frames that `sampling` takes of a clip or an animated picture, decoded and prepared as `processor` does.

    MediaError for what is not a video, is cut off or cannot be decoded, is longer than `limits` or takes longer to
    decode, of which more frames would be taken, or which is labelled as something else.
    """
    clip = Clip(media.file, media.data, media.name, until=time.monotonic() + limits.decode_seconds)
    kind = kind_of(clip)
    if kind == PICTURE:
        raise MediaError(f"{media}: expected a video, found a picture")
    if kind == NEITHER and (found := _other(media)):
        raise MediaError(f"{media}: expected a video, found {found}")
    if kind == VIDEO or (kind == ANIMATION and not media.label.startswith("image/")):
        _check_label(media, "video", "a video")
    try:
        info = probe(clip)
        if info.duration > limits.max_seconds:
            raise MediaError(f"{media}: expected {limits.max_seconds:g} s at most, found {info.duration:.1f} s")
        if (taken := sampling.count(info)) > limits.max_frames:
            raise MediaError(f"{media}: expected {limits.max_frames} frames to be taken at most, found {taken}")
        times = sample_times(info, sampling)
        return Checked(read_frames(clip, times, processor.square), times)
    except UserError as error:
        raise MediaError(str(error).removesuffix(INCOMPLETE_HINT)) from None


def _check_label(media: Media, expected: str, found: str) -> None:
    """MediaError where the label says that it is another kind of thing; 'application/…' says nothing."""
    said = media.label.partition("/")[0]
    if said != expected and said in ("image", "video", "audio", "text"):
        raise MediaError(f"{media}: labelled {media.label}, found {found}")


def _other(media: Media) -> str:
    """What it is that is neither a picture nor a video, by its first bytes; '' for what is not known."""
    with open_encoded(media) as stream:
        head = stream.read(2**12).removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if not head:
        return "nothing"
    if head.startswith(b"<"):
        return "HTML" if re.search(rb"<(!doctype )?html", head) else "SVG" if b"<svg" in head else ""
    if head.startswith(b"%pdf-"):
        return "PDF"
    return "HEIC" if head[4:8] == b"ftyp" and head[8:11] in (b"hei", b"hev", b"mif", b"msf") else ""
