"""The picture of a run: what is drawn is what was logged."""

from matplotlib import pyplot as plt
import pytest

from tests.helpers.commands import run_main
from tests.train.test_metrics import lines, run
from voco_jax.errors import UserError
from voco_jax.train import curves
from voco_jax.train.curves import draw_curves, read_history


@pytest.fixture
def drawn(monkeypatch):
    """The figure, kept open."""
    monkeypatch.setattr(plt, "close", lambda figure: None)
    yield lambda: {axis.get_title(): axis for axis in plt.gcf().axes}
    monkeypatch.undo()
    plt.close("all")


def test_one_run(tmp_path, drawn):
    run(tmp_path)
    draw_curves([read_history(tmp_path)], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    titles = "loss", "gradient norm", "learning rate", "tokens/s/device", "MFU", "goodput"
    assert [title for title in drawn() if title] == [*titles]
    logged = [line for line in lines(tmp_path) if "loss" in line]
    loss, evaluation = drawn()["loss"].lines
    assert loss.get_xydata().tolist() == [[line["step"], line["loss"]] for line in logged]
    assert evaluation.get_xydata().tolist() == [[8, 1.234568]]
    (speed,) = drawn()["tokens/s/device"].lines
    assert speed.get_ydata().tolist() == [line["tokens_per_second_per_device"] for line in logged]
    bars = drawn()[""].patches
    assert sum(bar.get_width() for bar in bars) == pytest.approx(1)
    assert bars[0].get_width() == pytest.approx(logged[-1]["goodput"], abs=0.2) and bars[0].get_x() == 0


def test_runs_are_compared(tmp_path, drawn):
    """Of different lengths; one is from before goodput was counted."""
    run(tmp_path / "a"), run(tmp_path / "b", stop=5)
    (tmp_path / "b" / "goodput.json").unlink()
    draw_curves([read_history(tmp_path / name) for name in "ab"], tmp_path / "curves.png")
    assert [len(line.get_xdata()) for line in drawn()["gradient norm"].lines] == [5, 2]
    assert [text.get_text() for text in plt.gcf().subfigs[0].legends[0].get_texts()] == ["a", "b"]
    assert [label.get_text().split(":")[0] for label in drawn()[""].get_yticklabels()] == ["a"]


def test_the_command(tmp_path, monkeypatch, capsys):
    run(tmp_path, stop=5)
    capsys.readouterr()
    assert run_main(curves, monkeypatch, capsys, "--run", tmp_path) == (0, f"written: {tmp_path}/curves.png\n", "")
    both = run_main(curves, monkeypatch, capsys, "--run", tmp_path, "--run", tmp_path)
    assert both == (2, "", "error: --out: expected a file for the picture of several runs, found none\n")
    for name, message in ("c.txt", "ending in .png or"), ("none/c.png", "in a directory that is there"):
        arguments = ("--run", tmp_path, "--out", tmp_path / name)
        status, _, err = run_main(curves, monkeypatch, capsys, *arguments)
        assert status == 2 and err.startswith(f"error: --out: expected a file {message}")


def test_what_is_no_run(tmp_path):
    with pytest.raises(UserError, match=r"metrics.jsonl: not found; a run directory has it once"):
        read_history(tmp_path)
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 4, "lo')
    with pytest.raises(UserError, match="metrics.jsonl: nothing has been logged yet"):
        read_history(tmp_path)
    file.write_text('{"step": 4, "loss": 1}\n{"loss": 2}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:2: expected an object with a step, found '{\"loss\": 2}'"):
        read_history(tmp_path)
    file.write_text('{"step": 4, "loss": 1}\n')
    (tmp_path / "goodput.json").write_text("{}")
    with pytest.raises(UserError, match="goodput.json: not an account of goodput"):
        read_history(tmp_path)
