"""What distillation, elastic numbers of tokens and memories of embeddings are worth, on scenes.

    python -m benchmarks.table2        (or `make table2`)

One base model reads all patches of a picture (`scenes_lists`, and then `scenes_base`). Every row begins with it and
trains the same steps on the same data (`scenes_few`, `scenes_places`, `scenes`); three seeds (order of the data, and
what is drawn) give a mean and a standard deviation. Runs that are there already are continued, or taken as they are;
`--rows` chooses some by a part of their names.

On an NVIDIA GPU: --set model.attention=cudnn --jobs 4.
"""

import argparse
from collections.abc import Mapping, Sequence
import dataclasses
import json
import math
from pathlib import Path
import statistics
import subprocess
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.trainings import Training, check_jobs, evaluate_command, run_all, train_command
from voco_jax import configs
from voco_jax.command_line import parse_arguments
from voco_jax.config import typed
from voco_jax.errors import UserError, one_line_errors
from voco_jax.optim import make_schedule

BASE_CONFIGS = tuple(configs.DIRECTORY / f"{name}.py" for name in ("scenes_lists", "scenes_base"))
CONFIGS = tuple(configs.DIRECTORY / f"{name}.py" for name in ("scenes_few", "scenes_places", "scenes"))
DATA = Path("data/scenes")
SOURCES = ("scenes", "held_out")  # of the configs' data.test
KS = (1, 2, 4, 8)
UPPER, VOCO = "upper bound", "VoCo, cross-entropy"
BASE = "base model, uncompressed"


@dataclasses.dataclass(frozen=True)
class Row:
    """A training and how it is evaluated. `family` and `k` are its line and place in the chart."""

    family: str
    k: int  # tokens an image; 0: all patches
    keys: dict[str, object] = dataclasses.field(default_factory=dict)
    frozen_teacher: bool = False  # the base model
    read_at: tuple[str, ...] = ()  # `--tokens` of further evaluations
    whole: bool = False  # evaluate uncompressed too

    @property
    def name(self) -> str:
        return f"{self.family}, {self.k} token{'s' * (self.k > 1)}" if self.k else self.family

    def read(self, k: str) -> str:
        """What it is called where so many of its tokens are read."""
        return f"{self.family}, {k}" if k == "auto" else f"{self.family}, read at {k}"


def _distill(**keys: object) -> dict[str, object]:
    found = {"alpha": 0.5, "temperature": 2.0} | keys
    return {"train.loss": "distillation"} | {f"train.distill.{key}": value for key, value in found.items()}


def _rows() -> list[Row]:
    def voco(k: int) -> dict[str, object]:
        return {"model.num_voco_tokens": k}

    elastic = voco(KS[-1]) | {"train.elastic_k": KS}
    layers, attended = (1, 2, 3), (0, 1, 2)  # of the four of `scenes`; attention is of all but the last
    read_at = (*map(str, KS), "auto")
    rows = [Row(UPPER, 0, {"model.compressor": "none"})]
    rows += [Row("average pooling", 1, {"model.compressor": "average_pool"})]
    rows += [Row("Q-Former", k, {"model.compressor": "qformer", "model.num_compressed_tokens": k}) for k in KS]
    rows += [Row(VOCO, k, voco(k)) for k in KS]
    rows += [Row("VoCo, KL of a frozen teacher", k, voco(k) | _distill(), frozen_teacher=True) for k in KS]
    rows += [
        Row("VoCo, KL of its own weights", 1, voco(1) | _distill(teacher="self", whole_weight=1.0), whole=True),
        Row("VoCo, KL of its own mean", 1, voco(1) | _distill(teacher="ema", whole_weight=1.0), whole=True),
        Row("VoCo, KL + hidden states", 1, voco(1) | _distill(beta=1.0, layers=layers), frozen_teacher=True),
        Row(
            "VoCo, KL + attention", 1, voco(1) | _distill(attention=1.0, attention_layers=attended),
            frozen_teacher=True,
        ),
        Row("elastic, cross-entropy", KS[-1], elastic, read_at=read_at),
        Row("elastic, prefix teaches", KS[-1], elastic | _distill(teacher="prefix"), read_at=read_at),
        Row("elastic, KL of a frozen teacher", KS[-1], elastic | _distill(), frozen_teacher=True, read_at=read_at),
    ]  # fmt: skip
    return rows + [Row("embeddings", k, voco(k) | {"model.compressor": "voco_embedding"}) for k in KS]


