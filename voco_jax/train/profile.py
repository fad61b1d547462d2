"""A profiler trace of some steps on demand: from a step that the config names, or when the process gets SIGUSR1.

    kill -USR1 PID

What was traced stands in `<workdir>/profile/step_N/` (of several processes, `process_I/` in it each). A trace that
cannot be made is one line of warning and never ends a run.
"""

from collections.abc import Callable
import contextlib
from pathlib import Path
import signal
import threading

import jax
from ml_collections import ConfigDict

from voco_jax.terminal import log
from voco_jax.train.goodput import Goodput


class Profiler:
    """Traces steps `train.profile_at` to `profile_at + profile_steps - 1`, and as many from the next on at a signal.

    The signal is to one process, and traces that one alone; the config's trace is made by all. The handler is there
    while the context is (in the main thread: others get no signals). A signal during a trace asks for one more.
    """

    def __init__(
        self, workdir: Path, train: ConfigDict, start: int, goodput: Goodput, log: Callable[[str], None] = log
    ):
        """`start` is the step that the run goes on after. `log` is told what is traced and where it stands."""
        self._directory, self._at, self._steps = workdir / "profile", train.profile_at, train.profile_steps
        self._start, self._end, self._goodput, self._log = start, train.steps, goodput, log
        self._asked = False  # by a signal
        self._until, self._trace = 0, None  # the last step of the trace under way, and its directory
        self._step = contextlib.ExitStack()
        self._previous = None

    def __enter__(self) -> "Profiler":
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGUSR1, self._on_signal) or signal.SIG_DFL
        if self._at and not self._start < self._at <= self._end and jax.process_index() == 0:
            self._log(
                f"profile: no trace: steps {self._start + 1} to {self._end} are to come, train.profile_at = {self._at}"
            )
        return self

    def __exit__(self, *_) -> None:
        """A trace under way ends here."""
        self._step.close()
        if self._trace is not None:
            self._stop()
        if self._asked:
            self._log("profile: no trace: asked for after the last step")
        if self._previous is not None:
            signal.signal(signal.SIGUSR1, self._previous)

    def before_step(self, step: int) -> None:
        """This step is about to be dispatched."""
        if self._trace is None and (self._asked or step == self._at):
            self._asked = False
            self._begin(step)
        if self._trace is not None:
            self._step.enter_context(jax.profiler.StepTraceAnnotation("train", step_num=step))

    def after_step(self, step: int, result) -> None:
        """It has been dispatched; `result` (arrays) is there when it has ended, for which the trace's last waits."""
        self._step.close()
        if self._trace is not None and step >= self._until:
            jax.block_until_ready(result)
            self._stop()

    def _on_signal(self, *_) -> None:
        self._asked = True  # and nothing else: this may be in the middle of anything

    def _begin(self, step: int) -> None:
        trace = self._directory / f"step_{step:06d}"
        if jax.process_count() > 1:
            trace /= f"process_{jax.process_index()}"
        self._until = min(step + self._steps - 1, self._end)
        try:
            with self._goodput.during("profile"):
                trace.mkdir(parents=True, exist_ok=True)
                jax.profiler.start_trace(str(trace))
        except Exception as error:  # of the file system, jax's, the profiler's own
            self._log(f"profile: no trace: {_reason(error)}")
            return
        self._trace = trace
        self._log(f"profile: tracing steps {step} to {self._until}")

    def _stop(self) -> None:
        trace, self._trace = self._trace, None
        try:
            with self._goodput.during("profile"):
                jax.profiler.stop_trace()
            if not any(trace.glob("plugins/profile/*/*")):
                raise FileNotFoundError(f"{trace}: nothing was written")
        except Exception as error:
            _forget_trace()
            self._log(f"profile: no trace: {_reason(error)}")
            return
        self._log(
            f"profile: written: {trace} (xprof --logdir={trace} shows it, https://ui.perfetto.dev the *.trace.json.gz "
            "in it)"
        )


def _reason(error: Exception) -> str:
    return f"{' '.join(str(error).split()) or type(error).__name__:.300}"


def _forget_trace() -> None:
    """jax 0.10 takes a trace that could not be written for one under way, and would begin no other."""
    from jax._src import profiler

    state = getattr(profiler, "_profile_state", None)
    if getattr(state, "profile_session", None) is not None:
        state.reset()
