"""Where the wall-clock time of a run went: into steps, and into what else, over all its restarts.

Goodput is the share of steps whose result was kept. A step after the last checkpoint before a kill has to run again:
its time is lost.

jax computes while Python goes on, so waiting for data costs nothing while a step runs. A thread notes when each step
ends; only the time after that counts as waiting for data. Waiting for a loss is step time.
"""

from collections.abc import Callable, Iterator
import contextlib
import json
from pathlib import Path
import queue
import threading
import time

import jax

from voco_jax.errors import UserError
from voco_jax.io.atomic import write_text
from voco_jax.io.json_files import read_object
from voco_jax.terminal import log

# In the order of `summary`. 'setup' is all that belongs to no other category: set-up, restoring, the end.
CATEGORIES = ("steps", "setup", "compile", "data", "checkpoint", "evaluation", "profile", "lost")
LABELS = {category: category for category in CATEGORIES} | {"setup": "set-up"}
_VERSION = 1
_WRITE_EVERY = 10.0  # seconds; a kill loses at most this much of the account
_COMPILE_EVENTS = ("/jax/core/compile/jaxpr_to_mlir_module_duration", "/jax/core/compile/backend_compile_duration")


class Goodput:
    """The account of a run, kept in a file; for one thread.

    Of nested blocks the innermost counts. What jax compiles is 'compile', wherever it happens.
    """

    def __init__(
        self,
        path: Path | None,
        start: int = 0,
        *,
        since: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        log: Callable[[str], None] = log,
    ):
        """Continue the account in `path`, where the run goes on after step `start`; 0: a new account.

        Without a `path` (processes but the first) nothing is read or written. The account begins at `since` (seconds
        of the clock; None: now). A file that cannot be used leads to a line in `log` and never ends a run.
        """
        self._path, self.clock, self._log = path, clock, log
        self._seconds = dict.fromkeys(CATEGORIES, 0.0)
        self._marks = {start: 0.0}  # seconds in steps, when the checkpoint after a step was made
        if path is not None and start:
            self._go_on(path, start)
        self._blocks = ["setup"]
        self._since = clock() if since is None else since
        self._written = self._since
        self._thread = threading.get_ident()
        self._steps = _StepEnds(clock)

    def __enter__(self) -> "Goodput":
        jax.monitoring.register_event_duration_secs_listener(self._on_event)
        return self

    def __exit__(self, *_) -> None:
        jax.monitoring.unregister_event_duration_listener(self._on_event)
        self._steps.close()
        self.write()

    @contextlib.contextmanager
    def during(self, category: str) -> Iterator[None]:
        """The block's time belongs to this category."""
        assert category in CATEGORIES and category != "lost", category
        self._settle()
        self._blocks.append(category)
        try:
            yield
        finally:
            self._settle()
            self._blocks.pop()

    def started(self, result) -> None:
        """A step has been dispatched. It ends when `result` is there: arrays that are not donated."""
        self._steps.add(result)

    def mark(self, step: int) -> None:
        """Steps up to this one are in a checkpoint. Writes the file."""
        self._settle()
        self._marks[step] = self._seconds["steps"]
        self.write()

    def step_ended(self) -> None:
        """Writes the file now and then."""
        if self.clock() - self._written >= _WRITE_EVERY:
            self.write()

    @property
    def seconds(self) -> dict[str, float]:
        """By category, up to now."""
        self._settle()
        return dict(self._seconds)

    @property
    def total(self) -> float:
        """Seconds of all categories together."""
        return sum(self.seconds.values())

    @property
    def share(self) -> float:
        """The goodput, 0 to 1."""
        return share(self.seconds)

    def write(self) -> None:
        """Replace the file. Where that fails (a full disk), a line says so and training goes on."""
        self._settle()
        self._written = self._since
        if self._path is None:
            return
        seconds = {category: round(value, 3) for category, value in self._seconds.items()}
        marks = {str(step): round(value, 3) for step, value in self._marks.items()}
        content = {"version": _VERSION, "seconds": seconds, "kept": marks}
        try:
            write_text(self._path, json.dumps(content) + "\n", synced=False)  # training does not wait for the disk
        except (OSError, UserError) as error:
            self._log(f"goodput: not written: {error}")

    # ---- The file that was there -------------------------------------------------------------------------------

    def _go_on(self, path: Path, start: int) -> None:
        try:
            seconds, marks = _read(path)
        except UserError as error:
            self._log(f"goodput: {error}; counted from step {start} on")
            return
        self._marks = {step: value for step, value in marks.items() if step <= start}
        kept = max(self._marks.values(), default=0.0)  # a kill may have come before the newest mark was written
        self._seconds |= seconds
        self._seconds["lost"] += seconds["steps"] - kept
        self._seconds["steps"] = self._marks[start] = kept

    # ---- The clock ---------------------------------------------------------------------------------------------

    def _settle(self, compiled: float = 0.0) -> None:
        """Add the time since the last call to the innermost block's category, and its last `compiled` seconds to
        'compile'. Everything that reads or changes the account calls this first."""
        now = self.clock()
        passed = now - self._since
        compiled = min(compiled, passed)
        rest, category = passed - compiled, self._blocks[-1]
        if category == "data":
            busy = min(max(0.0, self._steps.busy_until(now) - self._since), rest)
            self._seconds["steps"] += busy
            rest -= busy
        self._seconds[category] += rest
        self._seconds["compile"] += compiled
        self._since = now

    def _on_event(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event in _COMPILE_EVENTS and threading.get_ident() == self._thread:
            self._settle(compiled=duration_secs)


def read_seconds(path: Path) -> dict[str, float]:
    """Seconds by category from a run's file; UserError for another file."""
    return _read(path)[0]


def share(seconds: dict[str, float]) -> float:
    """Goodput of seconds by category, 0 to 1."""
    return seconds["steps"] / max(sum(seconds.values()), 1e-9)


def summary(seconds: dict[str, float]) -> str:
    """One line; with 'profile' only where there was a trace.

    >>> summary(dict.fromkeys(CATEGORIES, 0.0) | {"steps": 312.4, "compile": 11, "data": 2.2, "checkpoint": 4})
    'goodput 94.8 %: steps 312 s; set-up 0 s, compile 11 s, data 2.2 s, checkpoint 4 s, evaluation 0 s, lost 0 s'
    """
    rest = [c for c in CATEGORIES if c != "steps" and (c != "profile" or seconds[c])]
    parts = ", ".join(f"{LABELS[c]} {_seconds_text(seconds[c])}" for c in rest)
    return f"goodput {share(seconds):.1%}: steps {_seconds_text(seconds['steps'])}; {parts}".replace("%", " %", 1)


def _seconds_text(seconds: float) -> str:
    return f"{seconds:,.1f} s".replace(".0 s", " s") if seconds < 10 else f"{seconds:,.0f} s"


def _read(path: Path) -> tuple[dict[str, float], dict[int, float]]:
    """(seconds by category, seconds in steps at each checkpoint). UserError for another file."""
    content = read_object(path)
    try:
        if content["version"] != _VERSION:
            raise ValueError(f"version {content['version']!r}")
        seconds = {category: float(content["seconds"][category]) for category in CATEGORIES}
        marks = {int(step): float(value) for step, value in content["kept"].items()}
        numbers = (*seconds.values(), *marks.values())
        if not all(0 <= number < float("inf") for number in numbers):
            raise ValueError("a time that is negative or not finite")
        return seconds, marks
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{path}: not an account of goodput ({error!r:.100})") from None


class _StepEnds:
    """When the newest step ended, by a thread that waits for it."""

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._count, self._ended = 0, (0, float("-inf"))  # steps begun; the last that ended, and when

    def add(self, result) -> None:
        if not self._count:
            threading.Thread(target=self._wait, name="step ends", daemon=True).start()
        self._count += 1
        self._queue.put((self._count, result))

    def busy_until(self, now: float) -> float:
        """When the newest step ended, or `now` if it has not."""
        count, when = self._ended
        return when if count == self._count else now

    def close(self) -> None:
        self._queue.put(None)

    def _wait(self) -> None:
        while (item := self._queue.get()) is not None:
            count, result = item
            with contextlib.suppress(Exception):  # whoever reads the result meets it
                jax.block_until_ready(result)
            self._ended = count, self._clock()
