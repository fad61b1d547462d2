"""Processes that load data: they end with the process that started them; where one dies, there is a one-line error."""

from collections.abc import Callable, Generator, Iterator, Sequence
import concurrent.futures
from concurrent.futures.process import BrokenProcessPool
import contextlib
import itertools
import multiprocessing
from multiprocessing import resource_tracker
import multiprocessing.process
import os
from pathlib import Path
import signal
import threading
from typing import Any, TypeVar

from voco_jax import interrupts
from voco_jax.errors import TryAgain

_SHARED_MEMORY = Path("/dev/shm")
_TICK = 1.0  # seconds between two looks at the processes
_PROGRESS = 0.1  # seconds between two reports of progress
_PATIENCE = 10.0  # seconds until what a dead process had written must have been read


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """A block that starts processes: Ctrl-C goes to all processes of a terminal, and these never see it."""
    # What a process leaves that is killed, Python's tracker removes; it need not tell the user to
    silent = "ignore::UserWarning:multiprocessing.resource_tracker"
    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = f"{before},{silent}" if before else silent
    try:
        resource_tracker.ensure_running()  # which unblocks signals when it begins
    finally:
        os.environ.pop("PYTHONWARNINGS") if before is None else os.environ.update(PYTHONWARNINGS=before)
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def begin_worker(*_) -> None:
    """Called in each worker: it ends when the process that started it ends, however that happens, and not before.

    A training run that gets SIGTERM or Ctrl-C may still need batches until it has saved.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True, name="parent").start()


Task = TypeVar("Task")
Result = TypeVar("Result")


def run_tasks(
    work: Callable[[Task, Callable[[], None]], Result],
    tasks: Sequence[Task],
    num_workers: int,
    on_steps: Callable[[int], Any],
) -> Generator[tuple[Task, Result], None, None]:
    """Each task with the result of `work(task, step)` in a worker process, in the order in which they are finished.

    `work` is sent to each process once, and calls `step()` for every step; `on_steps` gets the numbers of new steps.
    An error of `work` is raised here, and TryAgain where a process dies. Then, as after Ctrl-C, all workers are killed.
    """
    context = multiprocessing.get_context("spawn")  # jax has threads, which a fork would cut
    others, left = set(multiprocessing.active_children()), iter(tasks)
    waiting: dict[concurrent.futures.Future, Task] = {}
    with uninterrupted():
        steps, counted = context.Value("q", 0), 0
        num_workers = max(1, min(num_workers, len(tasks)))
        pool = concurrent.futures.ProcessPoolExecutor(num_workers, context, _begin_tasks, (work, steps))
    try:
        with uninterrupted():
            waiting.update((pool.submit(_run_task, task), task) for task in itertools.islice(left, 2 * num_workers))
            pool.submit(int)  # else the pool may not notice the death of the process that it started last
        while waiting:
            done, _ = concurrent.futures.wait(waiting, _PROGRESS, concurrent.futures.FIRST_COMPLETED)
            now = steps.get_obj().value  # without the lock, which a process that was killed may hold
            on_steps(now - counted)
            counted = now
            for future in done:
                yield waiting.pop(future), future.result()
                waiting.update((pool.submit(_run_task, task), task) for task in itertools.islice(left, 1))
    except BrokenProcessPool:
        raise TryAgain("data: a worker process ended too early (out of memory?); the same command goes on") from None
    finally:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        pool.shutdown(cancel_futures=True)


_work: Callable | None = None  # of a worker process
_steps: Any = None


def _begin_tasks(work: Callable, steps) -> None:
    global _work, _steps
    begin_worker()
    _work, _steps = work, steps


def _run_task(task):
    assert _work is not None
    return _work(task, _count_step)


def _count_step() -> None:
    with _steps.get_lock():
        _steps.value += 1


def ended(status: int) -> TryAgain:
    """The error for a loader that ended before its work was done; `status` as in `multiprocessing`."""
    if status >= 0:
        how = f"ended too early, with status {status}"
    elif status == -signal.SIGBUS:
        how = f"was ended by SIGBUS: {_SHARED_MEMORY} is full (give it more room, or config.data.num_workers=0)"
    else:
        name = next((s.name for s in signal.Signals if s == -status), f"signal {-status}")
        how = f"was ended by {name}" + (" (out of memory?)" if status == -signal.SIGKILL else "")
    return TryAgain(f"data: a loader process {how}; the same command goes on from the newest checkpoint")


class Watch(threading.Thread):
    """Ends this process when one of its daemon processes has died and it has waited too long (`waiting()`, seconds).

    A process that dies while it writes into a pipe leaves its reader waiting for the rest.
    """

    def __init__(self, waiting: Callable[[], float]):
        super().__init__(daemon=True, name="loaders")
        self._waiting, self._stopped = waiting, threading.Event()
        self._seen: set[multiprocessing.process.BaseProcess] = set()
        self.start()

    def run(self) -> None:
        while not self._stopped.wait(_TICK):
            self._seen.update(process for process in multiprocessing.active_children() if process.daemon)
            dead = [process.exitcode for process in self._seen if process.exitcode]
            if dead and self._waiting() > _PATIENCE:
                interrupts.end(TryAgain.status, f"error: {ended(dead[0])}")

    def stop(self) -> None:
        self._stopped.set()


def usable_cores() -> int:
    """CPU cores that this process may use; where the system does not tell (macOS), all of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_shared_memory() -> int | None:
    """Free bytes of shared memory; None where it is not a file system."""
    try:
        stat = os.statvfs(_SHARED_MEMORY)
    except OSError:
        return None
    return stat.f_bavail * stat.f_frsize
