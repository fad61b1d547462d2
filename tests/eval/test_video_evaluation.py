"""`voco_jax.evaluate` on questions about videos: what is asked, about which frames, and what is said of the answers."""

import dataclasses
import json
from pathlib import Path
import re
import shutil

import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from tests.helpers.commands import run_main
from voco_jax import evaluate
from voco_jax.api import Model
from voco_jax.checkpoint.run import load_run
from voco_jax.config import source
from voco_jax.data.make_video_questions import make_part
from voco_jax.data.reports import Report
from voco_jax.data.shards import __main__ as build_records
from voco_jax.data.sources.array_records import ArrayRecordSource
from voco_jax.data.sources.llava import VideoQuestionSource
from voco_jax.eval import by_kind as asking
from voco_jax.eval import runner
from voco_jax.eval.by_kind import FRAMES_SHOWN, ONE_FRAME, SourceAnswers, read_questions, score_by_kind, shuffled
from voco_jax.eval.kind_pictures import choose_clips, draw_strip
from voco_jax.eval.pictures import RIGHT, WRONG
from voco_jax.eval.scoring import Answer, Guesser
from voco_jax.infer.memory import Embeddings, Item, MemoryBank
from voco_jax.infer.prompts import encode_prompt

FRAMES = 4
COLUMNS = [
    "this run", "frames shuffled", "one frame", "question only", "guess from the question", "most frequent answer"
]  # fmt: skip


@pytest.fixture(scope="module")
def shape_clips(tmp_path_factory) -> Path:
    """As voco make-video-questions leaves it: 8 clips a split, two of each story."""
    root = tmp_path_factory.mktemp("data") / "shape_clips"
    (root / "clips").mkdir(parents=True)
    for split in ("train", "test"):
        (root / f"{split}.json").write_text(json.dumps(make_part(root, split, range(8), 0)))
    return root


def clips_of(root: Path, split: str):
    return source("video_qa", file=str(root / f"{split}.json"), videos=str(root / "clips"))


def run_of(tiny_run: Path, directory: Path, train: dict, test: dict, **data) -> Path:
    """The tiny run as if it had been trained on other sources, with frames and time stamps."""
    run = shutil.copytree(tiny_run, directory / "run")
    config = json.loads((run / "config.json").read_text())
    config["data"] |= data | {
        key: {name: keys.to_dict() for name, keys in sources.items()}
        for key, sources in (("train", train), ("test", test))
    }
    config["data"]["video"] |= dict(num_frames=FRAMES, timestamps=True)
    config["eval"] |= dict(max_new_tokens=4)
    (run / "config.json").write_text(json.dumps(config))
    return run


@pytest.fixture(scope="module")
def run(tiny_run, shape_clips, tmp_path_factory) -> Path:
    """Trained on the clips alone, tested on them."""
    sources = [dict(clips=clips_of(shape_clips, split)) for split in ("train", "test")]
    return run_of(tiny_run, tmp_path_factory.mktemp("runs"), *sources)


@pytest.fixture(scope="module")
def model(run) -> Model:
    return Model(load_run(run))


def source_of(root: Path, file: str = "test.json") -> VideoQuestionSource:
    return VideoQuestionSource(str(root / file), str(root / "clips"))


def rows_of(root: Path) -> list[dict]:
    return json.loads((root / "test.json").read_text())


def edited(root: Path, to: Path, edit) -> Path:
    """The question set with its test rows changed by `edit`, the clips copied."""
    copy = shutil.copytree(root, to / "edited")
    rows = [dict(row) for row in rows_of(root)]
    (copy / "test.json").write_text(json.dumps([row for row in map(edit, rows) if row is not None]))
    return copy


# ---- What is asked ---------------------------------------------------------------------------------------------


def same(one, other) -> bool:
    """Whether the same is shown: the memories in their order, and their times."""
    if one is None or other is None:
        return one is other
    times = [[item.time for item in images.items] for images in (one, other)]
    arrays = [(one.keys, other.keys), (one.values, other.values)]
    return times[0] == times[1] and all(a.shape == b.shape and np.allclose(a, b, atol=1e-5) for a, b in arrays)


