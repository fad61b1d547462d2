"""Scenes, the last stage: a picture's 36 patches become 1 VoCo token, from which all questions are answered.

Hardware: any CPU.

    voco train --config=scenes
"""

from voco_jax.config import source, sources
from voco_jax.configs import scenes_places


def get_config():
    config = scenes_places.get_config()
    config.workdir = "runs/scenes"
    config.init_from = "runs/scenes_places"

    files = {"images": "data/scenes/pictures"}
    config.data.train = sources(scenes=source("llava", file="data/scenes/train.json", **files))
    config.data.rows_per_pack = 5  # half of a picture's questions

    config.train.steps = 800
    return config
