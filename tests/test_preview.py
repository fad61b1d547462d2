"""The preview of a training batch: what of a row is shown, literally; the page, as a parser reads it; the command."""

import base64
from html.parser import HTMLParser
import io
import itertools
import json
import re

import numpy as np
from PIL import Image
import pytest

from tests.helpers import tiny
from tests.helpers.chat_families import tokenizer_of
from tests.helpers.commands import run_main
from voco_jax.command_line import parse_arguments
from voco_jax.config import save_config
from voco_jax.data.conversations import Sample
from voco_jax.data.packing import pack_row
from voco_jax.data.tokenizer import save_tokenizer
from voco_jax.data.training_data import open_training_data
from voco_jax.preview import __main__ as preview
from voco_jax.preview.page import render
from voco_jax.preview.text import Run, make_decoder, row_runs


def letters(ids):
    return "".join(map(chr, ids))


def sample(text: str, slot_index=()) -> Sample:
    """A conversation of a token a letter: capitals are labels, `*` the visual tokens of the numbers in `slot_index`."""
    numbers = iter(slot_index)
    return Sample(
        tokens=np.array([ord(letter) for letter in text], np.int32),
        labels=np.array([letter.isupper() for letter in text]),
        slot_index=np.array([next(numbers) if letter == "*" else -1 for letter in text], np.int32),
        num_images=len(slot_index),
    )


def row(*samples: Sample, length: int, **kwargs) -> dict[str, np.ndarray]:
    return pack_row(samples, length, **kwargs).arrays()


@pytest.mark.parametrize("weighting", ["token", "conversation"])
def test_a_row(weighting):
    arrays = row(
        sample("**abCD**efG", [0, 1, 2, 3]), sample("xY"), sample("z**W", [0, 1]),
        length=20, first_slot=[0, 0, 4], weighting=weighting,
    )  # fmt: skip
    assert row_runs(arrays, 2, letters) == [
        Run("▣1×2", "image", 1, 2),
        Run("ab", "text", 1, 2),
        Run("CD", "label", 1, 2),
        Run("▣2×2", "image", 1, 2),
        Run("ef", "text", 1, 2),
        Run("G", "label", 1, 1),
        Run("x", "text", 2, 1),
        Run("Y", "label", 2, 1),
        Run("z", "text", 3, 1),
        Run("▣3×2", "image", 3, 2),
        Run("W", "label", 3, 1),
    ]


def test_images_side_by_side_and_of_one_token():
    arrays = row(sample("***A", [0, 1, 2]), length=6, first_slot=[9])
    assert [run.text for run in row_runs(arrays, 1, letters)] == ["▣10", "▣11", "▣12", "A"]
    assert [run.text for run in row_runs(arrays, 3, letters)] == ["▣4×3", "A"]


def test_an_empty_row():
    assert row_runs(row(length=5), 1, letters) == []


def test_text_from_the_middle_of_a_row(llama_tokenizer, small_tokenizer):
    for tokenizer in llama_tokenizer, small_tokenizer:
        decode, ids = make_decoder(tokenizer), tokenizer("It is  a\n$5", add_special_tokens=False).input_ids
        assert decode([*ids, tokenizer.eos_token_id]).lstrip() == "It is  a\n$5</s>"
    decode = make_decoder(llama_tokenizer)
    assert decode(llama_tokenizer("ASSISTANT: red", add_special_tokens=False).input_ids[-1:]) == " red"


class Page(HTMLParser):
    """A page's texts, each with the class (or tag) of its element, its pictures and bars; every tag must be closed."""

    def __init__(self, text: str):
        super().__init__()
        self.texts, self.pictures, self.bars, self._open = [], [], [], []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        assert not {"src", "href"} & attributes.keys() or attributes["src"].startswith("data:image/png;base64,")
        if tag == "img":
            encoded = base64.b64decode(attributes["src"].partition(",")[2])
            self.pictures.append(np.asarray(Image.open(io.BytesIO(encoded))))
        elif tag == "div" and attributes.get("class") == "bar":
            self.bars.append([])
        elif tag == "i":
            self.bars[-1].append((attributes["class"], int(attributes["style"].removeprefix("flex:"))))
        if tag not in ("meta", "img"):
            self._open.append((tag, attributes.get("class", tag)))

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        if data.strip() and self._open[-1][0] != "style":
            self.texts.append((self._open[-1][1], data))

    def of(self, *kinds: str) -> list[str]:
        return [text for kind, text in self.texts if kind in kinds]


