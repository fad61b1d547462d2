"""Scenes: one VoCo token learns to keep what is at each place, of pictures with two to nine objects.

Hardware: any CPU.

    voco train --config=scenes_places
"""

from voco_jax.config import source, sources
from voco_jax.configs import scenes_few


def get_config():
    config = scenes_few.get_config()
    config.workdir = "runs/scenes_places"
    config.init_from = "runs/scenes_few"

    files = {"images": "data/scenes/pictures"}
    config.data.train = sources(
        few=source("llava", file="data/scenes/few_places.json", **files),
        places=source("llava", file="data/scenes/places.json", **files),
    )

    config.train.steps = 500
    return config
