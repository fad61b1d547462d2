"""A training step on CPU beside transformers' and torch's, on the same small LLaVA.

    python -m benchmarks.step_time --out docs/step_time.json

Weights, pictures, tokens, labels, threads, AdamW and clipping are the same on both sides (`benchmarks/llava_pair.py`),
and before anything is timed the losses of the first steps must be the same too. Then steps are taken in turns, in an
order that moves on every round; a ratio is of two steps of one round, and the figure the median of all rounds'.
A process for each number of threads, which is the number of cores that it may use.

    voco_jax          `make_train_step`, compressor 'none': LLaVA itself
    transformers      `LlavaForConditionalGeneration` with sdpa, AdamW fused or foreach, whichever is faster here
    torch.compile     the same, compiled
    voco_jax, VoCo    the same conversations and pictures with every picture in one token; another model, to compare
"""

import argparse
import json
import os
from pathlib import Path
import statistics
import subprocess
import sys
import time

import torch

from benchmarks.llava_pair import SMALL, Ours, Peer, conversations, largest_difference, row_length
from benchmarks.machine import machine, others

CHECKED_STEPS, WARM_UP = 4, 2
TOLERANCE = 1e-4
OURS, EAGER, COMPILED, VOCO = "voco_jax", "transformers", "torch.compile", "voco_jax, VoCo"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_time", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures as JSON too")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--here", action="store_true", help="measure in this process, print JSON (what main starts)")
    args = parser.parse_args()
    if args.here:
        print(json.dumps(measure(args.threads[0], args.rounds, not args.no_compile)))
        return
    figures = {"machine": machine(), "model": describe(), "by_threads": []}
    for threads in args.threads:
        rest = ["--rounds", str(args.rounds), "--threads", str(threads)] + ["--no-compile"] * args.no_compile
        command = [sys.executable, "-m", "benchmarks.step_time", "--here", *rest]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        figures["by_threads"].append(json.loads(done.stdout.splitlines()[-1]))
    print(table(figures))
    if args.out:
        args.out.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n")


def describe() -> dict:
    """What is trained."""
    made, _ = conversations(SMALL)
    return {
        "rows": SMALL.rows,
        "tokens_a_row": row_length(SMALL, made),
        "visual_tokens_a_row": SMALL.patches,
        "labels": int(sum(conversation.labels.sum() for conversation in made)),
        "llm": f"{SMALL.layers} layers of {SMALL.hidden}, {SMALL.heads} heads, vocabulary {SMALL.vocabulary}",
        "vision_tower": f"{SMALL.vision_layers} layers of {SMALL.vision_hidden}, {SMALL.picture} px, frozen",
    }


def measure(threads: int, rounds: int, compile_too: bool) -> dict:
    """Figures of one number of threads."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    if len(cores) < threads:
        raise SystemExit(f"--threads {threads}: this process may use {len(cores)} cores")
    os.sched_setaffinity(0, cores)  # XLA takes a thread for each core that it may use
    torch.set_num_threads(threads)

    variant = faster_adamw()
    sides = {OURS: Ours(SMALL), EAGER: Peer(SMALL, variant)}
    losses = {name: [side.step() for _ in range(CHECKED_STEPS)] for name, side in sides.items()}
    difference = largest_difference(losses[OURS], losses[EAGER])
    if difference > TOLERANCE:
        raise SystemExit(f"losses differ by {difference:.1e}: {losses}")
    result = {"threads": threads, "adamw": variant, "losses": losses, "largest_difference": difference}
    if compile_too:
        try:
            start = time.perf_counter()
            compiled = Peer(SMALL, variant, compiled=True)
            again = [compiled.step() for _ in range(CHECKED_STEPS)]
            if largest_difference(again, losses[EAGER]) > TOLERANCE:
                raise RuntimeError(f"losses are {again}")
            sides[COMPILED] = compiled
            result["torch_compile_s"] = round(time.perf_counter() - start, 1)
        except Exception as error:  # torch.compile needs a C++ compiler, and raises all kinds
            result["torch_compile"] = f"{type(error).__name__}: {str(error)[:300]}"
    sides[VOCO] = Ours(SMALL, "voco")

    result["load_before"] = others()
    wall: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(WARM_UP + rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            sides[name].step()
            if number >= WARM_UP:
                wall[name].append(time.perf_counter() - start)
    result["load_after"] = others()
    result["step_s"] = {name: round(statistics.median(times), 3) for name, times in wall.items()}
    result["step_s_least_and_most"] = {name: [round(min(t), 3), round(max(t), 3)] for name, t in wall.items()}
    result["ratio"] = {}
    for name in names[1:]:
        ratios = sorted(a / b for a, b in zip(wall[OURS], wall[name], strict=True))
        quarter = len(ratios) // 4
        result["ratio"][name] = {
            "median": round(statistics.median(ratios), 3),
            "middle_half": [round(ratios[quarter], 3), round(ratios[-1 - quarter], 3)],
            "least_and_most": [round(ratios[0], 3), round(ratios[-1], 3)],
        }
    return result


def faster_adamw() -> str:
    """'fused' or 'foreach', after a few steps of each."""
    times: dict[str, list[float]] = {"fused": [], "foreach": []}
    peers = {variant: Peer(SMALL, variant) for variant in times}
    for _ in range(4):
        for variant, peer in peers.items():
            start = time.perf_counter()
            peer.step()
            times[variant].append(time.perf_counter() - start)
    return min(times, key=lambda variant: min(times[variant]))


def table(figures: dict) -> str:
    m = figures["model"]
    lines = [
        f"{m['rows']} rows of {m['tokens_a_row']} tokens, {m['visual_tokens_a_row']} of them visual; "
        f"{m['llm']}; vision tower: {m['vision_tower']}; {figures['machine']}",
        "| threads | | seconds a step (least and most) | voco_jax takes (middle half of rounds) |",
        "|---:|---|---:|---:|",
    ]
    for row in figures["by_threads"]:
        for name, seconds in row["step_s"].items():
            least, most = row["step_s_least_and_most"][name]
            ratio = row["ratio"].get(name)
            compared = "" if ratio is None else "{} times ({}–{})".format(ratio["median"], *ratio["middle_half"])
            lines.append(f"| {row['threads']} | {name} | {seconds} ({least}–{most}) | {compared} |")
        if "torch_compile" in row:
            lines.append(f"| {row['threads']} | torch.compile | {row['torch_compile']} | |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
