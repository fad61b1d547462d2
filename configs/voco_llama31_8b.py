"""VoCo on Llama 3.1 8B (grouped heads, 128,257 tokens), for the rest as `voco_7b`.

Hardware: a TPU v5e-64 by the compiler's estimate (the last command).

    voco convert to-jax --llm DIR --vision-tower DIR runs/llama31 --init-missing
    voco train --config=voco_llama31_8b --config.init_from=runs/llama31
    voco aot --config=voco_llama31_8b --topology=v5e:8x8
"""

from voco_jax.config import llama_preset
from voco_jax.configs import voco_7b


def get_config():
    config = voco_7b.get_config()
    config.workdir = "runs/voco_llama31_8b"

    config.model.llama = llama_preset("llama-3.1-8b")
    config.model.llama.vocab_size = 128257  # Llama's 128,256 and <voco>
    config.model.llama.vocab_multiple = 128
    return config
