"""One load, three servers: `voco serve`, the same uncompressed, `transformers serve`; and `Model.answers` without one.

    python -m benchmarks.serving --out docs/serving.json --chart docs/serving.png
    python -m benchmarks.serving --model 1b --questions 32 --tokens 8 --rounds 1 --out …        # more than an hour

All have the same weights (`served_model.py`; they are random, so the answers mean nothing), processes of their own on
the same cores, and the same requests from this process: `--clients` at once, each asks again when it has its answer.
The picture comes with every request, as a data URI. Answers are greedy, streamed, and all of the same length. Requests
are about 50 pictures that have been asked about before, or about pictures that nobody has seen. Sides are taken in
turns, in an order that moves on every round; figures are medians of all rounds, ratios those of one round. Before that
the uncompressed server and transformers must give the same texts.

`Model.answers` gets the same requests in one call, as many together as there are clients, and 64 together; pictures
that were asked about before are encoded already. Where memory is short, only one side is loaded at a time.
"""

import argparse
import asyncio
from collections.abc import Sequence
import contextlib
import json
import os
from pathlib import Path
import statistics
import subprocess
import sys
import tempfile
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from benchmarks import charts, served, served_model
from benchmarks.machine import cpu_seconds, free_memory, machine, memory_of, others
from benchmarks.trainings import HUGE_PAGES

SHARED, ONCE = CASES = ("shared pictures", "pictures seen once")
OURS, PLAIN, PEER = SERVERS = ("voco serve", "voco serve, uncompressed", "transformers serve")
OFFLINE, OFFLINE_64 = "Model.answers", "Model.answers, 64 together"
SIDES = {"voco": OURS, "none": PLAIN, "transformers": PEER, "offline": OFFLINE, "offline-64": OFFLINE_64}
COMPARED = ((OURS, PEER), (OURS, PLAIN), (PLAIN, PEER), (OURS, OFFLINE), (OURS, OFFLINE_64))
SAME_TEXT = ((PLAIN, PEER), (OURS, OFFLINE))
PICTURES = 50  # shared ones: numbers 0 … 49; those that are seen once come after them
CHECKED = 4  # questions whose answers must be the same before anything is timed


class Question(NamedTuple):
    picture: int
    text: str


