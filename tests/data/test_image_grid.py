"""A picture as several images: what each of them shows, and that training and asking look at the same ones."""

import dataclasses
import json
from pathlib import Path

import numpy as np
from PIL import Image
import pytest

from tests.helpers import tiny
from voco_jax.api import Model, Request
from voco_jax.checkpoint.run import load_run
from voco_jax.config import source, sources
from voco_jax.data.images import ImageProcessor
from voco_jax.data.plan import Pack
from voco_jax.data.records import Picture
from voco_jax.data.training_data import open_training_data
from voco_jax.errors import UserError
from voco_jax.eval.conversations import score_conversations
from voco_jax.train.loop import train

GREY = ((0, 0, 0), (1, 1, 1))
SIDE = 8


def quarters(width: int, height: int) -> Image.Image:
    """A picture whose quarters have grey levels 10, 20, 30, 40, row by row."""
    levels = np.array([[10, 20], [30, 40]], np.uint8)
    rows, columns = (np.arange(size) * 2 // size for size in (height, width))
    return Image.fromarray(levels[rows][:, columns]).convert("RGB")


@pytest.mark.parametrize("aspect_ratio", ["pad", "crop", "stretch"])
@pytest.mark.parametrize("size", [(64, 64), (96, 64), (33, 57)])
def test_tiles_together_are_the_square(aspect_ratio, size):
    """Each has twice the pixels of its part of the whole picture."""
    processor = ImageProcessor(SIDE, aspect_ratio, *GREY, resample="nearest", grid=2)
    image = quarters(*size)
    whole, *tiles = processor.squares(image)
    np.testing.assert_array_equal(whole, processor.square(image))
    larger = dataclasses.replace(processor, size=2 * SIDE, grid=1).square(image)
    assert len(tiles) == 4 and processor.tiles == ((0, 0, 1), (0, 0, 2), (0, 1, 2), (1, 0, 2), (1, 1, 2))
    if aspect_ratio != "crop":  # whose square is cut out of the resized picture, and the tiles' before it is resized
        parts = larger.reshape(2, SIDE, 2, SIDE, 3).swapaxes(1, 2).reshape(4, SIDE, SIDE, 3)
        assert np.mean(np.array(tiles) == parts) > 0.9  # but where quarters meet
    for tile, level in zip(tiles, (10, 20, 30, 40), strict=True):
        assert np.median(tile) == level
    # The same, asked for one by one, as records have them
    for tile, expected in zip(processor.tiles, [whole, *tiles], strict=True):
        np.testing.assert_array_equal(processor.square(processor.cut(image, tile)), expected)


def test_what_would_lose_parts_of_tiles():
    with pytest.raises(
        ValueError, match=r"^image_grid: expected 1 with processor.resize_to or without do_resize, found 2"
    ):
        ImageProcessor(SIDE, "crop", *GREY, resize_to=(10,), grid=2)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Questions about pictures of two sizes, one question about two pictures, and one about none."""
    directory = tmp_path_factory.mktemp("rows")
    for name, size in (("a", (40, 40)), ("b", (64, 24))):
        quarters(*size).save(directory / f"{name}.png")

    def row(images, *values):
        roles = ("human", "gpt") * len(values)
        turns = [{"from": role, "value": value} for role, value in zip(roles, values, strict=False)]
        return {"image": images, "conversations": turns}

    made = [
        row("a.png", "<image>\nwhat is it?", "a red cat"), row("b.png", "what is it?\n<image>", "a cat"),
        row(["a.png", "b.png"], "<image> <image> what is it?", "red"), row(None, "what is it?", "a cat"),
    ]  # fmt: skip
    (directory / "rows.json").write_text(json.dumps(made))
    return directory


def config_of(rows: Path, workdir: Path, **keys):
    config = tiny.config(workdir)
    config.data.train = sources(rows=source("llava", file=str(rows / "rows.json"), images=str(rows)))
    config.data.test = sources()
    config.data.image_grid, config.data.images_per_pack, config.data.batch_size = 2, 10, 1
    config.model.num_voco_tokens = 2
    config.update(keys)
    return config


@pytest.fixture(scope="module")
def run(rows, tmp_path_factory) -> Path:
    return train(config_of(rows, tmp_path_factory.mktemp("runs") / "run"))


def test_training_looks_at_all_tiles(rows, tmp_path):
    """Each with its slots, in order."""
    config = config_of(rows, tmp_path)
    data = open_training_data(config, log=lambda line: None)
    processor = data.batches.loader.processor
    seen = []
    for _ in range(len(list(data.batches.loader.plan.packs(0)))):
        batch = next(data.batches)
        used = batch["slot_index"][batch["slot_index"] >= 0]
        pixels = batch["pixel_values"][0]
        count = int(used.max()) // 2 + 1 if len(used) else 0
        assert sorted({*used.tolist()}) == list(range(2 * count)) and count % 5 == 0
        seen += [pixels[i : i + 5].tobytes() for i in range(0, count, 5)]
    data.batches.close()
    expected = [np.stack(processor.squares(Image.open(rows / f"{name}.png"))).tobytes() for name in "ab"]
    assert {*seen} == {*expected}
    config.data.images_per_pack = 4
    expected = r"images_per_pack: expected at least 5, for all of a picture and its 4 tiles .*image_grid = 2\); found 4"
    with pytest.raises(UserError, match=expected):
        open_training_data(config, log=lambda line: None)


def test_augmentation_changes_tiles_alike(rows, tmp_path):
    """They are cut out of the changed picture: a crop of the quarters is no crop of each tile."""
    config = config_of(rows, tmp_path)
    config.data.random_crop = 0.5
    loader = open_training_data(config, log=lambda line: None).batches.loader
    record, changed = loader.sources[0][0], []

    def change(image):
        changed.append(image.crop((12, 12, 36, 36)))  # the middle, where all quarters meet
        return changed[-1]

    images = loader.maker.load_images(record, None, loader.processor, change=change)
    assert len(changed) == 1 and len(images) == 5
    for image, tile in zip(images, loader.processor.tiles, strict=True):
        np.testing.assert_array_equal(np.asarray(image), np.asarray(loader.processor.cut(changed[0], tile)))
    (example,) = [p for pack in loader.plan.packs(0) for p in loader.plan[pack] if p.record == 0]
    pack = next(number for number in loader.plan.packs(0) if example in loader.plan[number])
    pixels = loader.map(Pack(pack, loader.plan[pack]))["pixel_values"]
    whole = loader.processor.load(rows / "a.png")
    ours = [
        loader.processor.square(loader.processor.cut(loader.augmentation(whole, loader._rng(example)), t))
        for t in loader.processor.tiles
    ]
    assert any((pixels[i : i + 5] == np.stack(ours)).all() for i in range(len(pixels) - 4))
    assert not (np.stack(ours) == np.stack(loader.processor.squares(whole))).all()


def test_asking_looks_at_the_same(rows, run):
    """A question's tokens are those of training, before the question or at its markers; one picture's answer does not
    depend on the others."""
    model = Model(load_run(run))
    picture, other = rows / "a.png", rows / "b.png"
    encoded = model.encode_images([picture, other])
    assert len(encoded) == 10
    (prompt,) = model.prompts([Request("what is it?", picture)])
    taught = open_training_data(load_run(run).config, run=run, log=lambda line: None).batches
    maker, about_a = taught.loader.maker, taught.loader.sources[0][0]
    np.testing.assert_array_equal(prompt.sample.tokens, maker.prompt(about_a, 0, None).tokens)
    np.testing.assert_array_equal(prompt.sample.slot_index, maker.prompt(about_a, 0, None).slot_index)
    both = taught.loader.sources[0][2]
    (prompt,) = model.prompts([Request("<image> <image> what is it?", [picture, other], interleaved=True)])
    np.testing.assert_array_equal(prompt.sample.tokens, maker.prompt(both, 0, None).tokens)
    # Evaluation of conversations, which opens the pictures itself
    results, answers, _ = score_conversations(model, taught.loader.sources[0])
    requests = [Request("what is it?", picture), Request("what is it?\n<image>", other, interleaved=True)]
    given = model.answers(requests, max_new_tokens=results["max_new_tokens"])
    assert len(answers) == 4 and [answer.given for answer in answers[:2]] == given
    taught.close()
    assert model.ask_each("what is it?", [picture, other]) == [model.ask("what is it?", p) for p in (picture, other)]
    assert [p.tile for p in about_a.images] == list(model.run.processor.tiles) and isinstance(
        about_a.images[0], Picture
    )
