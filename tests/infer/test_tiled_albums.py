"""Albums of a run that looks at pictures in tiles: a memory for each tile, and a picture is all of its tiles."""

import dataclasses
from pathlib import Path
import shutil

from flax import nnx
import jax
import numpy as np
from PIL import Image
import pytest

from tests.data.test_video import write_clip
from tests.eval.test_answering import with_random_parameters
from tests.helpers.commands import run_main
from voco_jax import ask, chat, compress, memory
from voco_jax.api import Model, Request
from voco_jax.checkpoint.run import load_run
from voco_jax.data.from_config import make_encoder, make_model_config
from voco_jax.data.records import tiles_of
from voco_jax.errors import UserError
from voco_jax.infer.auto_tokens import AutoTokens
from voco_jax.infer.compress import Outcome, compress_to_file, find_entries
from voco_jax.infer.memory import Item, MemoryBank
from voco_jax.infer.memory_file import MemoryFile
from voco_jax.models.build import abstract_model
from voco_jax.terminal import printable

QUESTIONS = ["what shape is in the image?", "is there a red circle?", "what color is the shape?"]
TILES = list(tiles_of(2))


@pytest.fixture(scope="module")
def model(tiles_run) -> Model:
    """Says something else about every picture."""
    return Model(with_random_parameters(load_run(tiles_run)))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    """Of coloured fields, so that every tile is another."""
    rng, directory = np.random.default_rng(0), tmp_path_factory.mktemp("pictures")
    files = [directory / f"{i}.png" for i in range(5)]
    for file in files:
        Image.fromarray(rng.integers(256, size=(8, 6, 3), dtype=np.uint8)).resize((48, 64), 0).save(file)
    return files


@pytest.fixture
def album(pictures, tmp_path) -> Path:
    directory = tmp_path / "album"
    directory.mkdir()
    for picture in pictures[:3]:
        shutil.copy(picture, directory)
    return directory


def add(model: Model, album: Path, out: Path, **options) -> Outcome:
    return compress_to_file(model.image_encoder, find_entries([str(album)]), out, batch_size=8, **options)


def names_of(bank: MemoryBank) -> list[str]:
    """Of the pictures and frames; each picture has all its tiles, and a frame none."""
    for one in bank.pictures():
        assert [item.tile for item in one.items] == ([None] if one.is_video else TILES)
    return [Path(one.items[0].source).name for one in bank.pictures()]


def same(bank: MemoryBank, other: MemoryBank) -> None:
    for name, array in bank.arrays.items():
        np.testing.assert_allclose(array, other.arrays[name], atol=1e-4)


def test_an_album(model, pictures, album, tmp_path, monkeypatch, capsys):
    """Made, listed, added to, one picture replaced, clips beside pictures; counts are of pictures."""
    out = tmp_path / "a.voco"
    for command in (compress, ask, chat):
        monkeypatch.setattr(command, "load_model", lambda args: model)
    arguments = ["--run", "run", "--images", album, "--out", out, "--frames", 2]
    status, said, err = run_main(compress, monkeypatch, capsys, *arguments)
    assert status == 0, err
    assert "a.voco: 3 pictures as 15 images, 2 tokens each, float32" in said and "(3 new, 0 known)" in said
    bank = model.open(out)
    assert names_of(bank) == ["0.png", "1.png", "2.png"] and MemoryFile(out).version == "4"
    for i, one in enumerate(bank.pictures()):
        same(one, model.compress(album / f"{i}.png"))
        assert len({array.tobytes() for array in one.keys}) == 5
    before = out.read_bytes()
    assert "(0 new, 3 known)" in run_main(compress, monkeypatch, capsys, *arguments)[1] and out.read_bytes() == before
    shutil.copy(pictures[3], album / "1.png")
    shutil.copy(pictures[4], album / "3.png")
    (album / "4.png").write_text("no picture")
    write_clip(album / "clip.mp4", frames=8)
    said = run_main(compress, monkeypatch, capsys, *arguments)[1]
    assert "6 pictures as 22 images" in said and "(4 new, 2 known, 1 left out, 1 replaced)" in said
    again = model.open(out)
    assert names_of(again) == ["0.png", "2.png", "1.png", "3.png", "clip.mp4", "clip.mp4"]
    same(again.pictures()[2], model.compress(pictures[3]))
    listed = run_main(memory, monkeypatch, capsys, "list", out)[1].splitlines()[1:]
    assert [line.split()[1:3] for line in listed[:4]] == [["5", "tiles"]] * 4
    assert len(listed) == 6 and "tiles" not in listed[4]
    assert "6 pictures as 22 images" in run_main(memory, monkeypatch, capsys, "check", out)[1]


