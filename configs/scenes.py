"""Scenes, the second stage: a picture's 36 patches become 1 VoCo token, by the model that `scenes_base` has trained.

Hardware: any CPU.

    voco train --config=scenes
"""

from voco_jax.config import source, sources
from voco_jax.configs import scenes_base


def get_config():
    config = scenes_base.get_config()
    config.workdir = "runs/scenes"
    config.init_from = "runs/scenes_base"

    config.model.compressor = "voco"

    files = {"images": "data/scenes/pictures"}
    config.data.train = sources(scenes=source("llava", file="data/scenes/train.json", **files))
    config.data.batch_size = 16  # packs, each of a picture with its ten questions, whatever the compressor
    config.data.rows_per_pack = 10

    config.train.steps = 800
    return config
