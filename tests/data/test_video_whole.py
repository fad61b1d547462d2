"""Whole videos that look as if they were cut off, or as if their headers counted too much: they are read."""

from fractions import Fraction
from pathlib import Path
import struct

import av
import numpy as np
from PIL import Image
import pytest

from tests.data.test_video import FAST_VP9, KINDS, bad, write_clip, write_gif
from voco_jax.data import container_headers, mp4_boxes, video_file
from voco_jax.data.records import Clip
from voco_jax.data.video import VideoInfo, probe, read_frames

WHOLE = VideoInfo(2.4, 60)
LIVE = {"codec": "libvpx-vp9", "settings": FAST_VP9, "container_options": {"live": "1"}}


def written(file: Path, **kw) -> bytes:
    return write_clip(file, **kw).file.read_bytes()


def read(data: bytes) -> VideoInfo:
    clip = Clip(data=data, name="clip")
    assert len(read_frames(clip, [0.1])) == 1
    return probe(clip)


# ---- What stands behind the end ------------------------------------------------------------------------------------

NULL_PACKETS = 5 * (b"G\x1f\xff\x10" + bytes(184))
BEHIND = {
    "null packets": ({"format": "mpegts"}, NULL_PACKETS),
    "a part of a packet": ({"format": "mpegts"}, b"G\x01\x00\x10" + bytes(90)),
    "zeros behind the end code": ({"format": "mpeg", "codec": "mpeg2video"}, b"\0\0\1\xb9" + bytes(2000)),
    "mkv and zeros": ({"format": "matroska"}, bytes(5000)),
    "mkv and text": ({"format": "matroska"}, b"<html>text</html>"),
    "flv and a new line": ({"format": "flv"}, b"\n"),
    "flv and zeros": ({"format": "flv"}, bytes(5000)),
    "fragments and a new line": (KINDS["fragments.mp4"] | {"format": "mp4"}, b"\n"),
    "fragments and text": (KINDS["fragments.mp4"] | {"format": "mp4"}, b"<html>text</html>"),
    "mp4 and zeros": ({"format": "mp4"}, bytes(5000)),
    "avi and zeros": ({"format": "avi", "codec": "mpeg4"}, bytes(5000)),
    "avi and noise": ({"format": "avi", "codec": "mpeg4"}, np.random.default_rng(0).bytes(5000)),
}


@pytest.mark.parametrize("name", BEHIND)
def test_what_stands_behind_the_end(tmp_path, name):
    kind, behind = BEHIND[name]
    assert read(written(tmp_path / "clip", **kind) + behind) == WHOLE


