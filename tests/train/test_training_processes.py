"""The trainer as two real processes, two simulated devices each: one run, the one that a single process makes."""

import json
import os
from pathlib import Path
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests.checkpoint.test_processes import errors
from tests.helpers import tiny
from tests.parallel.test_distributed import free_port, run_two
from voco_jax.checkpoint.run import load_run
from voco_jax.train.loop import train

pytestmark = pytest.mark.multiprocess

SCRIPT = """
import sys
from voco_jax.train.__main__ import main
sys.argv = eval(sys.argv[1])
main()
"""
CHANGES = dict(
    model__llama__vocab_multiple=16, model__unroll_layers=True, optim__name="adamw",
    train__steps=5, train__log_every=1, train__checkpoint_every=3,
)  # fmt: skip
MESH = dict(mesh__data=1, mesh__fsdp=2, mesh__tensor=2)  # the tensor axis inside of a process, fsdp across


def run(workdir, changes_of=lambda process: {}):
    address = f"--coordinator=localhost:{free_port()}"

    def arguments(i):
        changes = CHANGES | MESH | changes_of(i)
        return ["train", *tiny.arguments(workdir, **changes), address, "--num_processes=2", f"--process_id={i}"]

    return run_two(arguments, lambda i: {}, script=SCRIPT)


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def subjects(output: str) -> list[str]:
    """Of the lines, their first words, but for what Gloo writes (in pieces)."""
    return [line.split(":")[0].split()[0] for line in output.splitlines() if ": " in line and "ranks" not in line]


def test_two_processes_train_what_one_does(tmp_path):
    """Losses to rounding; the first process alone speaks and writes; one process goes on where two have stopped."""
    workdir = tmp_path / "two"
    first, second = run(workdir)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert subjects(first.stdout) == ["distributed", "data", "data", "model", "goodput", "trained", "score", "ask"]
    assert not subjects(second.stdout)

    alone = losses(train(tiny.config(tmp_path / "one", **CHANGES)))
    np.testing.assert_allclose(losses(workdir), alone, rtol=1e-5)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["3", "5"]
    (workdir / "checkpoints" / "5").rename(tmp_path / "5")
    train(tiny.config(workdir, **CHANGES))
    np.testing.assert_allclose(losses(workdir), alone, rtol=1e-5)
    assert load_run(workdir).step == 5


def pod(count: int, workdir: Path) -> None:
    """The trainer as so many processes of `launch/local_pod.sh`."""
    root = tiny.CONFIG_FILE.parents[1]
    environment = dict(os.environ, PYTHON=sys.executable)
    command = ["launch/local_pod.sh", str(count), "--", *tiny.arguments(workdir, **CHANGES)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_four_processes_and_then_fewer(tmp_path):
    """The losses of one process; and from a checkpoint of four, two go on, and one."""
    alone = losses(train(tiny.config(tmp_path / "one", **CHANGES)))
    workdir = tmp_path / "four"
    pod(4, workdir)
    np.testing.assert_allclose(losses(workdir), alone, rtol=1e-5)
    for go_on in lambda: pod(2, workdir), lambda: train(tiny.config(workdir, **CHANGES)):
        shutil.rmtree(workdir / "checkpoints" / "5")
        go_on()
        np.testing.assert_allclose(losses(workdir), alone, rtol=1e-5)
        assert (workdir / "checkpoints" / "5").is_dir()


def test_processes_that_do_not_agree(tmp_path):
    for done in run(tmp_path / "run", lambda i: dict(seed=i)):
        assert errors(done) == ["error: process 1: expected the config of process 0, found another"]
        assert done.returncode == 2
    assert not list(tmp_path.iterdir())


def test_what_one_process_finds_wrong(tmp_path):
    first, second = run(tmp_path / "run", lambda i: dict(data__batch_size=(4, 3)[i]))
    assert errors(second)[0].startswith("error: config.data.batch_size: ")
    assert errors(first)[0].startswith("error: process 1: config.data.batch_size: ")
    assert not list(tmp_path.iterdir())
