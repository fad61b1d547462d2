"""Looking at the test set while training: against one conversation at a time, and over meshes."""

import dataclasses
import json
from pathlib import Path
import shutil
from types import SimpleNamespace

from flax import nnx
import jax
import numpy as np
from PIL import Image
import pytest

from tests.data.test_video_training import CLIPS
from tests.data.test_video_training import NAMES as CLIP_NAMES
from tests.helpers import tiny
from tests.helpers.commands import run_main
from tests.helpers.losses import CROSS_ENTROPY
from tests.parallel.test_distributed import free_port, run_two
from voco_jax import evaluate
from voco_jax.api import Model
from voco_jax.checkpoint.run import Run, load_run
from voco_jax.config import load_config, save_config, source, sources, typed
from voco_jax.data.images import load_image
from voco_jax.data.records import Clip
from voco_jax.data.sources import easyvqa
from voco_jax.data.sources.llava import LlavaSource
from voco_jax.data.training_data import open_test_data, open_training_data
from voco_jax.data.video import FrameSampling, format_time, probe, read_frames, sample_times
from voco_jax.errors import UserError
from voco_jax.eval import pictures
from voco_jax.eval.conversations import LONG as LONG_ANSWERS
from voco_jax.eval.conversations import score_conversations, scores, table
from voco_jax.eval.scoring import Answer, token_f1
from voco_jax.infer.engine import Engine
from voco_jax.models.build import abstract_model
from voco_jax.models.voco import Read
from voco_jax.parallel.mesh import make_mesh
from voco_jax.train.actions import StepDone
from voco_jax.train.evaluation import Evaluator
from voco_jax.train.goodput import Goodput
from voco_jax.train.loop import train
from voco_jax.train.periodic import Evaluate

LONG = "a picture of one thing and no other, as far as can be seen"


@pytest.fixture(scope="module")
def test_set(tmp_path_factory) -> dict:
    """Seven pictures with one to three questions, one of them with two turns, one answered at length; one text."""
    directory, rows = tmp_path_factory.mktemp("test"), []
    for i, record in enumerate(easyvqa.load("test")[:7]):
        name = f"{i}.png"
        load_image(record.images[0]).resize((80 + i, 64)).save(directory / name)
        for turns in record.conversations[: 1 + i % 3]:
            if i == 2:
                turns = [*turns, {"from": "human", "value": "is that so?"}, {"from": "gpt", "value": "yes"}]
            if i == 3:
                turns = [turns[0], {"from": "gpt", "value": LONG}]
            rows.append({"image": name, "conversations": turns})
    rows.append({"conversations": [{"from": "human", "value": "is it late?"}, {"from": "gpt", "value": "no"}]})
    (directory / "rows.json").write_text(json.dumps(rows))
    return dict(file=str(directory / "rows.json"), images=str(directory)), rows


def config_of(workdir, test_set, kind="llava", keys=None, **changes):
    """The test set is what is trained on too: its words are the tokenizer's. Two batches hold it all."""
    changes = dict(
        data__batch_size=4, data__images_per_pack=2, data__rows_per_pack=1, data__row_length=90, eval__every=5,
        eval__max_new_tokens=4, eval__batch_size=4, data__cache_dir=workdir, model__llama__vocab_multiple=2,
    ) | changes  # fmt: skip
    config = tiny.config(workdir, **changes)
    with config.unlocked():
        config.data.train = sources(all=source(kind, **(keys or test_set[0])))
        config.data.test = sources(all=source(kind, **(keys or test_set[0])))
    return config


def make(config, workdir, mesh=None, **kwargs):
    """(evaluator, parameters that say something else about every picture, graphdef, training data)."""
    data = open_training_data(config, log=lambda line: None, **kwargs)
    graphdef, abstract = abstract_model(data.model_config)
    rng = np.random.default_rng(5)
    params = jax.tree.map(lambda p: (0.3 * rng.normal(size=p.shape)).astype(p.dtype), abstract)
    mesh = mesh or make_mesh(config.mesh, jax.devices()[:1])
    workdir.mkdir(exist_ok=True)
    said = []
    test = open_test_data(config, data.batches, said.append)
    evaluator = Evaluator(typed(config).eval, test, graphdef, abstract, CROSS_ENTROPY, mesh, said.append)
    evaluator.sheets = workdir / "answers"
    return evaluator, params, graphdef, data, said


