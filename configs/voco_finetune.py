"""Teach a converted LLaVA to compress, on easy-VQA: a short run with the optimizer of the released recipe.

All weights train. It shows that the way from a converted checkpoint to training works; `voco_7b` is the recipe itself.

Hardware: that of the converted model; for a 7B a TPU slice as of `voco_7b`, for a small one a CPU.

    voco train --config=voco_finetune --config.init_from=runs/llava --config.workdir=runs/voco
"""

from voco_jax.config import default_config


def get_config():
    config = default_config()
    config.workdir = "runs/voco"

    config.model.num_voco_tokens = 2  # as the released checkpoints

    config.data.batch_size = 32
    config.data.conversations_per_record = 4  # 128 conversations a step
    config.data.rows_per_pack = 4

    config.optim.learning_rate = 2e-5
    config.optim.b2 = 0.999
    config.optim.warmup_steps = 10

    config.train.steps = 300
    config.train.checkpoint_every = 100
    return config
