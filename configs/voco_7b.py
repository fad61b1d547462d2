"""VoCo-LLaMA 7B, the image stage of the released recipe: the language model and the projector train.

Hardware: a TPU v5e-64, or a v5p-16, by the compiler's estimate (the second command, on any Linux machine).

    voco train --config=voco_7b --config.init_from=runs/llava
    voco aot --config=voco_7b --topology=v5e:8x8
"""

from voco_jax.config import default_config, llama_preset, source, sources, vision_preset


def get_config():
    config = default_config()
    config.workdir = "runs/voco_7b"

    config.model.llama = llama_preset("vicuna-7b")
    config.model.llama.vocab_size = 32001  # Llama's 32,000 and <voco>
    config.model.llama.vocab_multiple = 128
    config.model.vision = vision_preset("clip-vit-l-14-336")
    config.model.num_voco_tokens = 1  # 576 patches → 1
    config.model.dtype = "bfloat16"
    config.model.attention = "splash"
    config.model.remat = "full"

    config.data.train = sources(
        mix665k=source("llava", file="data/llava_v1_5_mix665k.json", images="data/images"),
    )
    config.data.test = sources()
    config.data.layout = "group"  # the released recipe: batches of one modality and of like length
    config.data.batch_size = 128  # conversations, each in a row of its own
    config.data.conversations_per_record = 0
    config.data.rows_per_pack = 1
    config.data.row_length = 2048
    config.data.num_workers = 8

    config.optim.learning_rate = 2e-5
    config.optim.b2 = 0.999
    config.optim.warmup_steps = 312  # 3 %

    config.train.freeze = ("vision_tower",)
    config.train.steps = 10400  # two epochs of 665,000 conversations
    return config
