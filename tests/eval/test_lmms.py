"""The adapter inside the real lmms-eval: its command on easy-VQA, and its requests made by hand.

`make test` installs lmms-eval without most of what it requires (`.lmms` in the Makefile).
"""

import functools
import json
import os
from pathlib import Path
import shutil
import subprocess
import sys

from lmms_eval.api.instance import Instance
import numpy as np
from PIL import Image
import pytest

from tests.data.test_video import write_clip
from tests.eval.test_answering import with_random_parameters
from tests.helpers import tiny
from voco_jax.api import Model, Request
from voco_jax.checkpoint import run_files
from voco_jax.checkpoint.run import load_run
from voco_jax.data.images import load_image
from voco_jax.data.sources import easyvqa
from voco_jax.data.sources.easyvqa import EasyVqaSource
from voco_jax.data.video import FrameSampling
from voco_jax.errors import UserError
from voco_jax.eval.by_kind import THIS_RUN, score_by_kind
from voco_jax.eval.lmms import model as lmms_model
from voco_jax.eval.lmms.generation import Generation, read_generation
from voco_jax.eval.lmms.model import VoCoJax
from voco_jax.infer.generate import Sampling

pytestmark = pytest.mark.peer

ROOT = tiny.CONFIG_FILE.parents[1]
SHORT = {"max_new_tokens": 5, "do_sample": False}
PICTURES = [record.images[0].file for record in easyvqa.load("test")[:4]]


# ---- The command -----------------------------------------------------------------------------------------------------