@pytest.fixture(scope="module")
def evaluated(test_set, tmp_path_factory):
    """(evaluation, model, data, questions, said)."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    config = config_of(workdir, test_set, eval__num_answers=9)
    evaluator, params, graphdef, data, said = make(config, workdir)
    return evaluator(5, params), nnx.merge(graphdef, params), data, evaluator, said, params


def conversations(test_set, data):
    """(sample, pixel values [1, 1, size, size, 3] or None, turns) of each, straight from the rows."""
    loader = data.batches.loader
    for row in test_set[1]:
        images = [load_image(Path(test_set[0]["images"]) / row["image"])] if "image" in row else []
        pixels = np.stack([loader.processor(image) for image in images])[None] if images else None
        yield loader.maker.encoder.encode(row["conversations"], len(images)), pixels, row["conversations"]


def test_the_loss_is_that_of_each_conversation_alone(test_set, evaluated):
    evaluation, model, data, *_ = evaluated
    total = labels = 0.0
    log_softmax = jax.jit(lambda read, pixels: jax.nn.log_softmax(model(read, pixels))[0])
    for sample, pixels, _ in conversations(test_set, data):
        n, places = len(sample), np.arange(90)
        padded = lambda x, value, n=n: np.pad(x, (0, 90 - n), constant_values=value)[None]  # noqa: E731
        read = Read(padded(sample.tokens, 0), places[None], 0 + (places < n)[None], padded(sample.slot_index, -1))
        log_probabilities = log_softmax(read, pixels)
        for i in np.flatnonzero(sample.labels):
            total -= float(log_probabilities[i - 1, sample.tokens[i]])
            labels += 1
    assert evaluation.values["eval_loss"] == pytest.approx(total / labels, rel=1e-5)


def test_the_answers_are_those_of_one_question_at_a_time(test_set, evaluated):
    evaluation, model, data, evaluator, said, params = evaluated
    engine = Engine(model, data.batches.loader.maker.encoder)
    expected = {}
    for _, pixels, turns in conversations(test_set, data):
        visual = None if pixels is None else engine.encode_images(pixels)
        prompt = engine.encoder.encode(turns[:1], 0 if pixels is None else 1)
        (given,) = engine.generate([prompt], visual, [[0]], 4)
        expected.setdefault((turns[0]["value"].replace("<image>", "").strip(), turns[1]["value"]), []).append(given)
    questions = evaluator._questions
    assert len(questions) == 9 and len({q.text for q in questions}) > 3
    with jax.set_mesh(evaluator._mesh):
        answers = evaluator._ask(params)
    for question, given in zip(questions, answers, strict=True):
        assert given in expected[question.text, question.truth]
    assert len(set(answers)) > 3, "the comparison would say little"
    judged = [(q, given) for q, given in zip(questions, answers, strict=True) if q.judged]
    assert [q.judged for q in questions] == [q.truth != LONG for q in questions]
    assert evaluation.values["accuracy"] == np.mean([q.truth.lower() == given.lower() for q, given in judged])
    assert said[-1] == f"evaluation: 9 questions, {len(judged)} with a short answer"


def test_scores_of_own_data(test_set, evaluated, tmp_path):
    """Answers as of one question at a time, the loss as training has it, whatever is asked together."""
    evaluation, model, data, *_ = evaluated
    loader = data.batches.loader
    config = config_of(tmp_path / "run", test_set, eval__max_new_tokens=0, eval__batch_size=5)
    maker = loader.maker
    run = Run(tmp_path / "run", config, model, maker.encoder, loader.processor, 5, {"all": 1})
    results, answers, report = score_conversations(Model(run), LlavaSource(**test_set[0]), name="all")
    length = max(len(maker.encoder.tokenizer(a.truth, add_special_tokens=False).input_ids) for a in answers)
    assert results["max_new_tokens"] == length + 1 > 8 and not report.skipped  # room for the longest, and its end
    engine = Engine(model, maker.encoder)
    for answer, (_, pixels, turns) in zip(answers, conversations(test_set, data), strict=True):
        visual = None if pixels is None else engine.encode_images(pixels)
        prompt = maker.encoder.encode(turns[:1], 0 if pixels is None else 1)
        assert engine.generate([prompt], visual, [[0]], length + 1) == [answer.given]
        assert (answer.question, answer.truth) == (turns[0]["value"].replace("<image>", "").strip(), turns[1]["value"])
    assert results["loss"] == pytest.approx(evaluation.values["eval_loss"], rel=1e-5)
    # The scores are those of the answers, whatever these are
    given = [dataclasses.replace(a, given=a.truth.upper() if i % 3 else "a thing") for i, a in enumerate(answers)]
    of = scores(given)
    right = sum(a.given != "a thing" for a in given)
    assert of["overall"]["exact_match"] == right / len(given)
    in_long = token_f1("a thing", LONG)  # "a picture of one thing …": 1 of 1 word and of 13
    expected = right + sum(in_long for a in given if a.given == "a thing" and a.truth == LONG)
    assert of["overall"]["token_f1"] == pytest.approx(expected / len(given)) and in_long == pytest.approx(2 / 14)
    assert of[LONG_ANSWERS]["answers"] == sum(a.truth == LONG for a in given) > 0
    assert of["overall"]["loss"] == results["loss"] == results["scores"]["overall"]["loss"]
    assert table(of).splitlines()[-1].startswith(f"| overall | {len(given)} | {100 * right / len(given):.1f} % | ")


def test_the_sheet_has_pictures_however_many_questions_are_too_long(test_set, evaluated, tmp_path):
    _, model, data, *_ = evaluated
    maker, row = data.batches.loader.maker, next(row for row in test_set[1] if "image" in row)
    question = {"from": "human", "value": "<image>\n" + "what? " * 9000}
    rows = [row | {"conversations": [question, row["conversations"][1]]}] * 30 + [row] * 14
    (tmp_path / "long.json").write_text(json.dumps(rows))
    config = config_of(tmp_path / "run", test_set, data__max_skipped_fraction=1.0, eval__batch_size=4)
    run = Run(tmp_path / "run", config, model, maker.encoder, data.batches.loader.processor, 5, {"all": 1})
    source = LlavaSource(str(tmp_path / "long.json"), test_set[0]["images"])
    _, answers, report = score_conversations(Model(run), source)
    assert report.num_skipped == 30 and [a.picture is not None for a in answers] == [True] * 12 + [False] * 2


def test_evaluate_on_own_data(tiny_run, test_set, tmp_path, monkeypatch, capsys):
    """As a user has it: a table, results, a sheet; and what cannot be used is named."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    config = load_config(run / "config.json")
    rows = [*test_set[1][:3], {"image": "gone.png", "conversations": test_set[1][0]["conversations"]}]
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    with config.unlocked():
        config.data.test = sources(mine=source("llava", file=str(tmp_path / "mine.json"), images=test_set[0]["images"]))
    config.data.max_skipped_fraction = 0.5
    save_config(config, run / "config.json")
    status, out, err = run_main(evaluate, monkeypatch, capsys, "--run", run)
    assert status == 0, err
    results = json.loads((run / "results.mine.json").read_text())
    assert out.startswith("| answers | number | exact match | token F1 | loss |\n") and "\n| overall | 3 | " in out
    assert "1 skipped: missing file; mine.json[3]: " in out and results["left_out"] == {"missing file": 1}
    assert results["answers"] == 3 and 0 < results["loss"] < 10 and results["step"] == 40
    with Image.open(run / "answers.mine.png") as sheet:
        assert sheet.width > 1000
    config.data.max_skipped_fraction = 0.01
    save_config(config, run / "config.json")
    status, out, err = run_main(evaluate, monkeypatch, capsys, "--run", run)
    assert status == 2 and err.splitlines()[-1].startswith("error: config.data.test.mine: 1 of the first 4 records")


