"""The video stage end to end, in small: an image run goes on with clips, which differ by their order alone."""

import json
from pathlib import Path

import numpy as np
import pytest

from tools import make_video_questions as made
import voco_jax
from voco_jax.api import Request
from voco_jax.config import parse_command_line
from voco_jax.train.loop import train

CONFIG_FILE = Path(__file__).parents[1] / "configs" / "video_demo.py"
CHANGES = {
    "model.unroll_layers": False,
    "data.video.num_frames": 4,
    "data.batch_size": 2,
    "data.images_per_bin": 4,
    "data.rows_per_bin": 2,
    "data.train.easyvqa.weight": 0.001,
    "data.train.clips.weight": 4.0,
    "optim.learning_rate": 0.01,
    "optim.warmup_steps": 10,
    "train.steps": 250,
    "train.checkpoint_every": 250,
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Four clips of the same two pictures, in the four orders of two halves; questions that their order answers."""
    root = tmp_path_factory.mktemp("clips")
    shapes = made.load_shapes("train")
    red, blue = (next(s.picture() for s in shapes if s.color == color) for color in ("red", "blue"))
    rows = []
    for i, order in enumerate(("rrbb", "bbrr", "rbrb", "brbr")):
        frames = [{"r": red, "b": blue}[letter] for letter in order for _ in range(made.SECONDS // 4)]
        made.write_clip(root / f"{i}.mp4", frames)
        answers = {"what color is first?": order[0], "what color is at second 2?": order[1]}
        rows += [
            {"video": f"{i}.mp4", "question": q, "answer": {"r": "red", "b": "blue"}[a], "kind": "order"}
            for q, a in answers.items()
        ]
    (root / "questions.json").write_text(json.dumps(rows))
    return root


@pytest.fixture(scope="module")
def run(clips, tiny_run, tmp_path_factory) -> Path:
    changes = CHANGES | {
        "workdir": tmp_path_factory.mktemp("runs") / "video",
        "init_from": tiny_run,
        **{f"data.{split}.clips.file": clips / "questions.json" for split in ("train", "test")},
        **{f"data.{split}.clips.videos": clips for split in ("train", "test")},
    }
    arguments = [f"--config={CONFIG_FILE}", *(f"--config.{key}={value}" for key, value in changes.items())]
    return train(parse_command_line(["train", *arguments]))


def test_order_is_learnt(run, clips):
    """Frames without their order answer half of it; with it, all."""
    model = voco_jax.load(run)
    rows = json.loads((clips / "questions.json").read_text())
    seen = {row["video"]: model.see_video(clips / row["video"]) for row in rows}
    assert all(len(one) == 4 and one.num_tokens == 2 for one in seen.values())
    given = model.answers([Request(row["question"], seen[row["video"]]) for row in rows], max_new_tokens=8)
    assert given == [row["answer"] for row in rows]
    # What a clip's frames are in another order, another clip's are: so is the answer
    turned = seen["1.mp4"][[2, 3, 0, 1]]
    stamped = type(turned)(**{**vars(turned), "items": seen["0.mp4"].items})
    assert model.answers([Request("what color is first?", stamped)], max_new_tokens=8) == ["red"]


def test_the_vision_tower_stays(run, tiny_run):
    after, before = (voco_jax.load(r).run.checksums for r in (run, tiny_run))
    same = {key for key in before if before[key] == after[key]}
    assert {key.split(".")[0] for key in same} == {"vision_tower"}
    assert all(key in same for key in before if key.startswith("vision_tower"))
    assert np.isclose(len(before), len(after))
