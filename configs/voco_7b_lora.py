"""VoCo-LLaMA 7B by LoRA: low-rank updates of the language model and the projector, by LLaVA's published LoRA recipe.

Weights of the language model stay as they are (but for the VoCo token's row), so Adam's moments are of 4 % of them.

python -m voco_jax.aot --config=configs/voco_7b_lora.py --topology=v5e:4x4
python -m voco_jax.train --config=configs/voco_7b_lora.py --config.init_from=runs/llava
voco convert merge runs/voco_7b_lora runs/voco_7b_merged
"""

from voco_jax.configs import voco_7b


def get_config():
    config = voco_7b.get_config()
    config.workdir = "runs/voco_7b_lora"

    config.model.lora.rank = 128
    config.model.lora.alpha = 256.0

    config.optim.learning_rate = 2e-4
    config.optim.lr_multiplier.projector = 0.1  # 2e-5
    return config
