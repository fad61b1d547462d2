"""`voco_jax.load` and what it gives: requests of all kinds at once, as each by itself."""

from concurrent.futures import ThreadPoolExecutor
import dataclasses
import io
from pathlib import Path
import shutil
import subprocess
import sys

import easy_vqa
import numpy as np
from PIL import Image
import pytest

from tests.eval.test_answering import with_random_parameters
import voco_jax
from voco_jax.api import Model, Request
from voco_jax.checkpoint.run import load_run
from voco_jax.errors import UserError
from voco_jax.infer import engine
from voco_jax.infer.engine import Engine
from voco_jax.infer.memory import Embeddings, MemoryBank

PICTURES = [str(p) for p in sorted(Path(easy_vqa.__file__).parent.rglob("images/*.png"))[:4]]
QUESTIONS = ["what shape is in the image?", "is it red?", "what color is the shape in the picture that you see?", "is"]


@pytest.fixture(scope="module")
def model(tiny_run):
    """With random parameters, which say all kinds of things."""
    return Model(with_random_parameters(load_run(tiny_run)))


@pytest.fixture(scope="module")
def uncompressed(tiny_run):
    return Model(with_random_parameters(load_run(tiny_run, compressor="none")))


@pytest.fixture(params=["voco", "none"])
def either(request, model, uncompressed):
    return model if request.param == "voco" else uncompressed


def test_different_prompts_and_numbers_of_pictures(either):
    """In one batch, in several, or alone: the same answers."""
    model, seen = either, either.encode_images(PICTURES)
    abouts = [seen[0], None, seen[[2, 1, 3]], seen[1:3], seen[3], seen]
    requests = [Request(q, about) for q in QUESTIONS for about in abouts]
    together = model.answers(requests, max_new_tokens=4)
    assert model.answers(requests, max_new_tokens=4, batch_size=15) == together
    some = [1, 23]
    assert [model.answers([requests[i]], max_new_tokens=4)[0] for i in some] == [together[i] for i in some]
    assert len(set(together)) > 1  # or the comparison would say little


def test_threads_share_a_model(model, monkeypatch):
    """Each has its answers, and no program is compiled or started while another is."""
    seen = model.encode_images(PICTURES)
    alone = [model.ask(q, seen, max_new_tokens=4) for q in QUESTIONS]
    inside, most, lock = [], [], engine._DEVICE

    class Watched:
        def __enter__(self):
            lock.acquire()
            inside.append(1)
            most.append(len(inside))

        def __exit__(self, *_):
            inside.pop()
            lock.release()

    monkeypatch.setattr(engine, "_DEVICE", Watched())
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda q: model.ask(q, seen, max_new_tokens=4), QUESTIONS)) == alone
    assert len(most) >= 2 * len(QUESTIONS) and max(most) == 1


def test_drawn_answers_do_not_depend_on_the_batch(model):
    seen = model.encode_images(PICTURES)
    requests = [Request(q, seen[i]) for q in QUESTIONS for i in range(4)]
    sampling = voco_jax.Sampling(temperature=3.0, top_p=0.95, seed=5)
    drawn = model.answers(requests, max_new_tokens=6, sampling=sampling)
    assert model.answers(requests, max_new_tokens=6, sampling=sampling, batch_size=3) == drawn
    assert drawn != model.answers(requests, max_new_tokens=6)
    other = voco_jax.Sampling(temperature=3.0, top_p=0.95, seed=6)
    assert drawn != model.answers(requests, max_new_tokens=6, sampling=other)
    likeliest = voco_jax.Sampling(temperature=3.0, top_k=1)
    assert model.answers(requests, max_new_tokens=6, sampling=likeliest) == model.answers(requests, max_new_tokens=6)


def test_texts_that_end_an_answer(model):
    """What follows is left out, wherever it comes; other answers of the batch go on."""
    seen = model.encode_images(PICTURES)
    requests = [Request(q, seen[i]) for q in QUESTIONS[:2] for i in range(4)]
    sampling = voco_jax.Sampling(temperature=5.0, seed=1)
    whole = model.answers(requests, max_new_tokens=40, sampling=sampling)
    cut = model.answers(requests, max_new_tokens=40, sampling=sampling, until=["e", "r"])
    assert cut == [text.split("e")[0].split("r")[0].strip() for text in whole]
    assert any(len(text) > 10 for text in whole) and cut != whole


def test_pictures_of_all_kinds_are_one(either):
    picture = PICTURES[0]
    image = Image.open(picture)
    kinds = [picture, Path(picture), image, np.asarray(image.convert("RGB"))]
    seen = either.encode_images(kinds)
    arrays = seen.features if isinstance(seen, Embeddings) else seen.keys
    for other in arrays[1:]:
        np.testing.assert_allclose(other, arrays[0], atol=1e-5)