@pytest.fixture
def asked(monkeypatch) -> list[tuple]:
    """(question, images) of each prompt, whose answer is then its number."""
    found, questions = [], {}

    def encoded(engine, question, images=None, **keywords):
        prompt = encode_prompt(engine, question, images, **keywords)
        questions[id(prompt)] = prompt, question.removeprefix("<video>\n")
        return prompt

    def answers(engine, prompts, *, max_new_tokens, batch_size, **_):
        assert max_new_tokens == 4 and len(prompts) <= batch_size
        found.extend((questions[id(prompt)][1], prompt.images) for prompt in prompts)
        return [str(i) for i in range(len(found) - len(prompts), len(found))]

    monkeypatch.setattr(asking, "encode_prompt", encoded)
    monkeypatch.setattr(runner, "generate", answers)
    return found


def test_every_question_is_asked_about_its_own_clip(model, shape_clips, asked):
    """In batches over several clips, of whole clips and of parts of them; whole, and as each baseline has it."""
    config = model.run.config.copy_and_resolve_references()
    config.eval.batch_size = 10
    model = Model(dataclasses.replace(model.run, config=config))
    results, found, report = score_by_kind(model, source_of(shape_clips), name="clips", max_about=4, baselines=True)
    rows = [row for row in rows_of(shape_clips) if row["video"] <= "test_00003.mp4"]
    assert 20 < len(rows) < 30 and report.seen == len(rows) and not report.skipped
    said = {column: [asked[int(answer.given)] for answer in answers] for column, answers in found.answers.items()}
    expected = {column: [] for column in ("this run", "frames shuffled", "one frame", "question only")}
    for number, name in enumerate(f"test_0000{clip}.mp4" for clip in range(4)):
        seen = model.encode_video(shape_clips / "clips" / name)
        assert [item.time for item in seen.items] == [1.0, 3.0, 5.0, 7.0]
        for question in (row["question"] for row in rows if row["video"] == name):
            expected["this run"].append((question, seen))
            expected["frames shuffled"].append((question, shuffled(seen, number)))
            expected["one frame"].append((question, seen[2]))
            expected["question only"].append((question, None))
    assert list(said) == list(expected)
    for column, of_column in expected.items():
        assert [question for question, _ in said[column]] == [question for question, _ in of_column]
        assert all(same(a, b) for (_, a), (_, b) in zip(said[column], of_column, strict=True))
    pairs = list(zip(said["this run"], said["frames shuffled"], strict=True))
    changed = {images.items[0].source for (_, images), (_, other) in pairs if not same(images, other)}
    assert changed == {str(shape_clips / "clips" / f"test_0000{i}.mp4") for i in (0, 2, 3)}  # 1 is there in all four
    assert [a.truth for a in found.answers["this run"]] == [row["answer"] for row in rows]
    assert results["frames_per_clip"] == [4, 4] and results["tokens"] == 1
    assert (results["clips"], results["pictures"]) == (4, 0)


@pytest.mark.parametrize("kept", [["clip"], ["frames", "--num-frames", str(FRAMES)]], ids=["clips", "frames"])
def test_shards_of_clips(model, shape_clips, tmp_path, monkeypatch, kept):
    """Clips in shards, as they are or as the frames that are asked about: the same questions at the same times."""
    out = tmp_path / "shards"
    arguments = ["video", shape_clips / "test.json", "--videos", shape_clips / "clips", out, "--video", *kept]
    monkeypatch.setattr("sys.argv", ["build-records", *map(str, arguments), "--workers", "1"])
    build_records.main()
    results, found, report = score_by_kind(model, ArrayRecordSource(str(out)), max_about=2)
    expected, clips, _ = score_by_kind(model, source_of(shape_clips), max_about=2)
    assert not report.skipped and [(q.text, q.kind, q.about) for q in found.asked] == [
        (q.text, q.kind, q.about) for q in clips.asked
    ]
    assert found.times == clips.times
    if kept == ["clip"]:
        assert results == expected
    draw_strip(found, ArrayRecordSource(str(out)), tmp_path / "strip.png", "a title")
    with Image.open(tmp_path / "strip.png") as strip:
        assert len(strip.convert("L").getcolors()) > 50