def test_a_picture_is_known_with_all_its_tiles_in_order(model, album, tmp_path):
    """Else it is compressed again, and what there was of it goes."""
    out = tmp_path / "a.voco"
    assert add(model, album, out) == Outcome(new=3)
    whole = model.open(out)
    for odd in (whole[[0, 1, 2, *range(5, 15)]], whole[[4, 3, 2, 1, 0, *range(5, 15)]]):
        model.save(odd, out)
        outcome = add(model, album, out)
        assert (outcome.new, outcome.known) == (1, 2) and outcome.dropped > 0
        assert names_of(model.open(out)) == ["1.png", "2.png", "0.png"]
        same(model.open(out).pictures()[2], whole.pictures()[0])


def test_it_goes_on_after_a_kill(model, album, tmp_path, monkeypatch):
    """Finished parts hold whole pictures, also where a batch has room for less than one."""
    out, parts = tmp_path / "a.voco", tmp_path / "a.voco.parts"
    encode_pixels, calls = model.image_encoder.encode_pixels, []

    def killed(squares, items, batch_size):
        calls.append(len(items))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode_pixels(squares, items, batch_size)

    with monkeypatch.context() as patch:
        patch.setattr(model.image_encoder, "encode_pixels", killed)
        with pytest.raises(KeyboardInterrupt):
            add(model, album, out)
    assert calls == [5, 5, 5] and [len(MemoryFile(file)) for file in sorted(parts.iterdir())] == [5, 5]
    # What no version leaves behind: a part that lacks tiles
    first = parts / "000000.voco"
    model.save(model.open(first)[:3], first)
    assert add(model, album, out) == Outcome(new=2, known=1) and not parts.exists()
    assert names_of(model.open(out)) == ["1.png", "0.png", "2.png"]
    out.unlink()
    assert compress_to_file(model.image_encoder, find_entries([str(album)]), out, batch_size=2) == Outcome(new=3)
    assert names_of(model.open(out)) == ["0.png", "1.png", "2.png"]


def test_pictures_fill_batches(model, album, tmp_path, monkeypatch):
    sizes, encode_pixels = [], model.image_encoder.encode_pixels

    def counted(squares, items, batch_size):
        sizes.append(len(items))
        return encode_pixels(squares, items, batch_size)

    monkeypatch.setattr(model.image_encoder, "encode_pixels", counted)
    for batch_size, expected in ((10, [10, 5]), (14, [10, 5]), (15, [15])):
        sizes.clear()
        compress_to_file(
            model.image_encoder, find_entries([str(album)]), tmp_path / f"{batch_size}.voco", batch_size=batch_size
        )
        assert sizes == expected


def test_smaller_ones(model, pictures, album, tmp_path):
    """In int8, with the first token of each image; what is added has the same form."""
    out = tmp_path / "a.voco"
    add(model, album, out, int8=True, tokens=1)
    shutil.copy(pictures[4], album / "3.png")
    assert add(model, album, out) == Outcome(new=1, known=3)
    bank = model.open(out)
    assert bank.dtype == np.int8 and bank.num_tokens == 1 and len(bank) == 20
    one = model.compress(album / "3.png", tokens=1).to_int8()
    assert np.abs(bank.pictures()[3].keys.astype(int) - one.keys).max() <= 1
    assert model.ask_each(QUESTIONS[0], bank[:10]) == [model.ask(QUESTIONS[0], bank[i : i + 5]) for i in (0, 5)]


@pytest.mark.parametrize("compressor", ["voco", "voco_embedding", "none"])
def test_asking(tiles_run, model, album, compressor):
    """Each picture's answer is that about its file, by itself and among others; of every kind of model."""
    if compressor != "voco":
        model = Model(of_kind(load_run(tiles_run), compressor))
    files = sorted(map(str, album.iterdir()))
    encoded = model.encode_images(files)
    expected = [model.ask(QUESTIONS, file, max_new_tokens=5) for file in files]
    assert len({tuple(given) for given in expected}) > 1, "the comparison would say little"
    assert [len(one) for one in encoded.pictures()] == [5, 5, 5]
    given = [model.ask_each(question, encoded, max_new_tokens=5) for question in QUESTIONS]
    assert [list(of_picture) for of_picture in zip(*given, strict=True)] == expected
    both = Request("is <image> as <image>?", encoded[5:], interleaved=True)
    of_files = Request("is <image> as <image>?", files[1:], interleaved=True)
    of_tiles = Request(f"is {'<image>' * 5} as {'<image>' * 5}?", encoded[5:], interleaved=True)
    one, two, three = model.answers([both, of_files, of_tiles], max_new_tokens=5)
    assert one == two == three
    talk = model.chat(encoded[5:10], max_new_tokens=5)
    assert talk.ask(QUESTIONS[0]) == expected[1][0] and talk.ask(QUESTIONS[1])
    assert talk.turns[0]["value"] == f"<image>\n{QUESTIONS[0]}"  # as data have it


