"""What `benchmarks.aot_table` compiles: which run on which slice, and the peer's figures for the same shapes."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Case:
    name: str
    config: str
    topology: str
    step: str = "train"
    overrides: dict = field(default_factory=dict)  # config keys

    @property
    def arguments(self) -> list[str]:
        keys = [f"--config.{key}={value}" for key, value in self.overrides.items()]
        return [f"--config={self.config}", *keys, f"--topology={self.topology}", f"--step={self.step}"]


@dataclass(frozen=True)
class Peer:
    """MaxText (2026-08-22), Llama-2-7B: full remat, compiled and estimated by the same method with the same libtpu."""

    hbm_gib: float  # total a device
    seconds: tuple[float, float]  # B, A


IMAGE_STAGE, VIDEO = "configs/voco_7b.py", "configs/video_7b.py"
DISTILLED, QWEN = "configs/voco_7b_distill.py", "configs/voco_qwen3_8b.py"

# ---- Does it fit? Global batches of 128 conversations, a picture each, as LLaVA-1.5 is fine-tuned ----------------

SLICES = {  # chips: topology, and what makes the batch divide
    "v5e-64": ("v5e:8x8", {}),
    "v5e-256": ("v5e:16x16", {"mesh.tensor": 2}),
    "v5p-16": ("v5p:2x2x2", {}),
    "v6e-16": ("v6e:4x4", {}),
    "v6e-64": ("v6e:8x8", {}),
}
IRONWOOD = "tpu7x:2x2x1"  # a host: 4 chips of 2 devices
FITS = (
    *(
        Case(f"7B, K = {k}, {name}", IMAGE_STAGE, topology, "train", {"model.num_voco_tokens": k} | overrides)
        for name, (topology, overrides) in SLICES.items()
        for k in (1, 128)
    ),
    Case("7B, K = 1, tpu7x-8", IMAGE_STAGE, IRONWOOD),
    Case("13B, K = 1, v5p-32", "configs/voco_13b.py", "v5p:2x2x4"),
    *(
        Case(f"Qwen3-8B and SigLIP 2, K = 1, {name}", QWEN, topology)
        for name, topology in (("v5e-64", "v5e:8x8"), ("v6e-64", "v6e:8x8"), ("tpu7x-8", IRONWOOD))
    ),
    Case("projector, v5e-16", "configs/projector_7b.py", "v5e:4x4"),
    Case("video, K = 8, v5e-64", VIDEO, "v5e:8x8"),
    Case("compress 128 pictures, v5e-64", IMAGE_STAGE, "v5e:8x8", "compress"),
    Case("read 128 prompts, v5e-64", IMAGE_STAGE, "v5e:8x8", "read"),
    Case("decode 128 tokens, v5e-64", IMAGE_STAGE, "v5e:8x8", "decode"),
)

# What does a teacher cost? Beside the same step with cross-entropy alone
TAUGHT = tuple(
    (
        Case(
            f"7B taught by {who}, K = 1, {name}",
            DISTILLED,
            SLICES[name][0],
            "train",
            {"train.distill.teacher": teacher},
        ),
        f"7B, K = 1, {name}",
    )
    for name in ("v5e-64", "v5p-16")
    for who, teacher in (("another 7B", "runs/llava"), ("itself", "self"))
)

# ---- How fast? Llama-2-7B on text, beside a peer; the same with pictures -----------------------------------------


def text(name: str, topology: str, chips: int, rows: int) -> Case:
    """`rows` sequences of 2,048 tokens a chip."""
    keys = {"data.images_per_pack": 0, "data.batch_size": rows * chips}
    return Case(f"text, {name}, {rows} a chip", IMAGE_STAGE, topology, "train", keys)


SPEED = (
    (text("v5e-64", "v5e:8x8", 64, 1), Peer(4.28, (0.74, 0.83))),
    (text("v5e-64", "v5e:8x8", 64, 2), Peer(5.34, (1.50, 1.63))),
    (text("v5e-64", "v5e:8x8", 64, 4), Peer(7.27, (3.04, 3.27))),
    (text("v5e-16", "v5e:4x4", 16, 4), Peer(15.46, (3.62, 4.23))),
    (text("v5p-16", "v5p:2x2x2", 8, 2), Peer(18.56, (0.71, 0.84))),
    (text("v5p-16", "v5p:2x2x2", 8, 4), Peer(22.19, (1.46, 1.67))),
    (text("v6e-16", "v6e:4x4", 16, 4), Peer(14.77, (1.43, 1.75))),
)

# Two pictures a chip and 1,408 read tokens each, against one causal row each of the same 1,988 tokens.
PICTURES, READ_TOKENS, SAME_TOKENS = 2, 1408, 1408 + 580
PICTURE_SPEED = tuple(
    Case(
        f"pictures {kind}, v5e-64, {PICTURES} a chip", IMAGE_STAGE, "v5e:8x8", "train",
        {"model.compressor": compressor, "data.batch_size": PICTURES * 64, "data.row_length": length},
    )
    for kind, compressor, length in (("at K = 1", "voco", READ_TOKENS), ("uncompressed", "none", SAME_TOKENS))
)  # fmt: skip

# ---- How does it grow? A clip a step and group of devices, 1 to 256 frames ----------------------------------------


def clip(frames: int, devices: int) -> Case:
    keys = {"data.images_per_pack": frames, "data.batch_size": 8 // devices, "data.row_length": 4096}
    return Case(f"{frames} frames over {devices}", VIDEO, "v5p:2x2x2", "train", keys | {"mesh.frame": devices})


GROWTH = {  # frames of a clip: case
    "a clip on one chip": {frames: clip(frames, 1) for frames in (1, 16, 128)},
    "a clip over 8 chips": {frames: clip(frames, 8) for frames in (64, 256)},
}

CASES = (
    *FITS,
    *(case for case, _ in TAUGHT),
    *(case for case, _ in SPEED),
    *PICTURE_SPEED,
    *(case for cases in GROWTH.values() for case in cases.values()),
)
