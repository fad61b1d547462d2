"""A profiler trace of some steps: from a step that the config names, or when the process gets SIGUSR1.

    kill -USR1 PID

Traces are in `<workdir>/profile/step_N/` (of several processes, in `process_I/` there). A trace that cannot be made
leads to a warning and never ends a run.
"""

from collections.abc import Callable
import contextlib
from pathlib import Path
import signal
import threading

import jax

from voco_jax.terminal import log
from voco_jax.train.actions import Action, StepDone
from voco_jax.train.goodput import Goodput


class Profiler(Action):
    """Traces `length` steps from step `at` on, and at a signal as many from the next step on.

    A signal traces only the process that gets it; the config's trace is made by all. The handler is set between `with`
    and its end, in the main thread (others get no signals). A signal during a trace asks for another one.
    """

    def __init__(
        self,
        directory: Path,
        steps: range,
        goodput: Goodput,
        *,
        at: int = 0,
        length: int = 5,
        log: Callable[[str], None] = log,
    ):
        """`steps`: those to come; `at`: the first to trace, 0 for none. `log` gets a line for each trace."""
        self._directory, self._steps, self._at, self._length = directory, steps, at, length
        self._goodput, self._log = goodput, log
        self._asked = False  # by a signal
        self._trace: Path | None = None  # directory of the trace under way
        self._until = 0  # its last step
        self._annotation = contextlib.ExitStack()  # of the step under way
        self._restore = contextlib.ExitStack()

    def __enter__(self) -> "Profiler":
        if threading.current_thread() is threading.main_thread():
            previous = signal.signal(signal.SIGUSR1, self._on_signal) or signal.SIG_DFL
            self._restore.callback(signal.signal, signal.SIGUSR1, previous)
        if self._at and self._at not in self._steps and jax.process_index() == 0:
            first, last = self._steps.start, self._steps.stop - 1
            self._log(f"profile: no trace: steps {first} to {last} are to come, train.profile_at = {self._at}")
        return self

    def __exit__(self, *_) -> None:
        """A trace under way ends here."""
        self._annotation.close()
        if self._trace is not None:
            self._stop(self._trace)
        if self._asked:
            self._log("profile: no trace: asked for after the last step")
        self._restore.close()

    def before_step(self, step: int) -> None:
        if self._trace is None and (self._asked or step == self._at):
            self._asked = False
            self._begin(step)
        if self._trace is not None:
            self._annotation.enter_context(jax.profiler.StepTraceAnnotation("train", step_num=step))

    def after_step(self, done: StepDone) -> None:
        """Waits for the last step of a trace."""
        self._annotation.close()
        if self._trace is not None and done.step >= self._until:
            jax.block_until_ready(done.metrics)
            self._stop(self._trace)

    def _on_signal(self, *_) -> None:
        self._asked = True  # and nothing else: this may be in the middle of anything

    def _begin(self, step: int) -> None:
        trace = self._directory / f"step_{step:06d}"
        if jax.process_count() > 1:
            trace /= f"process_{jax.process_index()}"
        with self._warning_for_errors():
            trace.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(str(trace))
            self._trace, self._until = trace, min(step + self._length, self._steps.stop) - 1
            self._log(f"profile: tracing steps {step} to {self._until}")

    def _stop(self, trace: Path) -> None:
        self._trace = None
        with self._warning_for_errors():
            try:
                jax.profiler.stop_trace()
                if not any(trace.glob("plugins/profile/*/*")):
                    raise FileNotFoundError(f"{trace}: nothing was written")
            except BaseException:
                _forget_trace()
                raise
            self._log(
                f"profile: written: {trace} (xprof --logdir={trace} shows it, https://ui.perfetto.dev the "
                "*.trace.json.gz in it)"
            )

    @contextlib.contextmanager
    def _warning_for_errors(self):
        try:
            with self._goodput.during("profile"):
                yield
        except Exception as error:  # of the file system, jax's, the profiler's own
            self._log(f"profile: no trace: {' '.join(str(error).split()) or type(error).__name__:.300}")


def _forget_trace() -> None:
    """After a trace that could not be written, jax believes that it still runs, and starts no other."""
    from jax._src import profiler  # there is no public way to end it; the same in jax 0.10 to 0.12

    state = getattr(profiler, "_profile_state", None)
    if state is not None and state.profile_session is not None:
        state.reset()
