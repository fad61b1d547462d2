"""Ctrl-C and SIGTERM of a command, from its first moment to its last: one line and a status.

An exception in the main thread, which is Python's way, does not do for all of it. While modules are imported nobody
catches it; while XLA compiles, the main thread is in C++ for minutes and does not hear of it; and where the interpreter
then tears itself down under XLA's threads, the process crashes. So a thread hears the signals, and ends the process at
once where there is nothing to save and nothing to tidy up. Elsewhere Ctrl-C is a KeyboardInterrupt as usual.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import gc
import logging
import multiprocessing
import os
from pathlib import Path
import re
import signal
import sys
import threading
import time
import types
from typing import NoReturn

from voco_jax.terminal import printable

NOTHING_TO_SAVE = "preempted: nothing to save; the same command goes on"
INTERRUPTED = 130  # 128 + SIGINT, as of shells
_STATUS: dict[int, int] = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: 75}  # as TryAgain's
_LINE: dict[int, Callable[[], str]] = {signal.SIGINT: lambda: "interrupted", signal.SIGTERM: lambda: NOTHING_TO_SAVE}
_GRACE = 10.0  # seconds for the main thread to hear of Ctrl-C: a checkpoint may be on its way while it is in C++
_TWICE = 5.0  # seconds between two Ctrl-C by which somebody will not wait for the tidying up

_at_once: dict[int, bool] = {signal.SIGINT: False, signal.SIGTERM: False}
_raised, _ending = threading.Event(), threading.Lock()
_listening = False


def listen_in_a_command() -> None:
    """Begin, if this is `voco`, `python -m voco_jax.…` or one of tools/, and the package the first that it imports."""
    script = Path(sys.argv[0] if sys.argv else "").resolve()
    tool = script.is_file() and script.parent == Path(__file__).resolve().parents[1] / "tools"
    module = _module(sys.argv, sys.orig_argv)
    voco = module == "voco_jax" or script.is_file() and script.name == "voco"
    if (voco or module.startswith("voco_jax.") or tool) and multiprocessing.parent_process() is None:
        listen(terminates=module == "voco_jax.train" or voco and sys.argv[1:2] == ["train"])
        logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns of a home that it cannot write to


def _module(argv: Sequence[str], orig_argv: Sequence[str]) -> str:
    """What `python -m` is about to run, as long as Python looks for it; '' of other programs.

    >>> _module(["-m", "--help"], ["python", "-um", "voco_jax.ask", "--help"])
    'voco_jax.ask'
    """
    if argv[:1] != ["-m"]:
        return ""
    module = orig_argv[-len(argv)]  # before its own arguments
    return re.sub("^-[a-zA-Z]*?m", "", module)  # -mNAME


def listen(*, terminates: bool = False) -> None:
    """Hear Ctrl-C, and SIGTERM if that is to end with the status on which a command is started again."""
    global _listening
    _listening, _at_once[signal.SIGINT], _at_once[signal.SIGTERM] = True, True, terminates
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in a script's background
        signal.signal(signal.SIGINT, on_signal)
    if terminates:
        signal.signal(signal.SIGTERM, on_signal)
    heard, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    threading.Thread(target=_hear, args=(heard,), daemon=True, name="signals").start()


def listening() -> bool:
    """Whether this process is a command of this package, which ends as this module says."""
    return _listening


@contextlib.contextmanager
def at_once(value: bool, *signals: signal.Signals) -> Iterator[None]:
    """A block in which signals end the process at once (`value` true), or in which the block itself reacts to them."""
    before: dict[int, bool] = {number: _at_once[number] for number in signals}
    _at_once.update({number: value and _listening for number in signals})
    try:
        yield
    finally:
        _at_once.update(before)


def set_interrupt_line(line: Callable[[], str]) -> None:
    """Set the line that Ctrl-C is answered with from now on; `line` is called when Ctrl-C comes."""
    _LINE[signal.SIGINT] = line


def interrupted() -> str:
    """The line that Ctrl-C is answered with."""
    return _line(signal.SIGINT)


def _line(number: int) -> str:
    try:
        return _LINE[number]()
    except Exception as error:  # what it looks up may be out of reach by now: a directory, a bucket
        return f"interrupted ({type(error).__name__}: {error})".splitlines()[0]


def on_signal(number: int, frame: types.FrameType | None) -> None:
    """Handler: ends the process where that is to be; else Ctrl-C raises, and SIGTERM waits to be asked for."""
    number = signal.Signals(number)
    if _at_once[number]:
        end(_STATUS[number], _line(number))
    if number == signal.SIGINT:
        _raised.set()
        _raise(KeyboardInterrupt(), frame)


def exit_on_sigterm() -> None:
    """From now on SIGTERM is a SystemExit in the main thread: what was begun is tidied up on the way out."""
    signal.signal(signal.SIGTERM, lambda _, frame: _raise(SystemExit(128 + signal.SIGTERM), frame))


def _raise(error: BaseException, frame: types.FrameType | None) -> None:
    """Raise out of a handler that interrupted `frame`, at once or a moment later: Python ignores what is raised while
    it collects garbage (jax has a callback there) or in a `__del__`."""
    callbacks, above = [getattr(callback, "__code__", None) for callback in gc.callbacks], frame
    while above is not None:
        if above.f_code in callbacks or above.f_code.co_name == "__del__":
            signal.signal(signal.SIGALRM, lambda _, frame: _raise(error, frame))
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            return
        above = above.f_back
    raise error


def end(status: int, line: str = "") -> NoReturn:
    """End the process with a line on standard error, and without Python's farewell, which threads of C++ may crash."""
    if not _ending.acquire(blocking=False):
        time.sleep(3600)  # another thread is about to
    flush = threading.Thread(target=_flush, daemon=True)  # whoever is to read may have stopped reading
    flush.start()
    flush.join(1)
    if line:
        before = "\n" if sys.stderr is not None and sys.stderr.isatty() else ""  # "^C", or half a progress bar
        with contextlib.suppress(OSError):
            os.write(2, f"{before}{printable(line)}\n".encode(errors="backslashreplace"))
    os._exit(status)


def _flush() -> None:
    for stream in sys.stdout, sys.stderr:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()


def _hear(descriptor: int) -> None:
    last = -_TWICE
    while received := os.read(descriptor, 1):
        number = received[0]
        if number in _STATUS and _at_once[number]:
            end(_STATUS[number], _line(number))
        if number == signal.SIGINT:
            now = time.monotonic()
            if now - last < _TWICE or not _raised.wait(_GRACE):
                end(INTERRUPTED, interrupted())
            _raised.clear()
            last = now
