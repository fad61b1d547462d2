"""Random changes of training data; off by default, as in the released recipe."""

import dataclasses

import numpy as np
from PIL import Image, ImageEnhance


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What is changed at random. No mirroring: questions tell left from right.

    random_crop: the least share of a picture's sides that is kept; 1: no cropping.
    color_jitter: brightness, contrast and saturation change by at most this share.
    random_offset: frames of a clip are drawn at random within their even spacing.
    """

    random_crop: float = 1.0
    color_jitter: float = 0.0
    random_offset: bool = False

    @property
    def changes_pictures(self) -> bool:
        return self.random_crop < 1 or self.color_jitter > 0

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """The picture cropped to a random part, with random brightness, contrast and saturation."""
        if self.random_crop < 1:
            share = rng.uniform(self.random_crop, 1)
            width, height = (max(1, round(side * share)) for side in image.size)
            left = int(rng.integers(image.width - width + 1))
            top = int(rng.integers(image.height - height + 1))
            image = image.crop((left, top, left + width, top + height))
        if self.color_jitter > 0:
            for kind in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
                image = kind(image).enhance(1 + rng.uniform(-self.color_jitter, self.color_jitter))
        return image
