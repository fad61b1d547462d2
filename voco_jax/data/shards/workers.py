"""Work spread over processes, which end with the process that started them, however that one ends."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
import contextlib
import multiprocessing
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
import signal
import time
from typing import Any

from voco_jax.data.processes import uninterrupted
from voco_jax.errors import UserError

TICK = 0.1  # seconds between two messages about progress


def run_tasks(work: Callable, tasks: Iterable, num_workers: int, on_ticks: Callable[[int], Any]) -> Generator:
    """Results of `work(task, tick)`, as they come. `work` calls `tick()` for every step; `on_ticks` is called with the
    number of new steps.

    `work` is sent to each process once. Its UserError or OSError is raised here, and a UserError for a process that
    dies. Then, as after Ctrl-C, the other processes are killed.

    The pool of `concurrent.futures` may not notice the death of the worker that it started last.
    """
    context = multiprocessing.get_context("spawn")  # what a fork copies of threads' locks may hang
    waiting = deque(tasks)
    workers: dict[Connection, BaseProcess] = {}
    try:
        for _ in range(min(num_workers, len(waiting))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, work), daemon=True)
            with uninterrupted():
                process.start()
                workers[ours] = process
            theirs.close()  # now its end closes when the process ends, and ours when this one does
            ours.send(waiting.popleft())
        while workers:
            ready = wait(list(workers))
            for connection in [connection for connection in workers if connection in ready]:
                kind, value = _receive(connection, workers[connection])
                if kind == "ticks":
                    on_ticks(value)
                elif kind == "error":
                    raise value
                else:
                    if waiting:
                        connection.send(waiting.popleft())
                    else:
                        connection.close()
                        workers.pop(connection).join()
                    yield value
    finally:
        for worker in workers.values():
            worker.kill()
        for worker in workers.values():
            worker.join()


def _receive(connection: Connection, process: BaseProcess) -> tuple[str, Any]:
    try:
        return connection.recv()
    except (EOFError, ConnectionResetError):
        process.join()
        status = process.exitcode or 0
        how = f"was killed by signal {-status} (out of memory?)" if status < 0 else f"ended with status {status}"
        raise UserError(f"a worker process {how}") from None


def _serve(connection: Connection, work: Callable) -> None:
    """A worker process: tasks come until the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ticker = _Ticker(connection)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            task = connection.recv()
            try:
                result = "result", work(task, ticker)
            except (UserError, OSError) as error:
                result = "error", error
            ticker.flush()
            connection.send(result)


class _Ticker:
    """Counts steps, and sends the count now and then."""

    def __init__(self, connection: Connection):
        self._connection, self._count, self._told = connection, 0, time.monotonic()

    def __call__(self) -> None:
        self._count += 1
        if time.monotonic() - self._told > TICK:
            self.flush()

    def flush(self) -> None:
        self._connection.send(("ticks", self._count))
        self._count, self._told = 0, time.monotonic()
