"""Clips of every kind that people have: any container, whatever it is called; and the picture that a player shows."""

from fractions import Fraction
import io
import itertools
from pathlib import Path

import av
import numpy as np
from PIL import Image
import pytest

from tests.data.test_video import FAST_VP9, bad, numbers, write_clip
from voco_jax.data import video_file
from voco_jax.data.hdr import HLG, PQ
from voco_jax.data.media import ANIMATION, NEITHER, PICTURE, VIDEO, is_video, kind_of
from voco_jax.data.records import Clip
from voco_jax.data.video import VideoInfo, probe, read_frames

M2TS = {"mpegts_m2ts_mode": "1"}
KINDS = {
    "ts": {"format": "mpegts", "b_frames": 2},
    "mpeg2.ts": {"format": "mpegts", "codec": "mpeg2video", "b_frames": 2},
    "m2ts": {"format": "mpegts", "b_frames": 2, "container_options": M2TS},
    "flv": {"format": "flv", "b_frames": 2},
    "old.flv": {"format": "flv", "codec": "flv"},
    "mpeg": {"format": "mpeg", "codec": "mpeg1video", "b_frames": 2},
    "mpg": {"format": "mpeg", "codec": "mpeg2video", "b_frames": 2},
    "vob": {"format": "vob", "codec": "mpeg2video", "b_frames": 2},
    "wmv": {"format": "asf", "codec": "wmv2"},
    "h264.asf": {"format": "asf", "b_frames": 2},
    "3gp": {"format": "3gp", "codec": "mpeg4"},
    "m4v": {"format": "mp4", "b_frames": 2},
    "ogv": {"format": "ogg", "codec": "libvpx"},
    "mxf": {"format": "mxf", "codec": "mpeg2video", "b_frames": 2},
    "nut": {"format": "nut", "b_frames": 2},
    "rm": {"format": "rm", "codec": "rv10"},
    "ivf": {"format": "ivf", "codec": "libvpx-vp9", "settings": FAST_VP9},
    "h264": {"format": "h264", "b_frames": 2},
    "m1v": {"format": "mpeg1video", "codec": "mpeg1video", "b_frames": 2},
    "m2v": {"format": "mpeg2video", "codec": "mpeg2video", "b_frames": 2},
    "mjpeg": {"format": "mjpeg", "codec": "mjpeg"},
    "ffv1.mkv": {"format": "matroska", "codec": "ffv1"},
}


@pytest.mark.parametrize("name", KINDS)
def test_any_container_by_its_content(tmp_path, name):
    clip = write_clip(tmp_path / "clip.dat", **KINDS[name])
    assert probe(clip) == VideoInfo(2.4, 60)
    assert numbers(clip, (np.arange(60) + 0.5) / 25) == list(range(60))
    for i in range(3, 60, 14):  # each alone: found from any keyframe
        assert numbers(clip, [i / 25 + 0.01]) == [i]
    assert name == "mjpeg" or kind_of(clip.file) == VIDEO  # JPEGs one after the other begin as a picture does


@pytest.mark.parametrize("name", ["ts", "flv", "mpg", "wmv", "ogv", "h264", "m4v"])
def test_a_single_frame(tmp_path, name):
    clip = write_clip(tmp_path / "clip", frames=1, **KINDS[name])
    info = probe(clip)
    assert info.num_frames == 1 and 0 <= info.duration < 0.1
    assert [image.size for image in read_frames(clip, [0, 5])] == [(64, 48)] * 2


def write_animation(file: Path, durations, **settings) -> Clip:
    """Bars as `write_clip` draws them: the i-th picture shows i + 1."""
    pictures = []
    for i in range(1, len(durations) + 1):
        bars = np.array([255 * (i >> bit & 1) for bit in range(8)], np.uint8)
        pictures.append(Image.fromarray(np.broadcast_to(np.repeat(bars, 8), (48, 64)).copy()).convert("RGB"))
    pictures[0].save(file, save_all=True, append_images=pictures[1:], duration=durations, loop=0, **settings)
    return Clip(file)


@pytest.mark.parametrize(("name", "picture_format"), [("a.gif", "GIF"), ("a.png", "PNG"), ("a.jpg", "GIF")])
def test_animations_are_clips(tmp_path, name, picture_format):
    clip = write_animation(tmp_path / name, [200, 500, 100, 200], format=picture_format)
    assert probe(clip) == VideoInfo(1.0, 4)
    assert numbers(clip, [0, 0.19, 0.2, 0.69, 0.7, 0.85, 9]) == [1, 1, 2, 2, 3, 4, 4]
    assert numbers(clip, [0.85]) == [4]  # drawn upon all before it
    assert kind_of(clip.file) == ANIMATION and is_video(clip.file)


