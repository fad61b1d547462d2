"""VoCo-LLaMA 7B on packed batches: a chip takes some 20 conversations with their pictures at once, where voco_7b has
one a row.

python -m voco_jax.aot --config=configs/voco_7b_packed.py --topology=v5p:2x2x2
python -m voco_jax.train --config=configs/voco_7b_packed.py --config.init_from=runs/llava
"""

from voco_jax.configs import voco_7b


def get_config():
    config = voco_7b.get_config()
    config.workdir = "runs/voco_7b_packed"

    config.data.layout = "pack"
    config.data.batch_size = 8  # packs, one a chip of a v5p-16
    config.data.rows_per_pack = 4
    config.data.images_per_pack = 20  # what mix665k's mean lengths ask for (docs/data.md)
    config.data.share_images = False  # conversations about one picture come at different times, as in the recipe

    config.optim.warmup_steps = 240  # 3 %
    config.train.steps = 8020  # two epochs of some 32,000 packs
    return config