ROWS = {row.name: row for row in _rows()}


# ---- Trainings ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Suite:
    """What all rows have in common. `keys` are config keys of all runs; `sources` those of the configs' data.test.

    Stages are configs with their steps: each begins with the run before it, and a row's first with the base model.
    """

    out: Path
    base_stages: Mapping[Path, int]
    stages: Mapping[Path, int]
    keys: Mapping[str, object] = dataclasses.field(default_factory=dict)
    sources: tuple[str, ...] = SOURCES

    @property
    def base(self) -> Path:
        return self.out / "base"

    def directory(self, name: str, seed: int) -> Path:
        words = "".join(c if c.isalnum() else " " for c in name.lower()).split()
        return self.out / "_".join(words) / f"seed{seed}"

    def base_training(self) -> Training:
        return self._training(self.base, self.base_stages, None, {}, [()])

    def training(self, row: Row, seed: int) -> Training:
        own = row.keys | ({"train.distill.teacher": self.base} if row.frozen_teacher else {}) | {"seed": seed}
        asked = [(), *(("--tokens", k) for k in row.read_at), *([("--compressor", "none")] if row.whole else [])]
        return self._training(self.directory(row.name, seed), self.stages, self.base, own, asked)

    def _training(
        self, workdir: Path, stages: Mapping[Path, int], before: Path | None, own: Mapping[str, object],
        asked: Sequence[tuple[str, ...]],
    ) -> Training:  # fmt: skip
        """All stages, and those evaluations whose results are not there yet; no commands where all are."""
        *_, last = stages
        runs: dict[Path, int] = {}
        commands = []
        for config, steps in stages.items():
            begin_with = [*runs][-1] if runs else before
            run = workdir if config == last else workdir.with_name(f"{workdir.name}_{config.stem}")
            runs[run] = steps
            keys = own | ({"init_from": begin_with} if begin_with else {}) | {"train.steps": steps, "workdir": run}
            commands.append(train_command(config, {**keys, **self.keys}))

        def is_there(options: tuple[str, ...]) -> bool:
            files = [results_file(workdir, source, options) for source in self.sources]
            return all(file.exists() and json.loads(file.read_text())["step"] == stages[last] for file in files)

        missing = [evaluate_command(workdir, *options) for options in asked if not is_there(options)]
        if before and (file := workdir / "config.json").exists():
            found = json.loads(file.read_text())["init_from"]
            if found != str(begin_with):
                raise UserError(
                    f"{file}: init_from: expected {begin_with}, found {found}, of another recipe; move it away"
                )
        return Training(runs, [*commands, *missing] if missing else [])

    def read(self, workdirs: Sequence[Path], options: Sequence[str] = ()) -> dict | None:
        """Source → kind → [per cent of each seed], and 'tokens', read of a picture; None where a seed is missing."""
        found: dict = {source: {} for source in self.sources} | {"tokens": []}
        for workdir in workdirs:
            for source in self.sources:
                file = results_file(workdir, source, options)
                if not file.exists():
                    return None
                results = json.loads(file.read_text())
                for kind, (right, total) in results["counts"]["this run"].items():
                    found[source].setdefault(kind, []).append(100 * right / total)
                if source == self.sources[0]:
                    found["tokens"].append(results["auto"]["mean_tokens"] if "auto" in results else results["tokens"])
        return found

    def collect(self, names: Sequence[str], seeds: Sequence[int]) -> dict[str, dict]:
        """By what was evaluated: the base model, a row, or a row and how it was read."""
        base = self.read([self.base])
        found = {BASE: base} if base else {}
        for name in names:
            row, workdirs = ROWS[name], [self.directory(name, seed) for seed in seeds]
            asked: dict[str, tuple[str, ...]] = {name: ()}
            asked |= {row.read(k): ("--tokens", k) for k in row.read_at}
            asked |= {f"{name}, read uncompressed": ("--compressor", "none")} if row.whole else {}
            found |= {label: results for label, options in asked.items() if (results := self.read(workdirs, options))}
        return found

    def run(self, names: Sequence[str], seeds: int, jobs: int) -> None:
        """The base model, and then the rows; UserError before them where files of their data are missing."""
        for config in (*self.base_stages, *self.stages):
            for file in data_files(config):
                if not file.exists():
                    raise UserError(f"{file}: expected a file of {config.name}, found none; make {file.parent} anew")
        self.out.mkdir(parents=True, exist_ok=True)
        run_all([self.base_training()], 1, "base")
        trainings = [self.training(ROWS[name], seed) for seed in range(seeds) for name in names]
        left = [training for training in trainings if training.commands]
        print(f"{len(trainings)} trainings of {sum(self.stages.values()):,} steps, {len(left)} of them to do")
        run_all(left, jobs, "rows")

    def write(self, names: Sequence[str], seeds: int, title: str) -> None:
        """The results as a table, JSON and a chart. UserError where there are none."""
        results = self.collect(names, range(seeds))
        if not results:
            raise UserError(f"{self.out}: no results found")
        table = markdown(results, self.sources)
        (self.out / f"{title}.md").write_text(table + "\n")
        (self.out / f"{title}.json").write_text(json.dumps(results, indent=2) + "\n")
        draw(results, self.out / f"{title}.png")
        print(f"{table}\nwritten: {self.out}/{title}.md, {title}.json, {title}.png")


