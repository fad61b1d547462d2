"""VoCo-LLaMA 7B on video: 64 frames of 576 patches a clip become 8 tokens each; 4 devices share the frames of a clip.

It begins with a run on images (with any number of VoCo tokens). Each frame is compressed by itself, and the text reads
the tokens of all frames in their order.

Hardware: a TPU v5e-64 by the compiler's estimate (the second command).

    voco train --config=video_7b --config.init_from=runs/voco_7b
    voco aot --config=video_7b --topology=v5e:8x8
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
        # Pictures beside the clips keep what the image run can do; layout "pack" fills the packs that have no clip:
        # mix665k=source("llava", file="data/llava_v1_5_mix665k.json", images="data/images", weight=0.1),
    )
    # config.data.layout = "pack"
    config.data.template = "voco_video"  # released prompts for video; also voco_video_events, voco_video_helpful_events
    config.data.video.num_frames = 64
    # config.data.video.timestamps = True  # "00:07.2" before each frame: about 9 tokens more; needs longer rows
    config.data.batch_size = 16  # clips, each with one conversation
    config.data.images_per_pack = 64
    config.data.row_length = 1024  # 512 of them are slots

    # config.train.compress_gradients = False  # memories are constants: only reading them is learned
    config.optim.warmup_steps = 188  # 3 %
    config.train.steps = 6250  # one epoch of 100,000 questions
    return config
