"""VoCo-LLaMA 13B: `voco_7b` with Vicuna 13B.

Hardware: a TPU v5p-32 by the compiler's estimate (the second command).

    voco train --config=voco_13b --config.init_from=runs/llava-13b
    voco aot --config=voco_13b --topology=v5p:2x2x4
"""

from voco_jax.config import llama_preset
from voco_jax.configs import voco_7b


def get_config():
    config = voco_7b.get_config()
    config.workdir = "runs/voco_13b"
    config.model.llama = llama_preset("vicuna-13b")
    config.model.llama.vocab_size = 32001
    config.model.llama.vocab_multiple = 128
    return config
