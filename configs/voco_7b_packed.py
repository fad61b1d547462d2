"""VoCo-LLaMA 7B on packed batches.

Each chip takes about 20 conversations with their pictures at once, several in a row of tokens; `voco_7b` has one
conversation in a row.

Hardware: a TPU v5p-16 by the compiler's estimate (the second command).

    voco train --config=voco_7b_packed --config.init_from=runs/llava
    voco aot --config=voco_7b_packed --topology=v5p:2x2x2
"""

from voco_jax.configs import voco_7b


def get_config():
    config = voco_7b.get_config()
    config.workdir = "runs/voco_7b_packed"

    config.data.layout = "pack"
    config.data.batch_size = 8  # packs, one a chip of a v5p-16
    config.data.rows_per_pack = 4
    config.data.images_per_pack = 20  # fits the mean lengths of mix665k (docs/data.md)
    config.data.share_images = False  # conversations about one picture come at different times, as in the recipe

    config.optim.warmup_steps = 240  # 3 %
    config.train.steps = 8020  # two epochs of some 32,000 packs
    return config
