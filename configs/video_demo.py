"""Teach the demo's image model to read video: clips of 8 frames, 2 tokens a frame, questions about time.

python tools/make_video_questions.py data/shape_clips
python -m voco_jax.train --config=configs/video_demo.py --config.init_from=runs/easyvqa
"""

from configs import easyvqa
from voco_jax.config import source, sources


def get_config():
    config = easyvqa.get_config()
    config.workdir = "runs/video_demo"
    config.init_from = "runs/easyvqa"

    config.model.num_voco_tokens = 2

    clips = {"videos": "data/shape_clips/clips"}
    config.data.train = sources(
        clips=source("video_qa", file="data/shape_clips/train.json", **clips),
        easyvqa=source("easyvqa"),  # so that pictures are not forgotten
    )
    config.data.test = sources(
        clips=source("video_qa", file="data/shape_clips/test.json", **clips),
        easyvqa=source("easyvqa", split="test"),
    )
    config.data.video.num_frames = 8
    config.data.video.timestamps = True
    config.data.batch_size = 8  # bins, each of a clip with its questions, or of 8 pictures with theirs
    config.data.images_per_bin = 8
    config.data.rows_per_bin = 7

    config.optim.learning_rate = 1e-3

    config.train.freeze = ("vision_tower",)
    config.train.steps = 2600
    config.train.checkpoint_every = 500
    return config
