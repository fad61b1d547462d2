"""VoCo on Llama 3.1 8B: grouped heads, 128,257 tokens; the image stage of configs/voco_7b.py for the rest.

python -m voco_jax.aot --config=configs/voco_llama31_8b.py --topology=v5e:8x8
voco convert to-jax --llm DIR --vision-tower DIR runs/llama31 --init-missing
python -m voco_jax.train --config=configs/voco_llama31_8b.py --config.init_from=runs/llama31
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
