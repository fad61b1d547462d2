"""Does it fit, how fast should it be, how does it grow: tables and a plot over many TPU slices, without a TPU.

    python -m benchmarks.aot_table --out docs/aot        (two minutes a case; what is there already is kept)

Each case (`benchmarks/aot_cases.py`) is one `voco aot --json` in a process of its own; its answer stays
beside the tables as JSON, with the command that gave it, and a second call runs only what is missing. After a change of
code or configs, or with another libtpu, begin with an empty folder.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor, as_completed
import json
from pathlib import Path
import re
import subprocess
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from tqdm import tqdm

from benchmarks import aot_cases
from benchmarks.aot_cases import Case, Peer
from voco_jax.errors import UserError, one_line_errors

GIB = 2**30
PEER = (
    "The peer is MaxText's Llama-2-7B (2026-08-22): fp32 weights and Adam, bf16 compute, FSDP over all chips, full "
    "remat, splash attention, compiled with the same libtpu and counted in the same way, for the same 2,048 tokens a "
    "sequence. Collectives are in neither's time. Ours carries a frozen vision tower and a projector along, 0.02 GiB a "
    "chip on 64. With pictures, tokens are those of both streams."
)


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
        raise UserError(f"{case.name}: {last} (voco aot {' '.join(case.arguments)}; see {log})")
    temporary = file.with_suffix(".new")
    result = json.loads(process.stdout)
    temporary.write_text(json.dumps({"arguments": case.arguments, "result": result}, indent=1) + "\n")
    temporary.replace(file)
    log.unlink()


Rows = list[tuple[Case, dict]]


def fits_table(rows: Rows) -> str:
    lines = [
        "| run | step | slice | HBM GiB a device: arguments + temporaries = total | step ms, B–A "
        "| tokens/s a chip, A–B | MFU %, A–B | attention % | sent GiB a device | exposed ms | compiled in s |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for case, result in rows:
        hbm = result["hbm"]
        head = f"| {case.name} | {case.step} | {case.topology}"
        if not result["fits"]:
            needed = f"does not fit: at least {hbm['needed'] / GIB:.2f} of {hbm['available'] / GIB:.2f}"
            lines.append(f"{head} | {needed} |" + " – |" * 7)
            continue
        cells = [
            f"{hbm['arguments'] / GIB:.2f} + {hbm['temporaries'] / GIB:.2f} = {hbm['total'] / GIB:.2f} "
            f"({hbm['share']:.0%} of the device's)",
            span(result["step_seconds"], 1e3, ",.1f"),
            span(tokens_per_second(result), 1 / result["chips"], ",.0f"),
            span(result["mfu"], 100, ".1f"),
            span(result["attention_share"], 100, ".0f"),
            f"{sum(collective['bytes'] for collective in result['collectives']) / GIB:.2f}",
            f"{exposed(result):.1f}",
            f"{result['compile_seconds']:.0f}",
        ]
        lines.append(f"{head} | {' | '.join(cells)} |")
    return "\n".join(lines)


def speed_table(rows: Rows, peers: dict[str, Peer]) -> str:
    """Step and HBM beside the peer's; how many times the peer's tokens/s, by either end of the range."""
    lines = [
        "| run | HBM GiB | peer's | step s, B–A | peer's | × the peer's tokens/s, by A, by B "
        "| tokens/s a chip, A–B | MFU %, A–B |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for case, result in rows:
        if not result["fits"]:
            lines.append(f"| {case.name} | does not fit |" + " – |" * 6)
            continue
        peer = peers.get(case.name)
        b, a = result["step_seconds"]
        beside = ("–", "–", "–")
        if peer is not None:
            peer_b, peer_a = peer.seconds
            beside = f"{peer.hbm_gib:.2f}", f"{peer_b:.2f}–{peer_a:.2f}", f"{peer_a / a:.2f}, {peer_b / b:.2f}"
        cells = [
            f"{result['hbm']['total'] / GIB:.2f}",
            beside[0],
            f"{b:.3f}–{a:.3f}",
            *beside[1:],
            span(tokens_per_second(result), 1 / result["chips"], ",.0f"),
            span(result["mfu"], 100, ".1f"),
        ]
        lines.append(f"| {case.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def class_table(rows: Rows) -> str:
    """Where the time goes (A), and the dearest ops over the ideal."""
    lines = [
        "| run | matmul ms | attention | the rest, B–A | exposed collectives | dearest over the ideal (A), ms |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for case, result in rows:
        if result["fits"]:
            classes = result["classes"]
            dearest = "; ".join(
                f"{dear['label']} {dear['excess_seconds'] * 1e3:.0f} of {dear['seconds'] * 1e3:.0f}"
                for dear in result["dearest"][:3]
            )
            lines.append(
                f"| {case.name} | {classes['matmul'][1] * 1e3:,.0f} | {classes['attention'][1] * 1e3:,.0f} "
                f"| {span(classes['the rest'], 1e3, ',.0f')} | {exposed(result):,.0f} | {dearest} |"
            )
    return "\n".join(lines)


def tokens_per_second(result: dict) -> list[float]:
    """Read and compress tokens, without padding; [lower, upper]."""
    tokens = result["tokens"] + result["compress_tokens"]
    return [tokens / seconds for seconds in reversed(result["step_seconds"])]


def exposed(result: dict) -> float:
    """Milliseconds at the links' speed of collectives that nothing runs beside."""
    return sum(collective["exposed_seconds"] for collective in result["collectives"]) * 1e3


