"""Random changes of training pictures; off by default, as in the released recipe."""

import numpy as np
from PIL import Image, ImageEnhance


def augment(image: Image.Image, random_crop: float, color_jitter: float, rng: np.random.Generator) -> Image.Image:
    """The picture cropped to a random part (`random_crop`: least share of each side) with random brightness, contrast
    and saturation (`color_jitter`: by at most this share). No mirroring: questions tell left from right.
    """
    if random_crop < 1:
        share = rng.uniform(random_crop, 1)
        width, height = (max(1, round(side * share)) for side in image.size)
        left, top = rng.integers(image.width - width + 1), rng.integers(image.height - height + 1)
        image = image.crop((left, top, left + width, top + height))
    if color_jitter > 0:
        for kind in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = kind(image).enhance(1 + rng.uniform(-color_jitter, color_jitter))
    return image