def test_pictures_are_pictures(tmp_path):
    for name in ("a.png", "a.jpg", "a.webp", "a.bmp", "a.tiff", "a.avif", "clip.mp4"):
        Image.new("RGB", (32, 24), "red").save(
            tmp_path / name, name.split(".")[1].replace("mp4", "png").replace("jpg", "jpeg")
        )
        assert kind_of(tmp_path / name) == PICTURE and not is_video(tmp_path / name)
        assert f"{name}: expected a video, found a picture (" in bad(Clip(tmp_path / name))
    one = write_animation(tmp_path / "one.gif", [100])  # among clips that are GIFs
    assert kind_of(one.file) == PICTURE and numbers(one, [0]) == [1]


def test_what_is_neither_is_what_its_name_says(tmp_path):
    for name, video in (("a.mp4", True), ("a.gif", False), ("a.png", False), ("a.txt", False), ("a", False)):
        (tmp_path / name).write_bytes(b"neither")
        assert kind_of(tmp_path / name) == NEITHER and is_video(tmp_path / name) == video
    assert kind_of(tmp_path / "none.mp4") == NEITHER


def test_a_cover_before_the_video(tmp_path):
    file = tmp_path / "clip.mp4"
    with av.open(str(file), "w") as container:
        cover, pictures = container.add_stream("mjpeg"), container.add_stream("libx264", rate=25)
        cover.width, cover.height, cover.pix_fmt, cover.disposition = (
            64,
            48,
            "yuvj420p",
            av.stream.Disposition.attached_pic,
        )
        pictures.width, pictures.height, pictures.pix_fmt = 32, 24, "yuv420p"
        container.mux(cover.encode(av.VideoFrame(64, 48, "yuvj420p")))
        for i in range(5):
            frame = av.VideoFrame.from_ndarray(np.full((24, 32, 3), 50 * i, np.uint8), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 25)
            container.mux(pictures.encode(frame))
        container.mux(pictures.encode())
    assert probe(Clip(file)).num_frames == 5
    assert [image.size for image in read_frames(Clip(file), [0.1])] == [(32, 24)]


# ---- Shape -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "aspect", "turn", "size"),
    [
        ("clip.mp4", "16/15", None, (128, 90)),
        ("clip.mp4", "8/9", None, (107, 90)),
        ("clip.mp4", "16/15", 90, (90, 128)),
        ("clip.ts", "4/3", None, (160, 90)),
        ("clip.mkv", "4/3", None, (160, 90)),
        ("clip.avi", "1", None, (120, 90)),
    ],
)
def test_pixels_that_are_not_square(tmp_path, name, aspect, turn, size):
    """A disc of a picture squeezed to 120 x 90 pixels is one again."""
    aspect = Fraction(aspect)
    y, x = np.mgrid[:90, :120]
    disc = ((x - 59.5) * float(aspect)) ** 2 + (y - 44.5) ** 2 < 40**2
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.options = 120, 90, "yuv420p", {"qp": "0"}
        stream.codec_context.sample_aspect_ratio = aspect
        if turn is not None:
            stream.set_display_rotation(turn)
        for _ in range(5):
            pixels = np.repeat(disc[..., None].astype(np.uint8) * 255, 3, axis=2)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    image = read_frames(Clip(tmp_path / name), [0])[0]
    white = np.argwhere(np.asarray(image)[..., 1] > 127)
    assert image.size == size
    assert np.ptp(white, axis=0) == pytest.approx([79, 79], abs=2)


def test_frames_that_are_too_wide_when_shown(tmp_path, monkeypatch):
    test_pixels_that_are_not_square(tmp_path, "clip.mp4", "16/15", None, (128, 90))
    monkeypatch.setattr(video_file, "MAX_SIDE", 127)
    assert "expected sides of 127 pixels at most, found 128 x 90" in bad(Clip(tmp_path / "clip.mp4"))


# ---- Colours -----------------------------------------------------------------------------------------------------

LUMA = {"601": (0.299, 0.114), "709": (0.2126, 0.0722), "2020": (0.2627, 0.0593), "240": (0.212, 0.087)}  # of R and B


