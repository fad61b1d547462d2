"""Pictures: read, made square by padding (LLaVA-1.5) or cropping (CLIP), and preprocessed as CLIP does."""

from collections.abc import Callable
import dataclasses
import io
import os
from pathlib import Path
import struct
import zlib

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from voco_jax.data.records import TOO_LARGE, UNREADABLE_PICTURE, BadRecord, Picture
from voco_jax.data.sources.roots import check_file

# What is opened, whatever a file is called: Pillow would have Ghostscript run PostScript. JPEG is MPO too.
FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

MAX_SIDE = 16384  # pixels: a picture of few but in one long row would be padded to a square of gigabytes

# What turns a picture upright, by its EXIF orientation; these angles are anticlockwise.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
    """`size` is the square's side in pixels; mean and std are of RGB values in 0 … 1 (CLIP's).

    `aspect_ratio` 'pad' puts the whole picture into a square of the mean colour (LLaVA-1.5 and VoCo-LLaMA); 'crop'
    takes the middle of it (CLIP itself).
    """

    size: int = 336
    aspect_ratio: str = "pad"
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self):
        if self.aspect_ratio not in ("pad", "crop"):
            raise ValueError(f"aspect_ratio: expected pad or crop, found {self.aspect_ratio!r}")

    def __call__(self, image: Image.Image) -> np.ndarray:
        """`pixel_values` [size, size, 3], float32, of an RGB picture: squared, resized (bicubic), normalised."""
        return self.normalize(self.square(image))

    def square(self, image: Image.Image) -> np.ndarray:
        """Grey levels [size, size, 3], uint8: all of `__call__` but the arithmetic, and a quarter of the bytes."""
        if self.aspect_ratio == "pad":
            return np.asarray(self._pad_and_resize(image))
        if max(image.size) > 100 * min(image.size):  # of a line, the part around its middle: no need to scale all
            width, height = (min(side, 100 * min(image.size)) for side in image.size)
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
        scale = self.size / min(image.size)
        resized = tuple(max(self.size, int(side * scale)) for side in image.size)
        if image.size != resized:
            image = image.resize(resized, Image.Resampling.BICUBIC)
        left, top = ((side - self.size) // 2 for side in resized)
        image = image.crop((left, top, left + self.size, top + self.size))
        return np.asarray(image)

    def _pad_and_resize(self, image: Image.Image) -> Image.Image:
        """`pad_to_square`, then resized; a wide picture is padded half-way, which is the same and a fifth faster.

        Pillow resizes along the rows first and then along the columns, and rounds to grey levels in between. Padding
        above and below is no part of the first half.
        """
        colour, (width, height) = tuple(int(value * 255) for value in self.mean), image.size
        if width > height:
            image = image.resize((self.size, height), Image.Resampling.BICUBIC)
            square = Image.new("RGB", (self.size, width), colour)
            square.paste(image, (0, (width - height) // 2))
        else:
            square = pad_to_square(image, colour)
        return square.resize((self.size, self.size), Image.Resampling.BICUBIC)

    def normalize(self, pixels):
        """Grey levels 0 … 255 [..., 3] to float32 of zero mean and unit variance; for arrays of numpy and of jax."""
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        return (pixels.astype(np.float32) / 255 - mean) / std


def load_image(picture: str | os.PathLike | Picture, on_odd: Callable[[str], None] | None = None) -> Image.Image:
    """The picture in RGB and upright; BadRecord names one that is missing, broken or a decompression bomb.

    `on_odd` hears of a picture that is read and yet not what one expects. Of an animated one the first frame is taken;
    transparency is dropped, as in the released code.
    """
    picture = picture if isinstance(picture, Picture) else Picture(Path(picture))
    say = on_odd or (lambda kind: None)
    if picture.data is None:
        check_file(picture.file)
    try:
        content = picture.file if picture.data is None else io.BytesIO(picture.data)
        with Image.open(content, formats=FORMATS) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS or max(image.size) > MAX_SIDE:  # Pillow: twice that
                raise BadRecord(TOO_LARGE, f"{picture}: {image.width} × {image.height} pixels")
            if getattr(image, "is_animated", False):
                say("animated picture")
            if image.mode in ("CMYK", "P"):
                say(f"{image.mode} picture")
            image = _upright(image, say)
            if image.mode.startswith("I"):  # 16 bits, which Pillow's conversion would clip to white
                say("16-bit picture")
                return Image.fromarray((np.asarray(image, np.uint32) >> 8).astype(np.uint8)).convert("RGB")
            return image.convert("RGB")
    except Image.DecompressionBombError as error:
        raise BadRecord(TOO_LARGE, f"{picture}: {error}") from None
    except UnidentifiedImageError:  # Pillow's own text has the address of an object
        raise BadRecord(UNREADABLE_PICTURE, f"{picture}: not a readable picture (of no known format)") from None
    except _UNREADABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadRecord(UNREADABLE_PICTURE, f"{picture}: not a readable picture ({reason:.200})") from None


# Whatever Pillow's decoders raise for damaged files; RuntimeError is AVIF's.
_UNREADABLE = (
    OSError, SyntaxError, ValueError, TypeError, AttributeError, IndexError, KeyError, OverflowError,
    EOFError, RuntimeError, AssertionError, struct.error, zlib.error, MemoryError,
)  # fmt: skip


def _upright(image: Image.Image, say: Callable[[str], None]) -> Image.Image:
    """The picture turned as its EXIF says. EXIF that is damaged says nothing: the picture itself is whole."""
    turned = image.format == "TIFF"  # Pillow does that itself, when it loads one
    if not turned:
        image.load()  # now, as a PNG's EXIF needs it: what is wrong with the picture is not taken for that
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except _UNREADABLE:
        say("damaged EXIF")
        return image
    if orientation not in _TURNS:
        return image
    say("EXIF rotation")
    return image if turned else image.transpose(_TURNS[orientation])


def pad_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """The picture in the middle of a square of its longer side."""
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
