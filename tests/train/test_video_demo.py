"""The video stage end to end, in small: an image run goes on with clips, which differ by their order alone."""

import json
from pathlib import Path

import numpy as np
import pytest

import voco_jax
from voco_jax.api import Request
from voco_jax.command_line import parse_arguments
from voco_jax.config import source
from voco_jax.data import make_video_questions as made
from voco_jax.data.sources import easyvqa
from voco_jax.train.loop import train

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).parents[2] / "configs"
DIMENSIONS = {
    "model.llama.hidden_size": 64,
    "model.llama.intermediate_size": 128,
    "model.llama.num_hidden_layers": 3,
    "model.llama.num_attention_heads": 2,
    "model.llama.num_key_value_heads": 2,
    "tokenizer.source": "train",
    "model.llama.initializer_range": 0.125,
    "model.vision.hidden_size": 32,
    "model.vision.intermediate_size": 64,
    "model.vision.num_hidden_layers": 1,
    "model.vision.patch_size": 32,
    "model.vision.initializer_range": 0.18,
}
CHANGES = {
    "data.batch_size": 4,
    "data.images_per_pack": 4,
    "data.rows_per_pack": 10,
    "optim.warmup_steps": 10,
}
IMAGES = {"optim.learning_rate": 3e-3, "train.steps": 20}
VIDEO = {
    "data.video.num_frames": 4,
    "optim.learning_rate": 3e-3,
    "train.freeze": ("vision_tower",),
    "train.steps": 300,
    "train.checkpoint_every": 300,
}
ORDERS = ("rrbb", "bbrr", "rbrb", "brbr")


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Clips of two frames by turns, red and blue all over, alike but for the order; and a few pictures' questions."""
    root = tmp_path_factory.mktemp("clips")
    frames = {"r": np.full((64, 64, 3), (255, 0, 0), np.uint8), "b": np.full((64, 64, 3), (0, 0, 255), np.uint8)}
    rows = []
    for order in ORDERS:
        made.write_clip(root / f"{order}.mp4", [frames[letter] for letter in order for _ in range(made.SECONDS // 4)])
        asked = {"what color is first?": 0, "what color is last?": 3}
        asked |= {f"what color is at second {second}?": second // 2 for second in range(made.SECONDS)}
        for question, place in asked.items():
            answer = {"r": "red", "b": "blue"}[order[place]]
            rows.append({"video": f"{order}.mp4", "question": question, "answer": answer, "kind": "order"})
    (root / "clips.json").write_text(json.dumps(rows))
    pictures = [
        {"image": str(Path(record.images[0].file).name), "conversations": turns}
        for record in easyvqa.load("test")[:4]
        for turns in record.conversations[:2]
    ]
    (root / "pictures.json").write_text(json.dumps(pictures))
    return root


def trained(name: str, changes: dict, clips: Path) -> Path:
    arguments = [f"--config={CONFIGS / name}.py", *(f"--config.{key}={value}" for key, value in changes.items())]
    config = parse_arguments(["train", *arguments])[0]
    images = Path(easyvqa.load("test")[0].images[0].file).parent
    with config.unlocked():
        for pictures in ("easyvqa", "places"):
            config.data.train[pictures] = source("llava", file=str(clips / "pictures.json"), images=str(images))
    return train(config)


@pytest.fixture(scope="module")
def image_run(clips, tmp_path_factory) -> Path:
    workdir = {"workdir": tmp_path_factory.mktemp("runs") / "images"}
    return trained("video_demo_images", DIMENSIONS | CHANGES | IMAGES | workdir, clips)


@pytest.fixture(scope="module")
def run(clips, image_run, tmp_path_factory) -> Path:
    changes = (
        DIMENSIONS | CHANGES | VIDEO | {"workdir": tmp_path_factory.mktemp("runs") / "video", "init_from": image_run}
    )
    for split in ("train", "test"):
        changes |= {f"data.{split}.clips.file": clips / "clips.json", f"data.{split}.clips.videos": clips}
    return trained("video_demo", changes, clips)


def test_order_is_learnt(run, clips):
    """The frames in any order answer half of it at most; in theirs, all."""
    model = voco_jax.load(run)
    rows = json.loads((clips / "clips.json").read_text())
    seen = {order: model.encode_video(clips / f"{order}.mp4") for order in ORDERS}
    assert all(len(one) == 4 and one.num_tokens == 2 for one in seen.values())
    requests = [Request(row["question"], seen[Path(row["video"]).stem]) for row in rows]
    assert model.answers(requests, max_new_tokens=8) == [row["answer"] for row in rows]


def test_the_vision_tower_stays(run, image_run):
    after, before = (voco_jax.load(r).run.checksums for r in (run, image_run))
    assert after.keys() == before.keys()
    same = {key for key in before if before[key] == after[key]}
    assert same == {key for key in before if key.startswith("vision_tower")}
