"""Pictures: opened from files, bytes or arrays, and made into pixel values as LLaVA-1.5, CLIP and SigLIP do.

Sizes and rounding are those of transformers' image processors on Pillow (`CLIPImageProcessorPil`,
`LlavaImageProcessorPil`), which equal the released LLaVA code's.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import math
import os
import struct
from typing import BinaryIO
import zlib

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from voco_jax.data.picture_headers import asks_too_much
from voco_jax.data.records import TOO_LARGE, UNREADABLE_PICTURE, BadRecord, Picture, tiles_of
from voco_jax.data.sources.roots import local_path, open_encoded
from voco_jax.io.paths import as_path

# Formats that are opened, by a file's content: Pillow would have Ghostscript run PostScript. JPEG includes MPO.
FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

# What `load_image` opens: a file's path or its bytes, a file object, a PIL image, or an array (also jax's, torch's).
PictureLike = str | os.PathLike | Picture | bytes | bytearray | memoryview | BinaryIO | Image.Image | np.ndarray

MAX_PIXELS = 2**30 // 12  # Pillow's
MAX_SIDE = 16384  # pixels: a picture of few but in one long row would be padded to a square of gigabytes
_MAX_RESIZED = 2**25  # pixels of a resized picture, 128 MiB: of a longer one only the part that is kept is resized

_LARGE_SIDE, _STRIP = 2048, 256  # pixels: a square of such a side is padded in strips of so many rows

_FILTERS = {filter.name.lower(): filter for filter in Image.Resampling}

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
    """How a picture becomes `pixel_values`: padded or not, resized, its middle cut out, rescaled, normalised.

    size: side of the square that comes out, in pixels.
    aspect_ratio: 'pad' puts the whole picture into a square of one colour first (LLaVA-1.5 and VoCo-LLaMA); 'crop'
      resizes the shorter side (CLIP); 'stretch' resizes both sides (SigLIP).
    mean, std: of the rescaled RGB values, by channel.
    resize_to: pixels, before the middle is cut out: `()` for `size`; `(side,)`; or `(height, width)`, not with 'crop'.
    do_resize: without it the middle is cut out of the picture as it is. What is too small gets a black border.
    resample: the filter, by Pillow's name.
    rescale_factor: grey levels 0 … 255 are multiplied with it.
    pad_color: grey levels of red, green and blue around a padded picture; `()` for the mean colour.
    transparency: 'white' shows what is transparent on white, 'drop' shows the colours that are stored behind it.
    max_pixels, max_side: of a larger picture nothing is read.
    grid: from 2 on a picture is looked at several times, as a whole and in grid × grid tiles (`tiles`).
    """

    size: int = 336
    aspect_ratio: str = "pad"
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    resize_to: tuple[int, ...] = ()
    do_resize: bool = True
    resample: str = "bicubic"
    rescale_factor: float = 1 / 255
    pad_color: tuple[int, ...] = ()
    transparency: str = "drop"
    max_pixels: int = MAX_PIXELS
    max_side: int = MAX_SIDE
    grid: int = 1

    def __post_init__(self):
        """ValueError for a value that cannot be, under the name of its key in `config.data`."""
        _check(
            "aspect_ratio", self.aspect_ratio in ("pad", "crop", "stretch"), "pad, crop or stretch", self.aspect_ratio
        )
        _check("transparency", self.transparency in ("white", "drop"), "white or drop", self.transparency)
        _check("processor.resample", self.resample in _FILTERS, " or ".join(_FILTERS), self.resample)
        forms = ("()", "(side,)") if self.aspect_ratio == "crop" else ("()", "(side,)", "(height, width)")
        sound = len(self.resize_to) < len(forms) and all(side >= 1 for side in self.resize_to)
        _check("processor.resize_to", sound, " or ".join(forms), self.resize_to)
        _check(
            "processor.image_mean", len(self.mean) == 3 and all(map(math.isfinite, self.mean)), "3 numbers", self.mean
        )
        sound = len(self.std) == 3 and all(0 < value < math.inf for value in self.std)
        _check("processor.image_std", sound, "3 numbers above 0", self.std)
        tiles_alike = self.grid == 1 or (self.do_resize and not self.resize_to)
        _check("image_grid", tiles_alike, "1 with processor.resize_to or without do_resize", self.grid)
        _check("processor.rescale_factor", 0 < self.rescale_factor < math.inf, "above 0", self.rescale_factor)
        if self.aspect_ratio == "pad":
            sound = len(self.colour) == 3 and all(0 <= level <= 255 for level in self.colour)
            _check("processor.pad_color", sound, "3 grey levels of 0 … 255 (the mean's by default)", self.colour)

    @property
    def colour(self) -> tuple[int, ...]:
        """Grey levels around a padded picture."""
        return self.pad_color or tuple(int(value * 255) for value in self.mean)

    @property
    def tiles(self) -> tuple[tuple[int, int, int], ...]:
        """What is looked at of a picture, as `Picture.tile` names it."""
        return tiles_of(self.grid)

    def load(self, picture: PictureLike, on_warning: Callable[[str], None] | None = None) -> Image.Image:
        """`load_image`, with transparency as this processor wants it; of a `Picture` its tile."""
        image = load_image(picture, on_warning, self.transparency, self.max_pixels, self.max_side)
        tile = picture.tile if isinstance(picture, Picture) else None
        return image if tile is None else self.cut(image, tile)

    def cut(self, image: Image.Image, tile: tuple[int, int, int]) -> Image.Image:
        """A tile of an RGB picture, padded or cropped as `square` does it, before it is resized."""
        row, column, n = tile
        if n == 1:
            return image
        if self.aspect_ratio == "pad":
            image = pad_to_square(image, self.colour)
        left, top, (width, height) = 0, 0, image.size
        if self.aspect_ratio == "crop":
            side = min(image.size)
            left, top, width, height = (width - side) // 2, (height - side) // 2, side, side
        across, down = ([size * i // n for i in range(n + 1)] for size in (width, height))
        right, bottom = max(across[column + 1], across[column] + 1), max(down[row + 1], down[row] + 1)
        return image.crop((left + across[column], top + down[row], left + right, top + bottom))

    def squares(self, picture: PictureLike) -> list[np.ndarray]:
        """`square` of each of a picture's `tiles`, or of the tile that a `Picture` is."""
        image = self.load(picture)
        if isinstance(picture, Picture) and picture.tile is not None:
            return [self.square(image)]
        return [self.square(self.cut(image, tile)) for tile in self.tiles]

    def __call__(self, image: Image.Image) -> np.ndarray:
        """`pixel_values` [size, size, 3], float32, of an RGB picture."""
        return self.normalize(self.square(image))

    def square(self, image: Image.Image) -> np.ndarray:
        """Grey levels [size, size, 3], uint8: all of `__call__` but the arithmetic, and a quarter of the bytes."""
        if self.aspect_ratio == "pad":
            image = self._pad(image)
        width, height = self._resized(image.size) if self.do_resize else image.size
        left, top = (width - self.size) // 2, (height - self.size) // 2
        if width * height > _MAX_RESIZED:
            image = _resize_part(image, (width, height), (left, top, left + self.size, top + self.size), self.filter)
            left, top = min(left, 0), min(top, 0)
        elif image.size != (width, height):
            image = image.resize((width, height), self.filter)
        if (width, height) != (self.size, self.size):
            image = image.crop((left, top, left + self.size, top + self.size))
        return np.asarray(image)

    @property
    def filter(self) -> Image.Resampling:
        return _FILTERS[self.resample]

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) to resize to."""
        height, width = self.resize_to if len(self.resize_to) == 2 else (self.resize_to or (self.size,)) * 2
        if self.aspect_ratio != "crop":
            return width, height
        short, long = min(size), max(size)
        long = int(height * long / short)
        return (height, long) if size[0] <= size[1] else (long, height)

    def _pad(self, image: Image.Image) -> Image.Image:
        """`pad_to_square`; a wide picture is resized half-way before, which is the same and a fifth faster, and so is a
        very tall one, whose square would be a gigabyte.

        Pillow makes squares of squares along the rows first and then along the columns, and rounds to grey levels in
        between. Padding above and below is no part of the first half, and every row is made by itself.
        """
        width, height = image.size
        side = max(width, height)
        if not self.do_resize and side >= max(_LARGE_SIDE, self.size):  # no more than the middle
            square = Image.new("RGB", (self.size, self.size), self.colour)
            left, top = ((side - length) // 2 - (side - self.size) // 2 for length in image.size)
            square.paste(image, (left, top))
            return square
        wide, high = self._resized((side, side))
        if not self.do_resize or wide != high or (width <= height and height < _LARGE_SIDE):
            return pad_to_square(image, self.colour)
        square = Image.new("RGB", (wide, side), self.colour)
        if width > height:
            square.paste(image.resize((wide, height), self.filter), (0, (width - height) // 2))
            return square
        for top in range(0, height, _STRIP):
            strip = image.crop((0, top, width, min(top + _STRIP, height)))
            padded = Image.new("RGB", (height, strip.height), self.colour)
            padded.paste(strip, ((height - width) // 2, 0))
            square.paste(padded.resize((wide, strip.height), self.filter), (0, top))
        return square

    def normalize(self, pixels):
        """Grey levels 0 … 255 [..., 3] to float32 `pixel_values`; for arrays of numpy and of jax."""
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        return (pixels.astype(np.float32) / np.float32(1 / self.rescale_factor) - mean) / std


def _check(key: str, sound: bool, expected: str, found) -> None:
    if not sound:
        raise ValueError(f"{key}: expected {expected}, found {found!r}")


def _resize_part(image: Image.Image, size: tuple[int, int], part: tuple[int, int, int, int], filter) -> Image.Image:
    """What of `part` (left, top, right, bottom) lies inside the picture resized to `size`, without making all of it.

    Along the rows first and then along the columns, as Pillow enlarges.
    """
    left, top, right, bottom = max(part[0], 0), max(part[1], 0), min(part[2], size[0]), min(part[3], size[1])
    across, down = image.width / size[0], image.height / size[1]
    columns = left * across, 0, min(right * across, image.width), image.height
    image = image.resize((right - left, image.height), filter, box=columns)
    rows = 0, top * down, image.width, min(bottom * down, image.height)
    return image.resize((right - left, bottom - top), filter, box=rows)


def pad_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """The picture in the middle of a square of its longer side."""
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


# ---- Opening -------------------------------------------------------------------------------------------------------


def load_image(
    picture: PictureLike,
    on_warning: Callable[[str], None] | None = None,
    transparency: str = "white",
    max_pixels: int = MAX_PIXELS,
    max_side: int = MAX_SIDE,
) -> Image.Image:
    """The picture in 8-bit RGB and upright, the same from a path, bytes, a file object, a PIL image or an array.

    Arrays are [height, width] (grey) or [height, width, 1 … 4] (grey, grey and alpha, RGB, RGBA), in uint8, bool,
    uint16, or a float dtype with values 0 … 1. A PIL image is turned by its EXIF data as a file is. Of an animated
    picture the first frame is taken, of a PIL image the one that it stands at. Of 16 bits the upper 8 are. Colour
    profiles are not applied, as in the released code. The other arguments: see `ImageProcessor`.

    BadRecord names a picture that is missing, broken, a decompression bomb or not a picture. `on_warning` is called
    with a word for what is unusual about one that can be read.
    """
    warn = on_warning or (lambda kind: None)
    if hasattr(picture, "__array__"):
        picture = _from_array(picture)
    if isinstance(picture, Image.Image):
        with _naming("picture"):
            return _as_seen(picture, "picture", warn, transparency, max_pixels, max_side)
    picture = _encoded(picture)
    file = open_encoded(picture, whole=True)
    if found := asks_too_much(file):
        raise BadRecord(TOO_LARGE, f"{picture}: {found}")
    if max_pixels > (Image.MAX_IMAGE_PIXELS or math.inf):  # Pillow refuses twice that by itself
        Image.MAX_IMAGE_PIXELS = max_pixels
    with _naming(picture), Image.open(file, formats=FORMATS) as image:
        return _as_seen(image, picture, warn, transparency, max_pixels, max_side)


def is_picture(value) -> bool:
    """Whether it is one picture, as `load_image` takes it, rather than several."""
    return isinstance(value, str | os.PathLike | Picture | bytes | bytearray | memoryview | Image.Image) or (
        hasattr(value, "read") or (hasattr(value, "__array__") and getattr(value, "ndim", 3) <= 3)
    )


def _encoded(picture) -> Picture:
    if isinstance(picture, Picture):
        return picture
    if isinstance(picture, str | os.PathLike):
        return Picture(as_path(local_path(os.fspath(picture))))
    name = "picture"
    if hasattr(picture, "read"):
        name = str(getattr(picture, "name", name))
        if hasattr(picture, "seekable") and picture.seekable():
            picture.seek(0)
        picture = picture.read()
    if isinstance(picture, bytes | bytearray | memoryview):
        return Picture(data=bytes(picture), name=name)
    expected = "a path, bytes, a binary file, a PIL image or an array"
    raise BadRecord(UNREADABLE_PICTURE, f"{name}: expected {expected}; found {type(picture).__name__}")


def _from_array(values) -> Image.Image:
    """BadRecord for an array that is not a picture."""
    try:
        values = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:  # a tensor on a GPU, or one with gradients
        raise BadRecord(UNREADABLE_PICTURE, f"picture: not an array: {error}") from None
    found = f"{values.dtype} {list(values.shape)}"
    if values.ndim not in (2, 3) or not values.size or (values.ndim == 3 and values.shape[2] > 4):
        expected = "an array [height, width] or [height, width, 1 … 4]"
        raise BadRecord(UNREADABLE_PICTURE, f"picture: expected {expected}, found {found}")
    if np.issubdtype(values.dtype, np.floating):
        values = values.astype(np.float32, copy=False)
        if not (values.min() >= 0 and values.max() <= 1):  # also for NaN
            found = f"{found} of {values.min():g} … {values.max():g}"
            raise BadRecord(UNREADABLE_PICTURE, f"picture: expected values of 0 … 1 in a float array, found {found}")
        values = values * np.float32(255)
        np.round(values, out=values)
    elif values.dtype == np.uint16:
        values = values >> 8
    elif values.dtype == bool:
        values = values * 255
    elif values.dtype != np.uint8:
        raise BadRecord(UNREADABLE_PICTURE, f"picture: expected uint8, uint16, bool or float, found {found}")
    values = values.astype(np.uint8)
    return Image.fromarray(values[..., 0] if values.ndim == 3 and values.shape[2] == 1 else values)


@contextlib.contextmanager
def _naming(picture: Picture | str) -> Iterator[None]:
    """Whatever Pillow's decoders raise, as a BadRecord of this picture."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise BadRecord(TOO_LARGE, f"{picture}: {error}") from None
    except UnidentifiedImageError:  # Pillow's own text has the address of an object
        raise BadRecord(UNREADABLE_PICTURE, f"{picture}: not a readable picture (of no known format)") from None
    except UNREADABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadRecord(UNREADABLE_PICTURE, f"{picture}: not a readable picture ({reason:.200})") from None


