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
    files = {"images": "data/scenes_128/pictures"}
    with config.unlocked():
        del config.data.train.lists, config.data.train.lessons
        config.data.train.scenes = source("llava", file="data/scenes_128/train.json", **files)
        # A token learns from few objects first to keep what is where
        config.data.train.few = source("llava", file="data/scenes_128/few_places.json", weight=2.0, **files)
        config.data.train.places = source("llava", file="data/scenes_128/places.json", weight=0.5, **files)
    config.data.batch_size = 32  # packs, each of a picture with ten of its questions, whatever the compressor
    config.data.rows_per_pack = 10
    config.data.conversations_per_record = 10

    config.optim.lr_multiplier.vision_tower = 1.0
    config.optim.lr_multiplier.projector = 1.0
    config.train.steps = 600
    return config
