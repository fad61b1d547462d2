"""Processes that watch one another: when one fails or dies, the others say so and end, within a minute.

Without it they would wait in the next collective for a process that is gone, as long as jax lets them, and end with a
stack trace of C++. Every process regularly tells jax's coordination service that it is alive, and why it fails.
"""

from collections.abc import Iterator
import contextlib
import os
import re
import signal
import sys
import threading
import time
import traceback
from typing import Any

import jax

from voco_jax import interrupts
from voco_jax.errors import TryAgain, UserError, exit_status
from voco_jax.outages import first_line

_BEAT = 2.0  # seconds between two signs of life
_ROOM = "voco_jax"  # of keys


@contextlib.contextmanager
def watch() -> Iterator[None]:
    """A block of a training's work in which the processes watch one another; a single process just ends by Ctrl-C.

    An error that leaves the block, and that the others do not know yet, is sent to them; they print it and exit with
    status 2. When a process dies or stops without a word, the others notice after half a minute: status 75.
    """
    silence, client = _longest_silence(), _client()
    if client is None:
        with interrupts.at_once(True, signal.SIGINT):  # until there is something to save
            yield
        return
    watcher = _Watcher(client, silence)
    watcher.start()
    threading.Thread(target=watcher.await_answers, daemon=True, name="watch of process 0").start()
    try:
        yield
    except Exception as error:
        if not getattr(error, "known_to_all", False):
            watcher.fail(error)  # does not return
        watcher.stop()
        raise
    except BaseException as error:  # Ctrl-C, sys.exit
        if not (isinstance(error, SystemExit) and getattr(error, "known_to_all", False)):
            watcher.fail(error)
        watcher.stop()
        raise
    watcher.stop()


def _longest_silence() -> float:
    """Seconds without a sign of life, after which a process is given up; jax itself ends it, with a stack trace, after
    100."""
    text = os.environ.get("VOCO_JAX_SILENCE", "30")
    seconds = float(text) if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text) else 0.0
    if not 2 * _BEAT <= seconds < 100:
        raise UserError(f"VOCO_JAX_SILENCE: expected {2 * _BEAT:g} seconds or more, below 100; found {text!r:.50}")
    return seconds


def _client() -> Any:
    """jax's coordination service, a store of keys and values; None where this process is alone."""
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return None
    import orbax.checkpoint as ocp  # not at the top: a process that is alone can do without

    return ocp.multihost.get_jax_distributed_client()  # jax itself has no public way to it


class _Watcher(threading.Thread):
    def __init__(self, client: Any, silence: float):
        super().__init__(daemon=True, name="watch")
        self._silence = silence
        self._client, self._own, self._count = client, jax.process_index(), jax.process_count()
        self._failing, self._done, self._ending = threading.Event(), threading.Event(), threading.Event()
        self._answered = time.monotonic()

    def await_answers(self) -> None:
        """End this process where process 0, which has all keys, does not answer: a call to it waits without end."""
        while not self._done.wait(_BEAT) and not self._ending.is_set():
            silent = time.monotonic() - self._answered
            if self._own != 0 and silent > self._silence:
                self._ending.set()
                print(f"error: {self._gone(0)}", file=sys.stderr, flush=True)
                _end(TryAgain.status)

    def run(self) -> None:
        beats: dict[int, str] = {}
        heard = dict.fromkeys(range(self._count), time.monotonic())
        for beat in range(2**62):
            if self._done.is_set():
                return
            if time.monotonic() - self._answered > self._silence / 2:  # this process was stopped for a while
                heard = dict.fromkeys(range(self._count), time.monotonic())
            try:
                self._put(f"alive/{self._own}", str(beat))
                alive, errors = self._all("alive"), self._all("error")
            except Exception as error:
                if self._done.is_set():
                    return
                self._give_up(
                    f"process 0, which all others go by, does not answer: {first_line(error)}", TryAgain.status
                )
            self._answered = now = time.monotonic()
            for process, value in alive.items():
                if beats.get(process) != value:
                    beats[process], heard[process] = value, now
            for process, text in errors.items():
                if process != self._own and not self._failing.is_set():
                    status, _, line = text.partition(" ")
                    self._give_up(f"process {process}: {line}", int(status))
            gone = [p for p in heard if alive.get(p) != "done" and now - heard[p] > self._silence and p != self._own]
            if gone:
                self._give_up(self._gone(gone[0]), TryAgain.status)
            self._done.wait(_BEAT)

    def stop(self) -> None:
        """This process is through: the others need not hear of it any more."""
        self._done.set()
        self.join()
        with contextlib.suppress(Exception):  # the others may be gone already, and jax says so itself
            self._put(f"alive/{self._own}", "done")

    def fail(self, error: BaseException) -> None:
        """Tell the others and end this process; or, where the error comes of another's end, wait to hear of that."""
        if not isinstance(error, UserError | OSError | KeyboardInterrupt | SystemExit):
            # A collective fails where a process has gone, and says nothing that helps. Who it was will show.
            if self._ending.wait(self._silence + 3 * _BEAT):
                self.join()  # it ends this process as soon as the others know
            traceback.print_exception(error)
        self._failing.set()
        status = exit_status(error)
        if isinstance(error, KeyboardInterrupt):
            status, line = interrupts.INTERRUPTED, interrupts.interrupted()
        else:
            line = str(error) if isinstance(error, UserError | OSError) and str(error) else repr(error)
        print(f"error: {line}", file=sys.stderr, flush=True)
        with contextlib.suppress(Exception):
            self._put(f"error/{self._own}", f"{status} {line}")
            self._await_others()
        _end(status)

    def _give_up(self, line: str, status: int) -> None:
        self._ending.set()
        print(f"error: {line}", file=sys.stderr, flush=True)
        with contextlib.suppress(Exception):
            self._put(f"gone/{self._own}", line)
            self._await_others()
        _end(status)

    def _await_others(self) -> None:
        """All others have said that they end. Process 0 has to be there until then: without it jax ends them first,
        before they can say why."""
        if self._own != 0:
            return
        deadline = time.monotonic() + 4 * _BEAT
        while time.monotonic() < deadline:
            if len((self._all("gone") | self._all("error")).keys() - {self._own}) == self._count - 1:
                break
            time.sleep(_BEAT / 10)
        time.sleep(_BEAT / 2)  # having said so, they still have to end

    def _put(self, key: str, value: str) -> None:
        self._client.key_value_set(f"{_ROOM}/{key}", value, allow_overwrite=True)

    def _all(self, room: str) -> dict[int, str]:
        return {int(key.rsplit("/", 1)[1]): value for key, value in self._client.key_value_dir_get(f"{_ROOM}/{room}/")}

    def _gone(self, process: int) -> str:
        return (
            f"process {process} has given no sign of life for {self._silence:.0f} s: it died or was stopped, or its "
            "machine; the same command goes on from the newest checkpoint"
        )


def _end(status: int) -> None:
    """Without jax's farewell, which waits for processes that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
