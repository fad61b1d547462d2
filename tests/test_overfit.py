"""64 real questions, each about a picture of its own, learned by heart: with all parameters, by LoRA, and with the
language model frozen. The latter two begin with a run that was trained a little, on other pictures."""

import json
from pathlib import Path

from ml_collections import ConfigDict
import numpy as np

from voco_jax.config import parse_command_line, source, sources
from voco_jax.data.sources import easyvqa, open_sources
from voco_jax.eval.answering import answer_all
from voco_jax.run import load_run

CONFIG_FILE = Path(__file__).parents[1] / "configs" / "easyvqa.py"
SIZES = {
    "model.llama.hidden_size": 64,
    "model.llama.intermediate_size": 128,
    "model.llama.head_dim": 32,
    "model.llama.num_hidden_layers": 2,
    "model.vision.hidden_size": 64,
    "model.vision.intermediate_size": 128,
    "model.vision.num_hidden_layers": 1,
    "model.vision.patch_size": 16,
    "model.llama.initializer_range": 0.125,
    "model.vision.initializer_range": 0.125,
}
COMMON = {
    "data.rows_per_bin": 1,
    "data.conversations_per_record": 1,
    "data.batch_size": 32,
    "optim.name": "adamw",
    "optim.warmup_steps": 10,
    "train.log_every": 50,
}


def write_questions(file: Path, split: str, pictures, per_picture: int) -> None:
    """Questions of easy-VQA as a LLaVA file, drawn evenly over what they ask about."""
    rng = np.random.default_rng(0)
    records = easyvqa.load(split)
    rows = [
        {"image": str(records[i].images[0]), "conversations": records[i].conversations[j]}
        for i in pictures
        for j in rng.permutation(len(records[i].conversations))[:per_picture]
    ]
    file.write_text(json.dumps(rows))


def config_of(workdir: Path, questions: Path, **changes) -> ConfigDict:
    keys = SIZES | COMMON | {"workdir": workdir} | {key.replace("__", "."): value for key, value in changes.items()}
    arguments = [f"--config={CONFIG_FILE}", *(f"--config.{key}={value}" for key, value in keys.items())]
    config = parse_command_line(["train", *arguments])
    images = str(easyvqa._package_data())
    config.data.train = sources(questions=source("llava", file=str(questions), images=images))
    config.data.test = sources()
    config.train.checkpoint_every = config.train.steps
    return config


def accuracy(run: Path, questions: Path) -> float:
    loaded = load_run(run)
    config = config_of(run, questions)
    (found,), _ = open_sources(config, "train")
    answers = answer_all(loaded, [found[i] for i in range(len(found))])
    return sum(answer.correct for answer in answers) / len(answers)
