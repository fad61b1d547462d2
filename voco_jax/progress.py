"""What a person sees of a training that runs: one bar on a terminal, a line now and then in a log file."""

from collections.abc import Callable, Sequence
import shlex
import shutil
import sys
import time

from tqdm import tqdm

from voco_jax.terminal import log

LINE_EVERY = 10.0  # seconds at least between two lines where there is no terminal


class Progress:
    """Shows steps `start` to `steps` on stderr; nothing at all where `show` is false."""

    def __init__(self, start: int, steps: int, *, show: bool, clock: Callable[[], float] = time.monotonic):
        self._steps, self._show, self._clock = steps, show, clock
        self._shown = float("-inf")
        self._bar = tqdm(
            total=steps, initial=start, desc="training", dynamic_ncols=True, mininterval=0.5,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt}{postfix}", disable=not (show and sys.stderr.isatty()),
        )  # fmt: skip

    def step(self) -> None:
        """One more step has ended."""
        self._bar.update(1)

    def show(self, step: int, text: str) -> None:
        """How things stand after a step; not all of it is shown in a log file, but the last step's is."""
        if not self._bar.disable:
            room = shutil.get_terminal_size().columns - len(f"training: 100%|███| {self._steps}/{self._steps}, ")
            self._bar.set_postfix_str(fitting(text, room))
        elif self._show and (self._clock() - self._shown >= LINE_EVERY or step == self._steps):
            self._shown = self._clock()
            print(f"step {step}/{self._steps}  {text}", file=sys.stderr, flush=True)

    def log(self, line: str) -> None:
        """A line of its own."""
        if self._show:
            log(line)

    def close(self) -> None:
        self._bar.close()


def fitting(text: str, room: int) -> str:
    """What of `describe`'s parts fits into so many columns: the first and the last go last.

    >>> fitting("loss 1.234  grad 0.8  12.3k tokens/s/device  2 min 10 s left", 40)
    'loss 1.234  grad 0.8  2 min 10 s left'
    """
    parts = text.split("  ")
    while len(parts) > 2 and len("  ".join(parts)) > room:
        del parts[-2]
    return "  ".join(parts)


def interrupted(workdir: str, saved: int, step: int, arguments: Sequence[str]) -> str:
    """What Ctrl-C is answered with after `step` steps, the last checkpoint being that of step `saved` (0: none yet).

    >>> interrupted("runs/a", 500, 523, ["--config=a.py"])
    'interrupted: saved at step 500 in runs/a, 23 steps are lost; goes on: voco train --config=a.py'
    """
    lost = f"{step - saved} step{'s are' if step - saved != 1 else ' is'} lost" if step > saved else "nothing is lost"
    kept = f"saved at step {saved} in {workdir}" if saved else "no checkpoint yet"
    again = shlex.join(["voco", "train", *arguments])
    return f"interrupted: {kept}, {lost}; {'goes on' if saved else 'begins again'}: {again}"


def describe(line: dict, seconds_left: float | None) -> str:
    """A line of `metrics.jsonl` in words; what is not known is left out.

    >>> describe({"loss": 1.23413, "grad_norm": 0.8, "tokens_per_second_per_device": 12345.6, "mfu": 0.4123}, 130)
    'loss 1.234  grad 0.8  12.3k tokens/s/device  MFU 41.2 %  2 min 10 s left'
    """
    loss = line.get("loss")
    parts = [f"loss {'unknown' if loss is None else f'{loss:#.4g}'}"]
    for key, words in (
        ("grad_norm", "grad {:.3g}"),
        ("tokens_per_second_per_device", "{} tokens/s/device"),
        ("images_per_second", "{} images/s"),
        ("questions_per_second", "{} questions/s"),
        ("mfu", "MFU {:.1%}"),
    ):
        value = line.get(key)
        if value is not None and not (key == "images_per_second" and not value):
            number = short(value) if words.startswith("{}") else value
            parts.append(words.format(number).replace("%", " %"))
    if line.get("skipped"):
        parts.append(f"{line['skipped']} skipped")
    if seconds_left:
        parts.append(f"{duration(seconds_left)} left")
    return "  ".join(parts)


def short(value: float) -> str:
    """A rate in three digits or so.

    >>> [short(x) for x in (0.1234, 7.06, 340.4, 12345, 3.2e6)]
    ['0.12', '7.1', '340', '12.3k', '3.2M']
    """
    for limit, unit in ((1e6, "M"), (1e4, "k")):
        if value >= limit:
            return f"{value / (1e6 if unit == 'M' else 1e3):.1f}{unit}"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def duration(seconds: float) -> str:
    """In the two largest units.

    >>> [duration(s) for s in (9.4, 130, 3900, 90000, 86399.9)]
    ['9 s', '2 min 10 s', '1 h 5 min', '1 d 1 h', '1 d 0 h']
    """
    seconds = round(seconds)
    for unit, size, below, smaller in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if seconds >= size:
            return f"{seconds // size} {unit} {seconds % size // smaller} {below}"
    return f"{seconds} s"
