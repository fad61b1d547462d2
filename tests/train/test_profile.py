"""Traces on demand: what is asked for is there and can be read, or is told; the run goes on."""

import gzip
import json
from pathlib import Path
import resource
import signal
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import pytest

from tests.helpers import tiny
from voco_jax.train.actions import StepDone
from voco_jax.train.goodput import Goodput
from voco_jax.train.profile import Profiler


def steps_of(trace: Path) -> set[int]:
    """The steps that a trace shows, in both of its forms."""
    (file,) = trace.glob("plugins/profile/*/*.trace.json.gz")
    assert list(trace.glob("plugins/profile/*/*.xplane.pb"))
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    assert len(events) > 100
    return {int(event["args"]["step_num"]) for event in events if event.get("name") == "train"}


@jax.jit
def compute(x):
    return (x @ x).sum()


def run(workdir, start=0, stop=12, signal_at=(), before_stop=lambda step: None, **options) -> tuple[list[str], Goodput]:
    """(what was said, the account) of some steps; SIGUSR1 comes before some of them."""
    said = []
    with (
        Goodput(None) as goodput,
        goodput.during("steps"),
        Profiler(workdir / "profile", range(start + 1, 13), goodput, log=said.append, **options) as profiler,
    ):
        for step in range(start + 1, stop + 1):
            if step in signal_at:
                signal.raise_signal(signal.SIGUSR1)
            profiler.before_step(step)
            result = compute(jnp.ones((50, 50)))
            before_stop(step)
            profiler.after_step(StepDone(step, {"loss": result}))
    return said, goodput


def test_from_a_step_on(tmp_path):
    said, goodput = run(tmp_path, at=4, length=3)
    trace = tmp_path / "profile" / "step_000004"
    assert steps_of(trace) == {4, 5, 6}
    assert said[0] == "profile: tracing steps 4 to 6" and said[1].startswith(f"profile: written: {trace} (xprof --log")
    assert len(said) == 2 and goodput.seconds["profile"] > 0
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["step_000004"]


def test_signals(tmp_path):
    """One during a trace asks for another; the last trace ends with the steps, and a last signal comes too late."""
    before = signal.getsignal(signal.SIGUSR1)
    said, _ = run(tmp_path, signal_at=(2, 3, 10), length=2)
    assert {path.name: steps_of(path) for path in (tmp_path / "profile").iterdir()} == {
        "step_000002": {2, 3}, "step_000004": {4, 5}, "step_000010": {10, 11},
    }  # fmt: skip
    assert len(said) == 6 and signal.getsignal(signal.SIGUSR1) is before
    said, _ = run(tmp_path / "end", stop=6, signal_at=(6,), length=4)
    assert steps_of(tmp_path / "end" / "profile" / "step_000006") == {6} and said[0] == "profile: tracing steps 6 to 9"
    late = lambda step: step == 12 and signal.raise_signal(signal.SIGUSR1)  # noqa: E731
    assert run(tmp_path / "late", before_stop=late)[0] == ["profile: no trace: asked for after the last step"]


def test_processes_write_apart(tmp_path, monkeypatch):
    """Two on one machine would have the same names."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    run(tmp_path, signal_at=(2,), length=1)
    assert steps_of(tmp_path / "profile" / "step_000002" / "process_1") == {2}


@pytest.mark.parametrize("at", [5, 13])
def test_a_step_that_does_not_come(tmp_path, at):
    said, _ = run(tmp_path, start=5, at=at)
    assert said == [f"profile: no trace: steps 6 to 12 are to come, train.profile_at = {at}"]
    assert not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be(tmp_path):
    (tmp_path / "profile").write_text("")
    said, _ = run(tmp_path, at=4)
    assert len(said) == 1 and said[0].startswith("profile: no trace: ") and f"{tmp_path}/profile" in said[0]


def test_a_full_disk(tmp_path):
    """It is said in one line, all steps are made, and the next trace is whole."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(step):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000 if step == 2 else limits[0], limits[1]))

    try:
        said, _ = run(tmp_path, signal_at=(2, 6), before_stop=limit, length=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert said[0] == "profile: tracing steps 2 to 2" and said[1].startswith("profile: no trace: ")
    assert all("\n" not in line for line in said) and steps_of(tmp_path / "profile" / "step_000006") == {6}


def test_a_thread_gets_no_signals(tmp_path):
    found = []
    thread = threading.Thread(target=lambda: found.append(run(tmp_path, at=2, length=1)))
    thread.start()
    thread.join()
    assert len(found[0][0]) == 2 and steps_of(tmp_path / "profile" / "step_000002") == {2}


SCRIPT = """
import itertools, pathlib, sys, time
import jax, jax.numpy as jnp
from voco_jax.train.actions import StepDone
from voco_jax.train.goodput import Goodput
from voco_jax.train.profile import Profiler

workdir = pathlib.Path(sys.argv[1])
compute = jax.jit(lambda x: (x @ x).sum())
with Goodput(None) as goodput, Profiler(workdir / "profile", range(1, 10**9), goodput, length=3) as profiler:
    print("training", flush=True)
    for step in itertools.count(1):
        profiler.before_step(step)
        result = compute(jnp.ones((50, 50)))
        profiler.after_step(StepDone(step, {"loss": result}))
        time.sleep(0.01)
"""


@pytest.mark.multiprocess
def test_a_signal_to_a_process(tmp_path):
    """From another, as a person sends it; it goes on."""
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tiny.CONFIG_FILE.parents[1]
    ) as process:
        try:
            assert process.stdout.readline() == "training\n"
            process.send_signal(signal.SIGUSR1)
            said = [next(line for line in process.stderr if line.startswith("profile: ")) for _ in range(2)]
            assert process.poll() is None
        finally:
            process.kill()
    (trace,) = (tmp_path / "profile").iterdir()
    first = int(trace.name.removeprefix("step_"))
    assert steps_of(trace) == {first, first + 1, first + 2}
    assert said[0] == f"profile: tracing steps {first} to {first + 2}\n" and str(trace) in said[1]
