"""The image model that the video demo begins with: easy-VQA and where things are, 2 VoCo tokens of 16 patches.

python tools/make_video_questions.py data/shape_clips
python -m voco_jax.train --config=configs/video_demo_images.py
"""

from voco_jax.config import source
from voco_jax.configs import easyvqa


def get_config():
    config = easyvqa.get_config()
    config.workdir = "runs/video_demo_images"

    config.model.num_voco_tokens = 2
    # Of a clip's frames there are many: fewer patches, so that what is left can be spent on what reads the memories.
    config.model.vision.patch_size = 16
    config.model.vision.position_init = "sincos"  # movement is a matter of places
    config.model.llama.num_hidden_layers = 6
    config.model.llama.num_attention_heads = 4
    config.model.llama.num_key_value_heads = 4
    config.model.llama.head_dim = 32

    config.tokenizer.source = "data/shape_clips/tokenizer"  # knows the words of the video stage as well

    with config.unlocked():
        config.data.train.places = source(
            "llava", file="data/shape_clips/pictures.json", images="data/shape_clips/pictures"
        )
    config.data.rows_per_pack = 2

    config.optim.learning_rate = 1e-3

    config.train.steps = 1500
    return config
