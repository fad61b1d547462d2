"""The table over many slices, from answers that are there already."""

import json

from benchmarks import aot_table
from benchmarks.aot_table import Case, result_file
from tests.commands import run_main

FITS = {
    "fits": True,
    "chips": 4,
    "hbm": {"arguments": 2**30, "temporaries": 2**31, "total": 3 * 2**30, "share": 0.1875},
    "step_seconds": [0.010, 0.0125],
    "tokens_per_second": [8000.0, 10000.0],
    "mfu": [0.48, 0.6],
    "attention_share": [0.08, 0.1],
    "collectives": [{"bytes": 2**29}, {"bytes": 2**30}],
    "collective_seconds": 0.002,
    "compile_seconds": 12.3,
}
CASES = (
    Case("small, 1", "configs/easyvqa.py", "v5e:2x2", size=1),
    Case("small, 2", "configs/easyvqa.py", "v5e:2x2", overrides={"data.batch_size": 32}, size=2),
    Case("large", "configs/easyvqa.py", "v5e:2x2"),
)


def store(out, case, result):
    result_file(out, case).write_text(json.dumps({"arguments": case.arguments, "result": result}))


def test_what_is_there_is_kept(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(aot_table, "CASES", CASES)
    for case in CASES[:2]:
        store(tmp_path, case, FITS)
    store(tmp_path, CASES[2], {"fits": False, "hbm": {"needed": 17 * 2**30, "available": 15.75 * 2**30}})
    status, output, _ = run_main(aot_table, monkeypatch, capsys, "--out", tmp_path)
    assert status == 0
    assert output.splitlines()[2:] == [
        f"| {name} | train | v5e:2x2 | 1.00 / 2.00 / 3.00 (19%) | 10.0–12.5 | 2,000–2,500 | 48.0–60.0 | 8–10 "
        "| 1.50, 2.0 | 12 |"
        for name in ("small, 1", "small, 2")
    ] + ["| large | train | v5e:2x2 | does not fit: at least 17.00 of 15.75 | – | – | – | – | – | – |"]
    assert (tmp_path / "table.md").read_text() == output
    assert (tmp_path / "growth.png").stat().st_size > 5000


def test_a_case_that_fails_is_named_and_the_rest_stays(monkeypatch, capsys, tmp_path):
    wrong = Case("wrong", "configs/easyvqa.py", "v5e:17")
    monkeypatch.setattr(aot_table, "CASES", (CASES[0], wrong))
    store(tmp_path, CASES[0], FITS)
    store(tmp_path, wrong, FITS)
    wrong_before = result_file(tmp_path, wrong)
    wrong_before.write_text(wrong_before.read_text().replace("v5e:17", "v5e:2x2"))  # another command's answer
    status, output, error = run_main(aot_table, monkeypatch, capsys, "--out", tmp_path)
    assert status == 2 and len(output.splitlines()) == 3
    assert "wrong: error: topology: expected chip:shape" in error and "wrong.log" in error
