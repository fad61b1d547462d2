"""Scenes, the first stage: a small LLaVA, which reads all 36 patches of a picture. `scenes` teaches it to compress.

It trains on conversations about pictures: all questions, and then all objects in one answer.

Hardware: any CPU.

    voco make-scene-questions data/scenes
    voco train --config=scenes_base
"""

from voco_jax.config import default_config, source, sources


def get_config():
    config = default_config()
    config.workdir = "runs/scenes_base"

    config.model.compressor = "none"  # VoCo tokens are in its text too, so that it can begin a run that compresses
    config.model.num_voco_tokens = 1
    config.model.unroll_layers = True
    config.model.vision.image_size = 96
    config.model.vision.patch_size = 16
    config.model.vision.position_init = "sincos"
    config.model.vision.num_hidden_layers = 3
    config.model.vision.num_attention_heads = 4
    config.model.llama.num_hidden_layers = 4
    config.model.llama.num_attention_heads = 4
    config.model.llama.num_key_value_heads = 4
    config.model.llama.head_dim = 32

    config.tokenizer.source = "data/scenes/tokenizer"

    files = {"images": "data/scenes/pictures"}
    config.data.train = sources(lessons=source("llava", file="data/scenes/lessons.json", **files))
    config.data.test = sources(
        scenes=source("llava", file="data/scenes/test.json", **files),
        held_out=source("llava", file="data/scenes/held_out.json", **files),
    )
    config.data.template = "bare"
    config.data.batch_size = 16
    config.data.rows_per_pack = 1

    config.optim.name = "muon"
    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 50

    config.train.steps = 4000
    config.train.checkpoint_every = 500
    config.eval.max_new_tokens = 8
    return config
