"""Does it fit, and how fast should it be: a table and a growth plot over many TPU slices, without a TPU.

    python -m benchmarks.aot_table --out docs/aot        (minutes a case; what is there already is kept)

Each case is one `python -m voco_jax.aot --json` in a process of its own; its answer stays beside the table as JSON,
with the command that gave it, so a second call runs only what is missing or has changed.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
import json
from pathlib import Path
import re
import subprocess
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from tqdm import tqdm

from voco_jax.errors import UserError, one_line_errors

GIB = 2**30


@dataclass(frozen=True)
class Case:
    name: str
    config: str
    topology: str
    step: str = "train"
    overrides: dict = field(default_factory=dict)  # config keys
    size: int = 0  # place on the growth plot's axis; 0: not in the plot

    @property
    def arguments(self) -> list[str]:
        keys = [f"--config.{key}={value}" for key, value in self.overrides.items()]
        return [f"--config={self.config}", *keys, f"--topology={self.topology}", f"--step={self.step}"]


CASES = (
    Case("demo", "configs/easyvqa.py", "v5e:2x2"),
    *(
        Case(f"demo, {n} records", "configs/easyvqa.py", "v5e:2x2", "compress", {"data.batch_size": n}, size=n)
        for n in (16, 32, 64)
    ),
)
GROWTH_AXIS = "records a step"


def result_file(out: Path, case: Case) -> Path:
    return out / f"{re.sub(r'[^a-z0-9]+', '_', case.name.lower()).strip('_')}.json"


def load(out: Path, case: Case) -> dict | None:
    """The case's result, if its command was the same."""
    file = result_file(out, case)
    stored = json.loads(file.read_text()) if file.exists() else {}
    return stored["result"] if stored.get("arguments") == case.arguments else None


def run(out: Path, case: Case) -> None:
    """Compile one case and keep the answer; UserError with the log's name where there is none."""
    file = result_file(out, case)
    log = file.with_suffix(".log")
    command = [sys.executable, "-m", "voco_jax.aot", *case.arguments, "--json"]
    with log.open("w") as errors:
        process = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    if process.returncode not in (0, 1) or not process.stdout.startswith("{"):  # 1: it does not fit, an answer too
        last = (log.read_text().strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{case.name}: {last} (python -m voco_jax.aot {' '.join(case.arguments)}; see {log})")
    temporary = file.with_suffix(".new")
    result = json.loads(process.stdout)
    temporary.write_text(json.dumps({"arguments": case.arguments, "result": result}, indent=1) + "\n")
    temporary.replace(file)
    log.unlink()


def markdown(rows: list[tuple[Case, dict]]) -> str:
    lines = [
        "| case | step | slice | HBM GiB a device: arguments / temporaries / total | time ms, B–A "
        "| tokens/s a chip, A–B | MFU %, A–B | attention % | sent GiB a device, ms at links' speed | compiled in s |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for case, result in rows:
        hbm = result["hbm"]
        head = f"| {case.name} | {case.step} | {case.topology}"
        if not result["fits"]:
            needed = f"does not fit: at least {hbm['needed'] / GIB:.2f} of {hbm['available'] / GIB:.2f}"
            lines.append(f"{head} | {needed} |" + " – |" * 6)
            continue
        memory = " / ".join(f"{hbm[key] / GIB:.2f}" for key in ("arguments", "temporaries", "total"))
        sent = sum(collective["bytes"] for collective in result["collectives"]) / GIB
        cells = [
            f"{memory} ({hbm['share']:.0%})",
            span(result["step_seconds"], 1e3, ",.1f"),
            span(result["tokens_per_second"], 1 / result["chips"], ",.0f"),
            span(result["mfu"], 100, ".1f"),
            span(result["attention_share"], 100, ".0f"),
            f"{sent:.2f}, {result['collective_seconds'] * 1e3:.1f}",
            f"{result['compile_seconds']:.0f}",
        ]
        lines.append(f"{head} | {' | '.join(cells)} |")
    return "\n".join(lines)


def span(values: list[float], factor: float, form: str) -> str:
    low, high = (format(value * factor, form) for value in values)
    return low if low == high else f"{low}–{high}"


def draw(rows: list[tuple[Case, dict]], axis_name: str, path: Path) -> None:
    """Time (a band from B to A) and HBM of the cases that have a size."""
    grown = sorted(((case.size, result) for case, result in rows if case.size and result["fits"]), key=lambda x: x[0])
    sizes = [size for size, _ in grown]
    lower, upper = zip(*([s * 1e3 for s in result["step_seconds"]] for _, result in grown), strict=True)
    figure, (time, memory) = plt.subplots(1, 2, figsize=(9, 3.6))
    time.fill_between(sizes, lower, upper, color="#2563eb", alpha=0.3, linewidth=0)
    time.plot(sizes, upper, "o-", color="#2563eb", markersize=4)
    time.plot(sizes, lower, "o-", color="#2563eb", markersize=4)
    time.set_ylabel("estimated time, ms (B to A)")
    totals = [result["hbm"]["total"] / GIB for _, result in grown]
    memory.plot(sizes, totals, "o-", color="#2563eb", markersize=4)
    memory.set_ylabel("HBM a device, GiB")
    for axis in (time, memory):
        axis.set_xlabel(axis_name)
        axis.set_ylim(bottom=0)
        axis.set_xlim(left=0)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


@one_line_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/aot"), help="default: runs/aot")
    parser.add_argument("--jobs", type=int, default=1, help="compilations at a time (default 1; each takes two CPUs)")
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    args = parser.parse_args()
    if args.jobs < 1:
        raise UserError(f"--jobs: expected at least 1, found {args.jobs}")
    cases = [case for case in CASES if args.only in case.name]
    if not cases:
        raise UserError(f"--only: no case has {args.only!r} in its name; there are: {', '.join(c.name for c in CASES)}")
    args.out.mkdir(parents=True, exist_ok=True)
    missing = [case for case in cases if load(args.out, case) is None]
    failures = []
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=len(cases), initial=len(cases) - len(missing)) as bar:
        futures = {pool.submit(run, args.out, case): case for case in missing}
        for future in as_completed(futures):
            bar.set_description(futures[future].name)
            bar.update()
            if isinstance(future.exception(), UserError):
                failures.append(str(future.exception()))  # the others go on
            else:
                future.result()
    rows = [(case, result) for case in cases if (result := load(args.out, case)) is not None]
    if rows:
        (args.out / "table.md").write_text(markdown(rows) + "\n")
        print(markdown(rows))
    if sum(bool(case.size and result["fits"]) for case, result in rows) > 1:
        draw(rows, GROWTH_AXIS, args.out / "growth.png")
    if failures:
        raise UserError("; ".join(failures))


if __name__ == "__main__":
    main()