def results_file(workdir: Path, source: str, options: Sequence[str] = ()) -> Path:
    """What `voco evaluate` writes with these options."""
    suffix = {"--tokens": ".tokens{}", "--compressor": ".{}"}[options[0]].format(options[1]) if options else ""
    return workdir / f"results{'' if source == 'easyvqa' else f'.{source}'}{suffix}.json"


# ---- Results -----------------------------------------------------------------------------------------------------


def shown(values: Sequence[float]) -> str:
    """Mean ± standard deviation of the seeds.

    >>> shown([90.0, 92.0]), shown([90.0])
    ('91.0 ± 1.4', '90.0')
    """
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def overall(results: Mapping[str, dict], label: str) -> float:
    return statistics.mean(results[label][SOURCES[0]]["overall"]) if label in results else math.nan


def gap_closed(results: Mapping[str, dict], label: str) -> float:
    """Per cent of the way from VoCo's one token by cross-entropy to the upper bound; NaN without both."""
    lower, upper = overall(results, ROWS[f"{VOCO}, 1 token"].name), overall(results, UPPER)
    return 100 * (overall(results, label) - lower) / (upper - lower) if upper != lower else math.nan


def markdown(results: Mapping[str, dict], sources: Sequence[str] = SOURCES) -> str:
    """A row for each that was evaluated; after the sources' accuracies, that of each kind of the first source."""
    kinds = [kind for kind in next(iter(results.values()))[sources[0]] if kind != "overall"]
    heads = ["", *(f"{source.replace('_', ' ')}, %" for source in sources), "gap closed", *kinds]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    for label, row in results.items():
        closed = gap_closed(results, label)
        cells = [shown(row[source]["overall"]) for source in sources]
        cells += ["" if math.isnan(closed) else f"{closed:.0f} %"]
        cells += [f"{statistics.mean(row[sources[0]][kind]):.1f}" for kind in kinds]
        if label.endswith("auto"):
            label += f" ({shown(row['tokens'])} tokens)"
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(results: Mapping[str, dict], path: Path) -> None:
    """Accuracy by tokens an image, a line for each family that was measured at several, and dots for the others; below,
    that of one token by kind of question."""
    figure, (by_tokens, by_kind) = plt.subplots(2, 1, figsize=(10, 9))
    _draw_by_tokens(results, by_tokens)
    rows = [row.name for row in ROWS.values() if row.k <= 1 and row.name in results]
    rows = [BASE, *rows] if BASE in results else rows
    kinds = list(results[rows[0]][SOURCES[0]]) if rows else []
    for i, name in enumerate(rows):
        means = [statistics.mean(results[name][SOURCES[0]][kind]) for kind in kinds]
        places = [j + (i + 0.5) / (len(rows) + 1) for j in range(len(kinds))]
        color = "#9ca3af" if name == BASE else None
        by_kind.bar(places, means, 1 / (len(rows) + 1), label=name.removesuffix(", 1 token"), color=color)
    by_kind.set_xticks([j + 0.5 - 0.5 / (len(rows) + 1) for j in range(len(kinds))], kinds)
    by_kind.set_xlabel("kind of question, one token")
    for axis in (by_tokens, by_kind):
        axis.set_ylabel("test questions right, %")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, frameon=False, bbox_to_anchor=(1, 1), loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def _draw_by_tokens(results: Mapping[str, dict], axis: plt.Axes) -> None:
    points: dict[str, list[tuple[int, list[float]]]] = {}
    for row in ROWS.values():
        labels = {k: row.read(k) for k in row.read_at if k != "auto"} or {str(row.k): row.name}
        for k, label in labels.items():
            if row.k and label in results:
                points.setdefault(row.family, []).append((int(k), results[label][SOURCES[0]]["overall"]))
    for family, found in points.items():
        ks, values = zip(*sorted(found), strict=True)
        spread = [statistics.stdev(v) if len(v) > 1 else 0 for v in values]
        axis.errorbar(ks, [statistics.mean(v) for v in values], spread, label=family, marker="o", ms=4, capsize=2)
    for name, style in ((BASE, "--"), (UPPER, ":")):
        if not math.isnan(accuracy := overall(results, name)):
            axis.axhline(accuracy, color="#9ca3af", linestyle=style, label=name)
    axis.set_xscale("log", base=2)
    axis.set_xticks(KS, [str(k) for k in KS])
    axis.set_xlabel("tokens an image")


