"""`benchmarks/table2.py` and what runs its trainings: rows, results of several seeds, and the order of what is run."""

import json
import math
from pathlib import Path

import pytest

from benchmarks import table2, trainings
from tests.helpers.commands import run_main
from voco_jax.command_line import parse_arguments
from voco_jax.errors import UserError


def suite_in(out: Path, **more) -> table2.Suite:
    few, places, last = table2.CONFIGS
    lists, base = table2.BASE_CONFIGS
    return table2.Suite(out, {lists: 30, base: 40}, {few: 50, places: 60, last: 800}, **more)


def write(workdir: Path, right: int, *options: str, step: int = 800, **more) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    for source in table2.SOURCES:
        counts = {"where": [right, 100], "count": [right - 10, 100], "overall": [2 * right - 10, 200]}
        results = {"step": step, "tokens": 8, "counts": {"this run": counts}} | more
        table2.results_file(workdir, source, options).write_text(json.dumps(results))


@pytest.fixture
def results(tmp_path):
    """Two seeds of four rows, and the base model."""
    suite = suite_in(tmp_path)
    write(suite.base, 95)
    for seed in (0, 1):
        write(suite.directory(table2.UPPER, seed), 100)
        write(suite.directory("VoCo, cross-entropy, 1 token", seed), 80 + 4 * seed)
        own = suite.directory("VoCo, KL of its own weights, 1 token", seed)
        write(own, 91)
        write(own, 98, "--compressor", "none")
        elastic = suite.directory("elastic, cross-entropy, 8 tokens", seed)
        write(elastic, 94)
        for k in (1, 2, 4, 8):
            write(elastic, 86 + k, "--tokens", str(k))
        write(elastic, 94, "--tokens", "auto", tokens="auto", auto={"mean_tokens": 2.5 + seed})
    return suite.collect(list(table2.ROWS), (0, 1))


def test_means_of_seeds_and_how_much_of_the_gap_is_closed(results, tmp_path):
    assert list(results) == [
        table2.BASE, table2.UPPER, "VoCo, cross-entropy, 1 token", "VoCo, KL of its own weights, 1 token",
        "VoCo, KL of its own weights, 1 token, read uncompressed", "elastic, cross-entropy, 8 tokens",
        *(f"elastic, cross-entropy, read at {k}" for k in (1, 2, 4, 8)), "elastic, cross-entropy, auto",
    ]  # fmt: skip
    assert results["VoCo, cross-entropy, 1 token"]["scenes"]["overall"] == [75, 79]
    assert table2.gap_closed(results, "VoCo, KL of its own weights, 1 token") == 100 * (86 - 77) / (95 - 77)
    lines = table2.markdown(results).splitlines()
    assert "| VoCo, cross-entropy, 1 token | 77.0 ± 2.8 | 77.0 ± 2.8 | 0 % | 82.0 | 72.0 |" in lines
    assert "| base model, uncompressed | 90.0 | 90.0 | 72 % | 95.0 | 85.0 |" in lines
    assert (
        lines[-1]
        == "| elastic, cross-entropy, auto (3.0 ± 0.7 tokens) | 89.0 ± 0.0 | 89.0 ± 0.0 | 67 % | 94.0 | 84.0 |"
    )
    table2.draw(results, tmp_path / "table2.png")
    assert (tmp_path / "table2.png").stat().st_size > 1000


def test_a_seed_that_is_missing_leaves_its_row_out(results, tmp_path):
    suite = suite_in(tmp_path)
    table2.results_file(suite.directory(table2.UPPER, 1), "held_out").unlink()
    found = suite.collect(list(table2.ROWS), (0, 1))
    assert found.keys() == results.keys() - {table2.UPPER}
    assert math.isnan(table2.gap_closed(found, "VoCo, cross-entropy, 1 token"))
    assert "| VoCo, cross-entropy, 1 token | 77.0 ± 2.8 | 77.0 ± 2.8 |  | 82.0 | 72.0 |" in table2.markdown(found)


def test_every_row_begins_with_the_base_model_and_differs_in_the_model_and_the_loss_alone(tmp_path):
    common = {"init_from", "seed", "train.steps", "workdir", "model.attention"}
    suite = suite_in(tmp_path, keys={"model.attention": "cudnn"})
    for row in table2.ROWS.values():
        run = suite.training(row, 2)
        before = suite.base
        for command, config, (workdir, steps) in zip(run.commands[:3], table2.CONFIGS, run.runs.items(), strict=True):
            first, *given = (argument.removeprefix("--config") for argument in command[1:])
            assert first == f"={config}"
            keys = dict(argument[1:].split("=", 1) for argument in given)
            assert common <= keys.keys() and all(
                key.startswith(("model.", "train.loss", "train.distill.", "train.elastic_k"))
                for key in keys.keys() - common
            )
            assert keys["init_from"] == str(before) and keys["workdir"] == str(workdir)
            assert (keys["seed"], keys["train.steps"]) == ("2", str(steps))
            assert (keys.get("train.distill.teacher") == str(suite.base)) == row.frozen_teacher
            before = workdir
        assert [*run.runs.values()] == [50, 60, 800] and before == run.workdir == suite.directory(row.name, 2)
        assert run.commands[3] == trainings.evaluate_command(run.workdir)


def test_rows_are_chosen_by_a_part_of_their_names():
    assert table2.chosen([]) == list(table2.ROWS)
    assert table2.chosen(["Q-Former, 1", "hidden"]) == ["Q-Former, 1 token", "VoCo, KL + hidden states, 1 token"]
    with pytest.raises(UserError, match="--rows: no row has 'prefixes' in its name; there are: upper bound; average"):
        table2.chosen(["prefixes"])