def taught_lines(results: dict[str, dict]) -> list[str]:
    """A step with a teacher, over the same step without: by A, by B."""
    lines = []
    for case, alone in aot_cases.TAUGHT:
        both = results.get(case.name), results.get(alone)
        if all(result is not None and result["fits"] for result in both):
            taught, plain = (result["step_seconds"] for result in both)
            by_b, by_a = (with_ / without for with_, without in zip(taught, plain, strict=True))
            lines.append(f"{case.name}: {by_a:.2f} × (A), {by_b:.2f} × (B) the step of cross-entropy alone.")
    return lines


def flops_lines(rows: Rows) -> list[str]:
    """The program's FLOPs for pictures compressed, over those for one causal row of the same tokens."""
    lines = []
    for (case, compressed), (_, plain) in zip(rows[::2], rows[1::2], strict=True):
        if compressed["fits"] and plain["fits"]:
            ratio = compressed["program_flops"] / plain["program_flops"]
            lines.append(f"{case.name}: {ratio:.3f} × the FLOPs of plain causal attention over the same tokens.")
    return lines


def span(values: list[float], factor: float, form: str) -> str:
    low, high = (format(value * factor, form) for value in values)
    return low if low == high else f"{low}–{high}"


def draw(series: dict[str, dict[int, dict]], path: Path) -> None:
    """Time (a band from B to A) and HBM over the frames that a device compresses."""
    figure, (time, memory) = plt.subplots(1, 2, figsize=(9.5, 3.8))
    for color, (name, grown) in zip(("#2563eb", "#ea580c"), series.items(), strict=False):
        frames = sorted(grown)
        lower, upper = zip(*([s * 1e3 for s in grown[n]["step_seconds"]] for n in frames), strict=True)
        time.fill_between(frames, lower, upper, color=color, alpha=0.25, linewidth=0)
        time.plot(frames, upper, "o-", color=color, markersize=4, label=name)
        time.plot(frames, lower, "o-", color=color, markersize=4)
        memory.plot(frames, [grown[n]["hbm"]["total"] / GIB for n in frames], "o-", color=color, markersize=4)
    time.set_ylabel("estimated step, ms (B to A)")
    time.legend(frameon=False)
    memory.set_ylabel("HBM a device, GiB")
    for axis in (time, memory):
        axis.set_xlabel("frames a device")
        axis.set_ylim(bottom=0)
        axis.set_xlim(left=0)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def page(results: dict[str, dict]) -> str:
    """The tables, in Markdown, of the cases that have a result."""

    def rows(cases) -> Rows:
        return [(case, results[case.name]) for case in cases if case.name in results]

    peers = {case.name: peer for case, peer in aot_cases.SPEED}
    pictures = rows(aot_cases.PICTURE_SPEED)
    speed = rows(case for case, _ in aot_cases.SPEED) + pictures
    growing = rows(case for cases in aot_cases.GROWTH.values() for case in cases.values())
    any_result = next(iter(results.values()))
    parts = [
        "# Compiled for TPUs, on a machine without one",
        "Made by `python -m benchmarks.aot_table --out docs/aot` with "
        f"jax {any_result['jax']} and libtpu {any_result['libtpu']}. Nothing was run: HBM is what the compiler "
        "assigns, times are estimates from its cycles; [pods.md](../pods.md) says how to read them. Each line is one "
        "`voco aot`; the JSON files here have its arguments and its whole answer.",
    ]
    if fits := rows((*aot_cases.FITS, *(case for case, _ in aot_cases.TAUGHT))):
        parts += ["## Does it fit", fits_table(fits), *taught_lines(results)]
    if speed:
        parts += ["## How fast", PEER, speed_table(speed, peers)]
    if len(pictures) == len(aot_cases.PICTURE_SPEED):
        parts += flops_lines(pictures)
    if speed:
        parts += ["## Where the time goes", class_table(speed)]
    if growing:
        parts += ["## Growth", fits_table(growing), "![time and HBM over frames a device](growth.png)"]
    return "\n\n".join(parts) + "\n"


def grown(results: dict[str, dict]) -> dict[str, dict[int, dict]]:
    """Of each series with two results or more: {frames a device: result}."""
    series = {
        name: {
            frames // case.overrides.get("mesh.frame", 1): results[case.name]
            for frames, case in cases.items()
            if results.get(case.name, {}).get("fits")
        }
        for name, cases in aot_cases.GROWTH.items()
    }
    return {name: by_frames for name, by_frames in series.items() if len(by_frames) > 1}


@one_line_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/aot"), help="default: runs/aot")
    parser.add_argument("--jobs", type=int, default=1, help="compilations at a time (default 1; each takes two CPUs)")
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    args = parser.parse_args()
    if args.jobs < 1:
        raise UserError(f"--jobs: expected at least 1, found {args.jobs}")
    cases = [case for case in aot_cases.CASES if args.only in case.name]
    if not cases:
        raise UserError(
            f"--only: no case has {args.only!r} in its name; there are: {'; '.join(c.name for c in aot_cases.CASES)}"
        )
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
    results = {case.name: result for case in aot_cases.CASES if (result := load(args.out, case)) is not None}
    if len(versions := {(result["jax"], result["libtpu"]) for result in results.values()}) > 1:
        found = "; ".join(f"jax {jax}, libtpu {libtpu}" for jax, libtpu in sorted(versions))
        raise UserError(f"{args.out}: expected answers of one compiler, found {found}: remove the older JSON files")
    if results:
        (args.out / "tables.md").write_text(page(results))
        print(page(results))
    if series := grown(results):
        draw(series, args.out / "growth.png")
    if failures:
        raise UserError("; ".join(failures))


if __name__ == "__main__":
    main()
