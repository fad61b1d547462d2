"""`benchmarks/table1.py`: retention from results, and the table."""

import json

import pytest

from benchmarks import table1
from tests.helpers import tiny


def write(out, name, right, file="results.json"):
    counts = {"color": [right, 100], "shape": [right, 100], "yes/no": [right, 200], "overall": [2 * right, 400]}
    directory = table1.directory(out, name)
    directory.mkdir(exist_ok=True)
    (directory / file).write_text(json.dumps({"counts": {"this run": counts}}))


def test_retention_is_the_share_of_what_the_picture_adds(tmp_path):
    for name in table1.TRAININGS:
        write(tmp_path, name, 80)
    write(tmp_path, "upper bound", 90)
    write(tmp_path, "upper bound", 50, "results.voco.json")
    rows = table1.collect(tmp_path)
    assert list(rows) == [*table1.TRAININGS, table1.LOWER]
    assert rows["upper bound"]["retention"] == 100 and rows[table1.LOWER]["retention"] == 0
    assert rows["VoCo, 1 token"]["retention"] == 100 * (40 - 25) / (45 - 25)
    assert "| VoCo, 1 token | 80.0 % | 80.0 % | 40.0 % | 40.0 % | 75.0 % |" in table1.markdown(rows)
    table1.draw(rows, tmp_path / "table1.png")
    assert (tmp_path / "table1.png").stat().st_size > 1000


def test_steps_that_cannot_be(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["table1", "--steps", "10", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        table1.main()
    assert "error: config.optim.warmup_steps: expected 0 to 9 (train.steps is 10); found 50" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_rows_differ_only_in_the_model():
    for keys in table1.TRAININGS.values():
        assert all(key.startswith("model.") for key in keys)
    assert table1.CONFIG == tiny.CONFIG_FILE