# For damaged files; RuntimeError is AVIF's.
UNREADABLE = (
    OSError, SyntaxError, ValueError, TypeError, AttributeError, IndexError, KeyError, OverflowError,
    EOFError, RuntimeError, AssertionError, struct.error, zlib.error, MemoryError, ImageCms.PyCMSError,
)  # fmt: skip


def _check_size(image: Image.Image, name: Picture | str, max_pixels: int, max_side: int) -> None:
    width, height = image.size
    for key, found, most in (("pixels", width * height, max_pixels), ("side", max(width, height), max_side)):
        if found > most:
            expected = f"expected {most} at most (config.data.limits.picture_{key})"
            raise BadRecord(TOO_LARGE, f"{name}: {width} × {height} pixels: {expected}, found {found}")


def _as_seen(
    image: Image.Image,
    name: Picture | str,
    warn: Callable[[str], None],
    transparency: str,
    max_pixels: int,
    max_side: int,
) -> Image.Image:
    _check_size(image, name, max_pixels, max_side)
    if getattr(image, "is_animated", False):
        warn("animated picture")
    if image.mode in ("CMYK", "P"):
        warn(f"{image.mode} picture")
    image = _upright(image, warn)
    _check_size(image, name, max_pixels, max_side)  # again: an icon's header is not that of the picture in it
    if image.mode.startswith("I"):
        warn("16-bit picture")
        image = _from_deep_grey(image)
    elif image.mode == "F":
        warn("float picture")
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 255):  # also for NaN
            raise ValueError(f"expected values of 0 … 255, found {values.min():g} … {values.max():g}")
        image = _from_array(values) if values.max() <= 1 else image.convert("L")
    elif image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, *profiles, outputMode="RGB") or image
    elif image.mode in ("RGBa", "La"):  # colours multiplied with alpha
        image = image.convert(image.mode.upper())
    if transparency == "white" and image.has_transparency_data:
        image = _on_white(image)
    image = image.convert("RGB")
    image.info = {}  # EXIF has been followed, and must not be again
    return image


