"""Training as its users meet it: it learns, survives being killed, and refuses what does not fit together."""

import contextlib
import json
import os
from pathlib import Path
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import tiny
from voco_jax.checkpoint.checkpointer import Checkpointer
from voco_jax.checkpoint.init_from import begin_with_run
from voco_jax.checkpoint.run import load_run
from voco_jax.checkpoint.workdir import check_workdir
from voco_jax.config import default_config, load_config, save_config, set_value, source, sources, sources_to_score
from voco_jax.data.training_data import open_training_data
from voco_jax.errors import UserError
from voco_jax.train.actions import StepDone
from voco_jax.train.goodput import Goodput
from voco_jax.train.loop import _set_up, train
from voco_jax.train.periodic import SaveCheckpoint


def losses(run: Path) -> dict[int, float]:
    """By step; the tiny run logs every 4 steps and at its checkpoints, every 10."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 10, 12, 16, 20, 24, 28, 30, 32, 36, 40]
    return {line["step"]: line["loss"] for line in lines}


def params(run: Path, step: int | None = None):
    return nnx.to_pure_dict(nnx.state(load_run(run, step=step).model))


def test_the_loss_falls(tiny_run):
    loss = losses(tiny_run)
    assert loss[40] < 0.3 * loss[4]


def test_a_run_directory_is_whole(tiny_run):
    assert sorted(path.name for path in tiny_run.iterdir()) == [
        ".lock",
        "checkpoints",
        "config.json",
        "goodput.json",
        "metrics.jsonl",
        "tensorboard",
        "tokenizer",
    ]
    assert sorted(path.name for path in (tiny_run / "checkpoints").iterdir()) == ["30", "40"]
    assert load_run(tiny_run).step == 40


def train_and_kill_when(condition, arguments: list[str]) -> None:
    """Train in a process of its own, and kill it without warning as soon as the condition holds."""
    command = [sys.executable, "-m", "voco_jax.train", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=tiny.CONFIG_FILE.parents[1])
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, "ended before it could be killed"
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.multiprocess
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tiny_run, tmp_path, capsys):
    """Killed between two checkpoints; parameters and losses end bit for bit alike."""
    run = tmp_path / "run"
    train_and_kill_when((run / "checkpoints" / "10").exists, tiny.arguments(run))
    step = Checkpointer(run).steps()[0]
    assert 10 <= step < 40
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4')  # what a machine that loses its power leaves of the last line

    train(tiny.config(run))
    assert f"resuming, at step {step} of 40" in capsys.readouterr().out
    assert losses(run) == losses(tiny_run)
    jax.tree.map(np.testing.assert_array_equal, params(run), params(tiny_run))


@pytest.mark.multiprocess
def test_a_run_killed_before_its_first_checkpoint_may_be_replaced(tmp_path):
    run = tmp_path / "run"
    train_and_kill_when((run / "metrics.jsonl").exists, tiny.arguments(run, train__checkpoint_every=10**6))
    assert Checkpointer(run).steps() == []
    train(tiny.config(run, train__steps=4))
    assert load_run(run).step == 4


def test_a_complete_run_is_left_alone(tiny_run, tmp_path, capsys):
    """Wherever it stands, and however it is asked to say what it does."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    before = (run / "metrics.jsonl").read_text()
    train(tiny.config(run, train__log_every=7, eval__max_new_tokens=9))
    assert "complete, at step 40 of 40" in capsys.readouterr().out
    assert (run / "metrics.jsonl").read_text() == before
    assert load_run(run).config.eval.max_new_tokens == 9


def test_rows_that_the_data_choose(tiny_run, tmp_path, capsys):
    """They are written into the run's config, from which a resumed run has them."""
    run = _set_up(tiny.config(tmp_path / "run", data__rows_per_pack=0, data__conversations_per_record=3))
    assert run.config.data.rows_per_pack == run.batches.loader.plan.shape.rows == 3
    assert "data: 3 rows a pack, which costs least (config.data.rows_per_pack)" in capsys.readouterr().out
    again = shutil.copytree(tiny_run, tmp_path / "again")
    train(tiny.config(again, data__rows_per_pack=0))
    assert "complete, at step 40 of 40" in capsys.readouterr().out
    assert load_run(again).config.data.rows_per_pack == tiny.OVERRIDES["data.rows_per_pack"]


