"""Pictures of all formats and modes, damaged, or with headers that claim anything: `voco_jax/data/images.py`."""

import io
from pathlib import Path
import struct
import warnings
import zlib

import numpy as np
from PIL import Image

from tests.fuzz.harness import Target
from tests.fuzz.mutations import damage
from voco_jax.data.images import FORMATS, ImageProcessor, load_image
from voco_jax.data.media import kind_of
from voco_jax.data.records import Picture

MODES = ("1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16", "I", "F", "LAB", "YCbCr")
_LENGTHS = (1, 2, 335, 337, 5000, 16384)


class Pictures(Target):
    count = 1000

    def make(self, directory: Path) -> None:
        warnings.simplefilter("ignore")  # of Pillow, on large pictures and odd EXIF
        self.sound = {}
        for kind in FORMATS:
            for mode in MODES:
                content = io.BytesIO()
                try:
                    _picture(mode).save(content, kind, exif=_EXIF) if kind in ("JPEG", "PNG", "WEBP") else (
                        _picture(mode).save(content, kind)
                    )
                except (OSError, ValueError, KeyError):
                    continue  # a format that has no such mode
                self.sound[f"{kind} {mode}"] = content.getvalue()
        for kind in ("GIF", "PNG", "WEBP", "TIFF", "AVIF"):
            content, frames = io.BytesIO(), [_picture("RGB").rotate(i) for i in range(5)]
            frames[0].save(content, kind, save_all=True, append_images=frames[1:])
            self.sound[f"{kind} animated"] = content.getvalue()
        assert {name.split()[0] for name in self.sound} == set(FORMATS)
        self.pixels = 0

    def needs(self) -> int:
        return 4 * self.pixels

    def case(self, rng: np.random.Generator, directory: Path):
        file = directory / "picture"
        if rng.random() < 0.05:
            width, height = (int(rng.choice(_LENGTHS)) for _ in range(2))
            what, data = f"{width} x {height}", _png(width, height)
        elif rng.random() < 0.05:
            what, data = f"{(name := str(rng.choice(list(_BOMBS))))}", _BOMBS[name]()
        else:
            name = str(rng.choice(list(self.sound)))
            what, data = damage(rng, self.sound[name])
            what = f"{name}: {what}"
        file.write_bytes(data)
        processor = ImageProcessor(
            size=336, aspect_ratio=str(rng.choice(["pad", "crop", "stretch"])), do_resize=bool(rng.random() < 0.8)
        )
        self.pixels = 0

        def read() -> str | None:
            kind_of(file)
            image = load_image(Picture(file) if len(data) % 2 else data)
            self.pixels = image.width * image.height
            square = processor.square(image)
            return None if square.shape == (336, 336, 3) and image.mode == "RGB" else f"{image.mode} {square.shape}"

        return what, read


_EXIF = Image.Exif()
_EXIF[0x0112], _EXIF[0x010E] = 6, "description"


def _picture(mode: str) -> Image.Image:
    y, x = np.mgrid[:37, :41]
    image = Image.fromarray(np.stack([6 * x, 6 * y, x * y], axis=-1).astype(np.uint8))
    if mode == "I;16":
        return Image.fromarray((x * y * 40).astype(np.uint16))
    if mode == "LAB":
        return Image.frombytes("LAB", image.size, image.tobytes())
    return image.convert("L").convert(mode) if mode in ("I", "F") else image.convert(mode)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, *before: bytes) -> bytes:
    pixels = zlib.compress(bytes((width + 1) * height), 1)
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(before) + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")


def _jpeg(before: bytes = b"", scans: int = 0) -> bytes:
    content = io.BytesIO()
    Image.effect_noise((700, 700), 40).save(content, "JPEG", progressive=True, quality=30)
    data = content.getvalue()
    return data[:2] + before + data[2:-2] + data[data.rindex(b"\xff\xda") : -2] * scans + data[-2:]


def _gif(comments: int) -> bytes:
    content = io.BytesIO()
    _picture("P").save(content, "GIF")
    data = content.getvalue()
    at = data.index(b",", 13 + 3 * 256)
    return data[:at] + b"!\xfe" + (b"\xff" + b"x" * 255) * comments + b"\0" + data[at:]


_DEFLATED = zlib.compress(bytes(10**8), 9)
_BOMBS = {
    "300 scans": lambda: _jpeg(scans=300),
    "5,000 scans": lambda: _jpeg(scans=5000),
    "a million segments": lambda: _jpeg(b"\xff\xe5\0\2" * 10**6),
    "a thousand EXIF": lambda: _jpeg((b"\xff\xe1\xff\xffExif\0\0" + bytes(65527)) * 1000),
    "text of 100 MB": lambda: _png(8, 8, _chunk(b"zTXt", b"a\0\0" + _DEFLATED)),
    "a profile of 100 MB": lambda: _png(8, 8, _chunk(b"iCCP", b"a\0\0" + _DEFLATED)),
    "half a million chunks": lambda: _png(8, 8, _chunk(b"tEXt", b"a\0b") * 500_000),
    "comments of 10 MB": lambda: _gif(40_000),
    "a comment of 20 MB": lambda: b"P6\n#" + b"x" * 20_000_000 + b"\n1 1 255\n123",
    "nine million words": lambda: b"P3 3000 3000 255\n" + b"1 " * 27_000_000,
    "claims much": lambda: b"P6 9000 9000 255\n123",
    "9,400 x 9,400": lambda: _png(9400, 9400),
}
