"""LLaVA's question files in, its answer files out; killed at any moment, the file ends as if nothing had happened."""

import fcntl
import json
from pathlib import Path
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers import tiny
from tests.helpers.commands import run_main
import voco_jax
from voco_jax import evaluate
from voco_jax.api import Model, Request
from voco_jax.data.sources import easyvqa
from voco_jax.errors import UserError
from voco_jax.eval.question_files import answer_questions, read_questions
from voco_jax.infer.auto_tokens import AutoTokens
from voco_jax.infer.generate import Sampling
from voco_jax.infer.image_encoder import ImageEncoder

TOKENS = ["--max-new-tokens", "6"]


@pytest.fixture(scope="module")
def album(tmp_path_factory) -> Path:
    """Seven pictures, and a file of 30 questions of which some are about one of them."""
    directory = tmp_path_factory.mktemp("album")
    (directory / "images" / "sub").mkdir(parents=True)
    records = easyvqa.load("test")[:7]
    rows = []
    for n, record in enumerate(records):
        name = f"sub/{n}.png" if n % 2 else f"{n}.png"
        shutil.copy(record.images[0].file, directory / "images" / name)
        texts = [turns[0]["value"].replace("<image>\n", "") for turns in record.conversations][:4]
        rows += [{"image": name, "text": text, "category": "conv"} for text in texts]
    rows = rows[::2] + rows[1::2]  # a picture's questions do not follow each other
    rows += [{"text": "what color is the sky?"}, {"text": "<image>\nwhat shape is it?", "image": "0.png"}]
    lines = [json.dumps({"question_id": i % 20 if i % 2 else f"q{i}"} | row) for i, row in enumerate(rows)]
    (directory / "questions.jsonl").write_text("\n".join(lines) + "\n\n")
    return directory


def arguments(run, album: Path, answers: Path) -> list:
    files = ["--questions", album / "questions.jsonl", "--images", album / "images", "--answers", answers]
    return ["--run", run, *files, "--batch-size", 4, *TOKENS]


def answer(run, album, answers, monkeypatch, capsys, *more):
    return run_main(evaluate, monkeypatch, capsys, *arguments(run, album, answers), *more)


@pytest.fixture(scope="module")
def model(tiny_run) -> Model:
    return voco_jax.load(tiny_run)


def append(model, album, answers: Path, **settings) -> int:
    """As the command does, without loading a model."""
    questions = read_questions(album / "questions.jsonl", album / "images")
    return answer_questions(model, questions, answers, **{"max_new_tokens": 6, "batch_size": 4} | settings)


@pytest.fixture(scope="module")
def uninterrupted(tiny_run, album, tmp_path_factory) -> bytes:
    """What the answer file has to be."""
    answers = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments(tiny_run, album, answers))])
        evaluate.main()
    return answers.read_bytes()


def test_answers_are_the_models_in_the_questions_order(model, album, uninterrupted):
    questions = [json.loads(line) for line in (album / "questions.jsonl").read_text().split("\n") if line]
    answers = [json.loads(line) for line in uninterrupted.splitlines()]
    assert [(a["question_id"], a["prompt"]) for a in answers] == [(q["question_id"], q["text"]) for q in questions]
    assert all(list(a) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"] for a in answers)
    assert len({a["answer_id"] for a in answers}) == len(answers) == 30
    for q, a in zip(questions, answers, strict=True):
        seen = model.encode_images(album / "images" / q["image"]) if "image" in q else None
        assert a["text"] == model.ask(q["text"].removeprefix("<image>\n"), seen, max_new_tokens=6)


def test_as_many_tokens_as_needed(two_tokens_run, album, tmp_path):
    """Each line says with how many tokens it was read, and has the answer of so many; cut off, it goes on alike."""
    model, file = voco_jax.load(two_tokens_run), tmp_path / "auto.jsonl"
    questions = read_questions(album / "questions.jsonl", album / "images")[:8]
    tries = [
        [model.auto_answers([Request(q.asked, q.picture)], AutoTokens(c), max_new_tokens=6)[0] for c in (0, 1)]
        for q in questions
    ]
    rule = AutoTokens(sorted(few.confidence for few, _ in tries)[4])
    answer_questions(model, questions, file, tokens=rule, max_new_tokens=6, batch_size=4)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["tokens"] for line in lines] == [rule.decide(of).tokens for of in tries]
    assert {line["tokens"] for line in lines} == {1, 2}
    assert [line["text"] for line in lines] == [rule.decide(of).text for of in tries]
    assert lines[0]["metadata"]["tokens"] == "auto" and lines[0]["metadata"]["confidence"] == rule.confidence
    whole = file.read_bytes()
    file.write_bytes(whole[:-300])
    assert answer_questions(model, questions, file, tokens=rule, max_new_tokens=6, batch_size=4) < 8
    assert file.read_bytes() == whole
    with pytest.raises(UserError, match=r"metadata.confidence: expected 1.0, found "):
        answer_questions(model, questions, file, tokens=AutoTokens(1.0), max_new_tokens=6, batch_size=4)