def test_what_is_mostly_padding_is_told(tmp_path):
    said = []
    config = tiny.config(tmp_path / "run", data__rows_per_pack=8, data__conversations_per_record=1)
    open_training_data(config, log=said.append)
    found = re.search(r"most of that is padding; config.data.rows_per_pack=1 would need (\S+) times", "\n".join(said))
    assert float(found[1]) > 2


def test_the_test_set_is_that_of_the_training_set(tmp_path):
    """Where nothing is given: easy-VQA's own, and none of other data."""
    config = default_config()
    assert not config.data.test and sources_to_score(config.data).easyvqa.split == "test"
    config.data.train = sources(easyvqa=source("easyvqa"), mine=source("llava", file="mine.json"))
    assert not sources_to_score(config.data)
    config.data.test = sources(mine=source("llava", file="test.json"))
    assert [*sources_to_score(config.data)] == ["mine"]


def test_a_directory_of_another_run(tiny_run):
    with pytest.raises(UserError, match=r"holds a run with model.num_voco_tokens = 1, this config has 2; take another"):
        train(tiny.config(tiny_run, model__num_voco_tokens=2))


@pytest.mark.parametrize("names", [["precious.txt"], ["config.json", "model.safetensors"], ["config.json"]])
def test_a_directory_of_other_things(tmp_path, names):
    """Somebody's language model, say, with a config.json of its own; or a run's results without its checkpoints."""
    for name in names:
        (tmp_path / name).write_text("mine")
    for workdir in tmp_path, tmp_path / names[0]:
        with pytest.raises(UserError, match="expected a run or an empty directory, found other files"):
            train(tiny.config(workdir))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert all((tmp_path / name).read_text() == "mine" for name in names)