def test_a_right_answer_is_right(evaluated, monkeypatch):
    *_, evaluator, _, params = evaluated
    truths = [q.truth.upper() + "." if i % 2 else "no idea" for i, q in enumerate(evaluator._questions)]
    monkeypatch.setattr(evaluator, "_ask", lambda params: truths)
    judged = [i % 2 for i, q in enumerate(evaluator._questions) if q.judged]
    assert evaluator(7, params).values["accuracy"] == np.mean(judged)


def test_every_picture_comes_before_any_comes_twice(evaluated):
    evaluator = evaluated[3]
    first = {q.picture.size if q.picture else None for q in evaluator._questions[:8]}
    assert first == {None, *((80 + i, 64) for i in range(7))}


def test_the_sheet(evaluated):
    """Nine answers: three rows of four."""
    sheet = evaluated[0].sheet
    assert sheet.name == "step_000005.png" and sheet.parent.name == "answers"
    with Image.open(sheet) as picture:
        assert picture.width == 1364 and picture.height > 900 and len(picture.getcolors(10**6)) > 50


def test_the_same_again(evaluated):
    evaluation, *_, evaluator, _, params = evaluated
    again = evaluator(10, params)
    assert again.values == evaluation.values
    assert again.sheet.name == "step_000010.png"


def test_when():
    """Every so many steps and at the end, but not when the run is preempted."""
    steps = []
    log = SimpleNamespace(settle=lambda: None, evaluated=lambda step, values, sheet: steps.append(step))
    evaluate = Evaluate(lambda step, *_: ({"eval_loss": float(step)}, None), 5, log, Goodput(None))
    for step in range(1, 18):
        done = StepDone(step, {}, last=step == 17, preempted=step == 15)
        evaluate.after_step(done)
        assert done.evaluation == ({"eval_loss": float(step)} if step in (5, 10, 17) else None)
    assert steps == [5, 10, 17]