def bank(count: int) -> MemoryBank:
    """Whose picture i is known by its number."""
    numbers = np.arange(count, dtype=np.float32).reshape(count, 1, 1, 1, 1)
    items = tuple(Item("a.mp4", time=i + 0.5) for i in range(count))
    return MemoryBank({"keys": numbers, "values": numbers + 0.5}, items, "model")


def test_shuffled_frames_have_ascending_times_and_never_their_own_order():
    orders = set()
    for number in range(40):
        for count in (2, 3, 8):
            found = shuffled(bank(count), number)
            order = found.keys.ravel().tolist()
            assert sorted(order) == [*range(count)] and order != [*range(count)]
            assert (found.values == found.keys + 0.5).all() and found.items == bank(count).items
            np.testing.assert_array_equal(shuffled(bank(count), number).keys, found.keys)
        orders.add(tuple(order))
    assert len(orders) > 30  # of 40 clips
    assert shuffled(bank(1), 0).keys == bank(1).keys
    embeddings = Embeddings(jnp.arange(3.0).reshape(3, 1, 1), bank(3).items)
    found = shuffled(embeddings, 0)
    assert (
        found.features.ravel().tolist() == shuffled(bank(3), 0).keys.ravel().tolist() and found.items == bank(3).items
    )


def test_one_frame_is_the_middle_one_with_its_time():
    one = FRAMES_SHOWN[ONE_FRAME](bank(8), 0)
    assert one.keys.ravel().tolist() == [4] and one.items == (Item("a.mp4", time=4.5),)


# ---- Scores ----------------------------------------------------------------------------------------------------


def test_counts_by_kind_and_guesses(model, shape_clips, asked, monkeypatch):
    """A stand-in that knows the truth of a whole clip, and says 'yes' with less: the counts are counted by hand."""
    rows = rows_of(shape_clips)
    truths = {(row["video"], row["question"]): row["answer"] for row in rows}

    whole = [model.encode_video(file) for file in sorted((shape_clips / "clips").glob("test_*.mp4"))]

    def answers(engine, prompts, **_):
        given = asked_before(engine, prompts, **_)
        return [answer(*asked[int(number)]) for number in given]

    def answer(question, images) -> str:
        if not any(same(images, clip) for clip in whole):
            return "Yes."
        return truths[Path(images.items[0].source).name, question]

    asked_before = runner.generate
    monkeypatch.setattr(runner, "generate", answers)
    known = next(row for row in rows if row["kind"] == "what changes")
    guesser = Guesser([(known["question"], known["answer"])] + 2 * [("is it late?", "no")])
    results, _, _ = score_by_kind(model, source_of(shape_clips), baselines=True, guesser=guesser)
    kinds = {row["kind"] for row in rows}
    assert kinds == {"order", "at second", "count", "direction", "becomes", "ever shown", "what changes"}
    numbers = {kind: sum(row["kind"] == kind for row in rows) for kind in kinds}
    assert results["counts"]["this run"] == {k: (n, n) for k, n in numbers.items()} | {
        "overall": (len(rows), len(rows))
    }

    def of_kinds(is_right) -> dict[str, tuple[int, int]]:
        right = {kind: sum(is_right(row) for row in rows if row["kind"] == kind) for kind in kinds}
        return {kind: (n, numbers[kind]) for kind, n in right.items()} | {"overall": (sum(right.values()), len(rows))}

    expected = of_kinds(lambda row: row["answer"] == "yes")
    assert all(0 < expected[kind][0] < numbers[kind] for kind in ("ever shown", "at second"))
    assert results["counts"]["one frame"] == results["counts"]["question only"] == expected
    # Of a question that the training set has, its answer there; else the most frequent of all
    expected = of_kinds(
        lambda row: row["answer"] == (known["answer"] if row["question"] == known["question"] else "no")
    )
    assert results["counts"]["guess from the question"] == expected
    assert results["counts"]["most frequent answer"] == of_kinds(lambda row: row["answer"] == "no")
    assert list(results["counts"]) == COLUMNS
    assert results["accuracy"] == 1.0


