"""Pictures: read, pad to a square, and preprocess as CLIP does (LLaVA-1.5's recipe)."""

import dataclasses
import os

import numpy as np
from PIL import Image, UnidentifiedImageError

from voco_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
    """`size` is the square's side in pixels; mean and std are of RGB values in 0 … 1 (CLIP's)."""

    size: int = 336
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def __call__(self, image: Image.Image) -> np.ndarray:
        """`pixel_values` [size, size, 3], float32: padded with the mean colour, resized (bicubic), normalised."""
        image = pad_to_square(image, tuple(int(value * 255) for value in self.mean))
        if image.size != (self.size, self.size):
            image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        return self.normalize(np.asarray(image))

    def normalize(self, pixels: np.ndarray) -> np.ndarray:
        """Grey levels 0 … 255 [..., 3] to float32 of zero mean and unit variance."""
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        return (pixels.astype(np.float32) / 255 - mean) / std


def load_image(path: str | os.PathLike) -> Image.Image:
    """The picture in RGB; UserError names the file that is missing or broken."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{path}: picture not found") from None
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path}: not a readable picture ({error})") from None


def pad_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """The picture in the middle of a square of its longer side."""
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
