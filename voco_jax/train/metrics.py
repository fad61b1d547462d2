"""The numbers of a training: read from the devices, checked, averaged over some steps, and given to the writers."""

from collections.abc import Callable, Sequence
import math
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from voco_jax.config_keys import TrainConfig
from voco_jax.data.plan import Amount
from voco_jax.errors import UserError
from voco_jax.progress import Progress, describe
from voco_jax.terminal import log
from voco_jax.train.actions import Action, StepDone
from voco_jax.train.goodput import Goodput
from voco_jax.train.writers import Writer

_HINT = "a lower optim.learning_rate may help"


class Speed(NamedTuple):
    """The work of a step and the peak of all devices together.

    flops: of a step, by the formula of `models/flops.py`. peak: bfloat16 FLOP/s, None where it is not known.
    compress_length: tokens of an image in the compress stream.
    """

    flops: float = 0.0
    peak: float | None = None
    compress_length: int = 0


class MetricsLog(Action):
    """A line every `log_every` steps and at checkpoints, to the writers and in words.

    The numbers of a step are read when the next step is already under way, so the devices never wait.

    A line has the means since the last one of all that the steps return (`loss`, `grad_norm` …; null where no step
    knows it), the learning rate of its step, and speeds: of real tokens (padding is not counted), over the time since
    the last line in which steps ran or waited for data. `mfu` is null where the devices' peak is not known. `seconds`
    and `goodput` are of the whole run, all its restarts. What `evaluated` is told is a line of its own.

    Of several processes only the first has writers, but all check the numbers, so that all end when the loss is not
    finite.
    """

    def __init__(
        self,
        writers: Sequence[Writer],
        steps: range,
        config: TrainConfig,
        goodput: Goodput,
        learning_rates: np.ndarray,
        amount: Callable[[int], Amount],
        describe_batch: Callable[[int], str] = "batch {}".format,
        speed: Speed = Speed(),  # noqa: B008 (nobody changes it)
    ):
        """`steps` are those to come, `learning_rates` of all steps of the run. `amount` and `describe_batch` say how
        much is in a batch of all processes, and what, by its number."""
        self._writers, self._steps, self._config, self._goodput = writers, steps, config, goodput
        self._learning_rates, self._amount, self._describe, self._speed = learning_rates, amount, describe_batch, speed
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._values: list[dict[str, float]] = []  # of steps since the last line
        self._skipped, self._skipped_in_a_row = 0, 0
        self._begun = 0.0  # training seconds when the first step had ended: it compiles, and is no measure of others
        # Since the last line, but for the first step: steps, conversations, tokens, images; and when that line was
        self._work, self._busy = np.zeros(4), 0.0

    def __enter__(self) -> "MetricsLog":
        show = jax.process_index() == 0
        self._progress = Progress(self._steps.start - 1, self._config.steps, show=show, clock=self._goodput.clock)
        return self

    def __exit__(self, *_) -> None:
        self._progress.close()

    def after_step(self, done: StepDone) -> None:
        """Waits for the step before."""
        self._goodput.started(done.metrics)
        self.settle()
        self._pending = done.step, done.metrics
        if done.step == self._steps.start:
            self._begun, self._busy = self._training_seconds(), self._step_seconds()

    def settle(self) -> None:
        """Wait for the newest step and read its numbers. UserError if its loss is not finite, or, where bad steps are
        skipped (metrics with `bad` above 0, train.on_bad_step), for too many of them in a row."""
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        read = jax.device_get(metrics)
        values = {name: float(read[name]) for name in sorted(read, key=lambda name: (name != "loss", name))}
        if self._is_good(step, values):
            self._values.append({name: value for name, value in values.items() if name != "bad"})
        if step != self._steps.start:
            amount = self._amount(step - 1)
            tokens = amount.tokens + amount.images * self._speed.compress_length
            self._work += 1, amount.conversations, tokens, amount.images
        self._progress.step()
        self._goodput.step_ended()
        every = (self._config.log_every, self._config.checkpoint_every, self._config.steps)
        if any(step % n == 0 for n in every):
            self._write_line(step, "bad" in values)

    def evaluated(self, step: int, values: dict[str, float | None], sheet: Path | None = None) -> None:
        """Log an evaluation of the parameters after a step, with a picture of answers (PNG).

        It comes before the step's checkpoint: a run that goes on from there does not evaluate again.
        """
        for writer in self._writers:
            writer.scalars(step, {name: _rounded(value) for name, value in values.items()})
            if sheet is not None:
                writer.picture(step, sheet)
        parts = [f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items() if value is not None]
        self._progress.log("  ".join([f"step {step}/{self._config.steps}  evaluation", *parts]))

    # ---- A line ------------------------------------------------------------------------------------------------

    def _write_line(self, step: int, may_skip: bool) -> None:
        names = self._values[0] if self._values else ["loss"]  # null where every step was skipped
        line = {name: _rounded(_mean([v[name] for v in self._values])) if self._values else None for name in names}
        line["learning_rate"] = _rounded(self._learning_rates[step - 1])
        if may_skip:
            line["skipped"] = self._skipped
        line |= self._speeds()
        line |= {"seconds": round(self._goodput.total, 2), "goodput": round(self._goodput.share, 4)}
        self._values, self._skipped, self._work = [], 0, np.zeros(4)
        for writer in self._writers:
            writer.scalars(step, line)
        self._progress.show(step, describe(line, self._seconds_left(step)))

    def _speeds(self) -> dict[str, float | None]:
        """Speeds since the last line, without the run's first step; None where no other step ran."""
        now = self._step_seconds()
        seconds, self._busy = now - self._busy, now
        steps, questions, tokens, images = self._work
        known = steps > 0 and seconds > 0
        peak, flops = self._speed.peak, self._speed.flops
        return {
            "questions_per_second": _rounded(questions / seconds) if known else None,
            "images_per_second": _rounded(images / seconds) if known else None,
            "tokens_per_second_per_device": _rounded(tokens / seconds / jax.device_count()) if known else None,
            "mfu": _rounded(flops * steps / seconds / peak) if known and peak else None,
        }

    def _seconds_left(self, step: int) -> float | None:
        """At the pace since the first step, which includes evaluations and checkpoints."""
        done = step - self._steps.start
        return (self._config.steps - step) * (self._training_seconds() - self._begun) / done if done else None

    def _training_seconds(self) -> float:
        seconds = self._goodput.seconds
        return sum(seconds.values()) - seconds["setup"] - seconds["compile"]

    def _step_seconds(self) -> float:
        seconds = self._goodput.seconds
        return seconds["steps"] + seconds["data"]

    # ---- Bad steps ---------------------------------------------------------------------------------------------

    def _is_good(self, step: int, values: dict[str, float]) -> bool:
        bad = values.get("bad", 0.0) != 0
        if not bad and math.isfinite(values["loss"]):
            self._skipped_in_a_row = 0
            return True
        batch = self._describe(step - 1)
        if not bad or self._config.on_bad_step != "skip":
            spike = ", a spike or with gradients that are not finite," if math.isfinite(values["loss"]) else ""
            raise UserError(f"training: loss is {values['loss']:.6g}{spike} at step {step} ({batch}); {_HINT}")
        self._skipped += 1
        self._skipped_in_a_row += 1
        if jax.process_index() == 0:
            numbers = ", ".join(f"{name} {value:.4g}" for name, value in values.items() if name != "bad")
            log(f"training: step {step} skipped: {numbers} ({batch})")
        if self._skipped_in_a_row > self._config.max_skipped:
            raise UserError(
                f"training: {self._skipped_in_a_row} steps in a row were bad, up to step {step} "
                f"(train.max_skipped is {self._config.max_skipped}); {_HINT}"
            )
        return False


def _mean(values: Sequence[float]) -> float:
    """Of those that are known: a batch may have nothing that a metric is of, and it is NaN then."""
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan


def _rounded(value: float | np.floating | None) -> float | None:
    """With seven digits, as many as float32 has; None for NaN and infinities, which JSON does not have."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.7g}")
