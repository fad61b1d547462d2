"""VoCo on Qwen3 8B (grouped heads, norms of queries and keys) with SigLIP 2's 729 patches, for the rest as `voco_7b`.

Hardware: a TPU v5e-64 by the compiler's estimate (the last command): 14.9 of 15.75 GiB.

    voco convert to-jax --llm DIR --vision-tower DIR runs/qwen3 --init-missing
    voco train --config=voco_qwen3_8b --config.init_from=runs/qwen3
    voco aot --config=voco_qwen3_8b --topology=v5e:8x8
"""

from voco_jax.config import llama_preset, vision_preset
from voco_jax.configs import voco_7b


def get_config():
    config = voco_7b.get_config()
    config.workdir = "runs/voco_qwen3_8b"

    config.model.llama = llama_preset("qwen3-8b")  # 151,936 rows: 267 are no token of Qwen's, and one becomes <voco>
    config.model.llama.vocab_multiple = 128
    config.model.vision = vision_preset("siglip2-so400m-14-384")  # 729 patches → 1
    return config