class Result(NamedTuple):
    """What came of some questions. firsts: seconds to each first text; cpu: seconds of the side's process."""

    texts: list[str]
    firsts: list[float]
    seconds: float
    cpu: float


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("tiny", "small", "1b"), default="small", help="of benchmarks.asked_pair")
    parser.add_argument("--work", type=Path, default=Path("runs/served"), help="where models are made (runs/served)")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--questions", type=int, default=128, help="of each case, side and round (default 128)")
    parser.add_argument("--tokens", type=int, default=16, help="of each answer (default 16)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="some of the sides")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, help="one of the cases")
    parser.add_argument("--out", type=Path, help="write the figures as JSON too")
    parser.add_argument("--chart", type=Path, help="draw them as PNG")
    args = parser.parse_args()
    directory = args.work.resolve() / args.model
    model = served_model.make(directory, args.model)
    names = [SIDES[side] for side in args.sides]
    with tempfile.TemporaryDirectory(dir=directory) as store:
        sides = Sides(Load(directory, Path(store), args.clients, args.tokens), model["bytes"])
        with contextlib.closing(sides):
            figures = measure(sides, names, args.cases, args.questions, args.rounds)
    figures = {"machine": machine(), "cores": len(os.sched_getaffinity(0)), **model, **figures}
    print(table(figures))
    if args.out:
        args.out.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n")
    if args.chart:
        draw(figures, args.chart)


# ---- Sides -------------------------------------------------------------------------------------------------------


class Load(NamedTuple):
    """What all sides have in common; `directory` has the models, and `store` is for memories."""

    directory: Path
    store: Path
    clients: int
    tokens: int

    def picture(self, number: int) -> Path:
        file = self.directory / "pictures" / f"{number}.jpg"
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(served.picture(number))
        return file


class Server:
    """A side that is asked over HTTP."""

    def __init__(self, load: Load, name: str):
        self._load, log = load, load.directory / "servers.log"
        options = ["--rows", load.clients, "--context", 2048]
        self._model = "model" if name != PEER else str(load.directory / served_model.HF)
        if name == PEER:
            self._process = served.transformers(load.directory / served_model.HF, log)
        elif name == PLAIN:
            self._process = served.ours(load.directory / served_model.NONE, log, *options)
        else:
            self._process = served.ours(load.directory / served_model.VOCO, log, *options, "--store", load.store)

    def ask(self, case: str, questions: Sequence[Question]) -> Result:
        how = {"max_tokens": self._load.tokens, "stream": True, "stream_options": {"include_usage": True}}
        bodies = []
        for question in questions:
            part = served.picture_part(self._load.picture(question.picture).read_bytes())
            bodies.append(json.dumps(served.chat(question.text, [part], **how) | {"model": self._model}).encode())
        cpu = self._process.cpu_seconds
        answers, seconds = asyncio.run(served.ask_all(self._process.url, bodies, self._load.clients))
        if lengths := {answer.tokens for answer in answers} - {self._load.tokens}:
            raise SystemExit(f"expected answers of {self._load.tokens} tokens, found some of {lengths}")
        cpu = self._process.cpu_seconds - cpu
        return Result([answer.text for answer in answers], [answer.first for answer in answers], seconds, cpu)

    def memory(self) -> dict[str, float]:
        """Bytes: the process's, and what it says that it holds of pictures and of requests."""
        found = {"resident": float(self._process.memory)}
        if self._model == "model":
            metrics = self._process.metrics()
            found["cache"] = metrics["voco_cache_bytes"]
            found |= {level: metrics[f'voco_held_bytes{{level="{level}"}}'] for level in ("device", "host")}
        return found

    def close(self) -> None:
        self._process.stop()


class Offline:
    """`serving_offline.py`, as a side. `together` requests are answered at once."""

    def __init__(self, load: Load):
        self._load, self.together = load, load.clients
        command = [sys.executable, "-m", "benchmarks.serving_offline", str(load.directory / served_model.VOCO)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=HUGE_PAGES | os.environ
        )

    def ask(self, case: str, questions: Sequence[Question]) -> Result:
        assert self._process.stdin is not None and self._process.stdout is not None
        requests = [[str(self._load.picture(q.picture)), q.text] for q in questions]
        asked = {
            "requests": requests, "is_seen": case == SHARED, "tokens": self._load.tokens, "together": self.together
        }  # fmt: skip
        cpu = cpu_seconds(self._process.pid)
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        if not (line := self._process.stdout.readline()):
            raise SystemExit(f"benchmarks.serving_offline ended with status {self._process.wait()}")
        found = json.loads(line)
        return Result(found["texts"], [], found["seconds"], cpu_seconds(self._process.pid) - cpu)

    def memory(self) -> dict[str, float]:
        return {"resident": float(memory_of(self._process.pid))}

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


class Sides:
    """All of them, each started when it is asked, and then asked some questions that do not count."""

    def __init__(self, load: Load, bytes: int):
        self.load, self._bytes = load, bytes
        self._running: dict[str, Server | Offline] = {}
        self._warm: set[tuple[str, str]] = set()
        self.memory: dict[str, dict[str, float]] = {}

    def ask(self, name: str, case: str, questions: Sequence[Question]) -> Result:
        side = self._started(name)
        if (name, case) not in self._warm:
            self._warm.add((name, case))
            if case == SHARED and name != PEER:  # it keeps nothing of them
                side.ask(case, [Question(i, "What is it?") for i in range(PICTURES)])
            # `Model.answers` compiles for what it gets in one call
            side.ask(
                case, questions_of(case, 0, len(questions) if isinstance(side, Offline) else 2 * self.load.clients)
            )
        result = side.ask(case, questions)
        self.memory[name] = side.memory()
        return result

    def _started(self, name: str) -> Server | Offline:
        place = OFFLINE if name == OFFLINE_64 else name  # one process
        if place not in self._running:
            if free_memory() < 2 * self._bytes + (2 << 30):
                self.close()
            self._running[place] = Offline(self.load) if place == OFFLINE else Server(self.load, place)
        side = self._running[place]
        if isinstance(side, Offline):
            side.together = self.load.clients if name == OFFLINE else 64
        return side

    def close(self) -> None:
        for side in self._running.values():
            side.close()
        self._running.clear()
        self._warm.clear()


# ---- Measuring ---------------------------------------------------------------------------------------------------


def questions_of(case: str, round: int, count: int) -> list[Question]:
    """Those of a round; no two rounds have a question in common, or a picture that is seen once."""
    first = 10_000 * round
    shared = np.random.default_rng(round).integers(0, PICTURES, count).tolist()
    pictures = shared if case == SHARED else range(PICTURES + first, PICTURES + first + count)
    return [Question(picture, f"What is number {first + i} from the left?") for i, picture in enumerate(pictures)]


def measure(sides: Sides, names: Sequence[str], cases: Sequence[str], count: int, rounds: int) -> dict:
    """Figures, ready for JSON."""
    before = others()
    taken: dict[str, dict[str, list[Result]]] = {case: {name: [] for name in names} for case in cases}
    if PLAIN in names and PEER in names:
        check(sides)
    with tqdm(total=rounds * len(cases) * len(names), unit="load") as bar:
        for round in range(1, rounds + 1):
            for case in cases:
                questions = questions_of(case, round, count)
                for i in range(len(names)):
                    name = names[(i + round) % len(names)]
                    bar.set_description(f"{case}, {name}")
                    taken[case][name].append(sides.ask(name, case, questions))
                    bar.update()
    return {
        "clients": sides.load.clients, "questions": count, "tokens": sides.load.tokens, "rounds": rounds,
        "load_before": before, "load_after": others(),
        "cases": {case: {name: summary(r, sides.load.tokens) for name, r in of.items()} for case, of in taken.items()},
        "ratios": {case: ratios(of) for case, of in taken.items()},
        "same_text": {case: same_text(of) for case, of in taken.items()},
        "memory": sides.memory,
    }  # fmt: skip


def check(sides: Sides) -> None:
    """SystemExit unless the uncompressed server computes what transformers does."""
    questions = questions_of(SHARED, 0, CHECKED)
    ours, theirs = (sides.ask(name, SHARED, questions).texts for name in (PLAIN, PEER))
    if ours != theirs:
        raise SystemExit(f"answers differ:\n{ours}\n{theirs}")


def summary(results: Sequence[Result], tokens: int) -> dict[str, float]:
    """Medians of the rounds."""
    count = len(results[0].texts)
    found = {
        "questions_per_s": [count / r.seconds for r in results],
        "tokens_per_s": [count * tokens / r.seconds for r in results],
        "cpu_s_a_question": [r.cpu / count for r in results],
    }
    if results[0].firsts:
        found |= {f"first_token_s_p{p}": [float(np.percentile(r.firsts, p)) for r in results] for p in (50, 95)}
    return {name: rounded(statistics.median(values)) for name, values in found.items()}


def ratios(of: dict[str, list[Result]]) -> dict[str, list[float]]:
    """Questions/s of one side over another's in the same round: their median, least and most."""
    found = {}
    for one, other in COMPARED:
        if one in of and other in of:
            rates = [b.seconds / a.seconds for a, b in zip(of[one], of[other], strict=True)]
            found[f"{one} / {other}"] = [rounded(x) for x in (statistics.median(rates), min(rates), max(rates))]
    return found


def same_text(of: dict[str, list[Result]]) -> dict[str, float]:
    """The share of answers that two sides have in common."""
    return {
        f"{one} = {other}": statistics.mean(
            x == y for a, b in zip(of[one], of[other], strict=True) for x, y in zip(a.texts, b.texts, strict=True)
        )
        for one, other in SAME_TEXT if one in of and other in of
    }  # fmt: skip


def rounded(x: float) -> float:
    return float(f"{x:.4g}")


# ---- Shown -------------------------------------------------------------------------------------------------------


def table(figures: dict) -> str:
    lines = [
        f"{figures['model']}; {figures['parameters'] / 1e6:,.0f} M parameters; {figures['clients']} clients, "
        f"{figures['questions']} questions a round, answers of {figures['tokens']} tokens; {figures['cores']} cores of "
        f"{figures['machine']}; {figures['rounds']} rounds", "",
        "| | questions/s | tokens/s | first token, s: p50 | p95 | CPU s a question |", "|---|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for case, sides in figures["cases"].items():
        for name, of in sides.items():
            first = [of.get(f"first_token_s_p{p}", "") for p in (50, 95)]
            cells = (of["questions_per_s"], of["tokens_per_s"], *first, of["cpu_s_a_question"])
            lines.append(f"| {case}: {name} | " + " | ".join(map(str, cells)) + " |")
    lines += ["", "| questions/s | median of rounds | least and most |", "|---|---:|---:|"]
    for case, of in figures["ratios"].items():
        lines += [f"| {case}: {name} | {median} | {least}–{most} |" for name, (median, least, most) in of.items()]
    lines += ["", "| MB | process | pictures, host | pictures, devices | cache |", "|---|---:|---:|---:|---:|"]
    for name, of in figures["memory"].items():
        held = [f"{of[key] / 1e6:,.1f}" if key in of else "" for key in ("resident", "host", "device", "cache")]
        lines.append(f"| {name} | " + " | ".join(held) + " |")
    for case, of in figures["same_text"].items():
        lines += ["", *(f"{case}, same text: {name}: {share:.1%}" for name, share in of.items())]
    return "\n".join(lines)


def draw(figures: dict, file: Path) -> None:
    """Questions/s, and time to the first token, of the servers."""
    figure, axes = charts.panels(2)
    cases = figures["cases"]
    names = [name for name in SERVERS if all(name in sides for sides in cases.values())]
    colors = dict(zip(SERVERS, (charts.BLUE, charts.ORANGE, charts.RED), strict=True))
    shown = (("questions_per_s", "questions/s"), ("first_token_s_p50", "seconds to the first token (line: to p95)"))
    for axis, (key, label) in zip(axes, shown, strict=True):
        for i, name in enumerate(names):
            values = [sides[name][key] for sides in cases.values()]
            x = np.arange(len(cases)) + (i - (len(names) - 1) / 2) * 0.27
            axis.bar(x, values, 0.25, color=colors[name], label=name)
            for at, value in zip(x, values, strict=True):
                axis.annotate(f"{value:.3g}", (at, value), ha="center", va="bottom", fontsize=9, color=charts.GREY)
            if key != "questions_per_s":
                late = [sides[name]["first_token_s_p95"] for sides in cases.values()]
                axis.vlines(x, values, late, color=charts.GREY, linewidth=1)
        axis.set(yscale="log", ylabel=label, xticks=np.arange(len(cases)), xticklabels=list(cases))
    axes[0].legend(frameon=False, fontsize=9)
    axes[0].set_title(
        f"{figures['clients']} clients, {figures['parameters'] / 1e6:,.0f} M parameters, {figures['cores']} cores",
        fontsize=9, color=charts.GREY, loc="left",
    )  # fmt: skip
    charts.save(figure, file)


if __name__ == "__main__":
    main()
