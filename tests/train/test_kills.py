"""Real processes, really killed, at moments that nobody chose; whatever happens, a run ends as if it had not.

`KILLS` of each kind: 3 here, and as many as the environment's VOCO_JAX_KILLS says.
"""

import json
import os
from pathlib import Path
import random
import re
import shlex
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from tests.helpers import tiny
from tests.train.test_training import params

pytestmark = pytest.mark.multiprocess

KILLS = int(os.environ.get("VOCO_JAX_KILLS", "3"))
STEPS = 60 + 12 * max(0, KILLS - 3)  # enough for all the kills: between two, training moves on by a checkpoint or some
CHANGES = dict(train__steps=STEPS, train__checkpoint_every=3, train__log_every=1)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("kills") / "uninterrupted"
    assert start(run).wait() == 0
    return run


def start(run: Path, **changes) -> subprocess.Popen:
    command = [sys.executable, "-m", "voco_jax.train", *tiny.arguments(run, **CHANGES | changes)]
    with open(f"{run}.log", "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, cwd=tiny.CONFIG_FILE.parents[1])


def newest(run: Path) -> int:
    checkpoints = run / "checkpoints"
    names = os.listdir(checkpoints) if checkpoints.is_dir() else []
    return max((int(name) for name in names if name.isdecimal()), default=0)


def kill_at_random(run: Path, signal_number: int, rng: random.Random, count: int) -> list[int]:
    """Start the run again and again, and end it by the signal some time after it has begun to train; the newest
    checkpoint's step after each."""
    steps = []
    while len(steps) < count:
        process, before = start(run), newest(run)
        while process.poll() is None and newest(run) == before and not writing(run):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))
        if process.poll() is not None:
            pytest.fail(f"ended by itself, status {process.returncode}:\n{Path(f'{run}.log').read_text()[-3000:]}")
        process.send_signal(signal_number)
        status = process.wait(60)
        steps.append(newest(run))
        assert status == (-signal.SIGKILL if signal_number == signal.SIGKILL else 75)
        assert steps[-1] >= before
    return steps


def writing(run: Path) -> bool:
    checkpoints = run / "checkpoints"
    return checkpoints.is_dir() and any("tmp" in name for name in os.listdir(checkpoints))


def check_alike(run: Path, other: Path) -> None:
    """Parameters and optimizer bit for bit, and the logged losses."""
    jax.tree.map(np.testing.assert_array_equal, params(run), params(other))
    sums = [json.loads((r / f"checkpoints/{STEPS}/run/metadata").read_text())["checksums"] for r in (run, other)]
    assert [sums[0][name] for name in ("params", "opt_state")] == [sums[1][name] for name in ("params", "opt_state")]
    lines = [[json.loads(line) for line in (r / "metrics.jsonl").read_text().splitlines()] for r in (run, other)]
    assert [(a["step"], a["loss"]) for a in lines[0]] == [(b["step"], b["loss"]) for b in lines[1]]


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_killed_at_random(uninterrupted, tmp_path, name):
    run = tmp_path / "run"
    steps = kill_at_random(run, signal.Signals[name], random.Random(name), KILLS)
    log = Path(f"{run}.log").read_text()
    resumed = [int(line.split("at step ")[1].split()[0]) for line in log.splitlines() if "resuming, at step" in line]
    assert start(run).wait() == 0
    # Every start went on from the newest checkpoint there was
    assert resumed == [step for step in steps[:-1] if step]
    check_alike(run, uninterrupted)
    if name == "SIGTERM":
        assert log.count("; the same command goes on from there") == len(steps)
    assert not list((run / "checkpoints").glob("*tmp*"))


def test_killed_inside_of_a_save(uninterrupted, tmp_path):
    run = tmp_path / "run"
    process = start(run)
    while not writing(run):
        assert process.poll() is None
        time.sleep(0.0005)
    process.kill()
    process.wait()
    assert list((run / "checkpoints").glob("*tmp*"))
    assert start(run).wait() == 0
    check_alike(run, uninterrupted)


def test_told_to_end_before_the_first_step(uninterrupted, tmp_path):
    """Also while the tokenizer is written, before there is a config."""
    run = tmp_path / "run"
    process = start(run)
    while "model: " not in Path(f"{run}.log").read_text():
        assert process.poll() is None
        time.sleep(0.01)
    while not run.exists():
        time.sleep(0.005)
    process.terminate()
    assert process.wait(60) == 75
    assert newest(run) <= 2
    assert start(run).wait() == 0
    check_alike(run, uninterrupted)


def test_ctrl_c_says_what_is_saved_and_how_it_goes_on(tmp_path):
    run, long = tmp_path / "run", CHANGES | dict(train__steps=2000)  # it has not ended by itself before the signal
    process = start(run, **long)
    while not newest(run):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    last = Path(f"{run}.log").read_text().splitlines()[-1]
    again = shlex.join(["voco", "train", *tiny.arguments(run, **long)])
    lost = "nothing is lost|1 step is lost|[0-9]+ steps are lost"
    found = re.fullmatch(f"interrupted: saved at step ([0-9]+) in {re.escape(str(run))}, ({lost}); goes on: (.*)", last)
    assert found is not None, last
    assert (int(found[1]), found[3]) == (newest(run), again)