def test_a_question_about_a_picture_itself(either, tmp_path, monkeypatch):
    """Whatever it comes as, one or several, wherever a question is asked: as about what has been looked at before."""

    def arrays(seen):
        return np.asarray(seen.features if isinstance(seen, Embeddings) else seen.keys)

    seen = either.encode_images(PICTURES[:2])
    shutil.copy(PICTURES[0], tmp_path / "of a.png")
    monkeypatch.chdir(tmp_path)
    image = Image.open(PICTURES[0])
    kinds = [PICTURES[0], "of a.png", (tmp_path / "of a.png").as_uri(), Path("of a.png"), image, np.asarray(image)]
    for kind in *kinds, Path("of a.png").read_bytes(), io.BytesIO(Path("of a.png").read_bytes()):
        for about in kind, [kind]:
            np.testing.assert_allclose(arrays(either.encode(about)), arrays(seen[0]), atol=1e-5)
    two = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in PICTURES[:2]])
    for several in PICTURES[:2], (image, PICTURES[1]), two, [seen[0], PICTURES[1]], [seen[0], seen[1]]:
        np.testing.assert_allclose(arrays(either.encode(several)), arrays(seen), atol=1e-5)
    assert either.encode(seen) is seen and either.encode(None) is None

    few, question = dict(max_new_tokens=6), QUESTIONS[0]
    expected = either.answers([Request(question, one) for one in (seen, seen[0], seen[1])], **few)
    assert len(set(expected)) > 1
    assert either.ask(question, PICTURES[:2], **few) == expected[0]
    assert either.ask_each(question, PICTURES[:2], **few) == expected[1:]
    assert either.answers([Request(question, image), Request(question, image)], **few) == expected[1:2] * 2
    assert either.chat("of a.png", **few).ask(question) == expected[1]
    given, about = (either.scores([Request(question, one)], ["circle"])[0] for one in (PICTURES[0], seen[0]))
    assert given.log_probability == pytest.approx(about.log_probability, abs=1e-4)


def test_a_question_about_a_memory_file_or_a_video(model, tmp_path):
    seen = model.encode_images(PICTURES[:2])
    model.save(seen, tmp_path / "album.voco")
    np.testing.assert_array_equal(model.encode(tmp_path / "album.voco").keys, seen.keys)
    assert len(model.encode([tmp_path / "album.voco", PICTURES[0]])) == 3
    with pytest.raises(UserError, match="clip.mp4: not found"):
        model.ask(QUESTIONS[0], str(tmp_path / "clip.mp4"))


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ("nothing.png", "nothing.png: not found"),
        (
            "https://a.org/b c.png",
            "https://a.org/b c.png: web addresses are not fetched; .*: curl -LO 'https://a.org/b",
        ),
        ([], "images: expected at least one, found none"),
        (3, "images: expected one or several, found int"),
    ],
)
def test_what_no_question_can_be_about(model, about, message):
    with pytest.raises(UserError, match=message):
        model.ask(QUESTIONS[0], about)


def test_what_is_printed_is_short(either, tiny_run):
    seen = either.encode_images(PICTURES)
    assert repr(seen).startswith(f"{type(seen).__name__}(4 pictures: {PICTURES[0]}, ") and "…" in repr(seen)
    assert repr(seen[0]).startswith(f"{type(seen).__name__}(1 picture: {PICTURES[0]}, ")
    assert repr(either).startswith(f"Model('{tiny_run}', step 40, compressor '{either.config.compressor}', ")
    assert repr(either.run) == f"Run('{tiny_run}', step 40)"
    if isinstance(seen, MemoryBank):
        assert repr(seen.memory()) == "Memory(keys float32[2, 1, 4, 2, 16], values of the same shape)"
        assert "1 token each, float32 keys and values, " in repr(seen) and "KiB" in repr(seen)
    assert max(len(repr(x)) for x in (either, either.run)) < 300


def test_public_names():
    assert {"load", "Model", "Request", "Sampling", "UserError"} < set(dir(voco_jax)) == set(voco_jax.__all__)
    assert all(getattr(voco_jax, name).__name__ == name for name in dir(voco_jax))
    code = "import sys, voco_jax; assert 'jax' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_stream_is_the_answer(either):
    seen = either.encode_images(PICTURES[:1])
    chat = either.chat(seen, max_new_tokens=8)
    assert "".join(chat.stream(QUESTIONS[0])) == either.ask(QUESTIONS[0], seen, max_new_tokens=8)


