"""A run small enough to train inside a test: `configs/easyvqa.py` with every dimension cut down."""

from pathlib import Path

from voco_jax.command_line import parse_arguments

CONFIG_FILE = Path(__file__).parents[2] / "configs" / "easyvqa.py"
OVERRIDES = {
    "model.llama.hidden_size": 32,
    "model.llama.intermediate_size": 32,
    "model.llama.head_dim": 16,
    "model.llama.num_hidden_layers": 2,
    "model.vision.hidden_size": 16,
    "model.vision.intermediate_size": 16,
    "model.vision.num_hidden_layers": 1,
    "model.unroll_layers": False,
    "data.train.easyvqa.split": "test",  # a quarter of the questions
    "data.batch_size": 4,
    "data.conversations_per_record": 2,
    "data.rows_per_pack": 2,
    "optim.warmup_steps": 2,
    "optim.learning_rate": 0.01,
    "train.steps": 40,
    "train.log_every": 4,
    "train.checkpoint_every": 10,
}


def arguments(workdir: Path, **changes) -> list[str]:
    """Arguments of `voco train`; changes are written with __ for the dot."""
    keys = OVERRIDES | {"workdir": workdir} | {key.replace("__", "."): value for key, value in changes.items()}
    return [f"--config={CONFIG_FILE}", *(f"--config.{key}={value}" for key, value in keys.items())]


def config(workdir: Path, **changes):
    return parse_arguments(["train", *arguments(workdir, **changes)])[0]
