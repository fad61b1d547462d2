"""The paper's Table 1 on easy-VQA: how much of what the picture tells survives compression, and who compresses best.

    python -m benchmarks.table1        (or `make table1`)

Seven trainings of one configuration, alike in steps, seed and data, that differ only in how a picture's 64 tokens reach
the text; the eighth row, the lower bound, is the upper bound's model asked through its untrained VoCo token.
Retention is (x − lower) / (upper − lower). Runs that are there already are continued, or taken as they are.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
import json
import os
from pathlib import Path
import queue
import subprocess
import sys
import threading

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from tqdm import tqdm

from voco_jax.command_line import parse_arguments
from voco_jax.config import typed
from voco_jax.errors import UserError, one_line_errors
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


def run(out: Path, name: str, common: dict, cpus: set[int]) -> None:
    """Train and evaluate one row on some of the CPUs; UserError if that fails, with the log's name."""
    workdir = directory(out, name)
    keys = TRAININGS[name] | common | {"workdir": workdir}
    train = ["voco_jax.train", f"--config={CONFIG}", *(f"--config.{key}={value}" for key, value in keys.items())]
    commands = [train, ["voco_jax.evaluate", "--run", str(workdir)]]
    if name == "upper bound":
        commands.append(["voco_jax.evaluate", "--run", str(workdir), "--compressor", "voco"])
    log = workdir.with_suffix(".log")
    for command in commands:
        with log.open("ab") as file:
            process = subprocess.Popen([sys.executable, "-m", *command], stdout=file, stderr=file)
            os.sched_setaffinity(process.pid, cpus)
            if process.wait():
                raise UserError(f"{name}: python -m {' '.join(command)} failed; see {log}")


def show_progress(out: Path, steps: int, done: threading.Event) -> None:
    """One bar over the steps of all rows."""
    with tqdm(total=steps * len(TRAININGS), unit="step", desc="table 1") as bar:
        while True:
            finished = done.wait(timeout=2)
            bar.update(sum(last_step(directory(out, name)) for name in TRAININGS) - bar.n)
            if finished:
                return


def last_step(workdir: Path) -> int:
    metrics = workdir / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


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
    all_cpus = sorted(os.sched_getaffinity(0))
    jobs = min(len(all_cpus), 4) if args.jobs is None else args.jobs
    if not 1 <= jobs <= len(all_cpus):
        raise UserError(f"--jobs: expected 1 to {len(all_cpus)}, found {jobs}")
    common = {"train.steps": args.steps, "seed": args.seed}
    config = parse_arguments(["", f"--config={CONFIG}", *(f"--config.{key}={v}" for key, v in common.items())])[0]
    make_schedule(typed(config).optim, args.steps)  # steps that cannot be show themselves here, not in seven logs
    args.out.mkdir(parents=True, exist_ok=True)

    shares = queue.SimpleQueue()
    for job in range(jobs):
        shares.put(set(all_cpus[job::jobs]))

    def work(name: str) -> None:
        cpus = shares.get()
        try:
            run(args.out, name, common, cpus)
        finally:
            shares.put(cpus)

    done = threading.Event()
    progress = threading.Thread(target=show_progress, args=(args.out, args.steps, done))
    progress.start()
    try:
        with ThreadPoolExecutor(jobs) as pool:
            try:
                for future in [pool.submit(work, name) for name in TRAININGS]:
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        done.set()
        progress.join()

    rows = collect(args.out)
    (args.out / "table1.md").write_text(markdown(rows) + "\n")
    (args.out / "table1.json").write_text(json.dumps(rows, indent=2) + "\n")
    draw(rows, args.out / "table1.png")
    print(markdown(rows))
    print(f"written: {args.out}/table1.md, table1.json, table1.png")


if __name__ == "__main__":
    main()