def test_rows_without_a_kind(shape_clips, tmp_path):
    mixed = edited(
        shape_clips, tmp_path / "mixed", lambda row: row if row.pop("kind") != "count" else row | {"kind": "count"}
    )
    kinds = [q.kind for q in read_questions(source_of(mixed), Report())]
    assert set(kinds) == {"other", "count"} and kinds.count("count") == sum(
        r["kind"] == "count" for r in rows_of(shape_clips)
    )
    none = edited(shape_clips, tmp_path / "none", lambda row: {k: v for k, v in row.items() if k != "kind"})
    assert {q.kind for q in read_questions(source_of(none), Report())} == {""}


def test_rows_that_cannot_be_asked(shape_clips, tmp_path):
    changes = {
        0: dict(kind=3), 1: dict(kind="overall"), 2: dict(question=" "), 3: dict(answer=""), 4: dict(video="../a.mp4"),
    }  # fmt: skip
    rows = [row | changes.get(i, {}) for i, row in enumerate(rows_of(shape_clips))]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    report = Report()
    asked = read_questions(VideoQuestionSource(str(tmp_path / "rows.json"), str(shape_clips / "clips")), report)
    assert len(asked) == len(rows) - 5 and report.num_skipped == 5
    said = "\n".join(report.lines())
    for words in (
        "rows.json[0]: kind: expected text, found 3", "rows.json[1]: kind: expected a name other than 'overall'",
        "rows.json[2]: question: expected text, found none", "rows.json[3]: answer: expected text, found none",
        "rows.json[4]: expected a path inside",
    ):  # fmt: skip
        assert words in said


# ---- Pictures --------------------------------------------------------------------------------------------------


def test_a_strip_has_a_clip_for_every_kind(shape_clips, tmp_path):
    """The first, then those with something new: of eight clips the first of each story; right is green, wrong red."""
    source = source_of(shape_clips)
    asked = read_questions(source, Report())
    times = {number: [1.0, 3.0, 5.0, 7.0] for number in range(8)}

    def found(given) -> SourceAnswers:
        answers = [Answer(question.name, question.text, question.truth, given(question)) for question in asked]
        return SourceAnswers({"this run": answers}, asked, times)

    right, wrong = found(lambda q: q.truth), found(lambda q: "$mathematics")
    chosen = choose_clips(right)
    assert [question.about for question, _ in chosen] == [0, 1, 2, 3]
    assert [a.question for _, answers in chosen for a in answers] == [q.text for q in asked if q.about < 4]
    without = [dataclasses.replace(question, kind="") for question in asked]
    assert len(choose_clips(SourceAnswers(right.answers, without, times))) == 4
    for answers, there, missing in ((right, RIGHT, WRONG), (wrong, WRONG, RIGHT)):
        draw_strip(answers, source, tmp_path / "strip.png", "a title")
        with Image.open(tmp_path / "strip.png") as strip:
            colours = {"#{:02x}{:02x}{:02x}".format(*pixel) for _, pixel in strip.convert("RGB").getcolors(10**6)}
        assert there in colours and missing not in colours


# ---- The command -----------------------------------------------------------------------------------------------


def test_the_command_with_baselines(run, shape_clips, monkeypatch, capsys):
    status, out, _ = run_main(evaluate, monkeypatch, capsys, "--run", run, "--max-records", 3, "--baselines")
    assert status == 0
    results = json.loads((run / "results.clips.first3.json").read_text())
    columns = COLUMNS
    assert list(results["counts"]) == columns and results["left_out"] == {} and results["step"] == 40
    total = sum(row["video"] <= "test_00002.mp4" for row in rows_of(shape_clips))
    lines = out.splitlines()
    assert lines[0] == f"| questions | number | {' | '.join(columns)} |"
    shares = [f"{100 * results['counts'][c]['overall'][0] / total:.1f} %" for c in columns]
    assert f"| overall | {total} | {' | '.join(shares)} |" in lines
    files = ["results.clips.first3.json", "kinds.clips.first3.png", "strip.clips.first3.png"]
    assert lines[-1] == "written: " + ", ".join(f"{run}/{file}" for file in files)
    for file in files[1:]:
        with Image.open(run / file) as picture:
            assert picture.width > 600 and len(picture.convert("L").getcolors()) > 50


