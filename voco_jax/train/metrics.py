"""What a run says of itself while it trains: `metrics.jsonl`, TensorBoard and what is on the screen."""

from collections.abc import Callable
import json
import math
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from voco_jax.config import typed
from voco_jax.data.plan import Amount
from voco_jax.errors import UserError
from voco_jax.io.files import read_bytes
from voco_jax.io.paths import exists
from voco_jax.optim import make_schedule
from voco_jax.progress import Progress, describe
from voco_jax.terminal import log
from voco_jax.train.goodput import Goodput
from voco_jax.train.tensorboard import EventFile, write_all

_HINT = "a lower optim.learning_rate may help"


class Speed(NamedTuple):
    """What a step costs and what it might cost at best, all devices together.

    flops: of a step, by the formula of `models/flops.py`. peak: bfloat16 FLOP/s, None where it is not known.
    compress_length: tokens of an image in the compress stream.
    """

    flops: float = 0.0
    peak: float | None = None
    compress_length: int = 0


class MetricsLog:
    """A line every `log_every` steps and at checkpoints, in `metrics.jsonl`, TensorBoard and words.

    A step's numbers are read when the next step is already under way. What a killed run logged after its last
    checkpoint is forgotten: those steps are about to come again, and give the same lines but for the clock.

    A line has the means since the last one of all that the step returns (`loss`, `grad_norm` …), the learning rate of
    its step, and speeds: of real tokens (padding is not counted), over the time since the last line in which steps
    ran or waited for data. `mfu` is null where the devices' peak is not known. `seconds` and `goodput` are of the
    whole run, all its restarts. What `evaluated` is told is a line of its own.

    Of several processes the first alone writes and shows, but all look at the numbers, so that all end when the loss
    is none.
    """

    def __init__(
        self,
        workdir: Path,
        start: int,
        config: ConfigDict,
        goodput: Goodput,
        speed: Speed | None = None,
        describe: Callable[[int], str] = "batch {}".format,
    ):
        """`start` is the step that the run goes on after; `describe` says what is in a batch, by its number."""
        self._describe = describe
        self._workdir, self._start, self._train = workdir, start, config.train
        self._goodput, self._speed = goodput, speed or Speed()
        self._first = jax.process_index() == 0
        # All at once and here: computed later, it would wait in the devices' queue for the step under way
        self._rates = np.asarray(
            jax.vmap(make_schedule(typed(config).optim, config.train.steps))(jnp.arange(self._train.steps))
        )
        self._pending: tuple[int, dict[str, jax.Array], Amount] | None = None
        self._values: list[dict[str, float]] = []  # of steps since the last line
        self._skipped, self._skipped_in_a_row = 0, 0
        self._begun: tuple[int, float] | None = None  # the first step, and when it had ended
        # Since the last line, but for the first step: steps, conversations, tokens, images; and when that line was
        self._work, self._busy = np.zeros(4), 0.0
        self._jsonl = self._events = None

    def __enter__(self) -> "MetricsLog":
        self._progress = Progress(self._start, self._train.steps, show=self._first, clock=self._goodput.clock)
        if self._first:
            path = self._workdir / "metrics.jsonl"
            _drop_after(path, self._start)
            self._jsonl = path.open("ab", buffering=0)
            if self._train.tensorboard:
                self._events = EventFile(self._workdir / "tensorboard", self._start + 1)
        return self

    def __exit__(self, *_) -> None:
        for file in (self._jsonl, self._events):
            if file is not None:
                file.close()
        self._progress.close()

    def add(self, step: int, metrics: dict[str, jax.Array], amount: Amount) -> None:
        """A step has been started that returns these scalars (`loss` among them) and takes this amount of data, of all
        processes. Waits for the step before it, and for the first of all steps."""
        self._goodput.started(metrics)
        self.settle()
        self._pending = step, metrics, amount
        if self._begun is None:  # it is compilation, and no measure of the steps to come
            jax.block_until_ready(metrics)
            self._begun = step, self._training_seconds()
            self._busy = self._step_seconds()

    def settle(self) -> None:
        """Wait for the step that was added last. UserError if its loss is no number, or, where bad steps are skipped
        (metrics with `bad` above 0, train.on_bad_step), for too many of them in a row."""
        if self._pending is None:
            return
        (step, metrics, amount), self._pending = self._pending, None
        values = jax.device_get(metrics)
        values = {name: float(values[name]) for name in sorted(values, key=lambda name: (name != "loss", name))}
        if self._is_good(step, values):
            self._values.append({name: value for name, value in values.items() if name != "bad"})
        if step != self._begun[0]:
            tokens = amount.tokens + amount.images * self._speed.compress_length
            self._work += 1, amount.conversations, tokens, amount.images
        self._progress.step()
        self._goodput.note(step)
        every = (self._train.log_every, self._train.checkpoint_every, self._train.steps)
        if any(step % n == 0 for n in every):
            self._write_line(step, "bad" in values)

    def evaluated(self, step: int, values: dict[str, float | None], sheet: Path | None = None) -> None:
        """What an evaluation of the parameters after a step gave, and a picture of answers (PNG).

        Call it before the step's checkpoint is saved: a run that goes on from there does not evaluate again.
        """
        if not self._first:
            return
        self._write_json({"step": step} | {name: _rounded(value) for name, value in values.items()})
        if self._events is not None:
            self._events.scalars(step, {f"eval/{name.removeprefix('eval_')}": value for name, value in values.items()})
            if sheet is not None:
                self._events.picture(step, "eval/answers", sheet)
        parts = [f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items() if value is not None]
        self._progress.log("  ".join([f"step {step}/{self._train.steps}  evaluation", *parts]))

    # ---- A line ------------------------------------------------------------------------------------------------

    def _write_line(self, step: int, may_skip: bool) -> None:
        line = {"step": step} | self._means() | {"learning_rate": _rounded(self._rates[step - 1])}
        if may_skip:
            line["skipped"] = self._skipped
        line |= self._speeds()
        seconds_left = self._seconds_left(step)
        self._values, self._skipped, self._work = [], 0, np.zeros(4)
        line |= {"seconds": round(self._goodput.total, 2), "goodput": round(self._goodput.share, 4)}
        if not self._first:
            return
        self._write_json(line)
        if self._events is not None:
            self._events.scalars(step, {_tag(name): value for name, value in line.items() if name != "step"})
        self._progress.show(step, describe(line, seconds_left))

    def _means(self) -> dict[str, float | None]:
        """Of the steps since the last line that were not skipped."""
        if not self._values:
            return {"loss": None}
        return {name: _rounded(np.mean([v[name] for v in self._values])) for name in self._values[0]}

    def _speeds(self) -> dict[str, float | None]:
        """Since the last line, the first step left out; null where nothing is left."""
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
        """At the pace since the first step, evaluation and checkpoints included, compilation not."""
        first, begun = self._begun
        if step == first:
            return None
        return (self._train.steps - step) * (self._training_seconds() - begun) / (step - first)

    def _training_seconds(self) -> float:
        seconds = self._goodput.seconds
        return sum(seconds.values()) - seconds["setup"] - seconds["compile"]

    def _step_seconds(self) -> float:
        seconds = self._goodput.seconds
        return seconds["steps"] + seconds["data"]

    def _write_json(self, line: dict) -> None:
        write_all(self._jsonl, (json.dumps(line) + "\n").encode())

    # ---- Bad steps ---------------------------------------------------------------------------------------------

    def _is_good(self, step: int, values: dict[str, float]) -> bool:
        bad = values.get("bad", 0.0) != 0
        if not bad and math.isfinite(values["loss"]):
            self._skipped_in_a_row = 0
            return True
        if not bad or self._train.on_bad_step != "skip":
            spike = ", a spike or with gradients that are no numbers," if math.isfinite(values["loss"]) else ""
            raise UserError(
                f"training: loss is {values['loss']:.6g}{spike} at step {step} ({self._describe(step - 1)}); {_HINT}"
            )
        self._skipped += 1
        self._skipped_in_a_row += 1
        if self._first:
            numbers = ", ".join(f"{name} {value:.4g}" for name, value in values.items() if name != "bad")
            log(f"training: step {step} skipped: {numbers} ({self._describe(step - 1)})")
        if self._skipped_in_a_row > self._train.max_skipped:
            raise UserError(
                f"training: {self._skipped_in_a_row} steps in a row were bad, up to step {step} "
                f"(train.max_skipped is {self._train.max_skipped}); {_HINT}"
            )
        return False


