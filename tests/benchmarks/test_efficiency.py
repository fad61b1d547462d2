"""`benchmarks/efficiency.py`, `growth.py`, `long_video.py`: what is counted is right, and the commands run."""

import dataclasses
import json

import pytest

from benchmarks import counted, efficiency, growth, long_video
from benchmarks.asked_pair import SIZES
from benchmarks.counted import FULL, HIT, MISS, NO_CACHE, WAYS

pytestmark = pytest.mark.peer

FEW_LAYERS = dataclasses.replace(
    SIZES["7b"],
    llama=dataclasses.replace(SIZES["7b"].llama, num_hidden_layers=3),
    vision=dataclasses.replace(SIZES["7b"].vision, num_hidden_layers=4),
)


def test_xla_counts_what_the_formula_says():
    pair = counted.prompts(FEW_LAYERS, *counted.PROMPTS["released template, short question"])
    assert pair[0] == counted.Prompt(before=1, kept=576, text=pair[1].text + 1)  # what Llama's tokenizer makes of "\n"
    flops, formula = counted.counted_flops(FEW_LAYERS, *pair), counted.formula_flops(FEW_LAYERS, *pair)
    assert flops == pytest.approx(formula, rel=0.03)
    assert flops[NO_CACHE] > flops[MISS] > flops[FULL] > flops[HIT]


def test_bytes_of_7b_are_exact():
    token = 2 * 32 * 4096 * 2  # keys and values, layers, width, bytes of a bfloat16
    assert counted.kept_bytes(SIZES["7b"]) == {FULL: 576 * token, HIT: token}


def test_the_command(tmp_path, monkeypatch, capsys):
    """Greedy tokens of transformers are ours, or it would end."""
    monkeypatch.setattr(efficiency, "QUESTIONS", 3)
    monkeypatch.setattr(efficiency, "BATCHES", (1, 2))
    file = tmp_path / "efficiency.json"
    arguments = ["--count", "tiny", "--time", "tiny", "--rounds", "1", "--out", str(file)]
    monkeypatch.setattr("sys.argv", ["efficiency", *arguments])
    efficiency.main()
    figures = json.loads(file.read_text())
    timed = figures["timed"]
    assert timed["same_tokens"] and set(timed["same_tokens"].values()) == {1.0}
    assert timed["kept_bytes"] == counted.kept_bytes(SIZES["tiny"]) == figures["counted"]["bytes"]
    assert set(timed["ways"]["voco_jax"]) > set(WAYS)
    assert all(median > 0 for median, _, _ in timed["ratios"].values())
    shown = capsys.readouterr().out
    assert "| VoCo, hit | 1 | " in shown and "A hit saves" in shown


def test_growth(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(growth, "CONFIG", SIZES["tiny"])
    monkeypatch.setattr(
        "sys.argv", ["growth", "--out", str(tmp_path / "growth"), "--counts", "1", "40", "--rounds", "1"]
    )
    growth.main()
    figures = json.loads((tmp_path / "growth.json").read_text())
    assert 1 <= figures["most_uncompressed"] < 40
    found = {(p["way"], p["pictures"]): p["bytes"] for p in figures["points"]}
    assert set(found) == {(growth.MEMORY, 1), (growth.MEMORY, 40), (growth.READ, 1), (growth.KEPT, 1)}
    assert found[growth.MEMORY, 40] == 40 * found[growth.MEMORY, 1]
    assert (tmp_path / "growth.png").stat().st_size > 1000
    assert "| 40 | VoCo" in capsys.readouterr().out


def test_long_video(tiny_run, tmp_path, monkeypatch, capsys):
    """Two processes, over one clip; bytes are those of the slots, exactly."""
    monkeypatch.setattr(long_video, "SIZE", 64)
    arguments = ["--run", str(tiny_run), "--out", str(tmp_path / "long"), "--counts", "5", "3", "--rounds", "1"]
    monkeypatch.setattr("sys.argv", ["long_video", *arguments])
    long_video.main()
    figures = json.loads((tmp_path / "long.json").read_text())
    token = 2 * 2 * 32 * 4  # keys and values, layers, width, bytes of a float32
    assert figures["token_bytes"] == token and figures["uncompressed_tokens_a_frame"] == 64
    assert [p["frames"] for p in figures["points"]] == [3, 5]
    for p in figures["points"]:
        assert p["memory_bytes"] == p["frames"] * token and p["uncompressed_bytes"] == p["frames"] * 64 * token
        assert p["cache_bytes"] >= p["tokens"] * token and p["peak_bytes"] > 1e8
        assert p["compress_s"] > 0 and p["first_token_s"] > 0
    assert (tmp_path / "long.png").stat().st_size > 1000
    assert "| 5 | " in capsys.readouterr().out
