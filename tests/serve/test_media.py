import asyncio
import base64
import io
import threading
import time
import zlib

import numpy as np
import pytest

from tests.fuzz.mutations import damage
from tests.fuzz.pictures import _BOMBS
from tests.serve.conftest import clip, shown
from voco_jax.data.images import ImageProcessor
from voco_jax.data.records import Clip
from voco_jax.data.video import FrameSampling, probe, read_frames, sample_times
from voco_jax.serve.media import Checked, Media, MediaError, MediaLimits, check_picture, check_video, decode, fetch
from voco_jax.terminal import printable

PROCESSOR = ImageProcessor(size=32)
SAMPLING = FrameSampling(4)
LIMITS = MediaLimits()


def encoded(kind: str, frames: int = 1, **options) -> bytes:
    file, pictures = io.BytesIO(), [shown(i) for i in range(frames)]
    pictures[0].save(file, kind, save_all=frames > 1, append_images=pictures[1:], **options)
    return file.getvalue()


PNG, JPEG, GIF = encoded("PNG"), encoded("JPEG", quality=95), encoded("GIF", 6, duration=100)
MP4 = clip()


def picture(data: bytes, label: str = "", name: str = "it") -> Checked:
    return check_picture(Media(data=data, name=name, label=label), PROCESSOR)


def video(data: bytes, label: str = "", sampling: FrameSampling = SAMPLING, **limits) -> Checked:
    return check_video(Media(data=data, name="it", label=label), PROCESSOR, sampling, MediaLimits(**limits))


def refused(call, *args, **changes) -> str:
    """The one line."""
    with pytest.raises(MediaError) as error:
        call(*args, **changes)
    line = str(error.value)
    assert line == printable(line) and line.startswith("it: ") and len(line) < 400
    return line


# ---- Pictures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "AVIF", "TIFF"])
def test_pictures(kind):
    data = encoded(kind)
    checked = picture(data, "application/octet-stream")
    (square,) = checked.squares
    assert checked.times is None and np.array_equal(square, PROCESSOR.square(PROCESSOR.load(data)))


def test_pictures_in_tiles():
    processor = ImageProcessor(size=32, grid=2)
    squares = check_picture(Media(data=PNG, name="it"), processor).squares
    assert len(squares) == 5 and all(map(np.array_equal, squares, processor.squares(PNG)))


def test_pictures_in_files(tmp_path):
    (tmp_path / "upload").write_bytes(PNG)
    media = Media(tmp_path / "upload", name="cat.png", label="image/png")
    assert np.array_equal(check_picture(media, PROCESSOR).squares, picture(PNG).squares)
    (tmp_path / "upload").write_bytes(MP4)
    media = Media(tmp_path / "upload", name="cat.mp4", label="video/mp4")
    assert len(check_video(media, PROCESSOR, SAMPLING, LIMITS).squares) == 4


@pytest.mark.parametrize(
    ("data", "label", "expected"),
    [
        (MP4, "image/png", "(AVIF, BMP, GIF, ICO, JPEG, JPEG2000, PNG, PPM, TIFF, WEBP), found a video"),
        (PNG, "video/mp4", "labelled video/mp4, found a picture"),
        (PNG, "text/html", "labelled text/html, found a picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml", "found SVG"),
        (b"\xef\xbb\xbf <?xml version='1.0'?><!-- <svg> --> <SVG", "", "found SVG"),
        (b"<!DOCTYPE html><svg>", "image/png", "found HTML"),
        (b"\n<HTML>", "image/png", "found HTML"),
        (b"<" * 4000, "", "not a readable picture (of no known format)"),
        (b"%PDF-1.7", "image/png", "found PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9", "", "not a readable picture (of no known format)"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "image/heic", "found HEIC"),
        (b"secret: 123", "image/png", "not a readable picture (of no known format)"),
        (b"", "image/png", "found nothing"),
        (JPEG[:-300], "image/jpeg", "not a readable picture (image file is truncated"),
        (PNG[:200], "image/png", "not a readable picture"),
        (GIF[:40], "image/gif", "not a readable picture"),
    ],
)  # fmt: skip
def test_what_is_no_picture(data, label, expected):
    line = refused(picture, data, label)
    assert expected in line and "secret" not in line


def test_any_format_of_pictures_under_any_of_their_labels():
    """Programs write image/jpeg whatever it is."""
    assert len(picture(PNG, "image/jpeg").squares) == 1


