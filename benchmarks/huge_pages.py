"""A training step on CPU with huge pages (`GLIBC_TUNABLES=glibc.malloc.hugetlb=1`) beside one without.

    python -m benchmarks.huge_pages

Linux gives a step's buffers in pages of 4 KiB, at each of which the program stops for a moment; with huge pages of
2 MiB it seldom does. Runs of the demo's configuration, each a process of its own, are taken in turns; a ratio is of the
two of one round. glibc reads the variable when a process starts, so no program can set it for itself.
"""

import argparse
import json
import os
from pathlib import Path
import statistics
import subprocess
import sys
import tempfile

from tqdm import trange

from benchmarks.machine import machine
from benchmarks.trainings import HUGE_PAGES, train_command
from voco_jax import configs
from voco_jax.options import at_least_1

STEPS, EVERY = 60, 20


def seconds_of_a_step(env: dict[str, str]) -> float:
    """Of the steps after the first logged ones, which wait for the compiler."""
    with tempfile.TemporaryDirectory() as directory:
        workdir = Path(directory) / "run"
        keys = {"workdir": workdir, "train.steps": STEPS, "train.log_every": EVERY}
        command = train_command(configs.DIRECTORY / "easyvqa.py", keys)
        subprocess.run([sys.executable, "-m", *command], env=env, check=True, stdout=subprocess.DEVNULL)
        first, *_, last = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return (last["seconds"] - first["seconds"]) / (last["step"] - first["step"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=at_least_1, default=5)
    args = parser.parse_args()
    without = {name: value for name, value in os.environ.items() if name not in HUGE_PAGES}
    rounds = []
    for i in trange(args.rounds):
        pair = [("without", without), ("with", without | HUGE_PAGES)]
        rounds.append({name: seconds_of_a_step(env) for name, env in (pair if i % 2 else pair[::-1])})
    before, after = (statistics.median(round[name] for round in rounds) for name in ("without", "with"))
    ratios = sorted(round["with"] / round["without"] for round in rounds)
    spread = f"{ratios[0]:.2f}–{ratios[-1]:.2f}, {args.rounds} rounds"
    print(f"{before:.3f} s a step without, {after:.3f} s with huge pages, on {machine()}")
    print(f"with them a step takes {statistics.median(ratios):.2f} of the time ({spread})")


if __name__ == "__main__":
    main()
