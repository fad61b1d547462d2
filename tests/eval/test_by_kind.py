"""Questions about pictures, in rows of any source with a `kind`: what is asked about each, and the scores."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

from PIL import Image
import pytest

from tests.eval.test_answering import with_random_parameters
from tests.eval.test_video_evaluation import run_of
from tests.helpers.commands import run_main
from voco_jax import evaluate
from voco_jax.api import Model, Request
from voco_jax.checkpoint.run import load_run
from voco_jax.config import default_config, source, sources, typed
from voco_jax.data.images import load_image
from voco_jax.data.records import BadRecord
from voco_jax.data.reports import Report
from voco_jax.data.shards import __main__ as build_records
from voco_jax.data.sources import easyvqa, open_sources
from voco_jax.data.sources.array_records import ArrayRecordSource, unpack_record
from voco_jax.data.sources.llava import LlavaSource
from voco_jax.eval import by_kind
from voco_jax.eval.auto_scores import compare
from voco_jax.eval.by_kind import (
    FRAMES_SHOWN,
    GUESS,
    MAJORITY,
    NOTHING,
    THIS_RUN,
    has_kinds,
    read_questions,
    score_by_kind,
)
from voco_jax.eval.kind_pictures import BARS
from voco_jax.infer.auto_tokens import AutoTokens, Try
from voco_jax.infer.engine import Engine

PICTURES = 5


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Three questions about each of five pictures, a row each: the first about every picture, then the second, …; and
    as shards."""
    root = tmp_path_factory.mktemp("pictures")
    (root / "images").mkdir()
    rows: list[dict] = []
    records = easyvqa.load("test")[:PICTURES]
    for i, record in enumerate(records):
        load_image(record.images[0]).save(root / "images" / f"{i}.png")
    for c in range(3):
        for i, record in enumerate(records):
            question = record.conversations[c][0]["value"].removeprefix("<image>\n")
            turns = [{"from": "human", "value": f"{question}\n<image>"}, record.conversations[c][1]]
            rows.append({"id": f"{i}-{c}", "image": f"{i}.png", "conversations": turns, "kind": record.kinds[c]})
    (root / "rows.json").write_text(json.dumps(rows))
    return root


@pytest.fixture(scope="module")
def shards(pictures) -> Path:
    out = pictures / "shards"
    with pytest.MonkeyPatch.context() as patch:
        arguments = ["llava", pictures / "rows.json", "--images", pictures / "images", out, "--workers", "1"]
        patch.setattr("sys.argv", ["build-records", *map(str, arguments)])
        build_records.main()
    return out


@pytest.fixture(scope="module")
def model(tiny_run) -> Model:
    """Says something else about every picture."""
    run = with_random_parameters(load_run(tiny_run))
    run.config.eval.update(batch_size=4, max_new_tokens=6)
    return Model(run)


def source_of(pictures: Path) -> LlavaSource:
    return LlavaSource(str(pictures / "rows.json"), str(pictures / "images"))


def rows_of(pictures: Path) -> list[dict]:
    return json.loads((pictures / "rows.json").read_text())


def test_each_question_is_asked_about_its_picture_and_each_picture_is_encoded_once(
    model, pictures, shards, monkeypatch
):  # fmt: skip
    """Rows about a picture may lie anywhere in the file; shards, whose pictures are bytes, give the same."""
    caches = []

    class Watched(by_kind.ImageCache):
        def __init__(self, *arguments, **keywords):
            super().__init__(*arguments, **keywords)
            caches.append(self)

    monkeypatch.setattr(by_kind, "ImageCache", Watched)
    results, found, report = score_by_kind(model, source_of(pictures), baselines=True)
    assert [cache.compressed for cache in caches] == [PICTURES] and not report.skipped
    engine = Engine(model.run.model, model.run.encoder)
    expected, blind = {}, {}
    for row in rows_of(pictures):
        image = model.image_encoder.processor(load_image(pictures / "images" / row["image"]))
        question = row["conversations"][0]["value"].removesuffix("\n<image>")
        prompt = engine.encoder.encode(row["conversations"][:1], 1)
        (expected[row["image"], question],) = engine.generate(
            [prompt], engine.encode_images(image[None, None]), [[0]], 6
        )
        (blind[question],) = engine.generate([engine.encoder.encode_question(question, 0)], None, [[]], 6)
    given = {(Path(a.image).name, a.question): a.given for a in found.answers[THIS_RUN]}
    assert given == expected and len(set(expected.values())) > 8, "the comparison would say little"
    assert {a.question: a.given for a in found.answers["question only"]} == blind
    assert list(results["counts"]) == ["this run", "question only"]  # there is one frame alone, in one order
    assert (results["pictures"], results["clips"], results["tokens"], results["step"]) == (PICTURES, 0, 1, 40)
    kinds = {kind: of[1] for kind, of in results["counts"]["this run"].items()}
    assert kinds == {k: sum(row["kind"] == k for row in rows_of(pictures)) for k in kinds if k != "overall"} | {
        "overall": 3 * PICTURES
    }
    of_shards, again, _ = score_by_kind(model, ArrayRecordSource(str(shards)), baselines=True)
    assert of_shards == results and caches[1].compressed == PICTURES
    assert [(q.kind, q.about, q.value) for q in again.asked] == [(q.kind, q.about, q.value) for q in found.asked]
    assert [a.given for a in again.answers[THIS_RUN]] == [a.given for a in found.answers[THIS_RUN]]