def test_a_directory_held_by_another_process(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, run / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        holder.stdout.readline()
        with pytest.raises(UserError, match="run: another process is training in it"):
            train(tiny.config(run))
        holder.communicate(b"\n")
    assert [path.name for path in run.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(optim__name="sgd"), "optim.name: expected adamw, muon or adafactor; found 'sgd'"),
        (
            dict(optim__schedule="step"),
            "^--config.optim.schedule: expected one of cosine, .*constant; found 'step'",
        ),
        (dict(optim__decayed="('kernels',)"), "config.optim.decayed: expected some of .*embedding.*; found 'kernels'"),
        (dict(optim__warmup_steps=40), r"optim.warmup_steps: expected 0 to 39 \(train.steps is 40\); found 40"),
        (dict(data__row_length=5), "data: 9673 of the first 9673 records cannot be used.*× does not fit: .*= 5 tok"),
        (dict(data__template="chat"), "^--config.data.template: expected one of voco_v1, .*; found 'chat'"),
        (dict(data__train__easyvqa__kind="coco"), "config.data.train.easyvqa.kind: expected one of .*; found 'coco'"),
        (dict(data__layout="heap"), "config.data.layout: expected pack or group, found 'heap'"),
        (dict(data__loss_weighting="word"), "config.data.loss_weighting: expected token or conversation, found 'word'"),
        (dict(data__video__num_frames=0), "config.data.video: expected num_frames or fps above 0, found neither"),
        (dict(data__train__easyvqa__weight=0.0), "config.data.train: expected at least one record an epoch"),
        (dict(data__aspect_ratio="squash"), "config.data.aspect_ratio: expected pad, crop or stretch, found 'squash'"),
        (
            dict(model__compressor="pool"),
            "^--config.model.compressor: expected one of voco, .*; found 'pool'",
        ),
        (
            dict(model__llama__num_attention_heads=3),
            r"^config.model.llama.num_attention_heads: .* \(2\), found 3",
        ),
        (
            dict(model__attention="flash"),
            "^--config.model.attention: expected one of xla, .*; found 'flash'",
        ),
        (
            dict(model__dtype="float33"),
            "config.model.dtype: expected one of auto, .*, float16; found 'float33'",
        ),
        (
            dict(model__param_dtype="int8"),
            "config.model.param_dtype: expected one of auto, .* found 'int8'",
        ),
        (
            dict(model__compressor="qformer", model__llama__hidden_size=33),
            "config.model.llama.hidden_size: expected a multiple .*; found 33",
        ),
        (dict(model__llama__max_position_embeddings=10), "max_position_embeddings: a conversation has .* for 10"),
        (dict(model__llama__max_position_embeddings=60), "max_position_embeddings: a compressed image has .* for 60"),
        (dict(optim__learning_rate="nan"), "config.optim.learning_rate: expected at least 1e-12, found nan"),
        (dict(model__num_voco_tokens=0), "config.model.num_voco_tokens: expected at least 1, found 0"),
        (
            dict(model__compressor="average_pool", model__num_compressed_tokens=5),
            "model.num_compressed_tokens: .* 64 patches, found 5",
        ),
        (
            dict(data__test__easyvqa__split="validation"),
            "config.data.test.easyvqa: easyvqa: expected a split of train, test; found 'validation'",
        ),
        (dict(optim__b2=1.0), "config.optim.b2: expected at least 0 and below 1, found 1.0"),
        (dict(train__log_every=0), "config.train.log_every: expected at least 1, found 0"),
        (dict(tokenizer__source="./nowhere"), "tokenizer './nowhere': not found"),
        (
            dict(mesh__tensor=2),
            "config.mesh: expected sizes whose product is 1, the devices there are; found data 1, .*2",
        ),
        (dict(model__remat="some"), "config.model.remat: expected one of none, full, .*; found 'some'"),
        (dict(train__freeze="('vision',)"), "train.freeze: expected parts such as .*vision_tower; found 'vision'"),
    ],
)
def test_configs_that_cannot_be(tmp_path, changes, message):
    """One line, and no directory is left behind."""
    with pytest.raises(UserError, match=message) as error:
        train(tiny.config(tmp_path / "run", **changes))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("optim.schedule", "step", "config.optim.schedule: expected one of cosine, .*constant; found 'step'"),
        ("model.compressor", "pool", "config.model.compressor: expected one of voco, .*; found 'pool'"),
        ("model.vision.position_init", "sin", "config.model.vision.position_init: expected one of .*; found 'sin'"),
        ("train.steps", 0, "config.train.steps: expected at least 1, found 0"),
    ],
)
def test_a_config_from_python_that_cannot_be(tmp_path, key, value, message):
    config = tiny.config(tmp_path / "run")
    set_value(config, key, value)
    with pytest.raises(UserError, match=f"^{message}$"):
        train(config)
    assert not list(tmp_path.iterdir())


def test_a_directory_that_is_no_directory(tmp_path):
    config = tiny.config(tmp_path)
    config.workdir = "s3://bucket/run"
    with pytest.raises(UserError, match="config.workdir: s3://bucket/run: neither a local path nor gs://B"):
        train(config)


def test_a_run_that_begins_with_another(tiny_run, tmp_path):
    """Dimensions, tokenizer and parameters are the other's, whose config does not say how long its vocabulary is. The
    warm-up's first step is by a learning rate of 0."""
    config = tiny.config(tmp_path / "run", init_from=tiny_run, train__steps=3, train__checkpoint_every=1, train__keep=3)
    assert begin_with_run(config).model.llama.vocab_size == load_run(tiny_run).model.config.llama.vocab_size
    run = train(config)
    jax.tree.map(np.testing.assert_array_equal, params(run, step=1), params(tiny_run))
    assert train(config) == run  # complete: the config that was stored is the one that is asked for