def chosen(parts: Sequence[str]) -> list[str]:
    """Rows whose names have one of these parts; all without. UserError for a part of none."""
    for part in parts:
        if not any(part in name for name in ROWS):
            raise UserError(f"--rows: no row has {part!r} in its name; there are: {'; '.join(ROWS)}")
    return [name for name in ROWS if not parts or any(part in name for part in parts)]


@one_line_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/table2"), help="default: runs/table2")
    add("--rows", nargs="+", default=[], metavar="PART", help="only rows with such a part in their names")
    add("--seeds", type=int, default=3, help="number of seeds (default 3)")
    add("--base-steps", type=int, help="of each stage of the base model (default: as its config says)")
    add("--steps", type=int, help="of each stage of every row (default: as its config says)")
    add("--jobs", type=int, help="trainings at a time (default: as many as there are CPUs, at most 4)")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="config keys of all runs: model.attention=cudnn")
    add("--results", action="store_true", help="train nothing; write the tables of what is there")
    args = parser.parse_args()
    jobs, names, keys = check_jobs(args.jobs), chosen(args.rows), keys_of(args.set)
    if args.seeds < 1:
        raise UserError(f"--seeds: expected at least 1, found {args.seeds}")
    base_stages, stages = (
        {config: steps_of(config, asked, keys) for config in of_stages}
        for of_stages, asked in ((BASE_CONFIGS, args.base_steps), (CONFIGS, args.steps))
    )
    suite = Suite(args.out, base_stages, stages, keys)
    if not args.results:
        if not DATA.exists():
            subprocess.run([sys.executable, "-m", "voco_jax", "make-scene-questions", str(DATA)], check=True)
        suite.run(names, args.seeds, jobs)
    suite.write(names, args.seeds, "table2")


def keys_of(given: Sequence[str]) -> dict[str, object]:
    """Config keys of KEY=VALUE."""
    for text in given:
        if "=" not in text:
            raise UserError(f"--set: expected KEY=VALUE, found {text!r}")
    return {name: value for name, _, value in (text.partition("=") for text in given)}


def data_files(config: Path) -> list[Path]:
    """What a config trains on and is tested on, as far as it names files."""
    data = parse_arguments(["", f"--config={config}", "--config.init_from="])[0].data
    sources = [*data.train.values(), *data.test.values()]
    return [Path(source.file) for source in sources if "file" in source]


def steps_of(config: Path, steps: int | None, keys: Mapping[str, object]) -> int:
    """As asked, or as the config says. Steps and keys that cannot be show themselves here, not in many logs."""
    asked = keys | ({} if steps is None else {"train.steps": steps})
    given = [f"--config.{key}={value}" for key, value in asked.items()]
    parsed = parse_arguments(["", f"--config={config}", *given, "--config.init_from="])[0]
    make_schedule(typed(parsed).optim, parsed.train.steps)
    return parsed.train.steps


if __name__ == "__main__":
    main()