def test_several_sources(tiny_run, shape_clips, tmp_path, monkeypatch, capsys):
    """easy-VQA keeps its files' names; it was not trained on, so there is nothing to guess from."""
    test = dict(shapes=source("easyvqa", split="test"), clips=clips_of(shape_clips, "test"))
    run = run_of(tiny_run, tmp_path, dict(clips=clips_of(shape_clips, "train")), test)
    status, out, _ = run_main(evaluate, monkeypatch, capsys, "--run", run, "--max-records", 2)
    assert status == 0
    assert re.findall(r"## .*|\| questions .*", out) == [
        "## clips", "| questions | number | this run |", "## shapes", "| questions | number | this run |"
    ]  # fmt: skip
    written = {p.name for p in run.iterdir() if ".first2." in p.name}
    assert written == {
        "results.first2.json", "kinds.first2.png", "answers.first2.png", "results.clips.first2.json",
        "kinds.clips.first2.png", "strip.clips.first2.png",
    }  # fmt: skip
    assert json.loads((run / "results.first2.json").read_text())["counts"]["this run"]["overall"][1] == 11 + 7


def test_a_broken_clip(tiny_run, shape_clips, tmp_path, monkeypatch, capsys):
    """One clear line that names it; with a share allowed, the score says that it is of fewer."""
    broken = edited(shape_clips, tmp_path, lambda row: row)
    file = broken / "clips" / "test_00001.mp4"
    file.write_bytes(file.read_bytes()[:1500])
    lost = sum(row["video"] == file.name for row in rows_of(broken))
    sources = dict(clips=clips_of(broken, "train")), dict(clips=clips_of(broken, "test"))
    run = run_of(tiny_run, tmp_path, *sources)
    status, out, err = run_main(evaluate, monkeypatch, capsys, "--run", run, "--max-records", 2)
    error = err.strip().splitlines()[-1]
    assert status == 2 and "|" not in out
    assert (
        error.startswith(f"error: config.data.test.clips: {lost} of the first ")
        and "max_skipped_fraction = 0.01" in error
    )
    assert f"{lost}× unreadable video: {file}: expected a video, found: " in error
    assert not [*run.glob("results*")]

    config = json.loads((run / "config.json").read_text())
    config["data"]["max_skipped_fraction"] = 0.5
    (run / "config.json").write_text(json.dumps(config))
    status, out, _ = run_main(evaluate, monkeypatch, capsys, "--run", run, "--max-records", 2)
    assert status == 0
    left = sum(row["video"] == "test_00000.mp4" for row in rows_of(broken))
    assert f"\n{left + lost} questions: {left} good, {lost} skipped\n{lost} skipped: unreadable video; {file}: " in out
    results = json.loads((run / "results.clips.first2.json").read_text())
    assert results["left_out"] == {"unreadable video": lost} and results["clips"] == 1
    assert results["counts"]["this run"]["overall"][1] == left


@pytest.mark.parametrize(
    ("test", "arguments", "message"),
    [
        (dict(a=source("llava", file="a.json")), [], "config.data.test.a: a.json: not found"),
        (
            {},
            [],
            "config.data.test: expected a test set, found none; set it in the config file and give the command of",
        ),
        (dict(a=source("video_qa", file="a.json", videos="")), [], "config.data.test.a: a.json: not found"),
        ({}, ["--baselines", "--questions", "a.jsonl"], "--baselines: does not go with --questions"),
    ],
)
def test_what_cannot_be_scored(tiny_run, tmp_path, monkeypatch, capsys, test, arguments, message):
    run = run_of(tiny_run, tmp_path, dict(a=source("llava", file="a.json")), test)
    status, out, err = run_main(evaluate, monkeypatch, capsys, "--run", run, *arguments)
    *told, error = err.splitlines()  # first, what the run's config has otherwise than its checkpoint
    assert status == 2 and out == "" and all("was written with" in line for line in told)
    assert error.startswith("error: ") and message in error
