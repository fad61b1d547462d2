"""Train a small VoCo-LLaMA from scratch on easy-VQA, one VoCo token a picture (64 patches → 1).

python -m voco_jax.train --config=configs/easyvqa.py
"""

from voco_jax.config import default_config, source, sources


def get_config():
    config = default_config()
    config.workdir = "runs/easyvqa"

    config.model.num_voco_tokens = 1
    config.model.unroll_layers = True  # few and small: faster on a CPU than a scan

    config.data.test = sources(easyvqa=source("easyvqa", split="test"))
    config.data.template = "bare"  # a system prompt that never changes has nothing to say here
    config.data.batch_size = 32
    config.data.conversations_per_record = 4  # questions that share one compression of their picture
    config.data.rows_per_pack = 4  # each in a row of its own: they are all about equally long

    config.optim.name = "muon"
    config.optim.learning_rate = 6e-4
    config.optim.warmup_steps = 50

    config.train.steps = 850
    config.train.checkpoint_every = 250
    return config
