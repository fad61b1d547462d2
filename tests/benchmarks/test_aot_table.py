"""The tables over many slices, from answers that are there already; and the ones in docs/, from theirs."""

import json
from pathlib import Path

import pytest

from benchmarks import aot_cases, aot_table
from benchmarks.aot_cases import Case, Peer
from benchmarks.aot_table import result_file
from tests.helpers.commands import run_main

DOCS = Path(__file__).parents[2] / "docs" / "aot"
FITS = {
    "fits": True,
    "chips": 4,
    "jax": "0.1",
    "libtpu": "0.2",
    "hbm": {"arguments": 2**30, "temporaries": 2**31, "total": 3 * 2**30, "share": 0.1875},
    "step_seconds": [0.010, 0.0125],
    "tokens": 80,
    "compress_tokens": 20,
    "mfu": [0.48, 0.6],
    "attention_share": [0.08, 0.1],
    "classes": {"matmul": [0.008, 0.009], "attention": [0.001, 0.001], "the rest": [0.001, 0.0025]},
    "dearest": [{"label": "bwd mul", "excess_seconds": 0.001, "seconds": 0.002}],
    "collectives": [{"bytes": 2**29, "exposed_seconds": 0.0}, {"bytes": 2**30, "exposed_seconds": 0.002}],
    "program_flops": 1.01e12,
    "compile_seconds": 12.3,
}
MISFIT = {
    "fits": False, "jax": "0.1", "libtpu": "0.2", "hbm": {"needed": 17 * 2**30, "available": 15.75 * 2**30}
}  # fmt: skip


def case(name, **overrides):
    return Case(name, "configs/easyvqa.py", "v5e:2x2", overrides=overrides)


def store(out, case, result):
    result_file(out, case).write_text(json.dumps({"arguments": case.arguments, "result": result}))


@pytest.fixture
def few(monkeypatch):
    fits = (case("small"), case("large"))
    speed = ((case("text"), Peer(4.0, (0.011, 0.015))),)
    pictures = (case("compressed"), case("plain"))
    growth = {
        "one": {1: case("1 frame"), 2: case("2 frames")},
        "four": {n: case(f"{n} frames", **{"mesh.frame": 4}) for n in (4, 8)},
    }
    taught = ((case("taught"), "small"),)
    cases = (*fits, taught[0][0], speed[0][0], *pictures, *(c for cases in growth.values() for c in cases.values()))
    for name, value in dict(
        FITS=fits, TAUGHT=taught, SPEED=speed, PICTURE_SPEED=pictures, GROWTH=growth, CASES=cases
    ).items():
        monkeypatch.setattr(aot_cases, name, value)
    return cases


def test_what_is_there_is_kept(few, monkeypatch, capsys, tmp_path):
    for case in few:
        plain = FITS | {"program_flops": 1e12}
        taught = FITS | {"step_seconds": [0.014, 0.016]}
        by_name = {"large": MISFIT, "plain": plain, "taught": taught}
        store(tmp_path, case, by_name.get(case.name, FITS))
    status, output, _ = run_main(aot_table, monkeypatch, capsys, "--out", tmp_path)
    assert status == 0
    lines = output.splitlines()
    # 100 tokens on 4 chips in 12.5 to 10 ms
    assert (
        "| small | train | v5e:2x2 | 1.00 + 2.00 = 3.00 (19% of the device's) | 10.0–12.5 | 2,000–2,500 | 48.0–60.0 "
        "| 8–10 | 1.50 | 2.0 | 12 |"
    ) in lines
    assert "| large | train | v5e:2x2 | does not fit: at least 17.00 of 15.75 |" + " – |" * 7 in lines
    assert "taught: 1.28 × (A), 1.40 × (B) the step of cross-entropy alone." in lines
    assert "| text | 3.00 | 4.00 | 0.010–0.013 | 0.01–0.01 | 1.20, 1.10 | 2,000–2,500 | 48.0–60.0 |" in lines
    assert "| text | 9 | 1 | 1–2 | 2 | bwd mul 1 of 2 |" in lines
    assert "compressed: 1.010 × the FLOPs of plain causal attention over the same tokens." in lines
    assert (tmp_path / "tables.md").read_text() + "\n" == output
    assert aot_table.grown({case.name: FITS for case in few}) == {"one": {1: FITS, 2: FITS}, "four": {1: FITS, 2: FITS}}
    assert (tmp_path / "growth.png").stat().st_size > 5000


def test_a_case_that_fails_is_named_and_the_rest_stays(few, monkeypatch, capsys, tmp_path):
    wrong = Case("wrong", "configs/easyvqa.py", "v5e:17")
    monkeypatch.setattr(aot_cases, "CASES", (few[0], wrong))
    monkeypatch.setattr(aot_cases, "FITS", (few[0], wrong))
    store(tmp_path, few[0], FITS)
    store(tmp_path, wrong, FITS)
    wrong_before = result_file(tmp_path, wrong)
    wrong_before.write_text(wrong_before.read_text().replace("v5e:17", "v5e:2x2"))  # another command's answer
    status, output, error = run_main(aot_table, monkeypatch, capsys, "--out", tmp_path)
    assert status == 2 and "| small |" in output and "wrong" not in output
    assert "wrong: error: --topology: expected a chip" in error and "wrong.log" in error


def test_the_tables_in_docs_are_what_the_answers_there_say():
    results = {case.name: aot_table.load(DOCS, case) for case in aot_cases.CASES}
    assert None not in results.values()  # of today's commands
    assert (DOCS / "tables.md").read_text() == aot_table.page(results)
