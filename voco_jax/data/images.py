"""Pictures: read, made square by padding (LLaVA-1.5) or cropping (CLIP), and preprocessed as CLIP does."""

import dataclasses
import os

import numpy as np
from PIL import Image, UnidentifiedImageError

from voco_jax.errors import UserError


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
        if self.aspect_ratio == "pad":
            image = pad_to_square(image, tuple(int(value * 255) for value in self.mean))
        scale = self.size / min(image.size)
        resized = tuple(max(self.size, int(side * scale)) for side in image.size)
        if image.size != resized:
            image = image.resize(resized, Image.Resampling.BICUBIC)
        left, top = ((side - self.size) // 2 for side in resized)
        image = image.crop((left, top, left + self.size, top + self.size))
        return self.normalize(np.asarray(image))

    def normalize(self, pixels: np.ndarray) -> np.ndarray:
        """Grey levels 0 … 255 [..., 3] to float32 of zero mean and unit variance."""
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        return (pixels.astype(np.float32) / 255 - mean) / std


def load_image(path: str | os.PathLike) -> Image.Image:
    """The picture in RGB; UserError names the file that is missing or broken."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # 16 bits, which Pillow's conversion would clip to white
                return Image.fromarray((np.asarray(image, np.uint32) >> 8).astype(np.uint8)).convert("RGB")
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
