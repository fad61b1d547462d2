"""Train a small VoCo-LLaMA from scratch on easy-VQA, one VoCo token a picture.

python -m voco_jax.train --config=configs/easyvqa.py
"""

from voco_jax.config import default_config


def get_config():
    config = default_config()
    config.workdir = "runs/easyvqa"
    config.model.unroll_layers = True
    config.data.template = "bare"
    config.optim.name = "muon"
    return config
