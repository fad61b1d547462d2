"""SmolLM2-135M with a small ViT, the second stage: 64 patches become 1 VoCo token.

Hardware: one NVIDIA GPU (attention 'cudnn').

    voco train --config=smollm2_scenes
"""

from voco_jax.config import source
from voco_jax.configs import smollm2_scenes_base


def get_config():
    config = smollm2_scenes_base.get_config()
    config.workdir = "runs/smollm2_scenes"
    config.init_from = "runs/smollm2_scenes_base"

    config.model.compressor = "voco"
    with config.unlocked():
        del config.data.train.lists, config.data.train.lessons
        for name in ("few_places", "places", "train"):  # at first it learns most from few objects
            file = f"data/scenes_128/{name}.json"
            config.data.train[name] = source("llava", file=file, images="data/scenes_128/pictures")
    config.data.batch_size = 16  # packs, each of a picture with its questions, whatever the compressor
    config.data.rows_per_pack = 10
    config.data.conversations_per_record = 10

    config.optim.lr_multiplier.vision_tower = 1.0
    config.optim.lr_multiplier.projector = 1.0
    config.train.steps = 600
    return config