def test_the_loss_alone_of_fewer_batches(test_set, tmp_path):
    config = config_of(tmp_path, test_set, eval__num_answers=0, eval__num_batches=1)
    evaluator, params, *_ = make(config, tmp_path)
    evaluation = evaluator(5, params)
    assert list(evaluation.values) == ["eval_loss"] and evaluation.sheet is None
    assert not (tmp_path / "answers").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(eval__max_new_tokens=9000),
            "config.eval.num_answers: no question of config.data.test can be asked: .* and 9000",
        ),
        (
            dict(data__template="plain", data__max_skipped_fraction=1.0),
            "config.eval.num_answers: no question .* plain template",
        ),
    ],
)
def test_what_cannot_be_evaluated(test_set, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        make(config_of(tmp_path, test_set, **changes), tmp_path)


def test_no_test_data(test_set, tmp_path):
    config = config_of(tmp_path, test_set)
    with config.unlocked():
        config.data.test = sources()
    with pytest.raises(UserError, match="config.eval.every: expected sources in config.data.test .* found none"):
        make(config, tmp_path)


def test_questions_about_clips(tmp_path):
    """Frames evenly, though training moves them; the one in the middle is shown."""
    rows = [{"video": f"{name}.mp4", "question": f"what is {name}?", "answer": "a cat"} for name in CLIP_NAMES]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    clips = dict(file=str(tmp_path / "rows.json"), videos=str(CLIPS))
    changes = dict(data__images_per_pack=3, data__row_length=120, data__video__num_frames=3, data__template="bare")
    config = config_of(tmp_path, None, kind="video_qa", keys=clips, data__video__timestamps=True, **changes)
    evaluator, _, _, data, _ = make(config, tmp_path)
    assert len(evaluator._questions) == len(CLIP_NAMES)
    for question in evaluator._questions:
        name = next(name for name in CLIP_NAMES if question.text == f"what is {name}?")
        clip = Clip(CLIPS / f"{name}.mp4")
        times = sample_times(probe(clip), FrameSampling(3))
        frames = read_frames(clip, times)
        for frame, pixels in zip(frames, question.pixels, strict=True):
            np.testing.assert_array_equal(data.batches.loader.processor.square(frame), pixels)
        frames[1].thumbnail((336, 336))
        np.testing.assert_array_equal(np.asarray(question.picture), np.asarray(frames[1]))
        asked = "".join(f"{format_time(t)} <image>" for t in times) + f"\nwhat is {name}?"
        expected = data.batches.loader.maker.encoder.encode([{"from": "human", "value": asked}], 3)
        np.testing.assert_array_equal(question.prompt.tokens, expected.tokens)


# ---- In a training -----------------------------------------------------------------------------------------------


def lines(run: Path) -> list[dict]:
    clock = "questions_per_second", "images_per_second", "tokens_per_second_per_device", "seconds", "goodput"
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in clock} for line in found]