def bomb(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    header = width.to_bytes(4) + height.to_bytes(4) + b"\x08\0\0\0\0"
    pixels = zlib.compress(bytes(10**6), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_decompression_bombs():
    for width, height in ((20_000, 20_000), (60_000, 60_000), (10_000, 10_000), (1, 60_000)):
        line = refused(picture, bomb(width, height))
        assert "at most" in line or "exceeds limit" in line
    assert "found a picture" in refused(video, bomb(60_000, 60_000))
    for name in ("a million segments", "half a million chunks", "nine million words", "claims much", "text of 100 MB"):
        line = refused(picture, _BOMBS[name]())
        assert "at most" in line or "not a readable picture (" in line
    small = ImageProcessor(size=32, max_pixels=1000)
    assert "64 × 48 pixels: expected 1000 at most" in refused(check_picture, Media(data=PNG, name="it"), small)


# ---- Clips ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [MP4, clip("matroska"), clip("avi", "mpeg4"), GIF, encoded("PNG", 5, duration=100)],
    ids=["mp4", "mkv", "avi", "gif", "apng"],
)
def test_clips(data):
    """Frames and times are those of `read_frames`."""
    checked = video(data)
    times = sample_times(probe(Clip(data=data)), SAMPLING)
    assert len(times) == 4 and np.array_equal(checked.times, times)
    expected = [PROCESSOR.square(frame) for frame in read_frames(Clip(data=data), times)]
    assert all(map(np.array_equal, checked.squares, expected)) and not np.array_equal(*expected[:2])


def test_animations_are_both():
    for label in ("image/gif", "video/gif", ""):
        (square,) = picture(GIF, label).squares
        assert np.array_equal(square, video(GIF, label).squares[0])
    assert "labelled audio/mpeg, found a video" in refused(video, GIF, "audio/mpeg")


@pytest.mark.parametrize(
    ("data", "label", "expected"),
    [
        (PNG, "video/mp4", "expected a video, found a picture"),
        (JPEG, "image/jpeg", "expected a video, found a picture"),
        (encoded("GIF"), "image/gif", "expected a video, found a picture"),
        (MP4, "image/png", "labelled image/png, found a video"),
        (MP4, "text/plain", "labelled text/plain, found a video"),
        (b"<html>", "video/mp4", "expected a video, found HTML"),
        (b"", "video/mp4", "expected a video, found nothing"),
        (b"secret: 123", "video/mp4", "expected a video, found"),
        (b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1/secret.ts\n#EXT-X-ENDLIST\n", "", "expected a video, found"),
        (b"ffconcat version 1.0\nfile /etc/secret\n", "", "expected a video, found"),
        (MP4[: len(MP4) // 2], "video/mp4", "expected a video, found"),
        (MP4[:-1], "video/mp4", "the file is cut off or damaged"),
        (clip("matroska")[:-900], "video/x-matroska", "the file is cut off or damaged"),
        (b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0\x40\x1f\0\0\x80\x3e\0\0\2\0\x10\0data\0\0\0\0", "audio/wav",
         "found sound alone"),
    ],
)  # fmt: skip
def test_what_is_no_clip(data, label, expected):
    line = refused(video, data, label)
    assert expected in line and "--incomplete" not in line and "secret" not in line


def test_limits_of_clips():
    assert "expected 2.5 s at most, found 3.0 s" in refused(video, MP4, max_seconds=2.5)
    assert "expected 3 frames to be taken at most, found 4" in refused(video, MP4, max_frames=3)
    assert len(video(MP4, sampling=FrameSampling(0, 1.0), max_frames=3, max_seconds=3.1).squares) == 3
    for data in (MP4, GIF):
        assert "decoded in the time allowed" in refused(video, data, decode_seconds=1e-9)


# ---- Both ----------------------------------------------------------------------------------------------------------


def test_damaged(capfd):
    """One line, or what can be shown; and no decoder writes into the server's log."""
    rng = np.random.default_rng(0)
    sound = [encoded(kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "AVIF", "JPEG2000")] + [GIF, MP4]
    lines = 0
    for i in range(160):
        _, data = damage(rng, sound[i % len(sound)])
        for call in (picture, video):
            try:
                assert all(square.shape == (32, 32, 3) for square in call(data).squares)
            except MediaError as error:
                lines += 1
                assert (line := str(error)) == printable(line) and line.startswith("it: ")
    assert 160 < lines < 320 and capfd.readouterr() == ("", "")


def test_names_are_printable():
    media = Media(data=b"", name="a\x1b[2Jb\n.png", label="image/png")
    with pytest.raises(MediaError) as error:
        check_picture(media, PROCESSOR)
    assert str(error.value).startswith("a\\x1b[2Jb\\n.png: expected a picture")


def test_from_request_to_squares():
    async def asked(url: str) -> Checked:
        return await decode(check_picture, await fetch(url, LIMITS, video=False), PROCESSOR)

    checked = asyncio.run(asked(f"data:image/png;base64,{base64.b64encode(PNG).decode()}"))
    assert np.array_equal(checked.squares, picture(PNG).squares)
    with pytest.raises(MediaError, match="data: URL: not a readable picture"):
        asyncio.run(asked("data:image/png;base64,AAAA"))


def test_decoding_leaves_the_event_loop_alone():
    """Two at a time; what waits and is no longer wanted is not begun."""
    go, begun = threading.Event(), []

    def work(i: int) -> int:
        begun.append(i)
        assert go.wait(5)
        return i

    async def all_of_them():
        tasks = [asyncio.create_task(decode(work, i)) for i in range(5)]
        while len(begun) < 2:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        assert begun == [0, 1]
        tasks[2].cancel()
        await asyncio.sleep(0)
        go.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    start = time.monotonic()
    results = asyncio.run(all_of_them())
    assert [results[i] for i in (0, 1, 3, 4)] == [0, 1, 3, 4] and isinstance(results[2], asyncio.CancelledError)
    assert sorted(begun) == [0, 1, 3, 4] and time.monotonic() - start < 2
