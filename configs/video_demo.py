"""The video demo, second stage: a small image model learns to read clips of 8 frames, 2 tokens a frame.

The questions are about time: what moved, in which direction, in which order. `video_demo_images` is the first stage.

Hardware: any CPU.

    voco train --config=video_demo --config.init_from=runs/video_demo_images
"""

from voco_jax.config import source
from voco_jax.configs import video_demo_images


def get_config():
    config = video_demo_images.get_config()
    config.workdir = "runs/video_demo"
    config.init_from = "runs/video_demo_images"

    clips = {"videos": "data/shape_clips/clips"}
    with config.unlocked():  # beside the pictures, so that these are not forgotten
        config.data.train.clips = source("video_qa", file="data/shape_clips/train.json", **clips)
        config.data.test.clips = source("video_qa", file="data/shape_clips/test.json", **clips)
    config.data.video.num_frames = 8
    config.data.batch_size = 6  # packs, each of a clip with its questions, or of 8 pictures with theirs
    config.data.images_per_pack = 8
    config.data.rows_per_pack = 9

    config.train.steps = 3400
    config.train.checkpoint_every = 500
    return config
