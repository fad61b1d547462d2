"""VoCo-LLaMA 7B on video: 64 frames of 576 patches a clip, 8 tokens a frame, a clip's frames spread over 4 devices.

It begins with an image run (K may be another there) and goes on with clips: each frame is compressed by itself, and the
text reads all frames' tokens in their order.

python -m voco_jax.train --config=configs/video_7b.py --config.init_from=runs/voco_7b
python -m voco_jax.aot --config=configs/video_7b.py --topology=v5e:8x8
"""

from voco_jax.config import source, sources
from voco_jax.configs import voco_7b


def get_config():
    config = voco_7b.get_config()
    config.workdir = "runs/video_7b"

    config.mesh.frame = 4
    config.model.num_voco_tokens = 8

    config.data.train = sources(
        video_chatgpt=source("video_qa", file="data/VideoInstruct100K.json", videos="data/activitynet"),
        # Pictures beside the clips keep what the image run can do. With layout "pack" packs without a clip are filled:
        # mix665k=source("llava", file="data/llava_v1_5_mix665k.json", images="data/images", weight=0.1),
    )
    # config.data.layout = "pack"
    config.data.template = "voco_video"  # released prompts for video; also voco_video_events, voco_video_helpful_events
    config.data.video.num_frames = 64
    # config.data.video.timestamps = True  # "00:07.2" before each frame: some 9 tokens a frame, for a longer row_length
    config.data.batch_size = 16  # clips, each with one conversation
    config.data.images_per_pack = 64
    config.data.row_length = 1024  # 512 of them are slots

    # config.train.compress_gradients = False  # memories as constants: the language model learns to read them alone
    config.optim.warmup_steps = 188  # 3 %
    config.train.steps = 6250  # one epoch of 100,000 questions
    return config