def to_rgb(y: float, u: float, v: float, matrix: str, full: bool) -> np.ndarray:
    """Grey levels of 8-bit Y'CbCr, by the definition: [3] of 0 … 255."""
    kr, kb = LUMA[matrix]
    y, u, v = (
        (y / 255, (u - 128) / 255, (v - 128) / 255) if full else ((y - 16) / 219, (u - 128) / 224, (v - 128) / 224)
    )
    r, b = y + 2 * (1 - kr) * v, y + 2 * (1 - kb) * u
    return np.clip([r, (y - kr * r - kb * b) / (1 - kr - kb), b], 0, 1) * 255


def flat_clip(file, planes, pix_fmt="yuv420p", codec="libx264", size=(64, 48), settings=None, **tags) -> Clip:
    """Two frames of one colour; `planes` are the values of each, in whatever bits the format has."""
    with av.open(file if isinstance(file, io.BytesIO) else str(file), "w", format="matroska") as container:
        stream = container.add_stream(codec, rate=10)
        (stream.width, stream.height), stream.pix_fmt = size, pix_fmt
        stream.options = settings or ({"qp": "0"} if codec == "libx264" else {})
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        for i in range(2):
            frame = av.VideoFrame(*size, pix_fmt)
            for plane, value in zip(frame.planes, planes, strict=True):
                dtype = np.uint16 if frame.format.components[0].bits > 8 else np.uint8
                values = np.resize(np.asarray(value, dtype), plane.line_size // dtype().itemsize)
                plane.update(np.tile(values, plane.height).tobytes())
            frame.pts, frame.time_base = i, Fraction(1, 10)
            frame.color_range = tags.get("color_range", 0)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return Clip(data=file.getvalue(), name="memory") if isinstance(file, io.BytesIO) else Clip(file)


def color_of(clip: Clip) -> np.ndarray:
    pixels = np.asarray(read_frames(clip, [0])[0], float)
    return np.median(pixels.reshape(-1, 3), axis=0)


@pytest.mark.parametrize("size", [(64, 48), (1280, 720)])
def test_colours_by_matrix_and_range(size):
    """Without a matrix BT.601, whatever the size, and limited range, as FFmpeg has it."""
    matrices = ((None, "601"), (2, "601"), (1, "709"), (5, "601"), (6, "601"), (7, "240"), (9, "2020"))
    for (tag, matrix), color_range in itertools.product(matrices, (0, 1, 2)):
        tags = {"color_range": color_range} | ({} if tag is None else {"colorspace": tag})
        clip = flat_clip(io.BytesIO(), (120, 90, 170), size=size, **tags)
        np.testing.assert_allclose(
            color_of(clip), to_rgb(120, 90, 170, matrix, color_range == 2), atol=2, err_msg=str(tags)
        )


@pytest.mark.parametrize(
    ("pix_fmt", "codec", "scale"),
    [
        ("yuv422p", "libx264", 1), ("yuv444p", "libx264", 1), ("yuv420p10le", "libx264", 4),
        ("yuv422p10le", "libx264", 4), ("yuv444p10le", "libx264", 4), ("yuv411p", "ffv1", 1), ("yuv410p", "ffv1", 1),
        ("yuv440p", "ffv1", 1), ("yuv420p12le", "ffv1", 16), ("yuv444p16le", "ffv1", 256),
    ],
)  # fmt: skip
def test_colours_of_any_format(pix_fmt, codec, scale):
    clip = flat_clip(io.BytesIO(), (120 * scale, 90 * scale, 170 * scale), pix_fmt, codec, colorspace=1)
    np.testing.assert_allclose(color_of(clip), to_rgb(120, 90, 170, "709", False), atol=3)


def test_grey_and_red_green_blue():
    grey = flat_clip(io.BytesIO(), (120,), "gray", "ffv1", color_range=2)
    np.testing.assert_allclose(color_of(grey), [120] * 3, atol=1)
    rgb = flat_clip(io.BytesIO(), (200 * 4, 90 * 4, 40 * 4), "gbrp10le", "ffv1")  # green, blue, red
    np.testing.assert_allclose(color_of(rgb), [40, 200, 90], atol=1)


# ---- High dynamic range --------------------------------------------------------------------------------------------

TO_2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])  # BT.2087, of BT.709


def pq(nits):
    """BT.2100's signal, 0 … 1, of light in cd/m²."""
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
    power = (np.asarray(nits) / 10000) ** m1
    return ((c1 + c2 * power) / (1 + c3 * power)) ** m2


def codes(rgb) -> list[int]:
    """10-bit Y'CbCr by BT.2020's matrix, limited range, of R'G'B' signals."""
    kr, kb = LUMA["2020"]
    r, g, b = rgb
    y = kr * r + (1 - kr - kb) * g + kb * b
    return [round(4 * (16 + 219 * y)), *(round(4 * (128 + 112 * (x - y) / (1 - k))) for x, k in ((b, kb), (r, kr)))]


