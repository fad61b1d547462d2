"""Clips that are cut off, have zeros in place of their end, or are damaged: `voco_jax/data/video.py`."""

from pathlib import Path

import av
import numpy as np
from PIL import Image

from tests.fuzz.harness import Target
from tests.fuzz.mutations import damage
from voco_jax.data.records import Clip
from voco_jax.data.video import FrameSampling, probe, read_frames, sample_times

_FRAGMENTS = "frag_keyframe+empty_moov+default_base_moof"
_VP9 = {"deadline": "realtime", "cpu-used": "8"}
# By name: how many of ten cases, FFmpeg's container, codec, options of the container
KINDS = {
    "mp4": (2, "mp4", "libx264", {}),
    "early.mp4": (2, "mp4", "libx264", {"movflags": "faststart"}),
    "fragments.mp4": (3, "mp4", "libx264", {"movflags": _FRAGMENTS}),
    "first.mp4": (1, "mp4", "libx264", {"movflags": "frag_keyframe"}),
    "finished.mp4": (0.5, "mp4", "libx264", {"movflags": "hybrid_fragmented"}),
    "dash.mp4": (1, "mp4", "libx264", {"movflags": "dash+frag_keyframe"}),
    "mkv": (3, "matroska", "libx264", {}),
    "webm": (3, "webm", "libvpx-vp9", {}),
    "avi": (3, "avi", "mpeg4", {}),
    "live.webm": (1, "webm", "libvpx-vp9", {"live": "1"}),
    "ts": (1, "mpegts", "libx264", {}),
    "flv": (1, "flv", "libx264", {}),
    "wmv": (0.3, "asf", "wmv2", {}),
    "ogv": (0.3, "ogg", "libvpx", {}),
    "mpg": (0.3, "mpeg", "mpeg2video", {}),
    "mxf": (0.3, "mxf", "mpeg2video", {}),
    "swf": (0.3, "swf", "flv", {}),
    "rm": (0.3, "rm", "rv10", {}),
    "ivf": (0.3, "ivf", "libvpx", {}),
    "y4m": (0.3, "yuv4mpegpipe", "wrapped_avframe", {}),
    "gif": (0.5, "", "GIF", {}),
    "png": (0.3, "", "PNG", {}),
}
FRAMES = 48


class Clips(Target):
    count = 2000

    def make(self, directory: Path) -> None:
        self.sound = {name: _clip(directory / name, *options) for name, (_, *options) in KINDS.items()}
        self.infos = {name: probe(Clip(data=data, name=name)) for name, data in self.sound.items()}
        assert all(info.num_frames == FRAMES for info in self.infos.values()), self.infos
        weights = np.array([weight for weight, *_ in KINDS.values()])
        self.weights = weights / weights.sum()

    def case(self, rng: np.random.Generator, directory: Path):
        name = str(rng.choice(list(KINDS), p=self.weights))
        data = self.sound[name]
        way = rng.choice(["cut", "zeros", "damage"], p=[0.5, 0.15, 0.35])
        if way == "damage":
            what, data = damage(rng, data)
        else:
            at = int(rng.integers(len(data)))
            what = f"{way} from {at} on"
            data = data[:at] + (bytes(len(data) - at) if way == "zeros" else b"")
        # An end that is whole in itself, in a container that says nothing of its length; or packets filled with zeros
        hidden = (way == "cut" and _ends_whole(name, self.sound[name], len(data))) or (way, name) == ("zeros", "wmv")
        incomplete = bool(rng.random() < 0.1)

        def read() -> str | None:
            clip = Clip(data=data, name=name, incomplete=incomplete)
            info = probe(clip)
            times = sample_times(info, FrameSampling(4))
            assert len(read_frames(clip, times)) == len(times)
            if way == "damage" or hidden or incomplete or info == self.infos[name]:
                return None
            return f"{info.num_frames} frames, {info.duration} s; whole: {self.infos[name]}"

        return f"{name}: {what}" + " (cannot be told)" * hidden + " (taken)" * incomplete, read


def _clip(path: Path, container: str, codec: str, options: dict) -> bytes:
    pictures = [Image.fromarray(_pixels(i)) for i in range(FRAMES)]
    if not container:
        pictures[0].save(path, codec, save_all=True, append_images=pictures[1:], duration=40)
        return path.read_bytes()
    with av.open(str(path), "w", format=container, container_options=options) as file:
        stream = file.add_stream(codec, rate=25, options=_VP9 if codec == "libvpx-vp9" else {})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.gop_size = 8
        for picture in pictures:
            file.mux(stream.encode(av.VideoFrame.from_image(picture)))
        file.mux(stream.encode())
    return path.read_bytes()


def _pixels(i: int) -> np.ndarray:
    y, x = np.mgrid[:48, :64]
    return np.stack([4 * x + i, 5 * y - i, x * y // 16 + 3 * i], axis=-1).astype(np.uint8)


def _ends_whole(name: str, whole: bytes, size: int) -> bool:
    """Whether nothing in the first `size` bytes says that there were more."""
    if name in ("fragments.mp4", "first.mp4"):  # their index is at the end: cut behind a box of data they are a file
        kind, at = b"", 0
        while at < size:
            kind, at = whole[at + 4 : at + 8], at + int.from_bytes(whole[at : at + 4])
        return at == size and kind == b"mdat"
    if name == "ogv":  # between two pages, as a live recording ends
        return whole[size : size + 4] == b"OggS"
    if name == "gif":  # between two blocks
        return whole[size - 1 : size] == b"\0" and whole[size : size + 1] in (b"!", b",", b";")
    if name == "y4m":
        return whole[size : size + 6] == b"FRAME\n"
    return name == "ts"  # a recording stops anywhere
