"""LLaVA's first stage: the projector alone trains, on pictures and captions.

Hardware: a TPU v5e-16 by the compiler's estimate (the second command).

    voco train --config=projector_7b --config.init_from=runs/vicuna
    voco aot --config=projector_7b --topology=v5e:4x4
"""

from voco_jax.config import source, sources
from voco_jax.configs import voco_7b


def get_config():
    config = voco_7b.get_config()
    config.workdir = "runs/projector_7b"

    config.model.compressor = "none"
    config.data.train = sources(
        captions=source("llava", file="data/blip_laion_cc_sbu_558k.json", images="data/pretrain"),
    )
    config.data.template = "plain"
    config.data.batch_size = 256
    config.data.row_length = 768  # 576 patches and a caption

    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 65  # 3 %

    config.train.freeze = ("vision_tower", "llama")
    config.train.steps = 2180  # one epoch of 558,000 captions
    return config