def test_a_stream_of_any_bytes_is_the_answer(model):
    """Drawn at random: halves of letters, special tokens and spaces among them, and cut anywhere."""
    seen, found = model.encode_images(PICTURES[:1]), ""
    for seed in range(12):
        sampling = voco_jax.Sampling(temperature=9.0, seed=seed)
        chat = model.chat(seen, max_new_tokens=40, sampling=sampling)
        pieces = list(chat.stream(QUESTIONS[0]))
        whole = model.ask(QUESTIONS[0], seen, max_new_tokens=40, sampling=sampling)
        assert "".join(pieces) == whole == chat.turns[-1]["value"]
        assert all(pieces) and len(pieces) > 5
        found += whole
    assert "\N{REPLACEMENT CHARACTER}" in found


def test_a_conversation_goes_on_after_what_could_not_be_asked(model):
    chat = model.chat(model.encode_images(PICTURES[:1]), max_new_tokens=4)
    first = chat.ask("is it red?")
    for question, message in (
        (" ", "expected text"),
        ("what? " * 9000, "question: expected at most"),
    ):
        with pytest.raises(UserError, match=message):
            chat.ask(question)
    assert len(chat.turns) == 2
    again = model.chat(model.encode_images(PICTURES[:1]), max_new_tokens=4)
    assert again.ask("is it red?") == first
    assert chat.ask("what shape?") == again.ask("what shape?")


def test_a_stream_that_is_left_leaves_the_conversation_whole(model):
    chat = model.chat(model.encode_images(PICTURES[:1]), max_new_tokens=40, sampling=voco_jax.Sampling(temperature=5.0))
    stream = chat.stream("is it red?")
    said = next(stream)
    stream.close()
    assert [turn["from"] for turn in chat.turns] == ["human", "gpt"] and chat.turns[1]["value"] == said
    last = model.engine.text(chat._pending)  # of what has not been read into the cache
    assert last and said.endswith(last)
    assert isinstance(chat.ask("what shape?"), str)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_interruption_leaves_the_conversation_whole(model, monkeypatch, moment):
    """Ctrl-C while the first token after a piece is computed, its state being used up: it is Ctrl-C that comes out."""
    seen = model.encode_images(PICTURES[:1])
    chat, other = (model.chat(seen, max_new_tokens=9) for _ in range(2))
    assert chat.ask("is it red?") == other.ask("is it red?")
    decode = Engine.decode

    def interrupted(self, *arguments):
        if moment == "after":
            decode(self, *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Engine, "decode", interrupted)
        chat.ask("what shape?")
    assert chat.turns == other.turns
    assert chat.ask("what color?") == other.ask("what color?")


def test_memories_of_other_models(model):
    bank = dataclasses.replace(model.compress(PICTURES[:1]), model="another")
    with pytest.raises(UserError, match="memory of .*: expected one of this model"):
        model.ask("what?", bank)


def test_models_without_memories(uncompressed):
    for call in (uncompressed.compress, lambda _: uncompressed.watch(), uncompressed.compress_video):
        with pytest.raises(UserError, match="a model with compressor 'none' has no memories: expected 'voco'"):
            call(PICTURES[0])


def test_a_picture_in_any_form_is_one_memory(model):
    """Alone or in a list; an array of four axes is several pictures."""
    path = Path(PICTURES[0])
    pixels, expected = np.asarray(Image.open(path).convert("RGB")), model.compress(PICTURES[0])
    several = [path, path.read_bytes(), Image.open(path), pixels, pixels / 255, io.BytesIO(path.read_bytes())]
    for pictures, count in (several, 6), (np.stack([pixels] * 3), 3), *((one, 1) for one in several):
        bank = model.compress(pictures)
        assert len(bank) == count
        np.testing.assert_allclose(bank.keys, np.repeat(expected.keys, count, axis=0), atol=1e-5)
    assert all((model.image_encoder.square(one) == model.image_encoder.square(path)).all() for one in several)
    assert np.abs(model.compress(255 - pixels).keys - expected.keys).max() > 1e-2


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        ("nowhere.png", "nowhere.png: not found"),
        (np.full((4, 4, 3), 255.0), "picture: expected values of 0 … 1 in a float array, found float64 .4, 4, 3."),
        (b"GIF89a", r"picture: not a readable picture \(.*\)"),
    ],
)
def test_what_is_no_picture(model, picture, message):
    with pytest.raises(UserError, match=message):
        model.encode_images(picture)
    with pytest.raises(UserError, match="max_new_tokens: expected at least 1, found 0"):
        model.ask("what?", max_new_tokens=0)
    chat = model.chat()
    chat.ask("what?")
    for question, found in (3, "int"), ([3], "int"), (None, "none"), (" ", "none"):
        with pytest.raises(UserError, match=f"^question: expected text, found {found}$"):
            model.ask(question)
    for question, found in (3, "int"), (None, "none"), (" ", "none"):
        with pytest.raises(UserError, match=f"^question: expected text, found {found}$"):
            chat.ask(question)  # a later turn too
    assert model.ask(question for question in QUESTIONS) == model.ask(QUESTIONS)
    with pytest.raises(UserError, match="images: expected at least one"):
        model.encode_images([])
