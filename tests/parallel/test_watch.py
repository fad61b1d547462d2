"""One of several real processes fails or dies in the middle of training: the others say so, and end."""

import os
from pathlib import Path
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers import tiny
from tests.parallel.test_distributed import free_port, run_two
from voco_jax.errors import UserError
from voco_jax.parallel import watchdog
from voco_jax.parallel.watchdog import watch

pytestmark = pytest.mark.multiprocess

# Process 1 dies when both are about to write
SAVE = """
import os, signal, sys
from voco_jax.errors import one_line_errors
from voco_jax.parallel import distributed
from voco_jax.parallel import watchdog as watch

@one_line_errors
def main(address, process, run):
    distributed.start(address, 2, process, 60)
    import jax, jax.numpy as jnp
    from voco_jax.config import default_config
    from voco_jax.checkpoint.checkpointer import Checkpointer
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    params = {"scale": jax.jit(lambda: jnp.arange(8.0), out_shardings=sharding)()}
    with watch.watch():
        checkpointer = Checkpointer(run, create=True, config=default_config())
        checkpointer.save(1, params, params, {})
        checkpointer.wait()
        if process == 1:
            checkpointer._manager.save = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        checkpointer.save(2, params, params, {})
        checkpointer.wait()

main(*eval(sys.argv[1]))
"""
CHANGES = dict(
    model__llama__vocab_multiple=16, optim__name="adamw", train__steps=4000, train__checkpoint_every=20, mesh__fsdp=2
)
ENVIRONMENT = dict(os.environ, JAX_PLATFORMS="cpu")


def start(workdir: Path, count: int = 2, **environment) -> list[subprocess.Popen]:
    port = free_port()

    def process(i):
        address = [f"--coordinator=localhost:{port}", f"--num_processes={count}", f"--process_id={i}"]
        command = [sys.executable, "-m", "voco_jax.train", *tiny.arguments(workdir, **CHANGES), *address]
        with open(f"{workdir}.{i}.log", "wb") as log:
            env = ENVIRONMENT | environment
            return subprocess.Popen(command, stdout=log, stderr=log, env=env, cwd=tiny.CONFIG_FILE.parents[1])

    return [process(i) for i in range(count)]


def wait_until(condition, processes, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes), "ended too early"
        time.sleep(0.05)


def errors(workdir: Path, process: int) -> list[str]:
    lines = Path(f"{workdir}.{process}.log").read_text(errors="replace").splitlines()
    return [line for line in lines if line.startswith("error: ")]


@pytest.mark.parametrize("victim", [1, 0])
def test_one_dies(tmp_path, victim):
    """The other ends within half a minute of the silence that is allowed, and the same command goes on."""
    workdir = tmp_path / "run"
    processes = start(workdir, VOCO_JAX_SILENCE="6")
    wait_until((workdir / "checkpoints" / "20").exists, processes)
    processes[victim].kill()
    begun = time.monotonic()
    other = processes[1 - victim]
    status = other.wait(60)
    assert time.monotonic() - begun < 36
    if victim == 1:
        assert status == 75, status
        (error,) = errors(workdir, 0)
        assert error.startswith("error: process 1 has given no sign of life for 6 s: it died or was stopped, or its")
        assert "Traceback" not in Path(f"{workdir}.0.log").read_text(errors="replace")
    else:  # process 0 takes jax's coordination service with it, which jax ends the others for, at once and loudly
        assert status in (75, -signal.SIGABRT)
        assert "process 0" in "".join(errors(workdir, 1)) or "another task died" in Path(f"{workdir}.1.log").read_text()
    # A restart goes on; and one process that is told to end lets both save, at one step
    processes = start(workdir)
    wait_until(lambda: "resuming, at step" in Path(f"{workdir}.0.log").read_text(), processes)
    newest = max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())
    wait_until((workdir / "checkpoints" / f"{newest + 20}").exists, processes)
    processes[victim].terminate()
    assert [process.wait(60) for process in processes] == [75, 75]
    assert "the same command goes on from there" in Path(f"{workdir}.0.log").read_text()


def test_the_first_is_stopped(tmp_path):
    """As a paused machine is: the others end in one line, not in jax's stack trace, and so does it when it goes on."""
    workdir = tmp_path / "run"
    processes = start(workdir, VOCO_JAX_SILENCE="6")
    wait_until((workdir / "checkpoints" / "20").exists, processes)
    processes[0].send_signal(signal.SIGSTOP)
    try:
        assert processes[1].wait(30) == 75
        (error,) = errors(workdir, 1)
        assert error.startswith("error: process 0 has given no sign of life for 6 s: it died or was stopped")
        assert "Traceback" not in Path(f"{workdir}.1.log").read_text()
    finally:
        processes[0].send_signal(signal.SIGCONT)
    assert processes[0].wait(30) == 75
    (error,) = errors(workdir, 0)
    assert error.startswith("error: process 1 has given no sign of life for 6 s")


def test_one_fails(tmp_path):
    """What it fails of is told to the other, which ends with the same status."""
    workdir = tmp_path / "run"
    processes = start(workdir)
    wait_until((workdir / "checkpoints" / "20").exists, processes)
    shutil.rmtree(workdir / "checkpoints")  # the first cannot write its next checkpoint
    (workdir / "checkpoints").write_text("in the way")
    assert [process.wait(60) for process in processes] == [2, 2]
    first, second = errors(workdir, 0), errors(workdir, 1)
    assert first and second
    assert any("the checkpoint cannot be written" in line for line in first + second)
    assert any(
        line.startswith(f"error: process {1 - i}: ") for i, lines in enumerate((first, second)) for line in lines
    )


def test_one_dies_inside_of_a_save(tmp_path):
    """No error of the disk, which would have to be mended: the others end to be started again, and say who has gone."""
    address = f"localhost:{free_port()}"
    first, second = run_two(lambda i: (address, i, str(tmp_path)), lambda i: {"VOCO_JAX_SILENCE": "6"}, script=SAVE)
    assert second.returncode == -signal.SIGKILL
    assert first.returncode == 75, first.stderr
    (error,) = [line for line in first.stderr.splitlines() if line.startswith("error: ")]
    assert error.startswith(
        "error: process 1 has given no sign of life for 6 s: it died or was stopped, or its machine"
    )
    assert "Traceback" not in first.stderr
    assert (tmp_path / "checkpoints" / "1").is_dir() and not (tmp_path / "checkpoints" / "2").exists()


def test_half_a_minute_is_given_by_itself(monkeypatch):
    monkeypatch.delenv("VOCO_JAX_SILENCE", raising=False)
    assert watchdog._longest_silence() == 30


@pytest.mark.parametrize("text", ["abc", "", "nan", "1e400", "3", "100", "-5"])
def test_a_silence_that_is_none(monkeypatch, text):
    monkeypatch.setenv("VOCO_JAX_SILENCE", text)
    with pytest.raises(UserError, match="^VOCO_JAX_SILENCE: expected 4 seconds or more, below 100; found "), watch():
        raise AssertionError("it has begun")
