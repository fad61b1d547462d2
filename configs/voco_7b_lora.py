"""VoCo-LLaMA 7B by LoRA, with the settings of LLaVA's LoRA recipe.

Low-rank updates of the language model train, and the projector. The language model's own weights are frozen (but for
the VoCo token's row), so Adam's moments are kept for 4 % of the weights. The last command merges the updates into the
weights.

Hardware: a TPU v5e-64 by the compiler's estimate (the second command).

    voco train --config=voco_7b_lora --config.init_from=runs/llava
    voco aot --config=voco_7b_lora --topology=v5e:8x8
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
