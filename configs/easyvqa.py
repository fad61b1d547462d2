"""Train a small VoCo-LLaMA from scratch on easy-VQA: 64 patches of a picture become 1 VoCo token.

Hardware: any CPU; a few minutes on two cores.

    voco train --config=easyvqa
"""

from voco_jax.config import default_config, source, sources


def get_config():
    config = default_config()
    config.workdir = "runs/easyvqa"

    config.model.num_voco_tokens = 1
    config.model.unroll_layers = True  # the layers are few and small: on a CPU this is faster than a loop

    config.data.test = sources(easyvqa=source("easyvqa", split="test"))
    config.data.template = "bare"  # no system prompt: it would be the same for every question
    config.data.batch_size = 32
    config.data.conversations_per_record = 4  # questions that share one compression of their picture
    config.data.rows_per_pack = 4  # one question a row: they are about equally long

    config.optim.name = "muon"
    config.optim.learning_rate = 6e-4
    config.optim.warmup_steps = 50

    config.train.steps = 850
    config.train.checkpoint_every = 250
    return config