def test_what_is_there_is_not_made_again(tmp_path):
    row, suite = table2.ROWS["elastic, cross-entropy, 8 tokens"], suite_in(tmp_path)

    def options():
        return [command[3:] for command in suite.training(row, 0).commands[3:]]

    assert options() == [[], *(["--tokens", k] for k in ("1", "2", "4", "8", "auto"))]
    write(suite.directory(row.name, 0), 90)
    write(suite.directory(row.name, 0), 90, "--tokens", "2", step=799)
    assert options() == [["--tokens", k] for k in ("1", "2", "4", "8", "auto")]
    for k in (1, 2, 4, 8, "auto"):
        write(suite.directory(row.name, 0), 90, "--tokens", str(k))
    assert suite.training(row, 0).commands == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--steps", "10"], "config.optim.warmup_steps: expected 0 to 9 (train.steps is 10); found"),
        (["--seeds", "0"], "--seeds: expected at least 1, found 0"),
        (["--jobs", "0"], "--jobs: expected 1 to"),
        (["--set", "model.attention"], "--set: expected KEY=VALUE, found 'model.attention'"),
        (["--set", "model.attenton=cudnn"], "did you mean config.model.attention?"),
        (["--results"], "out: no results found"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_trained(arguments, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, _, error = run_main(table2, monkeypatch, capsys, "--out", tmp_path / "out", *arguments)
    assert status != 0 and expected in error and len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_the_configs_of_all_stages_are_of_one_model():
    stages = (*table2.BASE_CONFIGS, *table2.CONFIGS)
    *others, last = configs = [parse_arguments(["", f"--config={file}"])[0] for file in stages]
    assert [config.init_from for config in configs] == ["", *(config.workdir for config in others)]
    for other in others:
        assert other.model.llama == last.model.llama and other.model.vision == last.model.vision
        assert other.data.test == last.data.test and set(other.data.test) == set(table2.SOURCES)


def test_a_stage_of_the_base_model_begins_with_the_one_before(tmp_path):
    suite = suite_in(tmp_path)
    run = suite.base_training()
    first, last = run.runs
    assert [*run.runs.values()] == [30, 40] and last == run.workdir == suite.base
    assert f"--config.init_from={first}" in run.commands[1]
    assert not any("init_from" in argument for argument in run.commands[0])
    assert [command[0] for command in run.commands] == [*["voco_jax.train"] * 2, "voco_jax.evaluate"]
    write(suite.base, 90, step=40)
    assert suite.base_training().commands == []


# ---- Running them ------------------------------------------------------------------------------------------------


def script(tmp_path: Path, monkeypatch, text: str) -> None:
    (tmp_path / "a_step.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.parametrize("jobs", range(1, trainings.check_jobs(None) + 1))
def test_commands_of_a_training_follow_each_other(jobs, tmp_path, monkeypatch):
    """Whatever the number of jobs; their output is in one log."""
    script(tmp_path, monkeypatch, "import sys; open(sys.argv[1], 'a').write(sys.argv[2]); print('said', sys.argv[2])")
    monkeypatch.chdir(tmp_path)
    runs = [
        trainings.Training(
            {tmp_path / "x" / "before": 5, tmp_path / "x" / name: 5}, [["a_step", name, i] for i in "12"]
        )
        for name in ("first", "second")
    ]
    trainings.run_all(runs, jobs, "test")
    for name in ("first", "second"):
        assert (tmp_path / name).read_text() == "12"
        assert (tmp_path / "x" / f"{name}.log").read_text() == "said 1\nsaid 2\n"


def test_the_base_model_comes_before_the_rows_and_what_is_done_is_left_out(tmp_path, monkeypatch, capsys):
    suite, runs = suite_in(tmp_path / "out"), []
    monkeypatch.setattr(
        table2, "run_all", lambda trainings, jobs, title: runs.append([one.workdir for one in trainings])
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="lists.json: expected a file of scenes_lists.py, found none; make data/scenes"):
        suite.run([table2.UPPER], 2, 1)
    assert not suite.out.exists()
    Path("data/scenes").mkdir(parents=True)
    for config in (*table2.BASE_CONFIGS, *table2.CONFIGS):
        for file in table2.data_files(config):
            file.touch()
    write(suite.directory(table2.UPPER, 0), 90)
    suite.run([table2.UPPER], 2, 1)
    assert runs == [[suite.base], [suite.directory(table2.UPPER, 1)]]
    assert "2 trainings of 910 steps, 1 of them to do" in capsys.readouterr().out


def test_a_row_of_another_recipe_is_not_taken(tmp_path):
    suite, row = suite_in(tmp_path), table2.ROWS[table2.UPPER]
    workdir = suite.directory(row.name, 0)
    write(workdir, 90)
    (workdir / "config.json").write_text(json.dumps({"init_from": str(suite.base)}))
    with pytest.raises(
        UserError, match=rf"init_from: expected {workdir}_scenes_places, found {suite.base}, of another"
    ):
        suite.training(row, 0)


def test_a_training_that_fails_names_its_log(tmp_path, monkeypatch):
    script(tmp_path, monkeypatch, "import sys; print('why', file=sys.stderr); sys.exit(1)")
    run = trainings.Training({tmp_path / "run": 5}, [["a_step"], ["a_step", "never"]])
    with pytest.raises(UserError, match=rf"run: python -m a_step failed; see {tmp_path}/run.log"):
        trainings.run_all([run], 1, "test")
    assert (tmp_path / "run.log").read_text() == "why\n"


def test_the_last_step_is_that_of_the_last_line(tmp_path):
    assert trainings.last_step(tmp_path) == 0
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in (20, 40, 60)))
    assert trainings.last_step(tmp_path) == 60