def test_a_run_whose_compressor_has_parameters_that_this_one_lacks(tiny_run, tmp_path):
    """Nothing is written."""
    shutil.copytree(tiny_run / "tokenizer", tmp_path / "base" / "tokenizer")
    config = load_config(tiny_run / "config.json")
    config.model.compressor = "voco_embedding"
    save_config(config, tmp_path / "base" / "config.json")
    for ours in ("voco", "qformer"):
        message = f"config.model.compressor: expected 'voco_embedding', whose parameters .*base has; found '{ours}'"
        with pytest.raises(UserError, match=message):
            train(tiny.config(tmp_path / "run", init_from=tmp_path / "base", model__compressor=ours))
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite(tmp_path):
    with pytest.raises(
        UserError, match=r"training: loss is nan at step \d+ \(batch \d+: .*\); a lower optim.learning_rate may help"
    ):
        train(tiny.config(tmp_path / "run", optim__learning_rate=1e39, optim__warmup_steps=0))
    assert Checkpointer(tmp_path / "run").steps() == []


def test_parameters_that_are_not_finite_are_not_saved(tmp_path):
    """The loss of the step that spoils them is still a number."""
    (tmp_path / "run").mkdir()
    with contextlib.closing(Checkpointer(tmp_path / "run", create=True)) as checkpointer:
        log = SimpleNamespace(settle=lambda: None)
        save = SaveCheckpoint(checkpointer, None, 1, lambda step: {}, log, Goodput(None))
        params = {"scale": jnp.ones(3), "kernel": jnp.ones(3).at[1].set(jnp.inf)}
        with pytest.raises(UserError, match="training: parameters are not finite after step 1; a lower optim.learning"):
            save.after_step(StepDone(1, {}, params, {}))
    assert Checkpointer(tmp_path / "run").steps() == []


def test_a_checkpoint_of_another_shape(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    config = load_config(run / "config.json")
    config.model.llama.intermediate_size = 48
    save_config(config, run / "config.json")
    with pytest.raises(UserError, match="model.llama.intermediate_size: .*checkpoints/40 was written with 32, found"):
        load_run(run)
    config.model.llama.intermediate_size = 32
    config.model.compressor = "average_pool"
    save_config(config, run / "config.json")
    with pytest.raises(UserError, match=r"model.compressor: .*was written with 'voco', found 'average_pool'"):
        load_run(run)


@pytest.mark.parametrize("lost", ["params", "params/_METADATA", "params/manifest.ocdbt", "params/d"])
def test_a_damaged_checkpoint(tiny_run, tmp_path, lost):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    lost = run / "checkpoints" / "40" / lost
    shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    with pytest.raises(UserError, match=r"checkpoints/40: the checkpoint is damaged: ") as error:
        load_run(run, step=40)  # which is asked for: else an earlier one would be taken
    assert "\n" not in str(error.value)


def test_a_truncated_checkpoint(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    for file in (run / "checkpoints" / "40" / "params").rglob("d/*"):
        os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(UserError, match=r"checkpoints/40: the checkpoint is damaged: ") as error:
        load_run(run, step=40)  # which is asked for: else an earlier one would be taken
    assert "\n" not in str(error.value)


def test_a_run_without_checkpoint(tiny_run, tmp_path):
    with pytest.raises(UserError, match=r"config.json: not found; a run directory holds"):
        load_run(tmp_path)
    run = shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    with pytest.raises(UserError, match=r"run/checkpoints: no checkpoint found$"):
        load_run(run)


def test_a_kernel_for_other_devices(tiny_run):
    assert load_run(tiny_run, attention="xla").model.config.attention == "xla"
    with pytest.raises(UserError, match=r"attention: 'splash' needs a tpu, found cpu; 'xla' .* \(--attention\)$"):
        load_run(tiny_run, attention="splash")


def test_how_data_is_loaded_may_change(tiny_run):
    """A run goes on with other workers; batches are the same (test_pipeline.py)."""
    changes = dict(data__num_workers=3, data__prefetch=9, data__cache_dir="/elsewhere", data__max_skipped_fraction=0.5)
    assert check_workdir(tiny_run, tiny.config(tiny_run, **changes))
    with pytest.raises(UserError, match="holds a run with data.layout = 'pack', this config has 'group'"):
        check_workdir(tiny_run, tiny.config(tiny_run, data__layout="group"))
