"""What a run says of itself while it trains: a progress bar, and `metrics.jsonl` for plots."""

import json
import os
from pathlib import Path
import sys
import time

import jax
from ml_collections import ConfigDict
import numpy as np
from tqdm import tqdm

from voco_jax.errors import UserError


class MetricsLog:
    """The progress bar and `metrics.jsonl`: a line every `log_every` steps and at checkpoints, with the mean loss.

    A step's loss is read when the next step is already under way. What a killed run logged after its last checkpoint
    is forgotten: those steps are about to come again, and give the same lines but for the clock.

    Of several processes the first alone writes and shows, but all look at the loss, so that all end when it is no
    number. `questions` are those of all processes.
    """

    def __init__(self, path: Path, start: int, train: ConfigDict):
        first = jax.process_index() == 0
        self._path, self._train = path if first else Path(os.devnull), train
        self._pending: tuple[int, jax.Array] | None = None
        self._losses: list[float] = []
        self._questions, self._since = 0, None
        interval = 0.5 if sys.stderr.isatty() else 20
        self._bar = tqdm(
            total=train.steps, initial=start, unit="step", desc="training", mininterval=interval, disable=not first
        )

    def __enter__(self):
        _drop_after(self._path, self._bar.n)
        self._file = self._path.open("a")
        return self

    def __exit__(self, *_):
        self._file.close()
        self._bar.close()

    def add(self, step: int, loss: jax.Array, questions: int) -> None:
        """A step has been started."""
        self.settle()
        self._pending = step, loss
        if self._since is None:  # the first step is compilation
            jax.block_until_ready(loss)
            self._since = time.perf_counter()
            self._bar.unpause()  # or the time left would count it
        else:
            self._questions += questions

    def settle(self) -> None:
        """Wait for the loss of the step that was added last; UserError if it is no number."""
        if self._pending is None:
            return
        step, loss = self._pending
        self._pending = None
        loss = float(loss)
        if not np.isfinite(loss):
            raise UserError(f"training: loss is {loss} at step {step}; a lower optim.learning_rate may help")
        self._losses.append(loss)
        self._bar.update(1)
        every = (self._train.log_every, self._train.checkpoint_every, self._train.steps)
        if all(step % n for n in every):
            return
        seconds = time.perf_counter() - self._since
        speed = self._questions / seconds if self._questions else 0.0
        mean = float(np.mean(self._losses))
        self._losses.clear()
        self._bar.set_postfix_str(f"loss {mean:.4f}, {speed:.0f} questions/s")
        line = {
            "step": step,
            "loss": round(mean, 6),
            "questions_per_second": round(speed, 1),
            "seconds": round(seconds, 2),
        }
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


def _drop_after(path: Path, step: int) -> None:
    """Keep the lines of steps up to `step`."""
    if not path.exists():
        return
    *lines, unfinished = path.read_text().split("\n")  # nothing stands after the last newline, but in a killed run
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    if unfinished or len(kept) < len(lines):
        path.write_text("".join(line + "\n" for line in kept))