def _tag(name: str) -> str:
    """A line's key as TensorBoard shows it, in groups."""
    if name.endswith("_per_second") or name in ("tokens_per_second_per_device", "mfu"):
        return f"speed/{name}"
    return f"time/{name}" if name in ("seconds", "goodput") else f"train/{name}"


def _rounded(value: float | None) -> float | None:
    """To seven digits, what float32 has; null for what JSON has no number for."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.7g}")


def _step_of(line: str) -> int | None:
    try:
        step = json.loads(line)["step"]
        return step if isinstance(step, int) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _drop_after(path: Path, step: int) -> None:
    """Keep the lines of steps up to `step`."""
    if not exists(path):
        return
    # Nothing stands after the last newline, but in a killed run
    *lines, unfinished = read_bytes(path).decode(errors="replace").split("\n")
    steps = [_step_of(line) for line in lines]
    if None in steps:
        log(f"{path}: {steps.count(None)} lines are no metrics, the first is line {steps.index(None) + 1}; left out")
    kept = [line for line, of in zip(lines, steps, strict=True) if of is not None and of <= step]
    if unfinished or len(kept) < len(lines):
        temporary = path.with_name(f"{path.name}.new")
        temporary.write_text("".join(line + "\n" for line in kept))
        temporary.replace(path)