@pytest.mark.slow
def test_it_changes_nothing_and_comes_again(test_set, tmp_path):
    """Parameters bit for bit those of a training without; a run that goes on from its first checkpoint says the
    same."""
    length = dict(train__steps=6, train__checkpoint_every=3, train__log_every=2, optim__name="adamw")
    evaluations = dict(eval__every=2, eval__num_answers=3, eval__num_batches=1, train__profile_at=2)
    watched = train(config_of(tmp_path / "watched", test_set, **length, **evaluations))
    plain = train(config_of(tmp_path / "plain", test_set, **length, eval__every=0))
    found = [nnx.to_pure_dict(nnx.state(load_run(run).model)) for run in (watched, plain)]
    jax.tree.map(np.testing.assert_array_equal, *found)
    logged = lines(watched)
    assert [line for line in logged if "loss" in line] == lines(plain)
    assert [line["step"] for line in logged if "eval_loss" in line] == [2, 4, 6]
    assert sorted(p.name for p in (watched / "answers").iterdir()) == [f"step_00000{i}.png" for i in (2, 4, 6)]
    assert json.loads((watched / "goodput.json").read_text())["seconds"]["evaluation"] > 0

    assert list((watched / "profile" / "step_000002").glob("plugins/profile/*/*.trace.json.gz"))  # watched in every way

    shutil.rmtree(watched / "checkpoints" / "6")
    train(config_of(watched, test_set, **length, **evaluations))
    assert lines(watched) == logged


SCRIPT = """
import sys
from voco_jax.parallel import distributed
address, process, workdir, test_set = eval(sys.argv[1])
distributed.start(address, 2, process, 60)
import pathlib
import jax, numpy as np
from tests.train.test_evaluation import config_of, make
from voco_jax.parallel.mesh import make_mesh
from voco_jax.parallel.sharding import local_rows, param_shardings

workdir = pathlib.Path(workdir)
config = config_of(workdir, test_set, eval__num_answers=9, mesh__fsdp=2, mesh__frame=2)
mesh = make_mesh(config.mesh)
shard = local_rows(mesh, config.data.batch_size)
evaluator, params, *_ = make(config, workdir / str(process), mesh, shard=shard)
place = lambda p, s: jax.make_array_from_callback(p.shape, s, lambda index: p[index])
params = jax.tree.map(place, params, param_shardings(mesh, params))
values, sheet = evaluator(5, params)
with jax.set_mesh(mesh):
    print((values["eval_loss"], evaluator._ask(params), sheet.exists(), shard, evaluator.fingerprint()))
"""


@pytest.mark.multiprocess
def test_two_processes_see_what_one_does(test_set, evaluated, tmp_path):
    """Rows and parameters over both, a row's images over the two simulated devices of each: the same loss, answers."""
    evaluation, *_, evaluator, _, params = evaluated
    alone = evaluator._ask(params)
    address = f"localhost:{free_port()}"
    done = run_two(lambda i: (address, i, str(tmp_path), test_set), lambda i: {}, script=SCRIPT)
    for process, result in enumerate(done):
        assert result.returncode == 0, result.stderr
        (found,) = [eval(line) for line in result.stdout.splitlines() if line.startswith("(")]
        loss, answers, drawn, rows, fingerprint = found
        assert loss == pytest.approx(evaluation.values["eval_loss"], rel=1e-5) and answers == alone
        assert fingerprint == evaluator.fingerprint()
        assert drawn == (process == 0) and rows == [2 * process, 2 * process + 1]


@pytest.mark.parametrize("count", [1, 5, 12])
def test_all_text_of_a_sheet_is_on_it(count, tmp_path, monkeypatch):
    """Long questions and answers under square pictures, in one row and in several."""
    monkeypatch.setattr(pictures.plt, "close", lambda figure: None)
    answers = [Answer("", LONG * 4, LONG * 5, LONG * 6)] * count
    pictures.draw_sheet(answers, [Image.new("RGB", (50, 50))] * count, tmp_path / "sheet.png", "a title")
    figure = pictures.plt.gcf()
    boxes = [text.get_window_extent() for text in figure.texts if text.get_text()]
    assert len(boxes) == 2 * count + 1 and sum("truth:" in text.get_text() for text in figure.texts) == count
    assert all(box.y0 >= 0 and box.y1 <= figure.bbox.y1 and box.x0 >= 0 for box in boxes)
    places = [axis.get_window_extent() for axis in figure.axes]
    assert not any(box.overlaps(place) for box in boxes for place in places)
    monkeypatch.undo()
    pictures.plt.close(figure)