def test_pictures_in_tiles(tiles_run, album, tmp_path):
    """Answers are those about all of a picture's tiles; a question that is too long with them is told before any."""
    model, file = voco_jax.load(tiles_run), tmp_path / "tiles.jsonl"
    questions = read_questions(album / "questions.jsonl", album / "images")[:6]
    answer_questions(model, questions, file, max_new_tokens=4, batch_size=4)
    given = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    assert given == [model.ask(q.asked, q.picture, max_new_tokens=4) for q in questions]
    alone, found = (len(model.engine.encoder.encode_question(questions[0].asked, count)) for count in (1, 5))
    limit = model.config.llama.max_position_embeddings - alone
    message = f"^{questions[0].where}: question: expected at most .* found {found} and {limit} for the answer"
    with pytest.raises(UserError, match=message):
        answer_questions(model, questions[:1], tmp_path / "none.jsonl", max_new_tokens=limit)
    assert not (tmp_path / "none.jsonl").exists()


def test_a_json_array(model, album, tmp_path):
    """ScienceQA's, and rows as lines have them; `<image>` is text but at a question's ends."""
    said = [
        {"from": "human", "value": "<image>\nWhich <image> or </s>?\nA. <s>"},
        {"from": "gpt", "value": "The answer"},
    ]
    rows = [
        {"id": "4", "image": "0.png", "conversations": said},
        {"id": 5, "conversations": said[:1]},
        {"question_id": 6, "text": "what?", "image": ""},
        {"question_id": 7, "text": "what?\n<image>", "image": "sub/1.png"},
    ]
    (tmp_path / "array.json").write_text(json.dumps(rows, indent=1))
    questions = read_questions(tmp_path / "array.json", album / "images")
    assert [(q.id, q.asked, q.picture and q.picture.name) for q in questions] == [
        ("4", "Which <image> or </s>?\nA. <s>", "0.png"), (5, "Which <image> or </s>?\nA. <s>", None),
        (6, "what?", None), (7, "what?", "1.png"),
    ]  # fmt: skip
    answer_questions(model, questions, tmp_path / "a.jsonl", max_new_tokens=2, batch_size=4)
    answers = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [a["question_id"] for a in answers] == ["4", 5, 6, 7] and answers[0]["prompt"] == said[0]["value"]
    (tmp_path / "array.json").write_text(json.dumps([*rows, {"id": 8}]))
    with pytest.raises(UserError, match=r"array.json, row 5: question_id: expected a number or text, found None"):
        read_questions(tmp_path / "array.json", album / "images")
    (tmp_path / "array.json").write_text(json.dumps(rows)[:-1])
    with pytest.raises(UserError, match=r"array.json: not readable as a JSON array: .* after 4 rows"):
        read_questions(tmp_path / "array.json", album / "images")