def test_packs_of_their_own():
    """Two packs of two rows; the second's are of other text, other images, and with more padding."""
    rows = [row(sample("*aB", [0]), sample("cD"), length=10), row(length=10)]
    rows += [row(sample("***eF", [2, 3, 4]), length=10), row(sample("gHi"), length=10)]
    batch = {name: np.stack([x[name] for x in rows]) for name in rows[0]}
    greys = np.arange(10, dtype=np.uint8).reshape(2, 5, 1, 1, 1) * 20
    batch["pixel_values"] = np.broadcast_to(greys, (2, 5, 8, 8, 3))
    page = Page(render(batch, 1, letters, ["one", "two"], 9))
    assert [(picture.shape, int(picture.max())) for picture in page.pictures] == [
        ((8, 8, 3), grey) for grey in (0, 140, 160, 180)
    ]
    first_pack = next(i for i, (kind, _) in enumerate(page.texts) if kind == "h2")
    assert page.texts[first_pack:] == [
        ("h2", "pack 1 "),
        ("small", "conversations: 2 · tokens: 5 of 20 (25.0%) · image slots: 1 of 5 (20.0%)"),
        ("figcaption", "▣1"), ("small", "4 empty"),
        ("h3", "row 1 · padding: 5 of 10 (50.0%)"),
        ("b", "1"), ("image", "▣1"), ("text", "a"), ("label", "B"), ("b", "2"), ("text", "c"), ("label", "D"),
        ("h3", "row 2 · padding: 10 of 10 (100.0%)"),
        ("h2", "pack 2 "),
        ("small", "conversations: 2 · tokens: 8 of 20 (40.0%) · image slots: 3 of 5 (60.0%)"),
        ("figcaption", "▣3"), ("figcaption", "▣4"), ("figcaption", "▣5"), ("small", "2 empty"),
        ("h3", "row 1 · padding: 5 of 10 (50.0%)"),
        ("b", "1"), ("image", "▣3"), ("image", "▣4"), ("image", "▣5"), ("text", "e"), ("label", "F"),
        ("h3", "row 2 · padding: 7 of 10 (70.0%)"),
        ("b", "1"), ("text", "g"), ("label", "H"), ("text", "i"),
    ]  # fmt: skip
    assert page.of("p") == ["one", "two", " picture 1 · ", " · ", " · ↵ new line"]
    assert page.bars == [
        [("image", 1), ("c0", 1), ("label", 1), ("c1", 1), ("label", 1), ("padding", 5)],
        [("padding", 10)],
        [("image", 3), ("c0", 1), ("label", 1), ("padding", 5)],
        [("c0", 1), ("label", 1), ("c0", 1), ("padding", 7)],
    ]


def test_how_many_tokens_of_a_picture_a_pack_reads():
    batch = {name: np.stack([x] * 4) for name, x in row(sample("***aB", [0, 1, 2]), length=5).items()}
    batch |= {"pixel_values": np.zeros((2, 1, 8, 8, 3), np.uint8), "num_tokens": np.array([1, 3], np.int32)}
    facts = Page(render(batch, 3, letters, ["one"], 9)).of("small")
    assert [fact.split(" · ")[-1] for fact in facts] == [
        f"reads the first {k} of a picture" for k in ("1 token", "3 tokens")
    ]
    assert "reads the first" not in render(
        {k: x for k, x in batch.items() if k != "num_tokens"}, 3, letters, ["one"], 9
    )


def test_text_that_looks_like_markup():
    """Text of a data set is shown as it is: no tag, no entity, no control character of it reaches the browser."""
    said = "<script>alert(1)</script>&lt;\x1b[2J\u202e\n\"'"
    batch = {name: x[None] for name, x in row(sample(said), length=60).items()}
    batch["pixel_values"] = np.zeros((1, 0, 8, 8, 3), np.uint8)
    text = render(batch, 2, letters, ["<b>a config"], 1)
    assert "<script" not in text and "\x1b" not in text and "\u202e" not in text
    page = Page(text)
    shown = said.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e").replace("\n", "↵\n")
    start = page.texts.index(("b", "1"))
    assert "".join(text for _, text in page.texts[start + 1 :]) == shown and page.of("title") == ["<b>a config"]
    assert "▣1×2" in page.of("image") and " the 2 tokens of picture 1 · " in page.of("p")


