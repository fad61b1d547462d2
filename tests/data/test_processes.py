"""Work in several processes: all results and steps arrive, errors are raised here, and no process is left."""

import multiprocessing
import os
import signal
import time

import pytest

from voco_jax.data import processes
from voco_jax.data.processes import run_tasks
from voco_jax.errors import TryAgain, UserError


def doubled(task: int, tick) -> int:
    for _ in range(task):
        tick()
    return 2 * task


def fails(task: int, tick) -> int:
    if task == 1:
        raise UserError("task 1 fails")
    time.sleep(600)
    return task


def is_killed(task: int, tick) -> int:
    if task == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)
    return task


def is_killed_while_it_counts(task: int, tick) -> int:
    if task == 1:
        processes._steps.get_lock().acquire()
    return is_killed(task, tick)


def test_results_and_steps():
    steps: list[int] = []
    assert dict(run_tasks(doubled, range(5), 2, steps.append)) == {0: 0, 1: 2, 2: 4, 3: 6, 4: 8}
    assert sum(steps) == 10 and not multiprocessing.active_children()
    assert list(run_tasks(doubled, [], 2, steps.append)) == []


@pytest.mark.parametrize(
    ("work", "kind", "message"),
    [
        (fails, UserError, "task 1 fails"),
        (is_killed, TryAgain, r"a worker process ended too early \(out of memory"),
        (is_killed_while_it_counts, TryAgain, "a worker process ended too early"),
    ],
)
def test_one_that_fails_ends_all(work, kind, message):
    """The others, which would sleep on, are killed."""
    with pytest.raises(kind, match=message):
        list(run_tasks(work, range(2), 2, lambda steps: None))
    assert not multiprocessing.active_children()
