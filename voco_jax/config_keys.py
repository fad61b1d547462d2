"""The config keys: all of them, each with its type, default, range and meaning. `--help` prints this list.

`keys.py` says what `low`, `high`, `below`, `on_resume`, `on_load`, `earlier` and `was` mean. A group's rules hold for
the keys in it that have none of their own. The keys of `model` are in `models/config.py`.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from voco_jax.chat_templates import CHAT_TEMPLATES, CUSTOM, TOKENIZER, ChatTemplate
from voco_jax.keys import DEFAULT, key
from voco_jax.models.config import ModelConfig
from voco_jax.parallel.compilation_cache import DIRECTORY

# The keys of each kind of source with their defaults. All have `weight`: how often an epoch takes each record.
SOURCE_KEYS = {
    "easyvqa": {"split": "train"},
    "llava": {"file": "", "images": "", "videos": ""},  # JSON or JSONL; the directories its paths start from
    "video_qa": {"file": "", "videos": ""},  # JSON or JSONL of video, question, answer
    "array_record": {"files": ""},  # a directory or a pattern; written by voco_jax/data/shards
    "tfds": {
        "name": "", "split": "train", "data_dir": "",
        "image": "image", "question": "question", "answer": "answer", "prompt": "",  # features; or one fixed question
        "question_kind": "",  # a feature, by which evaluation splits its table
    },
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: int = key(1, "groups of devices, each with a copy of the weights", low=-1)
    fsdp: int = key(-1, "devices over which the batch, the weights and the optimizer state are split", low=-1)
    frame: int = key(1, "devices over which the images of a pack are split", low=-1)
    tensor: int = key(1, "devices over which heads and MLP width are split", low=-1)


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    source: str = key("train", "a directory or a hub name; 'train' trains a small one on the data")
    vocab_size: int = key(512, "largest vocabulary, with source 'train'", low=1)


@dataclasses.dataclass(frozen=True)
class TemplateConfig:
    system: str = key(ChatTemplate.system, "before the first turn")
    user: str = key(ChatTemplate.user, "before a question")
    assistant: str = key(ChatTemplate.assistant, "after a question")
    answer: str = key(ChatTemplate.answer, "before an answer")
    end: str = key(ChatTemplate.end, "after an answer")
    image: str = key(ChatTemplate.image, "an image before a question, and what follows each")
    after_images: str = key(ChatTemplate.after_images, "after all images before a question")
    without_images: str = key(ChatTemplate.without_images, "before a question that begins with no image")
    with_system: str = key(
        ChatTemplate.with_system, "all before the first question, with a system text '{system}' in it; '': it has none"
    )
    keeps_newlines: bool = key(ChatTemplate.keeps_newlines, "of turns about images; the released code drops them")


@dataclasses.dataclass(frozen=True)
class ProcessorConfig:
    resize_to: tuple[int, ...] = key((), "before the crop: (shorter side,) or (height, width); (): image_size")
    do_resize: bool = key(True, "False: the middle is cut out of the picture at its own size")
    resample: str = key("bicubic", "Pillow's name of the filter")
    rescale_factor: float = key(1 / 255, "grey levels 0 … 255 are multiplied by it")
    image_mean: tuple[float, ...] = key(
        (0.48145466, 0.4578275, 0.40821073), "of rescaled red, green, blue; default: CLIP's"
    )
    image_std: tuple[float, ...] = key(
        (0.26862954, 0.26130258, 0.27577711), "standard deviations of red, green, blue; default: CLIP's"
    )
    pad_color: tuple[int, ...] = key((), "(red, green, blue), 0 … 255, around a padded picture; (): the mean colour")


@dataclasses.dataclass(frozen=True)
class LimitsConfig:
    picture_pixels: int = key(
        89_478_485, "width × height of a picture; it takes 2^30 bytes in all while it is read", low=1
    )
    picture_side: int = key(16_384, "longer side of a picture, in pixels", low=1)
    row_bytes: int = key(2**20, "bytes of a record in JSON: some 250,000 tokens", low=1)


@dataclasses.dataclass(frozen=True)
class VideoConfig:
    num_frames: int = key(8, "frames taken from a clip, spread evenly; 0: by fps", low=0)
    fps: float = key(0.0, "frames a second of a clip, where num_frames is 0", low=0)
    max_frames: int = key(0, "most frames of a clip, by fps; 0: no limit", low=0)
    random_offset: bool = key(True, "in training, frames are drawn at random within the even spacing")
    timestamps: bool = key(False, "each frame's time stands in the text before it")
    incomplete: bool = key(False, "of a file that is cut off, take the part that is there", earlier=True)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """`config.data`: what is trained on, and how it becomes batches."""

    train: Mapping[str, Any] = key(
        {"easyvqa": {"kind": "easyvqa", "weight": 1.0, **SOURCE_KEYS["easyvqa"]}},
        "sources by name; kinds and their keys: docs/data.md", on_resume="content",
    )  # fmt: skip
    test: Mapping[str, Any] = key(
        {}, "sources by name; empty: none, or easy-VQA's own where it alone is trained on", on_resume="free"
    )
    template: str = key(
        "voco_v1", "text around questions and answers, by name (chat_templates.py); 'custom'; 'tokenizer': its own",
        one_of=(*CHAT_TEMPLATES, CUSTOM, TOKENIZER), on_load="told",
    )  # fmt: skip
    custom_template: TemplateConfig = key(
        TemplateConfig(), "exact text, spaces too; '{eos}' is the end-of-sequence token",
        on_load="told", earlier=DEFAULT,
    )  # fmt: skip
    system: str | None = key(
        None, "the system text, in place of the template's; None: its own", on_load="told", earlier=DEFAULT
    )
    image_position: str = key(
        "front", "of a conversation's only image: before all text, or where its 'text' has it (plain LLaVA: always)",
        one_of=("front", "text"), on_load="told", earlier=DEFAULT,
    )  # fmt: skip
    aspect_ratio: str = key(
        "pad", "to a square with the mean colour; or 'crop' its middle, or 'stretch' it", on_load="told"
    )
    transparency: str = key(
        "white", "transparent parts become white; or 'drop': show their stored colours (LLaVA)",
        on_load="told", earlier="drop",
    )  # fmt: skip
    image_grid: int = key(
        1, "from 2 on a picture is looked at as a whole and in so many rows and columns of tiles, each an image",
        low=1, below=9, on_load="told", earlier=1,
    )  # fmt: skip
    processor: ProcessorConfig = key(
        ProcessorConfig(), "the rest of what makes pixel values: voco_jax/data/images.py",
        on_load="told", earlier=DEFAULT,
    )  # fmt: skip
    limits: LimitsConfig = key(LimitsConfig(), "what is larger is not read", earlier=DEFAULT)

    layout: str = key("pack", "conversations to packs by best fit, or 'group': one a pack, by modality and length")
    batch_size: int = key(16, "packs a step: a pack is some rows of tokens and the images in their text", low=1)
    images_per_pack: int = key(
        1, "places for pictures, or frames of a clip; a record with more is left out", low=0, was="data.images_per_bin"
    )
    rows_per_pack: int = key(
        0, "rows of a pack; 0: chosen from the data, for the fewest tokens an epoch", low=0, was="data.rows_per_bin"
    )
    row_length: int = key(0, "tokens of a row; 0: the length of the longest conversation", low=0)
    conversations_per_record: int = key(8, "conversations taken from a record, drawn anew each time; 0: all", low=0)
    share_images: bool = key(True, "records about one picture go into one pack, which compresses it once")
    loss_weighting: str = key("token", "'token': all labels count alike; 'conversation': all conversations do")
    video: VideoConfig = key(VideoConfig(), "which frames of a clip are looked at", on_load="told")

    random_crop: float = key(
        1.0, "augmentation: the least share of a picture's sides that is kept; 1: no cropping", low=1e-3, high=1
    )
    color_jitter: float = key(0.0, "brightness, contrast and saturation change by at most this share", low=0, below=1)

    max_skipped_fraction: float = key(
        0.01, "largest share of records that cannot be used; with more the run stops",
        low=0, high=1, on_resume="free", was="data.max_bad_share",
    )  # fmt: skip
    cache_dir: str = key("~/.cache/voco_jax", "where indices of large sources are kept", on_resume="free")
    num_workers: int = key(0, "processes that load batches, and that make the index", low=0, on_resume="free")
    num_threads: int = key(
        0, "threads that load batches, in each of these processes; 0: from the machine's cores", low=0, on_resume="free"
    )
    prefetch: int = key(2, "batches made ahead, by each worker; at least one per thread", low=1, on_resume="free")


@dataclasses.dataclass(frozen=True)
class LRMultiplierConfig:
    vision_tower: float = key(1.0, "of the vision tower")
    projector: float = key(1.0, "of the projector")
    compressor: float = key(1.0, "of a compressor with weights of its own (qformer, voco_embedding, average_pool)")
    llama: float = key(1.0, "of the language model")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """`config.optim`: the optimizer and its learning rate."""

    name: str = key("adamw", "or 'muon' (matrices; AdamW for the rest), 'adafactor' (least memory)")
    rounding: str = key(
        "stochastic", "of bfloat16 parameters and moments; 'nearest' loses small updates", earlier="nearest"
    )
    learning_rate: float = key(1e-3, "highest learning rate, reached after the warm-up", low=1e-12)
    schedule: str = key(
        "cosine", "'cosine', 'linear', 'wsd' (constant, then down) or 'constant'",
        one_of=("cosine", "linear", "wsd", "constant"), on_resume="schedule",
    )  # fmt: skip
    warmup_steps: int = key(100, "steps in which the learning rate rises from 0", low=0)
    decay_fraction: float = key(
        0.2, "share of the steps, at their end, in which 'wsd' goes down",
        low=0, high=1, on_resume="schedule", was="optim.decay_share",
    )  # fmt: skip
    min_lr_ratio: float = key(
        0.0, "learning rate of the last step, as a share of learning_rate",
        low=0, high=1, on_resume="schedule", was="optim.final_scale",
    )  # fmt: skip
    lr_multiplier: LRMultiplierConfig = key(
        LRMultiplierConfig(), "factors on the learning rate, by part of the model", was="optim.rate_scale"
    )
    weight_decay: float = key(0.0, "decoupled weight decay, times the learning rate", low=0)
    decayed: tuple[str, ...] = key(("kernel", "embedding"), "the parameters that decay, by the last part of their path")
    b1: float = key(0.9, "decay of Adam's first moment", low=0, below=1)
    b2: float = key(0.99, "decay of Adam's second moment", low=0, below=1)
    clip_norm: float = key(1.0, "gradients with a larger norm are scaled down to it", low=1e-12)


OWN_TEACHERS = ("self", "ema", "prefix")  # teachers that are the model that trains; others are runs' directories


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """`config.train.distill`: what the loss 'distillation' adds to the cross-entropy. docs/training.md explains it."""

    teacher: str = key(
        "",
        "who reads the images whole: 'self' (the weights that train), 'ema' (their running mean), a run's directory "
        "(frozen); or 'prefix': all VoCo tokens teach fewer (train.elastic_k)",
        on_resume="content",
    )  # fmt: skip
    logits: str = key(
        "", "in place of a teacher: a directory that voco store-logits wrote (docs/data.md)", on_resume="content"
    )
    alpha: float = key(0.5, "share of the KL divergence of teacher and student; the cross-entropy has the rest",
                       low=0, high=1)  # fmt: skip
    alpha_end: float | None = key(
        None, "that of the last step, to which it goes in a line; None: it stays", low=0, high=1
    )
    temperature: float = key(1.0, "logits of both are divided by it, and the KL multiplied by its square", low=1e-3)
    top_k: int = key(0, "tokens of the teacher's distribution that count, the most likely; 0: all", low=0)
    whole_weight: float = key(
        0.0, "weight of the cross-entropy of the images read whole, which keeps that ability ('self', 'ema')", low=0
    )
    beta: float = key(0.0, "weight of the distance (1 - cosine) of both hidden states at the labels", low=0)
    layers: tuple[int, ...] = key((), "the layers after which they are compared, from 0; with beta")
    attention: float = key(
        0.0, "weight of the KL divergence of the text's attention to the patches (teacher) and the VoCo tokens'", low=0
    )
    attention_layers: tuple[int, ...] = key((), "the layers whose attention is compared, from 0; with attention")
    ema_decay: float = key(0.999, "decay of the running mean at each step, with teacher 'ema'", low=0, below=1)
    images_per_row: int = key(
        0, "images of a row of text for which there is room to read them whole; 0: as many as the first epoch needs",
        low=0,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """`config.train`: the training loop, its log and its checkpoints."""

    freeze: tuple[str, ...] = key((), "parts that stay as they are, for example ('vision_tower',) or ('llama.layers',)")
    compress_gradients: bool = key(
        True, "whether gradients go through the compress stream; False: memories of images are constants that the "
        "language model learns to read, and vision tower and projector are frozen",
    )  # fmt: skip
    loss: str = key(
        "cross_entropy", "what is minimised, by name (train/losses.py): 'cross_entropy' of the answers' tokens, or "
        "'distillation' from a model that reads images whole, too",
        earlier="cross_entropy",
    )  # fmt: skip
    distill: DistillConfig = key(DistillConfig(), "of the loss 'distillation'", earlier=DEFAULT)
    elastic_k: tuple[int, ...] = key(
        (), "VoCo tokens that text reads of an image, drawn anew for each pack from these numbers; the largest is "
        "model.num_voco_tokens; (): always all", earlier=(),
    )  # fmt: skip
    steps: int = key(1000, "updates, each of a batch", low=1, on_resume="schedule")
    accumulate: int = key(
        1, "pieces that a batch is computed in, one after the other, before an update", low=1, on_resume="free"
    )
    # A run that stopped at a step may skip it when it goes on
    on_bad_step: str = key(
        "stop", "where the loss is not finite, or a spike: 'stop', or 'skip' the update", on_resume="free"
    )
    spike_factor: float = key(
        0.0, "a loss this many times the running mean is a spike; 0: no check", low=0, on_resume="free"
    )
    max_skipped: int = key(
        10, "most steps in a row without an update; with more the run stops", low=0, on_resume="free"
    )
    log_every: int = key(20, "steps between lines of metrics.jsonl", low=1, on_resume="free")
    tensorboard: bool = key(True, "write TensorBoard's files too", on_resume="free")
    wandb: str = key(
        "", "project of Weights & Biases to which metrics are logged too; '': none", on_resume="free", earlier=""
    )
    profile_at: int = key(0, "step at which a profiler trace begins; 0: only on SIGUSR1", low=0, on_resume="free")
    profile_steps: int = key(5, "steps of a trace", low=1, on_resume="free")
    checkpoint_every: int = key(500, "steps between checkpoints; the last step always has one", low=1, on_resume="free")
    keep: int = key(2, "number of the newest checkpoints that are kept", low=1, on_resume="free")
    keep_every: int = key(0, "keep the checkpoints of every so many steps too; 0: none", low=0, on_resume="free")
    keep_best: int = key(0, "keep so many checkpoints of the lowest evaluation loss too", low=0, on_resume="free")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """`config.eval`: looks at the test set, while training and by `voco evaluate`."""

    batch_size: int = key(64, "records, or questions, at once", low=1)
    max_new_tokens: int = key(0, "longest answer, in tokens; 0: room for the test set's longest, from 8 to 256", low=0)
    every: int = key(0, "steps between looks at the test set while training; 0: never", low=0)
    num_batches: int = key(8, "batches of the test set for the loss while training", low=0)
    num_answers: int = key(64, "questions of the test set that are answered while training", low=0)


@dataclasses.dataclass(frozen=True)
class Config:
    """All keys. A user's `ConfigDict` has the same (`default_config`); `typed` makes this of it."""

    workdir: str = key(
        "runs/default", "checkpoints, this config, the tokenizer and the metrics go here", on_resume="free"
    )
    seed: int = key(0, "random seed: first weights, order of the data, augmentation", low=0, below=2**31)
    init_from: str = key("", "a run whose weights, dimensions and tokenizer this one begins with")
    compilation_cache: str = key(
        DIRECTORY, "compiled programs are kept here for the next start; '': they are not kept",
        on_resume="free", on_load="free", earlier=DEFAULT,
    )  # fmt: skip
    model: ModelConfig = key(
        ModelConfig(), "what is trained; with init_from the dimensions are those of that run", on_load="refused"
    )
    mesh: MeshConfig = key(
        MeshConfig(), "devices along each axis (voco_jax/parallel/mesh.py); -1: as many as the others leave",
        on_resume="free",
    )  # fmt: skip
    tokenizer: TokenizerConfig = key(TokenizerConfig(), "with init_from that of the run")
    data: DataConfig = key(DataConfig(), "docs/data.md")
    optim: OptimConfig = key(OptimConfig(), "docs/optimizer.md")
    train: TrainConfig = key(TrainConfig(), "docs/training.md")
    eval: EvalConfig = key(EvalConfig(), "docs/evaluation.md", on_resume="free")