def test_the_demo(tmp_path, monkeypatch, capsys):
    out = tmp_path / "preview.html"
    changes = ["--config.data.batch_size=6", "--config.data.images_per_pack=2"]
    arguments = [f"--config={tiny.CONFIG_FILE}", "--out", out, "--batch=7", "--packs=2", *changes]
    status, said, err = run_main(preview, monkeypatch, capsys, *arguments)
    assert (status, err) == (0, "") and said.splitlines()[-1] == f"written: {out} (2 of 6 packs of batch 7)"
    page = Page(out.read_text(encoding="utf-8"))
    header = page.of("p")
    assert header[:2] == [f"{tiny.CONFIG_FILE}, batch 7: step 8 of 850", " ".join(changes)]
    assert header[2] == "6 packs × 4 rows × 18 tokens; 24 conversations; longest in the data: 18 tokens"
    assert re.fullmatch(
        r"used: 8\d\.\d% of 432 tokens and 6 of 12 image slots; "
        r"in a whole epoch 85\.4% of the tokens and 50\.0% of the slots",
        header[3],
    )
    assert "the first 2 of 6 packs" in header and page.of("h2") == ["pack 1 ", "pack 2 "]
    assert len(page.of("h3")) == 8 and len(page.pictures) == 2 and page.pictures[0].shape == (64, 64, 3)
    data = open_training_data(parse_arguments(["", f"--config={tiny.CONFIG_FILE}", *changes])[0], log=lambda line: None)
    batch = next(itertools.islice(data.batches, 7, None))
    seen = [
        data.tokenizer.decode(tokens[used > 0])
        for tokens, used in zip(batch["tokens"], batch["segment_ids"], strict=True)
    ]
    runs = "".join(page.of("text", "label")).removeprefix("read only").removeprefix("trained onread only")
    assert runs.replace("↵\n", "<voco>\n") == "".join(seen[: 2 * 4])
    assert sum(text.endswith("</s>") for text in page.of("label")) == 8


def test_records_that_are_skipped_are_told(tmp_path, monkeypatch, capsys):
    """Pictures are read where the batch is made: who looks at no page sees that nothing is in it."""
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a cat"}]
    (tmp_path / "rows.json").write_text(json.dumps([{"image": "cat.png", "conversations": turns}]))
    (tmp_path / "config.py").write_text(
        "from configs import easyvqa\nfrom voco_jax.config import source, sources\n"
        "def get_config():\n    config = easyvqa.get_config()\n"
        f"    config.data.train = sources(a=source('llava', file='{tmp_path}/rows.json', images='{tmp_path}'))\n"
        "    return config\n"
    )
    arguments = [f"--config={tmp_path}/config.py", "--out", tmp_path / "page.html", "--config.data.batch_size=2"]
    status, said, _ = run_main(preview, monkeypatch, capsys, *arguments)
    lines = [line for line in said.splitlines() if line.startswith("batch 0: ")]
    assert status == 0 and lines[0].endswith("conversations: 0 good, 2 skipped"), said
    assert "skipped: missing file" in lines[1] and "cat.png" in lines[1]


def test_a_prompt_of_the_base_is_told(tmp_path, monkeypatch, capsys):
    base = parse_arguments(["", f"--config={tiny.CONFIG_FILE}", "--config.data.template=chatml"])[0]
    save_tokenizer(tokenizer_of("smollm2"), tmp_path / "base" / "tokenizer")
    save_config(base, tmp_path / "base" / "config.json")
    arguments = [f"--config.init_from={tmp_path}/base", "--config.data.template=voco_v1", f"--out={tmp_path}/page.html"]
    status, said, _ = run_main(preview, monkeypatch, capsys, f"--config={tiny.CONFIG_FILE}", *arguments)
    line = f"config.data.template: 'chatml', as in {tmp_path}/base; for 'voco_v1', convert the base with to-jax "
    assert status == 0 and said.splitlines()[0] == f"{line}--template voco_v1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch=-1"], "--batch: expected 0 to 849 (config.train.steps), found -1"),
        (["--batch=850"], "--batch: expected 0 to 849 (config.train.steps), found 850"),
        (["--packs=0"], "--packs: expected at least 1, found 0"),
        (["--out=preview.png"], "--out: expected a file ending in .html, found preview.png"),
        (["--out=nowhere/preview.html"], "--out: expected a file in a directory that is there"),
        (["--config=configs/nothing.py"], "configs/nothing.py"),
        (["--config.data.batch_siz=1"], "batch_siz"),
        (["--config.data.images_per_pack=0"], "data: 38575 of the first 38575 records cannot be used"),
    ],
)
def test_what_cannot_be_shown(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    arguments = arguments if arguments[0].startswith("--config=") else [f"--config={tiny.CONFIG_FILE}", *arguments]
    status, _, err = run_main(preview, monkeypatch, capsys, *arguments)
    (line,) = err.splitlines()[-1:]  # before it there may be a bar, where indexing takes long
    assert status == 2 and line.startswith("error: ") and message in line and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "preview.html").symlink_to("/dev/full")
    arguments = [f"--config={tiny.CONFIG_FILE}", "--packs=1", f"--out={tmp_path / 'preview.html'}"]
    status, _, err = run_main(preview, monkeypatch, capsys, *arguments)
    assert status == 2 and err.startswith("error: ") and "No space left" in err and err.count("\n") == 1
