"""The video demo, first stage: an image model on easy-VQA and on where things are; 16 patches become 2 VoCo tokens.

Hardware: any CPU.

    voco make-video-questions data/shape_clips
    voco train --config=video_demo_images
"""

from voco_jax.config import source
from voco_jax.configs import easyvqa


def get_config():
    config = easyvqa.get_config()
    config.workdir = "runs/video_demo_images"

    config.model.num_voco_tokens = 2
    # A clip has many frames: fewer patches a frame leave more for the layers that read the memories.
    config.model.vision.patch_size = 16
    config.model.vision.position_init = "sincos"  # questions about movement need positions
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
