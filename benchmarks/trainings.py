"""Many trainings by one command: some at a time, each on CPUs of its own, with one bar over the steps of all."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
import json
import os
from pathlib import Path
import queue
import subprocess
import sys
import threading
from typing import NamedTuple

from tqdm import tqdm

from voco_jax.errors import UserError


class Training(NamedTuple):
    """A run and what is done with it: `commands` after `python -m`, in turn, after the runs that it `needs`."""

    workdir: Path
    steps: int
    commands: list[list[str]]
    needs: tuple[Path, ...] = ()


def train_command(config: Path, keys: Mapping[str, object]) -> list[str]:
    return ["voco_jax.train", f"--config={config}", *(f"--config.{key}={value}" for key, value in keys.items())]


def evaluate_command(workdir: Path, *options: str) -> list[str]:
    return ["voco_jax.evaluate", "--run", str(workdir), *options]


def check_jobs(jobs: int | None) -> int:
    """Trainings at a time: as asked, or one a CPU and 4 at most. UserError for what cannot be."""
    cpus = len(os.sched_getaffinity(0))
    jobs = min(cpus, 4) if jobs is None else jobs
    if not 1 <= jobs <= cpus:
        raise UserError(f"--jobs: expected 1 to {cpus}, found {jobs}")
    return jobs


def run_all(trainings: Sequence[Training], jobs: int, title: str) -> None:
    """Runs that are there already are continued, or taken as they are. What a training needs comes before it.

    UserError, with the log's name, for the first that fails; those that have not begun by then do not begin.
    """
    all_cpus, shares = sorted(os.sched_getaffinity(0)), queue.SimpleQueue[set[int]]()
    for job in range(jobs):
        shares.put(set(all_cpus[job::jobs]))
    # On one GPU all take a share of its memory; otherwise the first would take three quarters
    env = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / jobs:.3f}"} | dict(os.environ)
    begun: dict[Path, Future[None]] = {}

    def work(training: Training) -> None:
        for needed in training.needs:  # it began before, so no two wait for each other
            begun[needed].result()
        cpus = shares.get()
        try:
            _run(training, cpus, env)
        finally:
            shares.put(cpus)

    done = threading.Event()
    progress = threading.Thread(target=_show_progress, args=(trainings, title, done))
    progress.start()
    try:
        with ThreadPoolExecutor(jobs) as pool:
            try:
                for training in trainings:
                    begun[training.workdir] = pool.submit(work, training)
                for future in begun.values():
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        done.set()
        progress.join()


def _run(training: Training, cpus: set[int], env: Mapping[str, str]) -> None:
    log = training.workdir.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    for command in training.commands:
        with log.open("ab") as file:
            process = subprocess.Popen([sys.executable, "-m", *command], stdout=file, stderr=file, env=env)
            os.sched_setaffinity(process.pid, cpus)
            if process.wait():
                raise UserError(f"{training.workdir.name}: python -m {' '.join(command)} failed; see {log}")


def _show_progress(trainings: Sequence[Training], title: str, done: threading.Event) -> None:
    with tqdm(total=sum(training.steps for training in trainings), unit="step", desc=title) as bar:
        while True:
            finished = done.wait(timeout=2)
            bar.update(sum(min(last_step(t.workdir), t.steps) for t in trainings) - bar.n)
            if finished:
                return


def last_step(workdir: Path) -> int:
    metrics = _metrics(workdir)
    return metrics[-1]["step"] if metrics else 0


def seconds_of_a_step(workdir: Path) -> float:
    """Of a run's steps after the first logged ones, which wait for the compiler; NaN where it has none."""
    metrics = _metrics(workdir)
    if len(metrics) < 2:
        return float("nan")
    first, last = metrics[0], metrics[-1]
    return (last["seconds"] - first["seconds"]) / (last["step"] - first["step"])


def _metrics(workdir: Path) -> list[dict]:
    file = workdir / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