def test_the_command_scores_as_evaluate_does(tiny_run, tmp_path):
    """On two simulated devices, in a process that knows of the adapter by its entry point alone."""
    results, answered, _ = score_by_kind(Model(load_run(tiny_run)), EasyVqaSource("test"), max_about=4)
    counts = results["counts"]["this run"]["overall"]
    command = [
        sys.executable, "-m", "lmms_eval", "--model", "voco_jax", "--model_args", f"run={tiny_run},tokens=1",
        "--include_path", ROOT / "benchmarks" / "lmms_tasks", "--tasks", "easyvqa,easyvqa_choices",
        "--limit", counts[1], "--output_path", tmp_path, "--log_samples",
    ]  # fmt: skip
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(map(str, command), cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = tmp_path.rglob("*results.json")
    found = json.loads(file.read_text())["results"]
    assert found["easyvqa"]["accuracy,none"] == counts[0] / counts[1] == results["accuracy"]
    (samples,) = tmp_path.rglob("*samples_easyvqa.jsonl")
    given = [json.loads(line)["filtered_resps"] for line in samples.read_text().splitlines()]
    assert given == [answer.given for answer in answered.answers[THIS_RUN]]
    # The likeliest of 13 answers is the one that is given freely, where that is one of them
    assert abs(found["easyvqa_choices"]["acc,none"] - results["accuracy"]) < 0.2


# ---- Requests made by hand -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tiny_run) -> Model:
    """Says much, and something else about every picture."""
    return Model(with_random_parameters(load_run(tiny_run)))


def adapter_of(model: Model, **arguments) -> VoCoJax:
    """An adapter of a model that is there, and has compiled its programs."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(lmms_model, "load_run", lambda *args, **kwargs: model.run)
        monkeypatch.setattr(lmms_model, "Model", lambda run: model)
        return VoCoJax(run="a run", **arguments)


@pytest.fixture
def adapter(model):
    return functools.partial(adapter_of, model)


def requests(lm: VoCoJax, task: str, asked: list[tuple], kwargs=SHORT, kind="generate_until", middle=()) -> list:
    """One request for each (context, what doc_to_visual gives); the documents are these pairs."""
    lm.task_dict[task] = {"test": asked}
    made = []
    for i, (context, _) in enumerate(asked):
        arguments = (context, kwargs, lambda doc: doc[1], *middle, i, task, "test")
        made.append(Instance(kind, arguments, i, metadata={"task": task, "doc_id": i, "repeats": 1}))
    return made


def directly(model: Model, asked: list[tuple]) -> list[str]:
    return [model.ask(text, None if not seen else model.encode_images(seen), max_new_tokens=5) for text, seen in asked]


QUESTIONS = ["what shape is in the image?", "is there a circle?", "what color is the shape?"]
ASKED = [(text, [str(picture)]) for picture in PICTURES for text in QUESTIONS]


def test_pictures_of_all_kinds_are_compressed_once_for_all_tasks(adapter, model):
    lm = adapter(batch_size=3)
    expected = directly(model, ASKED)
    assert len(set(expected)) > 6, "the model does not look at the pictures: the comparison would say nothing"
    assert lm.generate_until(requests(lm, "files", ASKED)) == expected
    assert lm._cache.compressed == 4
    others = [
        lambda file: [Image.open(file)],
        lambda file: [{"bytes": Path(file).read_bytes(), "path": "a.png"}],
        lambda file: ([np.asarray(load_image(file))],),
        lambda file: [{"type": "image", "url": file}],
    ]
    for i, other in enumerate(others):
        task = [(text, other(file)) for text, (file,) in ASKED]
        assert lm.generate_until(requests(lm, f"task{i}", task)) == expected
    assert lm._cache.compressed == 4


def test_text_alone_and_several_pictures(adapter, model):
    a, b, c, _ = map(str, PICTURES)
    asked = [("what color is the sky?", None), ("what?", [a]), ("how many?", [a, b]), ("and here?", [c, b, a, a])]
    lm = adapter()
    assert lm.generate_until(requests(lm, "mixed", asked)) == directly(model, asked)
    assert lm._cache.compressed == 3
    assert lm.generate_until(requests(lm, "empty", [("what?", []), ("what?", [None])])) == 2 * directly(
        model, [("what?", None)]
    )


def test_pictures_stand_at_their_markers(adapter, model):
    pair = list(map(str, PICTURES[:2]))
    asked = [
        ("is <image> as <image> is?", pair),
        ("<image>\nwhat is it?", pair[:1]),
        ("is <image 1> as <image 2>?", pair),
    ]
    lm = adapter()
    given = lm.generate_until(requests(lm, "interleaved", asked))
    (at_markers,) = model.answers([Request(asked[0][0], model.encode_images(pair), interleaved=True)], max_new_tokens=5)
    assert given == [at_markers, *directly(model, [("what is it?", pair[:1]), asked[2]])]
    with pytest.warns(UserWarning, match=r"odd\[0\]: 1 <image> markers for 2 pictures"):
        given = lm.generate_until(requests(lm, "odd", [("what is <image> it?", pair)]))
    assert given == directly(model, [("what is  it?", pair)])
    spelled = [("what is <image> or </s>?", None), ("is <voco> one?", pair[:1])]  # text, without pictures and with them
    assert lm.generate_until(requests(lm, "spelled", spelled)) == directly(model, spelled)


def test_pictures_in_tiles(tiles_run):
    """Each picture is all of its tiles, before the question or at its marker."""
    model = Model(with_random_parameters(load_run(tiles_run)))
    lm, pair = adapter_of(model), list(map(str, PICTURES[:2]))
    asked = [*ASKED[:4], ("how many?", pair), ("<image>\nwhat is it?", pair[:1]), ("is <image> as <image> is?", pair)]
    given = lm.generate_until(requests(lm, "tiles", asked))
    (at_markers,) = model.answers([Request(asked[-1][0], pair, interleaved=True)], max_new_tokens=5)
    assert given == [*directly(model, asked[:5]), *directly(model, [("what is it?", pair[:1])]), at_markers]
    distinct = {array.tobytes() for array in model.compress(pair).keys}
    assert len(distinct) > 2 and lm._cache.compressed == len(distinct)
    with pytest.warns(UserWarning, match=r"odd\[0\]: 1 <image> markers for 2 pictures"):
        assert lm.generate_until(requests(lm, "odd", [("what <image> is it?", pair)])) == directly(
            model, [("what  is it?", pair)]
        )
    (scored,) = lm.loglikelihood(requests(lm, "scored", asked[-1:], "red", "loglikelihood"))
    (score,) = model.scores([Request(asked[-1][0], pair, interleaved=True)], ["red"])
    assert scored.text[0] == pytest.approx(-score.log_probability / score.num_tokens, abs=1e-4)


def test_videos(adapter, model, tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", frames=20)
    lm = adapter(frames=3)
    asked = [("what happens?", [str(clip.file)]), ("and then?", {"type": "video", "url": str(clip.file)})]
    seen = model.encode_video(clip.file, sampling=FrameSampling(num_frames=3))
    assert lm.generate_until(requests(lm, "clips", asked)) == model.ask(
        [text for text, _ in asked], seen, max_new_tokens=5
    )
    assert lm._cache.compressed == 3


def test_fewer_tokens(tiny_run, tmp_path):
    """k of K tokens are what compressing to k gives."""
    shutil.copytree(tiny_run, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["model"]["num_voco_tokens"] = 3  # of one id and one row of parameters, however many there are
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    about = tmp_path / "run" / "checkpoints" / "40" / "run" / "metadata"
    content = json.loads(about.read_text()) | {"config": config}
    content["checksums"]["run"] = run_files._checksum(content)
    about.write_text(json.dumps(content))
    model = Model(with_random_parameters(load_run(tmp_path / "run")))
    lm = adapter_of(model, tokens=2)
    # Text alone among them: it has no tokens of pictures to read
    asked = [*ASKED[:2], ("what color is the sky?", None), *ASKED[2:]]
    expected = [
        model.ask(text, None if not seen else model.compress(seen, tokens=2), max_new_tokens=5) for text, seen in asked
    ]
    assert lm.generate_until(requests(lm, "fewer", asked)) == expected


def test_without_compression(tiny_run, tmp_path):
    model = Model(with_random_parameters(load_run(tiny_run, compressor="none")))
    lm = adapter_of(model)
    for name, value in (("tokens", 1), ("cache", tmp_path / "cache")):
        with pytest.raises(UserError, match=f"{name}: .* has no memories \\(compressor 'none'\\)"):
            adapter_of(model, **{name: value})
    assert lm.generate_until(requests(lm, "none", ASKED)) == directly(model, ASKED)
    assert lm._cache.compressed == 4
    scored = lm.loglikelihood(requests(lm, "none", ASKED, "red", "loglikelihood"))
    for (text, seen), given in zip(ASKED, scored, strict=True):
        (score,) = model.scores([Request(text, model.encode_images(seen))], ["red"])
        assert given.text[0] == pytest.approx(-score.log_probability / score.num_tokens, abs=1e-4)


# ---- What is kept ----------------------------------------------------------------------------------------------------


def test_memories_on_disk_serve_the_next_process(adapter, model, tmp_path):
    lm = adapter(cache=tmp_path / "cache")
    expected = lm.generate_until(requests(lm, "first", ASKED))
    lm.clean()
    again = adapter(cache=tmp_path / "cache")
    assert again.generate_until(requests(again, "second", ASKED)) == expected
    assert (lm._cache.compressed, again._cache.compressed) == (4, 0)
    # A damaged file is no answer: what it held is compressed again
    (file,) = (tmp_path / "cache").glob("*.voco")
    content = bytearray(file.read_bytes())
    content[-2000] ^= 1
    file.write_bytes(content)
    with pytest.warns(UserWarning, match="cache: left out: .* damaged"):
        damaged = adapter(cache=tmp_path / "cache")
        assert damaged.generate_until(requests(damaged, "third", ASKED)) == expected
    assert damaged._cache.compressed > 0


def test_what_is_kept_has_a_limit(adapter, model):
    one = model.encode_images(PICTURES[0]).nbytes / 2**30
    lm = adapter(host_gib=1.5 * one)
    expected = directly(model, ASKED)
    for task in ("first", "second"):
        assert lm.generate_until(requests(lm, task, ASKED)) == expected
    assert lm._cache._kept_bytes == one * 2**30
    assert lm._cache.compressed > 4


def test_a_file_that_has_changed_is_another_picture(adapter, model, tmp_path):
    file = tmp_path / "a.png"
    lm = adapter()
    for picture in PICTURES[:2]:
        file.write_bytes(picture.read_bytes())
        os.utime(file, ns=(0, len(picture.read_bytes())))
        asked = [(QUESTIONS[0], [str(file)])]
        assert lm.generate_until(requests(lm, "files", asked)) == directly(model, [(QUESTIONS[0], [str(picture)])])


# ---- Other requests --------------------------------------------------------------------------------------------------


def test_likelihoods_are_mean_losses(adapter, model):
    lm = adapter(batch_size=2)
    answers = ["circle", "a red circle", "no"]
    asked = [(text, [str(PICTURES[0])]) for text in QUESTIONS]
    for delimiter in ("", " "):
        made = [
            request
            for i, answer in enumerate(answers)
            for request in requests(lm, f"choices{i}", asked, delimiter + answer, "loglikelihood")
        ]
        given = [result.text for result in lm.loglikelihood(made)]
        seen = model.encode_images(PICTURES[0])
        for (loss, is_greedy), (answer, text) in zip(given, [(a, t) for a in answers for t in QUESTIONS], strict=True):
            (score,) = model.scores([Request(text, seen)], [answer])
            assert loss == pytest.approx(-score.log_probability / score.num_tokens, abs=1e-4)
            assert is_greedy == score.is_greedy
    greedy = model.ask(QUESTIONS[0], seen, max_new_tokens=64)
    by_document = requests(lm, "target", asked[:1], lambda doc: f" {greedy}", "loglikelihood")
    assert len(lm.loglikelihood(by_document)) == 1


def test_rounds(adapter, model):
    """Each document has as many rounds as it likes; the next prompt is made of the answers so far."""
    lm = adapter()
    a, b = str(PICTURES[0]), str(PICTURES[1])
    asked = [("first?", [a]), ("only?", None), ("one?", [a])]
    rounds = {"first?": ["second?", "third?"], "only?": [], "one?": ["two?"]}

    def doc_to_text(doc, previous_output, round_idx, previous_round_info):
        assert len(previous_output) == round_idx and previous_round_info == (None if round_idx == 1 else round_idx - 1)
        texts = rounds[doc[0]]
        if round_idx > len(texts):
            return None, None, True, previous_output, None
        return [b], texts[round_idx - 1] + previous_output[-1][:5], False, previous_output, round_idx

    made = requests(lm, "rounds", asked, SHORT, "generate_until_multi_round", (doc_to_text,))
    given = lm.generate_until_multi_round(made)
    assert [len(said) for said in given] == [3, 1, 2]
    for (text, seen), said in zip(asked, given, strict=True):
        assert said[0] == directly(model, [(text, seen)])[0]
        for follow, before, answer in zip(rounds[text], said, said[1:], strict=False):
            assert answer == directly(model, [(follow + before[:5], [b])])[0]


def test_generation_of_each_request(adapter, model):
    lm = adapter(seed=5)
    seen = model.encode_images(PICTURES[0])
    text = model.ask("what?", seen, max_new_tokens=12)
    end = text[len(text) // 2 :][:3]
    drawn = {"max_new_tokens": 12, "temperature": 1.0, "do_sample": True, "top_p": 0.9}
    asked = [("what?", [str(PICTURES[0])])] * 3
    greedy = {"max_new_tokens": 12, "do_sample": False, "temperature": 0.7, "top_p": 0, "num_beams": 1}
    made = [
        *requests(lm, "a", asked[:1], greedy),
        *requests(lm, "b", asked[:1], {"max_new_tokens": 12, "temperature": 0, "until": [end, ""]}),
        *requests(lm, "c", asked, drawn),
        *requests(lm, "d", asked[:1], {"max_new_tokens": 3}),
    ]
    given = lm.generate_until(made)
    assert given[0] == text
    assert given[1] == text.split(end)[0].strip()
    assert len(set(given[2:5])) == 3, "requests that are repeated are drawn alike"
    assert text.startswith(given[5]) and given[5] != text
    assert lm.generate_until(made) == given


def test_generation_keywords():
    def read(**kwargs):
        return read_generation(kwargs, 64, 0, "pad")

    assert read() == Generation(64)
    assert read(until="\n", max_new_tokens=16, top_p=1.0, num_beams=1, do_sample=False) == Generation(16, until=("\n",))
    assert read(image_aspect_ratio="original", stop_sequences=None, until=[]) == Generation(64)
    assert read(image_aspect_ratio="pad") == Generation(64)
    assert read(do_sample=True).sampling == Sampling(1.0)
    assert read(temperature=0.2, top_k=3, top_p=0.5, seed=7).sampling == Sampling(0.2, 3, 0.5, 7)
    assert read_generation({"temperature": 1, "seed": 0}, 64, 5, "pad").sampling.seed == 0
    assert read_generation({"temperature": 1}, 64, 5, "pad").sampling.seed == 5
    assert read(temperature=0.2, do_sample=False).sampling == Sampling()
    for kwargs, message in (
        ({"num_beams": 5}, "generation_kwargs.num_beams: voco_jax cannot honour it: expected 1, found 5"),
        ({"repetition_penalty": 1.2}, "generation_kwargs.repetition_penalty: .* expected 1, found 1.2"),
        ({"image_aspect_ratio": "crop"}, "generation_kwargs.image_aspect_ratio: .* found 'crop'"),
        ({"typical_p": 0.3}, "generation_kwargs.typical_p: .* expected none of that name, found 0.3"),
        ({"max_new_tokens": 0}, "generation_kwargs.max_new_tokens: expected at least 1, found 0"),
        ({"temperature": 1, "top_p": 0}, "generation_kwargs.top_p: expected more than 0 and at most 1, found 0.0"),
        ({"temperature": -1}, "generation_kwargs.temperature: expected 0 or more, found -1.0"),
        ({"until": [3]}, r"generation_kwargs.until: expected texts, found \[3\]"),
    ):
        with pytest.raises(UserError, match=message):
            read(**kwargs)


@pytest.mark.parametrize(
    ("context", "visuals", "kwargs", "message"),
    [
        ("what?", ["nothing.png"], SHORT, r"odd\[0\]: nothing.png: not found"),
        ("what?", ["sound.wav"], SHORT, r"odd\[0\]: expected pictures and videos, found 'sound.wav'"),
        ("what?", [{"array": 3}], SHORT, r"odd\[0\]: expected pictures and videos, found {'array': 3}"),
        ("what \ud800?", None, SHORT, r"odd\[0\]: turn 0 \(human\): half of a surrogate pair"),
        (" ", None, SHORT, r"odd\[0\]: question: expected text, found none"),
        ("what?", None, {"num_beams": 2}, r"odd\[0\]: generation_kwargs.num_beams"),
        ("what?", None, {"max_new_tokens": 10**6}, r"expected at most \d+ tokens with the answer"),
    ],
)
def test_requests_that_cannot_be(adapter, context, visuals, kwargs, message):
    lm = adapter()
    with pytest.raises(UserError, match=message):
        lm.generate_until(requests(lm, "odd", [(context, visuals)], kwargs))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": 2}, "tokens 2: there is only 1 token per image"),
        ({"device": "cuda"}, "--device: expected JAX_PLATFORMS in the environment instead, found 'cuda'"),
        ({"batch_size": "0"}, "--batch_size: expected auto or a number, found '0'"),
        ({"frames": 0}, "frames: expected more than 0, found 0"),
        ({"frames": 2, "fps": 1}, "frames, fps: expected one of them, found both"),
        ({"max_frames": 2}, "max_frames: expected fps with it: 8 frames are taken of a video"),
        ({"mesh": "tensor"}, "--mesh: expected data=N"),
    ],
)
def test_arguments_that_cannot_be(adapter, arguments, message):
    with pytest.raises(UserError, match=message):
        adapter(**arguments)


def test_one_process_alone(adapter, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process uses all devices"):
        adapter()
