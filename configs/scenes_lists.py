"""Scenes, the first stage: a small LLaVA learns to see: what is at each place of a picture, and where each object is.

Hardware: any CPU.

    voco make-scene-questions data/scenes
    voco train --config=scenes_lists
"""

from voco_jax.config import default_config, source, sources


def get_config():
    config = default_config()
    config.workdir = "runs/scenes_lists"

    config.model.compressor = "none"  # VoCo tokens are in its text too, so that it can begin a run that compresses
    config.model.num_voco_tokens = 1
    config.model.unroll_layers = True
    config.model.vision.image_size = 96
    config.model.vision.patch_size = 16
    config.model.vision.position_init = "sincos"
    config.model.vision.num_hidden_layers = 6
    config.model.vision.num_attention_heads = 4
    config.model.llama.num_hidden_layers = 4
    config.model.llama.num_attention_heads = 4
    config.model.llama.num_key_value_heads = 4
    config.model.llama.head_dim = 32

    config.tokenizer.source = "data/scenes/tokenizer"

    files = {"images": "data/scenes/pictures"}
    config.data.train = sources(lists=source("llava", file="data/scenes/lists.json", **files))
    config.data.test = sources(
        scenes=source("llava", file="data/scenes/test.json", **files),
        held_out=source("llava", file="data/scenes/held_out.json", **files),
    )
    config.data.template = "bare"
    config.data.batch_size = 16  # packs, each of a picture with both its lists
    config.data.rows_per_pack = 2

    config.optim.name = "muon"
    config.optim.learning_rate = 3e-3
    config.optim.warmup_steps = 50

    config.train.steps = 4000
    config.train.checkpoint_every = 500
    config.eval.max_new_tokens = 8
    return config
