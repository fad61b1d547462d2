"""A video's file, opened with PyAV: which stream is looked at, when its frames are shown, where to begin decoding.

A file comes from anywhere: what it is, its content shows, and no other file is opened: no playlists, no network.
"""

from collections.abc import Iterator
import contextlib
from fractions import Fraction
import math
import time
from typing import BinaryIO

from PIL import Image

from voco_jax.data.container_headers import Headers
from voco_jax.data.container_sizes import what_is_missing
from voco_jax.data.images import FORMATS as PICTURE_FORMATS
from voco_jax.data.images import MAX_SIDE, UNREADABLE
from voco_jax.data.mp4_boxes import check_counts
from voco_jax.data.picture_headers import asks_too_much
from voco_jax.data.records import UNREADABLE_VIDEO, BadRecord, Clip
from voco_jax.data.sources.roots import in_bucket, open_encoded
from voco_jax.errors import UserError
from voco_jax.outages import first_line

# FFmpeg's names of what may be opened (mov is mp4 and 3gp too, matroska webm, mpeg mpg and vob, asf wmv, apng animated
# PNG). All hold their frames themselves. Sound is opened too, to be told for what it is.
CONTAINERS = (
    "mov", "matroska", "avi", "mpegts", "mpeg", "flv", "live_flv", "asf", "ogg", "gif", "apng", "mxf", "nut", "rm",
    "ivf", "obu", "av1", "m4v", "mjpeg", "dv", "yuv4mpegpipe", "wtv", "gxf", "swf", "nsv", "mp3", "wav", "flac", "aac",
)  # fmt: skip
BARE = ("h264", "hevc", "vvc", "h263", "mpegvideo", "vc1")  # a codec's stream alone, without times
# FFmpeg cannot begin in the middle of these: times are lost (mpeg), or what a frame is drawn upon
FROM_START = (*BARE, "mpeg", "gif", "apng")
MAX_PIXELS = 8192 * 4608  # of a frame: a header may claim any size, and memory is taken for it
# Headers of the container that are looked at whenever a file is opened; those of the movie of an mp4, all of which
# FFmpeg reads; and those when all of a file is read through anyway
LOOK, MOVIE_LOOK, THOROUGH_LOOK = 16, 2**14, 2**20
MAX_STREAMS = 200  # FFmpeg begins to decode each of them, to know what it is
INCOMPLETE_HINT = "; --incomplete or config.data.video.incomplete takes what is there"
LOOKAHEAD = 64  # packets read before they are decoded; reordering reaches 16 frames at most


@contextlib.contextmanager
def open_video(clip: Clip, thorough: bool = False) -> Iterator["VideoFile"]:
    """The clip, opened. Errors of PyAV become BadRecord as long as it is open.

    `thorough` looks at all of the container's headers, where the file is not in a bucket, instead of a few.
    """
    try:
        import av
    except ImportError:
        raise UserError(f"{clip}: the package av is not installed; pip install -e '.[video]' brings it") from None
    if int(av.__version__.partition(".")[0]) < 18:  # lmms-eval brings one without index entries
        found = f"found {av.__version__}; pip install 'av>=18,<19' brings it"
        raise UserError(f"{clip}: expected the package av 18 or later, {found}")
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open_encoded(clip))
        try:
            yield VideoFile(clip, file, stack, thorough and not in_bucket(clip))
        except BadRecord:
            raise
        except Exception as error:
            # Python's own errors are of reading the file, and PyAV's of values that no video has, or of streams that
            # begin later. A bucket's are any.
            kinds = av.FFmpegError | OSError | ValueError | OverflowError | IndexError
            if not isinstance(error, kinds) and not in_bucket(clip):
                raise
            found = _picture_format(file) or f": {getattr(error, 'strerror', None) or first_line(error)}"
            raise BadRecord(UNREADABLE_VIDEO, f"{clip}: expected a video, found{found}") from None


def _picture_format(file: BinaryIO) -> str:
    """' a picture (PNG)' for a picture, else ''."""
    try:
        if asks_too_much(file, whole=False):
            return ""
        with Image.open(file, formats=PICTURE_FORMATS) as image:
            return f" a picture ({image.format})"
    except (Image.DecompressionBombError, *UNREADABLE):
        return ""


