"""Scenes, the second stage: a small LLaVA, which reads all 36 patches of a picture. `scenes_few`, `scenes_places` and
`scenes` teach it to compress.

It trains on conversations about pictures: all questions, and then all objects in one answer.

Hardware: any CPU.

    voco train --config=scenes_lists
    voco train --config=scenes_base
"""

from voco_jax.config import source, sources
from voco_jax.configs import scenes_lists


def get_config():
    config = scenes_lists.get_config()
    config.workdir = "runs/scenes_base"
    config.init_from = "runs/scenes_lists"

    files = {"images": "data/scenes/pictures"}
    config.data.train = sources(lessons=source("llava", file="data/scenes/lessons.json", **files))
    config.data.rows_per_pack = 1

    config.train.steps = 3000
    return config
