"""Videos: how long a clip is, at which times to look into it, and the pictures that it shows then.

Clips are read with PyAV in one thread; several processes can read several clips at once.
"""

from collections import deque
from collections.abc import Callable, Sequence
import dataclasses
import math
from typing import Any

import numpy as np
from PIL import Image

from voco_jax.data.images import load_image
from voco_jax.data.records import MISSING, UNREADABLE_VIDEO, BadRecord, Clip, Frames
from voco_jax.data.video_file import LOOKAHEAD, VideoFile, open_video
from voco_jax.data.video_frame import to_picture

# FFmpeg's names of codecs whose black frames are zeros
UNCOMPRESSED = (
    "rawvideo", "012v", "avrp", "avui", "ayuv", "bitpacked", "r10k", "r210", "targa_y216", "v210", "v210x", "v308",
    "v408", "v410", "y41p", "yuv4",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class FrameSampling:
    """How many frames of a clip are taken: `num_frames`, or where that is 0, `fps` a second and `max_frames` at most.

    `max_frames` 0 is no limit. No clip gives more frames than it has.
    """

    num_frames: int = 8
    fps: float = 1.0
    max_frames: int = 0

    def __post_init__(self):
        if self.num_frames < 0 or self.max_frames < 0:
            raise ValueError(f"num_frames, max_frames: expected 0 or more, found {self.num_frames}, {self.max_frames}")
        if not self.num_frames and not (math.isfinite(self.fps) and self.fps > 0):
            raise ValueError(f"fps: expected more than 0 where num_frames is 0, found {self.fps}")

    def count(self, info: "VideoInfo") -> int:
        """Frames taken of a clip: 1 … info.num_frames."""
        wanted = self.num_frames or max(1, round(info.duration * self.fps))
        limit = self.max_frames if self.max_frames and not self.num_frames else wanted
        return min(wanted, limit, info.num_frames)


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """`duration` in seconds, from when the first frame is shown until the last one no longer is; `num_frames` ≥ 1."""

    duration: float
    num_frames: int


def sample_times(info: VideoInfo, sampling: FrameSampling, rng: np.random.Generator | None = None) -> np.ndarray:
    """Times to look at, in seconds after the first frame: float64 [n], ascending; n is the same with any `rng`.

    The clip is n equal parts; the middle of each, or with `rng` a place that is drawn once and is the same in each
    part. Where n is all the frames there is nothing to choose, and middles are what rounded time stamps cannot upset.
    """
    n = sampling.count(info)
    offset = 0.5 if rng is None else rng.random()  # drawn even where unused: what is drawn next depends on no clip
    return (np.arange(n) + (0.5 if n == info.num_frames else offset)) * info.duration / n


def format_time(seconds: float) -> str:
    """A time stamp, minutes:seconds; minutes take the place of hours.

    >>> format_time(7.25), format_time(59.96), format_time(4503.2)
    ('00:07.2', '01:00.0', '75:03.2')
    """
    tenths = round(seconds * 10)
    return f"{tenths // 600:02d}:{tenths // 10 % 60:02d}.{tenths % 10}"


def probe(clip: Clip | Frames) -> VideoInfo:
    """Duration and frames of a clip, without decoding: of an mp4 by its index, else by reading through the file.

    BadRecord: MISSING, or UNREADABLE_VIDEO for a file that is no video, is cut off or has no frames.
    """
    if isinstance(clip, Frames):
        times = _relative_times(clip)
        n = len(times)
        return VideoInfo(float(times[-1] * n / max(1, n - 1)), n)
    with open_video(clip, thorough=True) as video:
        if video.indexed:  # headers tell no end: B-frames and variable rates move the last frame
            num_frames = sum(not entry.is_discard for entry in video.stream.index_entries)
            last = video.last_group()
            if video.decoder.name not in UNCOMPRESSED and any(not any(memoryview(packet)[:64]) for packet in last):
                video.not_whole("expected packets of frames, found zeros")  # the room of a copy that was not finished
            packets = [(p.pts, p.duration) for p in last if _shown(p)]
        else:
            video.rewind()
            packets = []
            for packet in video.packets():
                if packet.is_corrupt and not video.is_a("mpegts"):  # where packets may be lost on their way
                    video.not_whole(f"expected a whole packet at byte {packet.pos}, found it cut off")
                if _shown(packet):
                    packets.append((packet.dts if video.untimed else packet.pts, packet.duration))
            num_frames = len(packets)
        starts = [start for start, _ in packets if start is not None]
        if not starts:
            raise video.error("expected frames, found none")
        # An mp4 has durations between decoding times; of the packets only the last has one that reordering leaves.
        end = max(starts) + (packets[-1][1] or video.step)
        if video.is_a("matroska") and len(video.container.streams) == 1:  # of sound and pictures, either is the longer
            declared, gap = (video.container.duration or 0) / 1e6, max(np.diff(sorted(starts)), default=0)
            found = float(end * video.tick)  # as is declared: not from when the first frame is shown
            if found + max(0.1, float(2 * int(gap) * video.tick)) < declared:
                video.not_whole(f"expected {declared:.2f} s, found {found:.2f}")
        return VideoInfo(video.seconds(end), num_frames)


def read_frames(
    clip: Clip | Frames, times: Sequence[float] | np.ndarray, view: Callable[[Image.Image], Any] = lambda image: image
) -> list:
    """The pictures shown at `times` (seconds after the first frame, in any order): RGB, upright, one for each time; or
    what `view` makes of each, so that large frames are not in memory together.

    That is the last frame that begins at the time or before it; the last of all where the clip is over, the first
    where the time is negative. A frame wanted twice is decoded once and is one object. BadRecord: MISSING, or
    UNREADABLE_VIDEO where a frame wanted cannot be decoded.
    """
    times = np.asarray(times, np.float64)
    if times.ndim != 1 or not np.isfinite(times).all():
        raise ValueError(f"times: expected finite seconds [n], found {times}")
    if isinstance(clip, Frames):
        return _read_pictures(clip, times, view)
    with open_video(clip) as video:
        ticks = [video.ticks(float(time)) for time in times]
        shown = _pictures(video, sorted(set(ticks)), view)
    return [shown[tick] for tick in ticks]


def _relative_times(frames: Frames) -> np.ndarray:
    times = np.asarray(frames.times, np.float64)
    if len(times) != len(frames.pictures) or not len(times):
        found = f"{len(frames.pictures)} and {len(times)}"
        raise BadRecord(UNREADABLE_VIDEO, f"frames: expected pictures and as many times, found {found}")
    if not np.isfinite(times).all() or (np.diff(times) <= 0).any():
        raise BadRecord(UNREADABLE_VIDEO, f"{frames.pictures[0]}: expected ascending times, found {times.tolist()}")
    return times - times[0]


def _read_pictures(frames: Frames, times: np.ndarray, view: Callable[[Image.Image], Any]) -> list:
    places = np.maximum(np.searchsorted(_relative_times(frames), times, side="right") - 1, 0)
    shown = {}
    for place in set(places.tolist()):
        picture = frames.pictures[place]
        try:
            shown[place] = view(load_image(picture))
        except BadRecord as error:
            kind = MISSING if error.kind == MISSING else UNREADABLE_VIDEO
            raise BadRecord(kind, f"{picture}: expected a video's frame, found: {error}") from None
    return [shown[place] for place in places.tolist()]


def _shown(packet) -> bool:
    """Whether the packet brings a frame to be shown: VP8 has some that others only refer to."""
    if not packet.size or packet.is_discard or packet.is_corrupt:  # corrupt: cut off by the file's end
        return False
    return packet.stream.codec_context.name not in ("vp8", "libvpx") or bool(memoryview(packet)[0] & 0x10)


class _Pass:
    """Decodes a clip once, from where its container stands onwards; it is asked for ascending times.

    `times`: when the frames are shown, of a clip without time stamps. `key`: when the keyframe is shown that the
    container stands at; nothing before it is right, and `cannot_start` is set if no frame comes of it.
    """

    def __init__(self, video: VideoFile, times: list[int] | None = None, key: int | None = None):
        self.video, self.times, self.key, self.cannot_start = video, times, key, False
        self.packets = video.packets()
        self.queue: deque[Any] = deque()  # packets read and not decoded
        self.frames: deque[Any] = deque()  # decoded and not yet shown
        self.coming: list[int] = []  # when the packets read are shown
        self.last_dts, self.decoded = -math.inf, 0
        self.ended, self.drained, self.begun = False, False, False
        self.keys: set[int] = set()  # keyframes given to the decoder, by when they are shown
        self.shown: Any = None

    def at(self, ticks: int):
        """The frame shown at `ticks`; the first, where this pass begins later; None where no frame comes."""
        while True:
            due = self.read_ahead(ticks)
            if self.shown is not None and due is not None and self.shown.pts >= due:
                return self.shown
            if not self.frames and not self.decode():
                return self.shown
            if self.frames and self.shown is not None and self.frames[0].pts > ticks:
                return self.shown
            if self.frames:
                self.shown = self.frames.popleft()
                if self.shown.pts > ticks:
                    return self.shown

    def read_ahead(self, ticks: int) -> int | None:
        """When the frame shown at `ticks` begins; None as long as a packet not yet read might be it."""
        while not self.ended and len(self.queue) < LOOKAHEAD and (self.last_dts <= ticks or not self.queue):
            packet = next(self.packets, None)
            if packet is None:
                self.ended = True
                break
            self.queue.append(packet)
            self.last_dts = packet.dts if packet.dts is not None else self.last_dts
            if packet.pts is not None and not packet.is_discard:
                self.coming.append(packet.pts)
        if self.times is not None or not (self.ended or self.last_dts > ticks):
            return None
        if self.shown is not None:
            self.coming = [pts for pts in self.coming if pts >= self.shown.pts]
        return max((pts for pts in self.coming if pts <= ticks), default=None)

    def decode(self) -> bool:
        """Decodes a packet, or after the last one what is left in the decoder; False where nothing is left."""
        if self.queue:
            packet = self.queue.popleft()
            if packet.is_corrupt:
                raise self.video.error(f"expected a whole packet, found it cut off at byte {packet.pos}")
            if packet.is_keyframe:
                self.keys.add(packet.pts)
        elif self.ended and not self.drained:
            packet, self.drained = None, True
        else:
            return False
        for frame in _decode(self.video.decoder, packet):
            if self.times is not None:  # in the order in which they are shown
                frame.pts = self.times[min(self.decoded, len(self.times) - 1)]
            self.decoded += 1
            if frame.pts is None:
                raise self.video.error(f"expected a time stamp on frame {self.decoded} of those decoded, found none")
            if self.key is not None and frame.pts < self.key:  # refers to frames before the keyframe
                continue
            self.cannot_start = self.cannot_start or (self.key is not None and not self.begun and frame.pts != self.key)
            self.begun = True
            if frame.is_corrupt:
                raise self.video.error(
                    f"expected whole frames, found a damaged one at {self.video.seconds(frame.pts)} s"
                )
            self.frames.append(frame)
        return True


def _decode(decoder, packet) -> list:
    """All decoding goes through here. None for `packet` asks for the frames that the decoder still holds."""
    return decoder.decode(packet)


def _pictures(video: VideoFile, wanted: list[int], view: Callable[[Image.Image], Any]) -> dict[int, Any]:
    """What `view` makes of the picture shown at each of the ascending ticks `wanted`."""
    times, keys = None, dict.fromkeys(wanted)
    if video.untimed:
        video.rewind()
        times = sorted(packet.dts for packet in video.packets() if packet.dts is not None)
    else:
        keys = video.seek_keys(wanted)
    shown: dict[int, Any] = {}
    run, last = None, None
    for tick in wanted:
        key = keys[tick]
        # What the decoder has begun is not begun again, and what lies between two groups of frames is never decoded.
        if run is None or (key is not None and key[1] not in run.keys):
            if key is None or not video.seek(key[0]):
                key = None
                video.rewind()
            run = _Pass(video, times, key and key[1])
        frame = run.at(tick)
        # A keyframe that decoding cannot begin from (H.264 that refreshes bit by bit): without seeking
        if run.cannot_start or frame is None:
            video.rewind()
            run, keys = _Pass(video, times), dict.fromkeys(wanted)
            frame = run.at(tick)
        if frame is None:
            raise video.error(f"expected a frame at {video.seconds(tick)} s, found none that can be decoded")
        if frame is not last:
            last, image = frame, view(to_picture(frame, video.aspect))
        shown[tick] = image  # a frame wanted twice is one object
    return shown
