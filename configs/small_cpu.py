"""The demo (`easyvqa`) with a smaller model and fewer steps, for trying things out.

It evaluates on the test set every 50 steps and leaves sheets of answers in runs/small_cpu/answers.

Hardware: any CPU; about a minute.

    voco train --config=small_cpu
"""

from voco_jax.configs import easyvqa


def get_config():
    config = easyvqa.get_config()
    config.workdir = "runs/small_cpu"

    config.model.llama.hidden_size = 64
    config.model.llama.intermediate_size = 176
    config.model.llama.head_dim = 32
    config.model.llama.num_hidden_layers = 2
    config.model.vision.hidden_size = 64
    config.model.vision.intermediate_size = 256
    config.model.vision.num_hidden_layers = 1

    config.data.batch_size = 16

    config.optim.warmup_steps = 20
    config.train.steps = 200
    config.train.checkpoint_every = 50
    config.train.keep_best = 1
    config.eval.every = 50
    return config
