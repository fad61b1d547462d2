"""`voco curves --run runs/a [--run runs/b …]`: how runs went, as one picture; several are compared.

Loss (with the evaluations'), accuracy, gradient norm, learning rate, speed, MFU and goodput over the steps, as far as
`metrics.jsonl` has them, and below where the time went (`goodput.json`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
import numpy as np

from voco_jax.errors import UserError, one_line_errors
from voco_jax.options import Parser, check_out
from voco_jax.progress import duration, short
from voco_jax.train.goodput import CATEGORIES, LABELS, read_seconds, share
from voco_jax.train.writers import read_metrics

# Key of a line and title of its panel; a key that no run has gets no panel
PANELS = {
    "loss": "loss",
    "accuracy": "accuracy of short answers",
    "grad_norm": "gradient norm",
    "learning_rate": "learning rate",
    "tokens_per_second_per_device": "tokens/s/device",
    "mfu": "MFU",
    "goodput": "goodput",
}
SHARES = ("accuracy", "mfu", "goodput")
RUN_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito's
_OF_CATEGORIES = ("#009e73", "#999999", "#e69f00", "#d55e00", "#56b4e9", "#0072b2", "#f0e442", "#000000")
TIME_COLOURS = dict(zip(CATEGORIES, _OF_CATEGORIES, strict=True))


class History(NamedTuple):
    """Lines of `metrics.jsonl`, and seconds by category (none without `goodput.json`)."""

    name: str
    lines: list[dict]
    seconds: dict[str, float]

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """(steps, values) of one key, where it has a number."""
        points = [(line["step"], line[key]) for line in self.lines if line.get(key) is not None]
        return [step for step, _ in points], [value for _, value in points]


def read_history(run: Path) -> History:
    """UserError for a directory without metrics, or a damaged file."""
    file = run / "metrics.jsonl"
    if not file.exists():
        raise UserError(f"{file}: not found; a run directory has it once training has begun")
    lines = []
    for i, (text, values) in enumerate(read_metrics(file), start=1):
        lines.append({key: value for key, value in values.items() if _is_number(value)})
        if "step" not in lines[-1]:
            raise UserError(f"{file}:{i}: expected an object with a step, found {text!r:.80}")
    if not lines:
        raise UserError(f"{file}: nothing has been logged yet")
    account = run / "goodput.json"
    return History(run.name or str(run), lines, read_seconds(account) if account.exists() else {})


def _is_number(value) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e300  # what can be drawn; a file may say anything


@matplotlib.rc_context({"text.parse_math": False})  # a run may be called `a$b$`
def draw_curves(histories: Sequence[History], path: Path) -> None:
    """Draw all runs into one PNG, or another kind of file by the name's ending."""
    keys = [key for key in PANELS if any(history.series(key)[0] for history in histories)]
    timed = [history for history in histories if history.seconds]
    columns = 4 if len(keys) in (4, 7, 8) else 3
    rows = -(-len(keys) // columns)
    bars = 0.7 + 0.35 * len(timed) if timed else 0.01
    figure = plt.figure(figsize=(13.2, 2.9 * rows + bars), layout="constrained")
    panels, below = np.atleast_1d(np.asarray(figure.subfigures(2, 1, height_ratios=(2.9 * rows, bars))))
    axes = list(panels.subplots(rows, columns, squeeze=False, sharex=True).flat)
    for axis, key in zip(axes, keys, strict=False):
        _draw_panel(axis, histories, key)
    for axis in axes[len(keys) :]:
        axis.axis("off")
    if len(histories) > 1:
        panels.legend(
            [plt.Line2D([], [], color=_colour(i)) for i in range(len(histories))], [h.name for h in histories],
            loc="outside upper center", ncols=min(len(histories), 5), frameon=False,
        )  # fmt: skip
    else:
        figure.suptitle(histories[0].name, fontsize=11)
    if timed:
        _draw_times(below.subplots(), timed)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_panel(axis, histories: Sequence[History], key: str) -> None:
    for i, history in enumerate(histories):
        steps, values = history.series(key)
        axis.plot(steps, values, color=_colour(i), linewidth=1.2, marker="." if len(steps) < 20 else "")
        if key == "loss":
            steps, values = history.series("eval_loss")
            axis.plot(steps, values, color=_colour(i), linewidth=1.2, linestyle="--", marker="o", markersize=4)
    if key == "loss" and any(history.series("eval_loss")[0] for history in histories):
        handles = [plt.Line2D([], [], color="#57606a", linestyle=line) for line in ("-", "--")]
        axis.legend(handles, ["training", "evaluation"], frameon=False, fontsize=8)
    axis.set_title(PANELS[key], fontsize=10)
    axis.set_xlabel("step", fontsize=8)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axis.tick_params(labelsize=8, labelbottom=True)
    axis.grid(alpha=0.25)
    if key in SHARES:
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axis.set_ylim(0, 1 if key != "mfu" else None)
    elif key == "tokens_per_second_per_device":
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        axis.set_ylim(bottom=0)
    elif key == "loss":
        axis.set_ylim(bottom=0)


def _draw_times(axis, histories: Sequence[History]) -> None:
    """A bar a run, of all its time, by category."""
    for row, history in enumerate(histories):
        total, left = sum(history.seconds.values()) or 1.0, 0.0
        for category in CATEGORIES:
            part = history.seconds[category] / total
            axis.barh(
                row, part, left=left, height=0.7, color=TIME_COLOURS[category], label=None if row else LABELS[category]
            )
            left += part
    names = [f"{history.name}: {_told(history)}" for history in histories]
    axis.set_yticks(range(len(histories)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.tick_params(axis="x", labelsize=8)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(CATEGORIES), frameon=False, fontsize=8,
        handlelength=1.0,
    )  # fmt: skip


def _told(history: History) -> str:
    return f"{duration(sum(history.seconds.values()))}, goodput {share(history.seconds):.1%}".replace("%", " %")


def _colour(i: int) -> str:
    return RUN_COLOURS[i % len(RUN_COLOURS)]


@one_line_errors
def main() -> None:
    parser = Parser(prog="voco curves", description=__doc__)
    parser.add_argument("--run", type=Path, action="append", required=True, help="run directory; again for more")
    parser.add_argument("--out", type=Path, help="picture (default: curves.png in the run's directory)")
    args = parser.parse_args()
    if len(args.run) > 1 and args.out is None:
        raise UserError("--out: expected a file for the picture of several runs, found none")
    out = args.out or args.run[0] / "curves.png"
    if args.out is not None:
        check_out(out, ".png", ".svg", ".pdf", ".jpg")
    draw_curves([read_history(run) for run in args.run], out)
    print(f"written: {out}")


if __name__ == "__main__":
    main()
