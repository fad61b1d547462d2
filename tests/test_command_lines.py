"""`voco evaluate` and `ask` on a real run; and what they say to bad input."""

import dataclasses
import io
import json
import os
import subprocess
import sys

from PIL import Image
import pytest

from tests.data.test_video import write_clip
from tests.helpers import tiny
from tests.helpers.commands import run_main
from voco_jax import ask, chat, evaluate
from voco_jax.checkpoint.run import load_run
from voco_jax.config import default_config, source, sources
from voco_jax.errors import UserError
from voco_jax.eval.scoring import Answer, count_by_kind, table
from voco_jax.train import __main__ as train_main


def copy(run, to):
    """A run that may be written into."""
    import shutil

    return shutil.copytree(run, to / "run")


def test_evaluate(tiny_run, tmp_path, monkeypatch, capsys):
    run = copy(tiny_run, tmp_path)
    status, out, _ = run_main(evaluate, monkeypatch, capsys, "--run", run, "--max-records", 5)
    assert status == 0
    results = json.loads((run / "results.first5.json").read_text())
    right, total = results["counts"]["this run"]["overall"]
    assert total == 11 + 7 + 9 + 17 + 9  # questions about the first five test pictures
    assert results["accuracy"] == right / total and results["step"] == 40
    kinds = results["counts"]["this run"]
    assert sum(kinds[kind][0] for kind in ("color", "shape", "yes/no")) == right
    assert f"| overall | {total} | {100 * right / total:.1f} % |" in out
    with Image.open(run / "answers.first5.png") as sheet:
        assert sheet.width > 1000 and len(sheet.convert("L").getcolors()) > 50


@pytest.mark.slow
def test_an_uncompressed_run_can_be_read_through_voco_tokens(tmp_path, monkeypatch, capsys):
    """The paper's lower bound: train with the image in the open, ask with the slots alone."""
    workdir = tmp_path / "run"
    changes = dict(model__compressor="none", train__steps=4, train__checkpoint_every=4)
    monkeypatch.chdir(tiny.CONFIG_FILE.parents[1])
    assert run_main(train_main, monkeypatch, capsys, *tiny.arguments(workdir, **changes))[0] == 0
    for arguments, file in ((), "results.first3.json"), (("--compressor", "voco"), "results.voco.first3.json"):
        assert run_main(evaluate, monkeypatch, capsys, "--run", workdir, "--max-records", 3, *arguments)[0] == 0
        assert json.loads((workdir / file).read_text())["compressor"] == ("voco" if arguments else "none")


def test_ask(tiny_run, picture, monkeypatch, capsys):
    questions = ["what shape is in the image?", "is there a circle?"]
    status, out, _ = run_main(ask, monkeypatch, capsys, "--run", tiny_run, "--image", picture, *questions)
    assert status == 0
    lines = out.splitlines()
    assert [lines[0], lines[2]] == questions


@pytest.mark.multiprocess
def test_ask_as_a_process_says_only_the_answer(tiny_run, picture):
    command = [sys.executable, "-m", "voco_jax.ask", "--run", tiny_run, "--image", picture, "is there a circle?"]
    # On the CPU, without looking for others: libtpu, which the tests have, speaks up where another holds its lock
    environment = dict(os.environ, JAX_PLATFORMS="cpu")
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=tiny.CONFIG_FILE.parents[1], env=environment
    )
    assert done.stdout.startswith("is there a circle?\n  ") and done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "nothing.png", "what?"], "nothing.png: not found"),
        (["--image", __file__, "what?"], "test_command_lines.py: not a readable picture"),
        (
            ["--image", "https://a.org/b.png", "what?"],
            "web addresses are not fetched; download it first: curl -LO https",
        ),
        (["--image", "file:///nothing%20here.png", "what?"], "error: /nothing here.png: not found"),
        (["--image", "{picture}", " "], "question: expected text, found none"),
        (["--image", "{picture}", "--max-new-tokens", "0", "what?"], "--max-new-tokens: expected at least 1, found 0"),
        (
            ["--image", "{picture}", "--memory", "a.voco", "what?"],
            "--image, --memory: expected one of them, found both",
        ),
        (["--image", "{picture}", "--tokens", "2", "what?"], "tokens 2: there is only 1 token per image"),
        (["--image", "{picture}", "--temperature", "-1", "what?"], "--temperature: expected 0 or more, found -1"),
        (["--image", "{picture}", "--mesh", "tensor=x", "what?"], "--mesh: expected data=N, fsdp=N, frame=N, tensor=N"),
        (["--memory", __file__, "what?"], "test_command_lines.py: not a memory file"),
        (["--picture", "a.png", "what?"], "--picture: expected a --memory that holds it"),
        (["--image", "{picture}", "--frames", "4", "what?"], "--frames: expected a --video to take frames of"),
        (["--image", "{picture}", "--max-frames", "4", "what?"], "--max-frames: expected a --video to take frames of"),
        (["--image", "{clip}", "what?"], "clip.png: expected a picture, found a video; --video takes its frames"),
        (["--video", "{picture}", "what?"], "chelsea.png: expected a video, found a picture (PNG)"),
        (["--video", "{clip}", "--max-frames", "4", "what?"], "--max-frames: expected --fps with it: 8 frames are"),
        (["--each", "what?"], "--each: expected images, found none"),
        (["--image", "{picture}", "what? " * 5000], "question: expected at most "),
        (["--hepl"], "error: --hepl: no such option; did you mean --help?"),
        (["--memory", "", "what?"], "error: --memory: expected a value, found ''"),
        (["--run=", "what?"], "error: --run: expected a value, found ''"),
        (["--pciture=a.png"], "error: --pciture: no such option; did you mean --picture?"),
        (["--run", "nowhere", "what?"], "nowhere/config.json: not found; a run directory holds"),
    ],
)
def test_ask_about_what_cannot_be(tiny_run, picture, tmp_path, monkeypatch, capsys, arguments, message):
    clip = tmp_path / "clip.png"
    if "{clip}" in arguments:
        write_clip(clip, format="mp4")
    arguments = [argument.format(picture=picture, clip=clip) for argument in arguments]
    status, out, err = run_main(ask, monkeypatch, capsys, "--run", tiny_run, *arguments)
    assert status == 2 and out == ""
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


