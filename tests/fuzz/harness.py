"""What runs the cases of a `Target`, in a process of its own that may be killed, and counts what became of them."""

import collections
from collections.abc import Callable, Iterable
import dataclasses
import hashlib
import multiprocessing
import os
from pathlib import Path
import re
import sys
import tempfile
import time
import traceback

import numpy as np

SECONDS = 10.0  # that a case may take
MEMORY = 2**30  # bytes that a case may take, above what the process had before and what `Target.needs`
SOUND, REFUSED, TRACEBACK, HANG, OVER, SILENT = "read", "refused", "traceback", "hang", "over the bound", "silent"
BAD = (TRACEBACK, HANG, OVER, SILENT)


class Target:
    """A kind of input. Subclasses have their `count` of cases in the whole suite."""

    count: int

    def make(self, directory: Path) -> None:
        """Write sound inputs into a directory, once; called in the process that reads them, as everything here."""

    def case(self, rng: np.random.Generator, directory: Path) -> tuple[str, Callable[[], str | None]]:
        """What is damaged and how, in words; and a call that reads it. An exception that is no `UserError` is a fault,
        and so is a text that it returns: what was wrong with the input, could be told, and was not."""
        raise NotImplementedError

    def needs(self) -> int:
        """Bytes that reading the last case's input takes for what is in it."""
        return 0


@dataclasses.dataclass
class Outcome:
    case: int
    kind: str
    what: str  # was done to the input
    said: str = ""  # the line, or the end of the traceback
    seconds: float = 0.0
    memory: int = 0  # bytes above what the process had before


@dataclasses.dataclass
class Report:
    name: str
    outcomes: list[Outcome]

    def __str__(self) -> str:
        kinds = collections.Counter(outcome.kind for outcome in self.outcomes)
        counts = ", ".join(f"{kinds[kind]} {kind}" for kind in (SOUND, REFUSED, *BAD))
        slowest = max((outcome.seconds for outcome in self.outcomes), default=0.0)
        largest = max((outcome.memory for outcome in self.outcomes), default=0)
        return f"{self.name}: {len(self.outcomes)} cases: {counts}; at most {slowest:.1f} s, {largest / 2**20:.0f} MiB"

    @property
    def bad(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.kind in BAD]


def run(
    name: str,
    cases: Iterable[int],
    seed: int = 0,
    on_case: Callable[[Outcome], None] = lambda _: None,
    seconds: float = SECONDS,
) -> Report:
    """All cases in order; the process is started anew after one that it does not survive."""
    outcomes, left = [], collections.deque(cases)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="fuzz_") as temporary:
        while left:
            directory = Path(temporary) / f"inputs_{len(outcomes)}"
            directory.mkdir()
            ours, theirs = context.Pipe()
            child = context.Process(target=_child, args=(name, seed, directory, theirs), daemon=True)
            child.start()
            theirs.close()
            what = None  # until there is a case
            try:
                if not ours.poll(300) or ours.recv() != "ready":
                    raise TimeoutError(f"{name}: its inputs were not made in 300 s")
                while left:
                    what = "making the case"
                    ours.send(left[0])
                    # First what is read, then what became of it
                    what = ours.recv() if ours.poll(60) else what
                    outcome = ours.recv() if ours.poll(seconds) else Outcome(left[0], HANG, what, "", seconds)
                    outcomes.append(outcome)
                    left.popleft()
                    on_case(outcome)
                    if outcome.kind == HANG:
                        break
            except (EOFError, ConnectionResetError, BrokenPipeError):
                child.join()
                if what is None:
                    printed = directory.with_name(f"{directory.name}_printed").read_text(errors="replace")
                    raise RuntimeError(f"{name}: its inputs were not made: {printed[-2000:]}") from None
                outcomes.append(Outcome(left.popleft(), TRACEBACK, what, f"the process ended: {child.exitcode}"))
                on_case(outcomes[-1])
            finally:
                child.kill()
                child.join()
                ours.close()
    return Report(name, outcomes)


def run_here(name: str, case: int, seed: int = 0) -> str:
    """One case without a process around it: an error that is none for users is raised."""
    from tests.fuzz import target
    from voco_jax.errors import UserError

    with tempfile.TemporaryDirectory(prefix="fuzz_") as directory:
        of_kind = target(name)
        of_kind.make(Path(directory))
        what, read = of_kind.case(_rng(name, seed, case), Path(directory))
        print(what)
        try:
            return read() or SOUND
        except UserError as error:
            return f"{REFUSED}: {error}"


def _rng(name: str, seed: int, case: int) -> np.random.Generator:
    return np.random.default_rng([int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]), seed, case])


def _child(name: str, seed: int, directory: Path, pipe) -> None:
    from tests.fuzz import target
    from voco_jax.terminal import printable

    printed = os.open(directory.with_name(f"{directory.name}_printed"), os.O_RDWR | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(printed, stream)
    of_kind = target(name)
    of_kind.make(directory)
    pipe.send("ready")
    while True:
        case = pipe.recv()
        what, read = of_kind.case(_rng(name, seed, case), directory)
        os.ftruncate(printed, 0)
        pipe.send(what)
        outcome = _outcome(case, what, read, of_kind.needs)
        sys.stdout.flush()
        sys.stderr.flush()
        text = os.pread(printed, 10_000, 0).decode(errors="surrogateescape")
        if outcome.kind not in BAD and (text != printable(text, keep="\n\r\t") or "Traceback" in text):
            outcome = dataclasses.replace(outcome, kind=TRACEBACK, said=f"printed: {ascii(text)}")
        pipe.send(outcome)


def _outcome(case: int, what: str, read: Callable[[], str | None], needs: Callable[[], int]) -> Outcome:
    from voco_jax.errors import UserError
    from voco_jax.terminal import printable

    before, start = _start_of_peak(), time.monotonic()
    try:
        silent = read()
        kind, said = (SILENT, silent) if silent else (SOUND, "")
    except UserError as error:
        kind, said = REFUSED, str(error)
        if said != printable(said) or not said:
            kind = TRACEBACK
    except BaseException:
        kind, said = TRACEBACK, traceback.format_exc()[-2000:]
    seconds, memory = time.monotonic() - start, _memory("VmHWM") - before
    if kind in (SOUND, REFUSED) and memory > MEMORY + needs():
        kind = OVER
    return Outcome(case, kind, what, said, seconds, memory)


def _start_of_peak() -> int:
    """Let the kernel count the most memory from here on; bytes that the process has."""
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _memory(key: str) -> int:
    return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
