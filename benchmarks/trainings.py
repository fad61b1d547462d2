"""Many trainings by one command: some at a time, each on CPUs of its own, with one bar over the steps of all."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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

# Of Linux, for what runs on CPUs (`benchmarks/huge_pages.py` measures what it is worth); the user's own goes first
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


class Training(NamedTuple):
    """Runs, each of which goes on from the one before, and what is done with them: `commands` after `python -m`."""

    runs: Mapping[Path, int]  # directory → steps
    commands: list[list[str]]

    @property
    def workdir(self) -> Path:
        """The last run's."""
        return list(self.runs)[-1]


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
    """Runs that are there already are continued, or taken as they are.

    UserError, with the log's name, for the first that fails; those that have not begun by then do not begin.
    """
    all_cpus, shares = sorted(os.sched_getaffinity(0)), queue.SimpleQueue[set[int]]()
    for job in range(jobs):
        shares.put(set(all_cpus[job::jobs]))
    env = {
        # On one GPU all take a share of its memory; otherwise the first would take three quarters
        "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / jobs:.3f}",
        **HUGE_PAGES,
    } | dict(os.environ)

    def work(training: Training) -> None:
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
                for future in [pool.submit(work, training) for training in trainings]:
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
    steps = {workdir: number for training in trainings for workdir, number in training.runs.items()}
    with tqdm(total=sum(steps.values()), unit="step", desc=title) as bar:
        while True:
            finished = done.wait(timeout=2)
            bar.update(sum(min(last_step(workdir), number) for workdir, number in steps.items()) - bar.n)
            if finished:
                return


def last_step(workdir: Path) -> int:
    file = workdir / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0