def test_a_compressor_that_a_run_was_not_trained_with(tiny_run, monkeypatch, capsys):
    status, _, err = run_main(evaluate, monkeypatch, capsys, "--run", tiny_run, "--compressor", "qformer")
    assert (status, err) == (
        2, f"error: --compressor: expected 'voco', with which {tiny_run} was trained; found 'qformer'\n"
    )  # fmt: skip
    with pytest.raises(UserError, match="^compressor: expected one of voco, voco_embedding, none, .*; found 'pool'$"):
        load_run(tiny_run, compressor="pool")


def test_a_question_is_text_whatever_stands_in_it(tiny_run, picture, monkeypatch, capsys):
    questions = ["what <voco>?", "what <image>?", "what </s> is it?"]
    status, out, err = run_main(ask, monkeypatch, capsys, "--run", tiny_run, "--image", picture, *questions)
    assert not status and err == ""
    assert out.splitlines()[::2] == questions


def test_a_mistyped_key(tmp_path, monkeypatch, capsys):
    arguments = [*tiny.arguments(tmp_path / "run"), "--config.optim.learning_rat=1"]
    status, _, err = run_main(train_main, monkeypatch, capsys, *arguments)
    assert status == 2 and err.count("\n") == 1
    assert "no such key; did you mean config.optim.learning_rate?" in err
    assert not list(tmp_path.iterdir())


def test_scores_literally():
    answers = [
        Answer("0.png", "what color?", "red", "Red."),
        Answer("0.png", "what color?", "red", "blue"),
        Answer("1.png", "is it?", "yes", " yes "),
    ]
    kinds = ["color", "color", "yes/no"]
    counts = count_by_kind(answers, kinds)
    assert counts == {"overall": (2, 3), "color": (1, 2), "yes/no": (1, 1)}
    guesses = [dataclasses.replace(a, given=text) for a, text in zip(answers, ["red", "red", "no"], strict=True)]
    guessed = count_by_kind(guesses, kinds)
    assert table({"run": counts, "guess": guessed}).splitlines() == [
        "| questions | number | run | guess |",
        "|---|---:|---:|---:|",
        "| color | 2 | 50.0 % | 100.0 % |",
        "| yes/no | 1 | 100.0 % | 0.0 % |",
        "| overall | 3 | 66.7 % | 66.7 % |",
    ]


def test_what_a_complete_run_can_do():
    """Commands that work for it alone."""
    config = default_config()
    evaluate_it = "score it on its test set: voco evaluate --run 'runs/a b'"
    ask_it = "ask it: voco ask --run 'runs/a b' --image FILE \"QUESTION\""
    assert train_main.next_commands("runs/a b", config.data) == [evaluate_it, ask_it]
    config.data.train = sources(mine=source("llava", file="a.json"))
    assert train_main.next_commands("runs/a b", config.data) == [ask_it]
    config.data.train = sources(mine=source("video_qa", file="a.json"))
    assert train_main.next_commands("runs/a", config.data) == ['ask it: voco ask --run runs/a --video FILE "QUESTION"']


def test_asked_about_no_picture(tiny_run, monkeypatch, capsys):
    """A model that has never seen a text alone answers, and it is said."""
    status, out, err = run_main(ask, monkeypatch, capsys, "--run", tiny_run, "--max-new-tokens", 2, "is it red?")
    assert status == 0 and out.startswith("is it red?\n  ")
    assert err == f"note: no image is given, and {tiny_run} was trained with an image in every conversation\n"


def test_lines_of_a_chat_that_are_no_questions(tiny_run, picture, monkeypatch, capsys):
    def said(*lines):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        arguments = "--run", tiny_run, "--image", picture, "--max-new-tokens", 4
        status, out, err = run_main(chat, monkeypatch, capsys, *arguments)
        assert status == 0
        return out, err

    first, note = said("is it red?", "/usr/bin is red?")  # which is a question
    assert note == f"note: {tiny_run} was trained on single questions: a second turn is new to it\n"
    assert first.splitlines()[2] == "> /usr/bin is red?" and len(first.splitlines()) == 4
    out, note = said("/help", "is it red?", "/clear", "is it red?", "/quit", "is it red?")
    answer = first.splitlines()[1]
    assert out.splitlines()[-5:] == ["> is it red?", answer, "> /clear", "> is it red?", answer] and not note
    out, note = said("/help", "/exit")
    assert note == "error: /exit: expected /clear, /help or /quit\n" and out.splitlines()[-1] == "> /exit"
    assert out.startswith("> /help\nA line is a turn.") and "/clear   begin a new conversation" in out
