"""VoCo-LLaMA 7B, the image stage with a teacher: LLaVA reads all patches and teaches what VoCo tokens must keep.

The loss is half cross-entropy and half the KL divergence of the answers' tokens; docs/training.md, Distillation.

Hardware: a TPU v5e-64 or v5p-16, by the compiler's estimate (the second command, on any Linux machine).

    voco train --config=voco_7b_distill --config.init_from=runs/llava
    voco aot --config=voco_7b_distill --topology=v5e:8x8
"""

from voco_jax.configs import voco_7b


def get_config():
    config = voco_7b.get_config()
    config.workdir = "runs/voco_7b_distill"

    config.train.loss = "distillation"
    # Frozen, over the same mesh: `voco convert to-jax llava-1.5-7b-hf runs/llava_plain --compressor none`.
    # Or 'self': the weights that train.
    config.train.distill.teacher = "runs/llava_plain"
    config.train.distill.alpha = 0.5
    return config
