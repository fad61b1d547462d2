"""Random changes of training pictures; off by default, as in the released recipe."""

from ml_collections import ConfigDict
import numpy as np
from PIL import Image, ImageEnhance


def augments(data: ConfigDict) -> bool:
    """Whether the config asks for any change."""
    return data.random_crop < 1 or data.color_jitter > 0


def augment(image: Image.Image, data: ConfigDict, rng: np.random.Generator) -> Image.Image:
    """The picture cropped to a random part (`random_crop`: least share of each side) with random brightness, contrast
    and saturation (`color_jitter`: by at most this share). No mirroring: questions tell left from right.
    """
    if data.random_crop < 1:
        share = rng.uniform(data.random_crop, 1)
        width, height = (max(1, round(side * share)) for side in image.size)
        left, top = rng.integers(image.width - width + 1), rng.integers(image.height - height + 1)
        image = image.crop((left, top, left + width, top + height))
    if data.color_jitter > 0:
        for kind in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = kind(image).enhance(1 + rng.uniform(-data.color_jitter, data.color_jitter))
    return image