class VideoFile:
    """An opened clip and its video stream. Ticks are the stream's unit of time, and absolute, as in the file."""

    def __init__(self, clip: Clip, file: BinaryIO, stack: contextlib.ExitStack, thorough: bool = False):
        self.clip, self.file, self.stack = clip, file, stack
        # Of an mp4 whose header would take memory beyond measure
        if wrong := check_counts(Headers(file, THOROUGH_LOOK if thorough else MOVIE_LOOK), fragments=thorough):
            raise self.error(wrong)
        self.open()
        self.tick: Fraction = self.stream.time_base
        # A plain mp4 has a table of all its frames; one in fragments does not, and counts none in its header.
        self.indexed = self.is_a("mov") and self.stream.frames > 0
        # avi has no presentation times, and asf's are in doubt: what FFmpeg makes up for them is wrong where frames are
        # reordered.
        self.untimed = self.is_a(*BARE) or (self.is_a("avi", "asf") and self.stream.codec_context.has_b_frames)
        if self.indexed:
            end = max((entry.pos + entry.size for entry in self.stream.index_entries), default=0)
            if end > self.container.size:
                self.not_whole(f"expected {end} bytes or more, found {self.container.size}")
                self.indexed = False  # of what is not there too
        if missing := what_is_missing(self.file, self.container.format.name, THOROUGH_LOOK if thorough else LOOK):
            self.not_whole(missing)
        first: list[int] = []  # time stamps of the first packet
        starts: list[int] = []
        for packet in self.packets():
            first = first or [t for t in (packet.pts, packet.dts) if t is not None]
            start = packet.dts if self.untimed else packet.pts
            if start is not None and not packet.is_discard:
                starts.append(start)
            # what follows is shown after it is decoded, so not before this one's dts
            if starts and (len(starts) > LOOKAHEAD or packet.dts is not None and packet.dts > min(starts)):
                break
        if not starts:
            raise self.error("expected frames with time stamps, found none")
        self.origin = min(starts)
        self.start = min(first)

    def open(self):
        import av

        # Of a file object no other file is looked for; playlists and the like are refused before they are parsed.
        options = {"format_whitelist": ",".join((*CONTAINERS, *BARE)), "protocol_whitelist": "none"}
        options["max_streams"] = str(MAX_STREAMS)
        self.file.seek(0)
        # FFmpeg decodes the first frames to learn what they are: this limit holds for those decoders too
        decoders = {"max_pixels": str(MAX_PIXELS)}
        self.container = self.stack.enter_context(
            av.open(self.file, container_options=options, options=decoders, metadata_errors="replace")
        )
        cover = av.stream.Disposition.attached_pic
        streams = [stream for stream in self.container.streams.video if not stream.disposition & cover]
        if not streams:
            raise self.error(
                f"expected a video, found {'sound alone' if self.container.streams.audio else 'no pictures'}"
            )
        best = self.container.streams.best("video")
        self.stream = best if best in streams else streams[0]
        if self.is_a("mov") and self.container.metadata.get("major_brand") in ("avif", "heic", "heix", "mif1"):
            raise self.error("expected a video, found a picture (AVIF or HEIC)")
        codec = self.stream.codec_context
        if codec is None:
            raise self.error("expected a video codec that FFmpeg decodes, found another")
        if self.stream.metadata.get("alpha_mode") == "1" and codec.name in ("vp8", "vp9"):  # FFmpeg's own drops it
            codec = av.CodecContext.create({"vp8": "libvpx", "vp9": "libvpx-vp9"}[codec.name], "r")
        # Pixels need not be square: how wide the frames are shown
        self.aspect = self.stream.sample_aspect_ratio or Fraction(1)
        shown = round(self.stream.width * self.aspect), self.stream.height
        for width, height in ((self.stream.width, self.stream.height), shown):
            if width * height > MAX_PIXELS:
                raise self.error(f"expected frames of {MAX_PIXELS} pixels at most, found {width} x {height}")
            if max(width, height) > MAX_SIDE:
                raise self.error(f"expected sides of {MAX_SIDE} pixels at most, found {width} x {height}")
        codec.thread_count, codec.options = 1, {"max_pixels": str(MAX_PIXELS)}
        self.decoder = codec
        for stream in self.container.streams:
            if stream.index != self.stream.index:
                stream.discard = av.stream.Discard.all

    def is_a(self, *formats: str) -> bool:
        """Whether the file is one of FFmpeg's `formats`."""
        return not set(formats).isdisjoint(self.container.format.name.split(","))

    def error(self, message: str) -> BadRecord:
        return BadRecord(UNREADABLE_VIDEO, f"{self.clip}: {message}")

    def not_whole(self, message: str) -> None:
        """BadRecord, unless incomplete clips are wanted."""
        if not self.clip.incomplete:
            raise self.error(f"{message}: the file is cut off or damaged{INCOMPLETE_HINT}")

    def packets(self) -> Iterator:
        """The stream's packets from where the container stands, without the empty one at the end."""
        packets = (packet for packet in self._demuxed() if packet.size)
        return self._counted(packets) if self.is_a(*BARE) else packets

    def _demuxed(self) -> Iterator:
        import av

        try:
            for packet in self.container.demux(self.stream):
                if time.monotonic() > self.clip.until:
                    raise self.error("expected a clip that is decoded in the time allowed, found one that takes longer")
                yield packet
        except av.FFmpegError:
            if not self.clip.incomplete:
                raise

    def _counted(self, packets: Iterator) -> Iterator:
        """Packets without times: they follow each other at the stream's rate."""
        for i, packet in enumerate(packets):
            packet.pts = packet.dts = i * self.step
            packet.duration = self.step
            yield packet

    @property
    def step(self) -> int:
        """Ticks of a frame at the stream's rate."""
        return round(1 / (self.stream.guessed_rate or 25) / self.stream.time_base)

    def ticks(self, seconds: float) -> int:
        """The last tick at `seconds` or before; a frame's own time in float64 is that frame's tick."""
        seconds = min(max(seconds, 0.0), 1e9)
        ticks = math.floor(Fraction(seconds) / self.tick)
        return self.origin + ticks + (float((ticks + 1) * self.tick) <= seconds)

    def seconds(self, ticks: int) -> float:
        return float((ticks - self.origin) * self.tick)

    def seek(self, ticks: int) -> bool:
        """To the last keyframe that the container finds at `ticks` or before; False where it finds none."""
        import av

        if self.is_a(*FROM_START):
            return False
        try:
            self.container.seek(ticks, stream=self.stream)
        except av.FFmpegError:
            return False
        return True

    def rewind(self):
        """To the clip's first packet; a file without an index is opened again."""
        if not self.indexed or not self.seek(self.start):
            self.container.close()
            self.open()

    def seek_key(self, ticks: int) -> tuple[int, int] | None:
        """Of the last keyframe shown at `ticks` or before: what to seek to, and when it is shown.

        None where the clip is to be read from its start. Leaves the container anywhere.
        """
        target = ticks
        for _ in range(4):  # a sound file takes two; a damaged one could take as many as it has ticks
            if target <= self.start or not self.seek(target):
                break
            key = next((packet for packet in self.packets() if packet.is_keyframe), None)
            if key is not None and key.pts is not None and key.pts <= ticks:
                return (target, key.pts) if key.pts > self.origin else None
            stamps = [t for t in (key.pts, key.dts) if t is not None] if key is not None else []
            target = min([target, *stamps]) - 1  # mp4 seeks by decoding times, which are earlier
        return None

    def seek_keys(self, wanted: list[int]) -> dict[int, tuple[int, int] | None]:
        """`seek_key` of ascending ticks; where there is an index, it seeks once for those of one group of frames."""
        keys: dict[int, tuple[int, int] | None] = {}
        before, group = 0, -1
        for ticks in wanted:
            entry = self.stream.index_entries.search_timestamp(ticks) if self.indexed else -1
            # what the first try found for an earlier time, or the very first group: found again for this one
            known = keys.get(before)
            if entry >= 0 and entry == group and (known[0] == before if known else entry == 0):
                keys[ticks] = known
            else:
                keys[ticks], group, before = self.seek_key(ticks), entry, ticks
        return keys

    def last_group(self) -> list:
        """The packets from the last keyframe on, of a clip with an index."""
        if not self.seek(max(entry.timestamp for entry in self.stream.index_entries)):
            self.rewind()
        return list(self.packets())
