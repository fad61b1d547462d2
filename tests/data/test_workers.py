"""Work in several processes: all results and steps arrive, errors are raised here, and no process is left."""

import multiprocessing
import os
import signal
import time

import pytest

from voco_jax.data.shards.workers import run_tasks
from voco_jax.errors import UserError


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


def test_results_and_steps():
    steps: list[int] = []
    assert sorted(run_tasks(doubled, range(5), 2, steps.append)) == [0, 2, 4, 6, 8]
    assert sum(steps) == 10 and not multiprocessing.active_children()
    assert list(run_tasks(doubled, [], 2, steps.append)) == []


@pytest.mark.parametrize(
    ("work", "message"),
    [(fails, "task 1 fails"), (is_killed, "a worker process was killed by signal 9")],
)
def test_one_that_fails_ends_all(work, message):
    """The others, which would sleep on, are killed."""
    with pytest.raises(UserError, match=message):
        list(run_tasks(work, range(2), 2, lambda steps: None))
    assert not multiprocessing.active_children()