def of_kind(run, compressor: str):
    """A run's model with another compressor, and random parameters."""
    run.config.model.compressor = compressor
    model_config = make_model_config(run.config, run.encoder.tokenizer)
    graphdef, state = abstract_model(model_config)
    rng = np.random.default_rng(1)
    draw = lambda p: rng.normal(size=p.shape).astype(p.dtype)  # noqa: E731
    encoder = make_encoder(run.config, run.encoder.tokenizer, model_config)
    return dataclasses.replace(run, model=nnx.merge(graphdef, jax.tree.map(draw, state)), encoder=encoder)


def test_the_commands_ask_a_memory(model, album, tmp_path, monkeypatch, capsys):
    """A picture by itself, by its name, together with others; with fewer tokens, and as many as needed."""
    out = tmp_path / "a.voco"
    add(model, album, out)
    for command in (ask, chat):
        monkeypatch.setattr(command, "load_model", lambda args: model)
    bank, question, few = model.open(out), QUESTIONS[0], ["--max-new-tokens", 4]
    about = lambda *rest: run_main(ask, monkeypatch, capsys, "--run", "run", "--memory", out, *few, *rest)  # noqa: E731
    answers = lambda *about, **how: [  # noqa: E731
        printable(model.ask(question, one, max_new_tokens=4, **how)) for one in about
    ]
    files = sorted(map(str, album.iterdir()))
    status, said, err = about(question)
    assert status == 0 and "note" not in err
    assert said.splitlines() == [question, *(f"  {f}: {a}" for f, a in zip(files, answers(*files), strict=True))]
    _, said, err = about("--picture", "2.png", "--picture", "0.png", "--together", question)
    assert said.splitlines() == [question, f"  {answers([files[2], files[0]])[0]}"]
    assert "note: 2 pictures as 10 images together: " in err and "was trained with at most 5" in err
    assert about("--picture", "1.png", question)[1].splitlines()[1] == f"  {files[1]}: {answers(files[1])[0]}"
    one = answers(*bank.pictures(), tokens=1)
    assert [line.rsplit(": ")[-1] for line in about("--tokens", 1, question)[1].splitlines()[1:]] == one
    _, said, _ = about("--tokens", "auto", "--confidence", 1, question)
    assert [line.partition(": ")[2] for line in said.splitlines()[1:]] == [
        f"{printable(a.text)}  (2 tokens, {a.confidence:.2f})"
        for a in model.auto_answers([Request(question, file) for file in files], AutoTokens(1.0), max_new_tokens=4)
    ]
    _, said, _ = run_main(
        ask, monkeypatch, capsys, "--run", "run", "--image", files[0], "--image", files[1], "--each", *few, question
    )
    assert [line.rsplit(": ")[-1] for line in said.splitlines()[1:]] == answers(*files[:2])
    lines = iter([question, ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    _, said, err = run_main(chat, monkeypatch, capsys, "--run", "run", "--memory", out, *few)
    assert said.splitlines()[1] == answers(files)[0] and "note: 3 pictures as 15 images together" in err


def test_a_file_that_says_nothing_of_tiles(model, album, tmp_path, monkeypatch, capsys):
    """As `Model.save` wrote one before items had them: opened, asked and added to."""
    out, files = tmp_path / "a.voco", sorted(map(str, album.iterdir()))
    items = tuple(Item(file) for file in files for _ in TILES)
    model.save(dataclasses.replace(model.compress(files), items=items), out)
    assert MemoryFile(out).version == "3"
    expected = [model.ask(QUESTIONS[0], file, max_new_tokens=4) for file in files]
    assert names_of(model.open(out)) == ["0.png", "1.png", "2.png"]
    assert model.ask_each(QUESTIONS[0], str(out), max_new_tokens=4) == expected
    monkeypatch.setattr(ask, "load_model", lambda args: model)
    arguments = ["--run", "run", "--memory", out, "--max-new-tokens", 4, QUESTIONS[0]]
    _, said, _ = run_main(ask, monkeypatch, capsys, *arguments)
    assert [line.rsplit(": ")[-1] for line in said.splitlines()[1:]] == list(map(printable, expected))
    # Without hashes they are replaced by those of the files
    outcome = add(model, album, out)
    assert outcome.new == 3 and names_of(model.open(out)) == ["0.png", "1.png", "2.png"]


def test_another_grid_is_another_model(model, album, tmp_path, two_tokens_run):
    out = tmp_path / "a.voco"
    add(model, album, out)
    with pytest.raises(UserError, match="a memory can only be read by the model that made it"):
        Model(load_run(two_tokens_run)).open(out)