def test_each_picture_is_compressed_once(model, album, uninterrupted, tmp_path, monkeypatch):
    counts, encode_pixels = [], ImageEncoder.encode_pixels

    def counted(self, squares, items, batch_size=32):
        counts.append(len(items))
        return encode_pixels(self, squares, items, batch_size)

    monkeypatch.setattr(ImageEncoder, "encode_pixels", counted)
    assert append(model, album, tmp_path / "a.jsonl") == 0
    assert sum(counts) == 7
    assert (tmp_path / "a.jsonl").read_bytes() == uninterrupted


@pytest.mark.multiprocess
def test_killed_again_and_again(tiny_run, album, uninterrupted, tmp_path):
    answers = tmp_path / "a.jsonl"
    command = [sys.executable, "-m", "voco_jax.evaluate", *map(str, arguments(tiny_run, album, answers))]
    for enough in (1, 9):
        process = subprocess.Popen(command, cwd=tiny.CONFIG_FILE.parents[1], stderr=subprocess.DEVNULL)
        while not answers.exists() or answers.read_bytes().count(b"\n") < enough:
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert uninterrupted.startswith(answers.read_bytes())
        # The disk may have had room for a part of the last write alone
        answers.write_bytes(answers.read_bytes()[:-9])
    done = subprocess.run(command, cwd=tiny.CONFIG_FILE.parents[1], capture_output=True, text=True)
    assert done.returncode == 0 and "already in the file" in done.stdout
    assert answers.read_bytes() == uninterrupted
    done = subprocess.run(command, cwd=tiny.CONFIG_FILE.parents[1], capture_output=True, text=True)
    assert "30 answers, 30 of them already in the file" in done.stdout
    assert answers.read_bytes() == uninterrupted


@pytest.mark.parametrize("cut", [0, 1, 25, 200, 700, 1201])
def test_cut_at_any_byte(model, album, uninterrupted, tmp_path, cut):
    answers = tmp_path / "a.jsonl"
    answers.write_bytes(uninterrupted[:cut])
    assert append(model, album, answers) == uninterrupted[:cut].count(b"\n")
    assert answers.read_bytes() == uninterrupted


def test_drawn_answers_go_on_alike(model, album, uninterrupted, tmp_path):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    drawn = Sampling(temperature=1.5, top_p=0.9, top_k=50, seed=3)
    append(model, album, whole, sampling=drawn)
    lines = whole.read_bytes().splitlines(keepends=True)
    cut.write_bytes(b"".join(lines[:6]))
    assert append(model, album, cut, sampling=drawn) == 6
    assert cut.read_bytes() == whole.read_bytes()
    assert [json.loads(line)["text"] for line in lines] != [
        json.loads(line)["text"] for line in uninterrupted.splitlines()
    ]


