"""SmolLM2-135M with CLIP ViT-L/14 at 224 pixels: 256 patches become 1 VoCo token. All of it but CLIP trains.

`runs/smollm2` is made from the two by `voco convert`; without init_from the weights are random.

Hardware: one NVIDIA GPU (attention 'cudnn').

    voco train --config=small_gpu --config.init_from=runs/smollm2
"""

from voco_jax.config import default_config, llama_preset, source, sources, vision_preset


def get_config():
    config = default_config()
    config.workdir = "runs/small_gpu"

    config.model.llama = llama_preset("smollm2-135m")
    config.model.llama.vocab_size = 49153  # SmolLM2's and <voco>
    config.model.vision = vision_preset("clip-vit-l-14")
    config.model.attention = "cudnn"
    config.model.remat = "context"

    config.data.train = sources(
        mix665k=source("llava", file="data/llava_v1_5_mix665k.json", images="data/images"),
    )
    config.data.test = sources()
    config.data.batch_size = 4  # packs a step
    config.data.rows_per_pack = 4
    config.data.row_length = 2048
    config.data.images_per_pack = 20
    config.data.conversations_per_record = 0
    config.data.num_workers = 8

    config.optim.learning_rate = 2e-4
    config.optim.schedule = "wsd"  # training may stop, or go on, at any step before the decay
    config.optim.b2 = 0.999
    config.optim.warmup_steps = 200

    config.train.freeze = ("vision_tower",)
    config.train.on_bad_step = "skip"
    config.train.spike_factor = 3.0
    config.train.steps = 8000
    return config