def test_the_first_so_many_pictures(model, pictures):
    results, found, _ = score_by_kind(model, source_of(pictures), max_about=2)
    assert len(found.asked) == 6 and {question.about for question in found.asked} == {0, 1}
    assert results["pictures"] == 2


def test_which_rows_have_kinds(pictures, tmp_path):
    """Shards without them are byte for byte what they were before there were any."""
    assert has_kinds(source_of(pictures))
    rows = [{k: v for k, v in row.items() if k != "kind"} for row in rows_of(pictures)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert not has_kinds(LlavaSource(str(tmp_path / "rows.json"), str(pictures / "images")))
    rows[1]["kind"], rows[2]["kind"], rows[3]["kind"] = "color", 7, "overall"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    odd, report = LlavaSource(str(tmp_path / "rows.json"), str(pictures / "images")), Report()
    assert has_kinds(odd)
    assert sorted({question.kind for question in read_questions(odd, report)}) == ["color", "other"]
    said = "\n".join(report.lines())
    assert report.num_skipped == 2 and "rows.json[2]: kind: expected text, found 7" in said
    assert "rows.json[3]: kind: expected a name other than 'overall'" in said


def test_kinds_of_shards_are_checked(shards):
    import msgpack

    found = ArrayRecordSource(str(shards))
    assert found[0].kinds == [easyvqa.load("test")[0].kinds[0]]
    content = msgpack.unpackb(found._open()[0])
    assert content["kinds"] == found[0].kinds
    for kinds in ("color", ["color", "shape"], {"a": 1}):
        with pytest.raises(BadRecord, match="expected as many 'kinds' as conversations, found "):
            unpack_record(msgpack.packb(content | {"kinds": kinds}))
    assert unpack_record(msgpack.packb({k: v for k, v in content.items() if k != "kinds"})).kinds == []


@pytest.fixture(scope="module")
def run(tiny_run, pictures, shards, tmp_path_factory) -> Path:
    """Trained on the rows, tested on them and on the shards."""
    rows = source("llava", file=str(pictures / "rows.json"), images=str(pictures / "images"))
    test = dict(scenes=rows, shards=source("array_record", files=str(shards)))
    return run_of(tiny_run, tmp_path_factory.mktemp("runs"), dict(a=rows), test)


def test_the_command_with_baselines(run, pictures, monkeypatch, capsys):
    status, out, err = run_main(evaluate, monkeypatch, capsys, "--run", run, "--baselines")
    assert status == 0, err
    assert out.count("| questions | number | this run | question only | guess from the question | most frequent") == 2
    rows = rows_of(pictures)
    answers = {}
    for row in rows:
        question = row["conversations"][0]["value"]
        answers.setdefault(question, []).append(row["conversations"][1]["value"])
    guess = {question: max(given, key=given.count) for question, given in answers.items()}
    right = sum(row["conversations"][1]["value"] == guess[row["conversations"][0]["value"]] for row in rows)
    every = [row["conversations"][1]["value"] for row in rows]
    for name in ("scenes", "shards"):
        results = json.loads((run / f"results.{name}.json").read_text())
        assert results["counts"]["guess from the question"]["overall"] == [right, len(rows)]
        most = every.count(max(every, key=every.count))
        assert results["counts"]["most frequent answer"]["overall"] == [most, len(rows)]
        for picture in ("kinds", "answers"):
            with Image.open(run / f"{picture}.{name}.png") as drawn:
                assert drawn.width > 600 and len(drawn.convert("L").getcolors()) > 50


def test_guesses_of_rows_of_any_form(tmp_path):
    """Of all turns, whoever speaks first; rows that training cannot use are passed over."""
    asked = [{"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": "Ann"}]
    other = [{"from": "human", "value": "When?"}, {"from": "gpt", "value": "now"}]
    bad = [[{"from": "human", "value": "Who?"}, turn] for turn in ({"from": "gpt"}, {"from": "gpt", "value": 3}, 7)]
    rows = [*bad, [7], [*asked, *other], [{"from": "gpt", "value": "Hello"}, *other]]
    (tmp_path / "rows.json").write_text(json.dumps([{"conversations": turns} for turns in rows]))
    config = default_config()
    config.data.train = sources(a=source("llava", file=str(tmp_path / "rows.json")))
    guess = evaluate._guesser(SimpleNamespace(config=config), "llava")
    assert [guess(question) for question in ("Who?", "When?", "Why?")] == ["Ann", "now", "now"]


def test_each_column_has_a_colour():
    assert len(set(BARS)) >= len({*FRAMES_SHOWN, NOTHING, GUESS, MAJORITY})


def test_baselines_want_kinds(tiny_run, tmp_path, monkeypatch, capsys):
    (tmp_path / "rows.json").write_text(json.dumps([{"conversations": [{"from": "human", "value": "is it late?"}]}]))
    test = dict(a=source("llava", file=str(tmp_path / "rows.json")))
    run = run_of(tiny_run, tmp_path, test, test)
    status, out, err = run_main(evaluate, monkeypatch, capsys, "--run", run, "--baselines")
    assert status == 2 and out == ""
    assert "error: --baselines: expected a source whose rows carry a kind of question in " in err


def test_fewer_tokens_and_uncompressed(two_tokens_run, pictures, tmp_path, monkeypatch, capsys):
    """A run of two tokens: read with one of them, with none of its memory, and with more than it has."""
    rows = source("llava", file=str(pictures / "rows.json"), images=str(pictures / "images"))
    run = run_of(two_tokens_run, tmp_path, dict(a=rows), dict(a=rows))
    for arguments, suffix, compressor, tokens in (
        (["--tokens", 1], ".first2.tokens1", "voco", 1),
        (["--compressor", "none"], ".none.first2", "none", 64),
    ):
        status, _, err = run_main(evaluate, monkeypatch, capsys, "--run", run, "--max-records", 2, *arguments)
        assert status == 0, err
        results = json.loads((run / f"results.a{suffix}.json").read_text())
        assert (results["step"], results["compressor"], results["tokens"]) == (3, compressor, tokens)
    for arguments, error in (
        (["--tokens", 3], "--tokens 3: there are 2 tokens per image"),
        (["--tokens", 1, "--compressor", "none"], f"{run}: a model with compressor 'none' has no memories"),
    ):
        status, _, err = run_main(evaluate, monkeypatch, capsys, "--run", run, *arguments)
        assert status == 2 and err.splitlines()[-1].startswith(f"error: {error}")


def test_as_many_tokens_as_needed(two_tokens_run, pictures, tmp_path, monkeypatch, capsys):
    """The comparison's fixed numbers are what --tokens gives, and the score is of the confidence asked for."""
    rows = source("llava", file=str(pictures / "rows.json"), images=str(pictures / "images"))
    run = run_of(two_tokens_run, tmp_path, dict(a=rows), dict(a=rows))
    found = {}
    for name, arguments in (
        ("1", ["--tokens", 1]), ("2", ["--tokens", 2]), ("auto", ["--tokens", "auto", "--confidence", 1]),
    ):  # fmt: skip
        status, out, err = run_main(evaluate, monkeypatch, capsys, "--run", run, *arguments)
        assert status == 0, err
        found[name] = json.loads((run / f"results.a.tokens{name}.json").read_text())
    auto = found["auto"]["auto"]
    fixed = [{"tokens": k, "accuracy": found[str(k)]["accuracy"]} for k in (1, 2)]
    assert auto["by_tokens"] == fixed and found["auto"]["tokens"] == "auto"
    assert found["auto"]["counts"] == found["2"]["counts"] and auto["accuracy"] == found["2"]["accuracy"]
    assert (auto["confidence"], auto["mean_tokens"], auto["mean_tokens_tried"]) == (1, 2, 3)
    assert "\n| **auto, confidence 1** | " in out and "\n| 2 | " in out
    with Image.open(run / "auto.a.tokensauto.png") as drawn:
        assert drawn.width > 600 and len(drawn.convert("L").getcolors()) > 50
    config = json.loads((run / "config.json").read_text())
    (tmp_path / "rows.json").write_text(json.dumps([{"conversations": [{"from": "human", "value": "is it late?"}]}]))
    config["data"]["test"]["b"] = source("llava", file=str(tmp_path / "rows.json")).to_dict()
    (run / "config.json").write_text(json.dumps(config))
    status, _, err = run_main(evaluate, monkeypatch, capsys, "--run", run, "--tokens", "auto")
    assert status == 2 and "error: --tokens auto: expected sources whose rows carry a kind of question: " in err


@pytest.fixture(scope="module")
def tiles_model(tiles_run) -> Model:
    run = with_random_parameters(load_run(tiles_run))
    run.config.eval.update(batch_size=4, max_new_tokens=6)
    return Model(run)


@pytest.mark.parametrize("tokens", [None, 1, AutoTokens(0.5)])
def test_pictures_in_tiles(tiles_model, pictures, shards, monkeypatch, tokens):
    """Each question is asked about all tiles of its picture, which are encoded once; pictures are counted, not tiles.
    Rows of files, and shards, whose pictures are bytes."""
    caches = []

    class Watched(by_kind.ImageCache):
        def __init__(self, *arguments, **keywords):
            super().__init__(*arguments, **keywords)
            caches.append(self)

    monkeypatch.setattr(by_kind, "ImageCache", Watched)
    keys = dict(rows=source("llava", file=str(pictures / "rows.json"), images=str(pictures / "images")))
    if tokens is None:
        keys["shards"] = source("array_record", files=str(shards))
    data = dataclasses.replace(typed(tiles_model.run.config).data, test=sources(**keys))
    opened, _ = open_sources(data, "test")
    for one in opened:
        results, found, report = score_by_kind(tiles_model, one, max_about=3, tokens=tokens, baselines=tokens is None)
        assert not report.skipped and (results["pictures"], results["clips"]) == (3, 0)
        seen = {
            row["image"]: tiles_model.encode_images(pictures / "images" / row["image"]) for row in rows_of(pictures)
        }
        distinct = {array.tobytes() for i in range(3) for array in seen[f"{i}.png"].keys}
        assert caches[-1].compressed == len(distinct) > 9
        assert len(found.asked) == 9 and {len(question.name.split(", ")) for question in found.asked} == {1}
        # By the number of the picture: in shards it has another name
        requests = [Request(f"{q.text}\n<image>", seen[f"{q.about}.png"], interleaved=True) for q in found.asked]
        expected = tiles_model.answers(requests, tokens=tokens, max_new_tokens=6)
        given = [answer.given for answer in found.answers[THIS_RUN]]
        assert given == expected and len(set(expected)) > 3, "the comparison would say little"
        if tokens is None:
            blind = tiles_model.answers([Request(question.text) for question in found.asked], max_new_tokens=6)
            assert [answer.given for answer in found.answers[NOTHING]] == blind


def test_the_command_with_tiles(tiles_run, pictures, tmp_path, monkeypatch, capsys):
    rows = source("llava", file=str(pictures / "rows.json"), images=str(pictures / "images"))
    run = run_of(tiles_run, tmp_path, dict(a=rows), dict(a=rows))
    status, out, err = run_main(evaluate, monkeypatch, capsys, "--run", run, "--max-records", 2, "--baselines")
    assert status == 0, err
    assert "| overall | 6 |" in out and "answers.a.first2.png" in out
    with Image.open(run / "answers.a.first2.png") as drawn:
        assert len(drawn.convert("L").getcolors()) > 50


def test_what_any_confidence_would_have_taken():
    """By hand: two questions about pictures, the second sure of a wrong answer at once; and one without."""
    tries = [
        [Try(1, "red", 0.4), Try(2, "Blue.", 0.6), Try(4, "blue", 0.9)],
        [Try(1, "two", 0.8), Try(2, "three", 0.3), Try(4, "three", 0.5)],
        [Try(0, "yes", 0.2)],
    ]
    found = compare(AutoTokens(0.55), tries, ["blue", "three", "yes"])
    assert {k: found[k] for k in ("confidence", "accuracy", "mean_tokens", "mean_tokens_tried")} == {
        "confidence": 0.55, "accuracy": 2 / 3, "mean_tokens": (2 + 1) / 3, "mean_tokens_tried": (1 + 2 + 1) / 3
    }  # fmt: skip
    by_confidence = {of.pop("confidence"): of for of in found["by_confidence"]}
    assert by_confidence[0.9] == {"accuracy": 1, "mean_tokens": 8 / 3, "mean_tokens_tried": 14 / 3}
    assert found["by_tokens"] == [
        {"tokens": 1, "accuracy": 1 / 3}, {"tokens": 2, "accuracy": 1}, {"tokens": 4, "accuracy": 1}
    ]  # fmt: skip