def _on_white(image: Image.Image) -> Image.Image:
    """RGB, in strips: in one go a large picture would be there four times."""
    shown = Image.new("RGB", image.size)
    for top in range(0, image.height, _STRIP):
        strip = image.crop((0, top, image.width, min(top + _STRIP, image.height)))
        white = Image.new("RGBA", strip.size, (255, 255, 255, 255))
        shown.paste(Image.alpha_composite(white, strip.convert("RGBA")).convert("RGB"), (0, top))
    return shown


def _from_deep_grey(image: Image.Image) -> Image.Image:
    """The upper 8 of 16 bits, where Pillow's own conversion clips to white; with alpha where one level is clear."""
    levels = np.asarray(image)
    if levels.min() < 0 or levels.max() > 65535:
        raise ValueError(f"expected grey levels of 0 … 65535, found {levels.min()} … {levels.max()}")
    grey = np.right_shift(levels, 8, out=np.empty(levels.shape, np.uint8), casting="unsafe")
    clear = image.info.get("transparency")
    if not isinstance(clear, int):
        return Image.fromarray(grey)
    return Image.fromarray(np.stack([grey, np.where(levels == clear, 0, 255).astype(np.uint8)], axis=-1))


def _upright(image: Image.Image, warn: Callable[[str], None]) -> Image.Image:
    """The picture turned as its EXIF says. EXIF that is damaged says nothing: the picture itself is whole."""
    turned = image.format == "TIFF"  # Pillow does that itself, when it loads one
    if not turned:
        image.load()  # now, as a PNG's EXIF needs it: what is wrong with the picture is not taken for that
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except UNREADABLE:
        warn("damaged EXIF")
        return image
    if orientation not in _TURNS:
        return image
    warn("EXIF rotation")
    return image if turned else image.transpose(_TURNS[orientation])