@pytest.mark.parametrize("name", ["live.webm", "gif", "flv", "mkv", "avi"])
def test_zeros_before_the_end(tmp_path, name):
    """A copy that made room first, and then was interrupted."""
    kind = LIVE | {"format": "webm"} if name == "live.webm" else {"format": name.replace("mkv", "matroska")}
    kind |= {"codec": "mpeg4"} if name == "avi" else {}
    data = write_gif(tmp_path / "a.gif").file.read_bytes() if name == "gif" else written(tmp_path / "clip", **kind)
    half = Clip(data=data[: len(data) // 2] + bytes(len(data) - len(data) // 2), name="clip")
    assert "clip: expected " in bad(half, call=probe)


def test_animations_without_their_last_byte(tmp_path):
    data = write_gif(tmp_path / "clip.gif").file.read_bytes()
    assert data.endswith(b"\0;")
    for odd in (data[:-1], data[:-1] + b"\0;", data[:-1] + b"\0\0\0;" + bytes(100)):
        assert read(odd) == WHOLE
    for cut in (data[:-2], data[: len(data) // 2], data[:-1] + bytes(100)):
        assert "expected the end of the pictures" in bad(Clip(data=cut, name="clip"), call=probe)


# ---- Recordings that were stopped, or joined -----------------------------------------------------------------------


def test_live_recordings_of_ogg(tmp_path):
    """No page is the last one of its stream; but the last one is whole."""
    data = written(tmp_path / "clip.ogv", codec="libvpx")
    last = data.rindex(b"OggS")
    assert 40 < read(data[:last]).num_frames < 60
    assert "expected " in bad(Clip(data=data[: last - 1], name="clip"), call=probe)
    assert "by its checksum" in bad(Clip(data=data[: last - 9] + b"new bytes", name="clip"), call=probe)


def test_live_recordings_that_were_joined(tmp_path):
    data = written(tmp_path / "clip.webm", **LIVE)
    assert read(data) == WHOLE
    assert read(data + data).num_frames >= 60
    cut = data + data[:-5] + bytes(5)
    assert "expected " in bad(Clip(data=cut[: -len(data) // 2] + bytes(len(data) // 2), name="clip"), call=probe)


def test_long_frames_of_flv(tmp_path):
    """The duration that is declared has the last frame in it."""
    with av.open(str(tmp_path / "clip.flv"), "w") as container:
        stream = container.add_stream("flv", rate=Fraction(1, 2))
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(6):
            pixels = np.full((48, 64, 3), 40 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    assert read((tmp_path / "clip.flv").read_bytes()).num_frames == 6


def test_sizes_of_avi_that_are_not_right(tmp_path):
    data = bytearray(written(tmp_path / "clip.avi", codec="mpeg4"))
    movi = data.index(b"movi") - 8
    for at, size in ((4, 0), (movi + 4, 0), (4, len(data) + 100)):  # a recorder killed; one that counts otherwise
        odd = data.copy()
        struct.pack_into("<I", odd, at, size)
        assert read(bytes(odd)) == WHOLE
    struct.pack_into("<I", data, 4, len(data) + 100)
    cut = Clip(data=bytes(data[: data.rindex(b"idx1") - 4]), name="clip")
    assert "clip: expected " in bad(cut) and "clip: expected " in bad(cut, call=probe)


def test_zeros_in_place_of_the_second_part_of_an_avi(tmp_path):
    """The header of a long one counts the frames of all its parts."""
    data = written(tmp_path / "clip.avi", codec="mpeg4")
    first = data.index(b"avih") + 24
    odd = data[:first] + struct.pack("<I", 60) + data[first + 4 :]
    at = odd.index(b"JUNK")
    for every, told in ((60, False), (90, True)):
        dmlh = odd[:at] + odd[at : at + 8] + struct.pack("<4sII", b"dmlh", 4, every) + odd[at + 20 :] + bytes(5000)
        if told:
            assert "expected another part" in bad(Clip(data=dmlh, name="clip"))
        else:
            assert read(dmlh) == WHOLE


@pytest.mark.parametrize(("codec", "pix_fmt"), [("r210", "gbrp10le"), ("r10k", "gbrp10le"), ("rawvideo", "rgb24")])
def test_black_frames_without_compression(tmp_path, codec, pix_fmt):
    with av.open(str(tmp_path / "clip.mov"), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, pix_fmt
        for _ in range(3):
            frame = av.VideoFrame(64, 48, pix_fmt)
            for plane in frame.planes:
                plane.update(bytes(plane.buffer_size))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert read((tmp_path / "clip.mov").read_bytes()) == VideoInfo(0.12, 3)


# ---- What an mp4's header counts -----------------------------------------------------------------------------------


def test_titles_that_hold_names_of_boxes(tmp_path):
    for name, options in (("plain.mp4", {}), ("fragments.mp4", KINDS["fragments.mp4"]["container_options"])):
        with av.open(str(tmp_path / name), "w", container_options=options) as container:
            container.metadata.update(title="An elephant trunk", comment="truncated, stsz, cmvd: all of it " * 3)
            stream = container.add_stream("mpeg4", rate=25)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            container.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (64, 48)))))
            container.mux(stream.encode())
        data = (tmp_path / name).read_bytes()
        assert b"trunk" in data
        assert read(data).num_frames == 1
        xmp = struct.pack(">I4s", 8 + 16 + 12, b"uuid") + bytes(16) + b"trunstszcmvd"
        assert read(data + xmp).num_frames == 1


def test_sound_that_counts_samples(tmp_path):
    """Old QuickTime files: a size of 1, and as many as there are samples of PCM, whatever they are packed into."""
    file = tmp_path / "clip.mov"
    with av.open(str(file), "w") as container:
        pictures, sound = container.add_stream("mpeg4", rate=5), container.add_stream("adpcm_ima_qt", rate=44100)
        pictures.width, pictures.height, pictures.pix_fmt = 16, 16, "yuv420p"
        sound.layout = "mono"
        for _ in range(20):
            container.mux(pictures.encode(av.VideoFrame.from_image(Image.new("RGB", (16, 16)))))
        for i in range(2000):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 64), np.int16), format="s16p", layout="mono")
            frame.sample_rate, frame.pts = 44100, 64 * i
            container.mux(sound.encode(frame))
        container.mux(pictures.encode())
        container.mux(sound.encode())
    data = bytearray(file.read_bytes())
    track = data.index(b"soun")
    stts, stsz, stsc = (data.index(kind, track) for kind in (b"stts", b"stsz", b"stsc"))
    samples = 64 * struct.unpack_from(">I", data, stsz + 12)[0]
    assert samples > len(data)
    struct.pack_into(">4I", data, stts + 4, 0, 1, samples, 1)
    struct.pack_into(">3I", data, stsz + 4, 0, 1, samples)
    for entry in range(stsc + 12, stsc + 12 + 12 * struct.unpack_from(">I", data, stsc + 8)[0], 12):
        struct.pack_into(">I", data, entry + 4, 64 * struct.unpack_from(">I", data, entry + 4)[0])
    assert read(bytes(data)) == VideoInfo(4.0, 20)
    struct.pack_into(">4I", data, stts + 4, 0, 1, samples, 2)  # of which FFmpeg would make a packet each
    assert f"found {samples} frames of 1" in bad(Clip(data=bytes(data), name="clip"))


@pytest.mark.parametrize("begin", [b"RIFF\x10\x20\x30\x40AVI ", b"FLV\1\5\0\0\0\x09", b"OggS\0\2\0\0", b"G@\0\x10aaaa"])
def test_files_of_other_kinds_hold_no_boxes(tmp_path, begin):
    """What their first bytes would be as a size leads anywhere."""
    with (tmp_path / "clip").open("w+b") as file:  # with a hole of a gigabyte
        file.write(begin)
        file.seek(int.from_bytes(begin[:4]))
        file.write(struct.pack(">I4s", 40, b"free") + b"trun" + b"\xff" * 28)
        assert mp4_boxes.check_counts(container_headers.Headers(file, 100)) == ""


def test_more_fragments_than_are_looked_at(tmp_path, monkeypatch):
    """What was not looked at is taken."""
    options = {"container_options": {"movflags": "frag_every_frame+empty_moov+default_base_moof"}}
    data = written(tmp_path / "clip.mp4", **options)
    monkeypatch.setattr(video_file, "THOROUGH_LOOK", 100)
    assert data.count(b"moof") > 50 and read(data) == WHOLE


# ---- How much is read ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.mkv", "a.avi", "a.flv", "a.gif", "fragments.mp4", "a.ts", "a.ogv"])
def test_few_headers_are_read_to_open_a_clip(tmp_path, monkeypatch, name):
    """All of them only where the clip is probed, once."""
    kinds = {"a.avi": {"codec": "mpeg4"}, "a.ogv": {"codec": "libvpx"}, "a.ts": {"format": "mpegts"}}
    clip = write_gif(tmp_path / name) if name == "a.gif" else None
    clip = clip or write_clip(tmp_path / name, **(KINDS | kinds).get(name, {}))
    reads, read_headers = [], container_headers.Headers.read
    monkeypatch.setattr(container_headers.Headers, "read", lambda *args: reads.append(args) or read_headers(*args))
    read_frames(clip, [1])
    opened = len(reads)
    assert 0 < opened <= 64
    probe(clip)
    assert len(reads) - opened > 60 or name in ("a.ts", "a.ogv")
    monkeypatch.setattr(video_file, "in_bucket", lambda clip: True)
    probed = len(reads)
    probe(clip)
    assert len(reads) - probed <= 64
