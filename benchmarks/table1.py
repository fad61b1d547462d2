"""The paper's Table 1 on easy-VQA: how much of what the picture tells survives compression, and who compresses best.

    python -m benchmarks.table1        (or `make table1`)

Seven trainings of one configuration, alike in steps, seed and data, that differ only in how a picture's 64 tokens reach
the text; the eighth row, the lower bound, is the upper bound's model asked through its untrained VoCo token.
Retention is (x − lower) / (upper − lower). Runs that are there already are continued, or taken as they are.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.trainings import Training, check_jobs, evaluate_command, run_all, train_command
from voco_jax.command_line import parse_arguments
from voco_jax.config import typed
from voco_jax.errors import one_line_errors
from voco_jax.optim import make_schedule

CONFIG = Path(__file__).parents[1] / "configs" / "easyvqa.py"

TRAININGS = {
    "upper bound": {"model.compressor": "none", "model.num_voco_tokens": 1},  # the VoCo token is in its text too
    "VoCo, 8 tokens": {"model.num_voco_tokens": 8},
    "VoCo, 4 tokens": {"model.num_voco_tokens": 4},
    "VoCo, 2 tokens": {"model.num_voco_tokens": 2},
    "VoCo, 1 token": {"model.num_voco_tokens": 1},
    "average pooling + linear, 1 token": {"model.compressor": "average_pool"},
    "Q-Former, 1 token": {"model.compressor": "qformer"},
}
LOWER = "lower bound, 1 token"


def directory(out: Path, name: str) -> Path:
    return out / name.replace(",", "").replace(" + ", " ").replace(" ", "_").lower()


def training(out: Path, name: str, common: dict) -> Training:
    """One row: its training, and its evaluations."""
    workdir = directory(out, name)
    commands = [train_command(CONFIG, TRAININGS[name] | common | {"workdir": workdir}), evaluate_command(workdir)]
    if name == "upper bound":
        commands.append(evaluate_command(workdir, "--compressor", "voco"))
    return Training({workdir: common["train.steps"]}, commands)


def collect(out: Path) -> dict[str, dict[str, float]]:
    """Accuracy in per cent by row and kind of question, and retention."""
    files = {name: directory(out, name) / "results.json" for name in TRAININGS}
    files[LOWER] = directory(out, "upper bound") / "results.voco.json"
    rows = {}
    for name, file in files.items():
        counts = json.loads(file.read_text())["counts"]["this run"]
        rows[name] = {kind: 100 * right / total for kind, (right, total) in counts.items()}
    upper, lower = rows["upper bound"]["overall"], rows[LOWER]["overall"]
    for row in rows.values():
        row["retention"] = 100 * (row["overall"] - lower) / (upper - lower) if upper != lower else float("nan")
    return rows


def markdown(rows: dict[str, dict[str, float]]) -> str:
    lines = ["| visual tokens to the text | color | shape | yes/no | overall | retention |", "|---|" + "---:|" * 5]
    for name, row in rows.items():
        shares = [f"{row[key]:.1f} %" for key in ("color", "shape", "yes/no", "overall", "retention")]
        lines.append(f"| {name} | {' | '.join(shares)} |")
    return "\n".join(lines)


def draw(rows: dict[str, dict[str, float]], path: Path) -> None:
    names = list(reversed(rows))
    accuracy = [rows[name]["overall"] for name in names]
    colours = ["#2563eb" if name.startswith("VoCo") else "#9ca3af" for name in names]
    figure, axis = plt.subplots(figsize=(8, 3.6))
    bars = axis.barh(names, accuracy, color=colours)
    labels = [f"{rows[name]['overall']:.1f} %  (keeps {rows[name]['retention']:.0f} %)" for name in names]
    axis.bar_label(bars, labels, padding=4, fontsize=9)
    lower = rows[LOWER]["overall"]
    axis.axvline(lower, color="#9ca3af", linestyle=":", linewidth=1)
    axis.set_xlim(0, 100)
    axis.set_xlabel("easy-VQA test questions right, %")
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


@one_line_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/table1"), help="default: runs/table1")
    parser.add_argument("--steps", type=int, default=850, help="of every training (default 850)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, help="trainings at a time (default: as many as there are CPUs, at most 4)")
    args = parser.parse_args()
    jobs = check_jobs(args.jobs)
    common = {"train.steps": args.steps, "seed": args.seed}
    config = parse_arguments(["", f"--config={CONFIG}", *(f"--config.{key}={v}" for key, v in common.items())])[0]
    make_schedule(typed(config).optim, args.steps)  # steps that cannot be show themselves here, not in seven logs
    args.out.mkdir(parents=True, exist_ok=True)
    run_all([training(args.out, name, common) for name in TRAININGS], jobs, "table 1")

    rows = collect(args.out)
    (args.out / "table1.md").write_text(markdown(rows) + "\n")
    (args.out / "table1.json").write_text(json.dumps(rows, indent=2) + "\n")
    draw(rows, args.out / "table1.png")
    print(markdown(rows))
    print(f"written: {args.out}/table1.md, table1.json, table1.png")


if __name__ == "__main__":
    main()