def hdr_color(rgb, color_trc: int, primaries: int = 9) -> np.ndarray:
    tags = {"color_trc": color_trc, "colorspace": 9, "color_primaries": primaries, "color_range": 1}
    return color_of(flat_clip(io.BytesIO(), codes(rgb), "yuv420p10le", **tags))


# Of grey, in cd/m² on a display of HDR: % of the light of SDR's white, by BT.2446-1's method C
LIGHT = {0: 0, 1: 0.84, 10: 8.38, 26: 21.8, 50: 41.9, 100: 73.4, 203: 90.7, 300: 98.2, 1000: 100, 4000: 100}
# Signals of HLG and what they are on a display of 1,000 cd/m² (BT.2100, BT.2408)
HLG_LIGHT = {0: 0, 0.38: 26, 0.5: 50.7, 0.75: 203, 1: 1000}


def test_light_of_hdr_is_that_of_sdr():
    """A grey card (26 cd/m²) is mid grey, a sheet of paper (203) white, and there is something between them."""
    for nits, percent in LIGHT.items():
        found = hdr_color([pq(nits)] * 3, PQ)
        np.testing.assert_allclose(found, 255 * (percent / 100) ** (1 / 2.4), atol=3, err_msg=f"{nits} cd/m²")
    for signal, nits in HLG_LIGHT.items():
        np.testing.assert_allclose(hdr_color([signal] * 3, HLG), hdr_color([pq(nits)] * 3, PQ), atol=4)


@pytest.mark.parametrize("light", [(20, 40, 80), (60, 30, 10), (5, 5, 30), (40, 0, 0), (0, 40, 0), (0, 0, 40)])
def test_colours_of_hdr_keep_their_hue(light):
    """Darker than where brightness is bent: light in proportion."""
    found = 100 * (hdr_color(pq(TO_2020 @ light), PQ) / 255) ** 2.4
    np.testing.assert_allclose(found, 0.83802 * np.array(light), atol=2)


TO_P3 = np.array([[0.8225, 0.1775, 0.0], [0.0332, 0.9668, 0.0], [0.0171, 0.0724, 0.9105]])  # of BT.709


@pytest.mark.parametrize(("primaries", "matrix"), [(1, np.eye(3)), (12, TO_P3), (2, TO_2020)])
def test_primaries_of_hdr(primaries, matrix):
    """As tagged (BT.709's, P3's); BT.2020's where they are not."""
    light = np.array([60, 30, 10])
    found = 100 * (hdr_color(pq(matrix @ light), PQ, primaries) / 255) ** 2.4
    np.testing.assert_allclose(found, 0.83802 * light, atol=2)


def test_wide_colours_without_hdr():
    """BT.2020's own primaries, SDR: colours that BT.709 has are these."""
    light = np.array([0.7, 0.3, 0.2])
    np.testing.assert_allclose(hdr_color((TO_2020 @ light) ** (1 / 2.4), 14), 255 * light ** (1 / 2.4), atol=3)


# ---- Transparency ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "planes"),
    [
        ("libvpx-vp9", "yuva420p", (120, 90, 170, (255,) * 32 + (0,) * 32)),
        ("ffv1", "yuva420p", (120, 90, 170, (255,) * 32 + (0,) * 32)),
    ],
)
def test_what_is_transparent_is_white(codec, pix_fmt, planes):
    settings = FAST_VP9 | {"crf": "4", "b": "0"} if codec == "libvpx-vp9" else None
    clip = flat_clip(io.BytesIO(), planes, pix_fmt, codec, settings=settings)
    pixels = np.asarray(read_frames(clip, [0.1])[0], float)
    np.testing.assert_allclose(pixels[24, 8], to_rgb(120, 90, 170, "601", False), atol=6)
    np.testing.assert_allclose(pixels[24, 56], [255] * 3, atol=6)


def test_a_transparent_gif(tmp_path):
    frames = []
    for i in range(3):
        frames.append(Image.new("RGBA", (32, 24), (0, 0, 0, 0)))
        frames[-1].paste((255, 0, 0, 255), (8 * i, 0, 8 * i + 8, 24))
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100, disposal=2)
    for i, image in enumerate(read_frames(Clip(tmp_path / "a.gif"), [0.05, 0.15, 0.25])):
        row = np.asarray(image)[12, 4::8].tolist()
        assert row == [[255, 0, 0] if place == i else [255, 255, 255] for place in range(4)]