@pytest.mark.parametrize(
    ("written", "more", "message"),
    [
        (b"a shopping list", {}, "a.jsonl, line 1: expected an answer, or half of one; found 'a shopping list'"),
        (b"a shopping list\n", {}, "a.jsonl, line 1: expected an answer, found 'a shopping list'"),
        (b"[]\n", {}, "questions.jsonl, line 1, found None; another --answers file begins anew"),
        ("second line first", {}, "a.jsonl, line 1: expected the answer to question 'q0' of "),
        ("all", {"max_new_tokens": 7}, "a.jsonl, line 1: metadata.max_new_tokens: expected 7, found 6; another"),
        ("all", {"sampling": Sampling(1.0)}, "a.jsonl, line 1: metadata.temperature: expected 1.0, found 0.0; another"),
        ("other model", {}, "a.jsonl, line 1: metadata.model: expected "),
        ("all and more", {}, "a.jsonl: expected at most 30 answers, found 31; another"),
        ("all and half", {}, "a.jsonl, line 31: expected an answer, or half of one"),
    ],
)
def test_answers_to_other_questions(model, album, uninterrupted, tmp_path, written, more, message):
    answers = tmp_path / "a.jsonl"
    first, second, *_ = uninterrupted.splitlines(keepends=True)
    known = {
        "second line first": second + first, "all": uninterrupted, "all and more": uninterrupted + first,
        "all and half": uninterrupted + first[:50],
        "other model": uninterrupted.replace(model.fingerprint.encode(), b"0" * 32),
    }  # fmt: skip
    content = known.get(written, written)
    answers.write_bytes(content)
    with pytest.raises(UserError) as error:
        append(model, album, answers, **more)
    assert message in str(error.value)
    assert answers.read_bytes() == content


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question_id": 1, "text": ', "line 3: broken JSON"),
        ("[1]", "line 3: expected an object, found [1]"),
        ('{"text": "what?"}', "line 3: question_id: expected a number or text, found None"),
        ('{"question_id": 1}', "line 3: text: expected a question, found None"),
        ('{"question_id": 1, "text": "<image>"}', "line 3: text: expected a question, found '<image>'"),
        ('{"question_id": 1, "text": "what?", "image": "no.png"}', "line 3: image: {images}/no.png: not found"),
        ('{"question_id": 1, "text": "what?", "image": "../0.png"}', "image: expected a path inside {images}, found"),
        ('{"question_id": 1, "text": "what?", "image": "/etc/hosts"}', "image: expected a path inside {images}, found"),
        ('{"question_id": 1, "text": "what?", "image": 7}', "line 3: image: expected the path of a file, found 7"),
        ('{"question_id": 1, "text": "what?", "image": "bad.png"}', "line 3: {images}/bad.png: not a readable picture"),
        ('{"id": 1, "conversations": []}', "line 3: conversations: expected a question, found []"),
        ('{"id": [], "conversations": []}', "line 3: id: expected a number or text, found []"),
        ('{"question_id": 1, "text": "\\ud800?"}', "line 3: turn 0 (human): half of a surrogate pair"),
        ('{"question_id": 1, "text": "' + "what? " * 5000 + '"}', "line 3: question: expected at most "),
    ],
)
def test_questions_that_cannot_be_asked(tiny_run, album, tmp_path, monkeypatch, capsys, line, message):
    images = tmp_path / "images"
    shutil.copytree(album / "images", images)
    (images / "bad.png").write_bytes(b"no picture")
    (tmp_path / "questions.jsonl").write_text('\n{"question_id": 0, "text": "what?", "image": "0.png"}\n' + line + "\n")
    status, out, err = answer(tiny_run, tmp_path, tmp_path / "a.jsonl", monkeypatch, capsys)
    error = err.splitlines()[-1]
    assert status == 2 and out == ""
    assert error.startswith(f"error: {tmp_path}/questions.jsonl, line 3: ")
    assert message.format(images=images) in error
    assert not (tmp_path / "a.jsonl").exists() or not (tmp_path / "a.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tokens", 2], "tokens 2: there is only 1 token per image"),
        (["--batch-size", 0], "--batch-size: expected at least 1, found 0"),
        (["--top-p", 0], "--top-p: expected more than 0 and at most 1, found 0.0"),
        (["--max-records", 3], "--max-records: does not go with --questions"),
        (["--images", "nowhere"], "--images: nowhere: expected a directory"),
        (["--questions", "nothing.jsonl"], "nothing.jsonl: not found; expected a .json or .jsonl file"),
    ],
)
def test_options_that_cannot_be(tiny_run, album, tmp_path, monkeypatch, capsys, more, message):
    status, _, err = answer(tiny_run, album, tmp_path / "a.jsonl", monkeypatch, capsys, *more)
    assert status == 2 and err.splitlines()[-1] == f"error: {message}"


def test_options_of_question_files_alone(tiny_run, monkeypatch, capsys):
    status, _, err = run_main(evaluate, monkeypatch, capsys, "--run", tiny_run, "--temperature", 1)
    assert (status, err) == (2, "error: --temperature: expected --questions with it\n")


def test_one_process_writes(model, album, tmp_path):
    answers = tmp_path / "a.jsonl"
    with open(answers, "a+b") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is writing answers into it"):
            append(model, album, answers)
