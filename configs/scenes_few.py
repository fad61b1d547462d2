"""Scenes: one VoCo token learns to keep what is at each place, of pictures with at most three objects.

It goes on from `scenes_base`. Large batches matter: with 16 pictures in place of 32 it learned little in as many steps.

Hardware: any CPU.

    voco train --config=scenes_few
"""

from voco_jax.config import source, sources
from voco_jax.configs import scenes_base


def get_config():
    config = scenes_base.get_config()
    config.workdir = "runs/scenes_few"
    config.init_from = "runs/scenes_base"

    config.model.compressor = "voco"

    files = {"images": "data/scenes/pictures"}
    config.data.train = sources(few=source("llava", file="data/scenes/few_places.json", **files))
    config.data.batch_size = 32  # packs, each of a picture with nine of its questions, whatever the compressor
    config.data.rows_per_pack = 9

    config.train.steps = 600
    return config
