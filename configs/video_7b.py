"""VoCo-LLaMA 7B on video: 64 frames of 576 patches a clip, 8 tokens a frame, a clip's frames spread over 4 devices.

python -m voco_jax.train --config=configs/video_7b.py --config.init_from=runs/voco_7b
python -m voco_jax.aot --config=configs/video_7b.py --topology=v5e:8x8
"""

from configs import voco_7b
from voco_jax.config import source, sources


def get_config():
    config = voco_7b.get_config()
    config.workdir = "runs/video_7b"

    config.mesh.frame = 4
    config.model.num_voco_tokens = 8

    config.data.train = sources(
        video_chatgpt=source("video_qa", file="data/VideoInstruct100K.json", videos="data/activitynet"),
    )
    config.data.template = "voco_video"
    config.data.video.num_frames = 64
    config.data.batch_size = 16  # clips, each with one conversation
    config.data.images_per_bin = 64
    config.data.row_length = 1024  # 512 of them are slots
    return config
