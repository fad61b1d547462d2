"""The preview of a training batch: what of a row is shown, literally; that it fits on a sheet; and the command."""

import itertools
import re

import numpy as np
from PIL import Image
import pytest

from tests.helpers import tiny
from tests.helpers.commands import run_main
from voco_jax.command_line import parse_command_line
from voco_jax.data.conversations import Sample
from voco_jax.data.packing import pack_row
from voco_jax.data.training_data import open_training_data
from voco_jax.preview import __main__ as preview
from voco_jax.preview import sheet as preview_sheet
from voco_jax.preview.text import Run, drawable, make_decoder, row_runs, wrap


def letters(ids):
    return "".join(map(chr, ids))


def sample(text: str, slot_index=()) -> Sample:
    """A conversation of a token a letter: capitals are labels, `*` the visual tokens of numbers `slot_index`."""
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
    assert row_runs(row(length=5), 1, letters) == [] and wrap([], 9) == []


def test_the_middle_is_left_out():
    """An image counts as one; of three conversations with two to show, the first and the last are shown."""
    middle = sample("lmnOP")
    arrays = row(sample("***abcdEFGHi", [0, 1, 2]), middle, sample("xY"), length=30)
    assert row_runs(arrays, 3, letters, max_tokens=5, max_conversations=2) == [
        Run("▣1×3", "image", 1, 3),
        Run("ab", "text", 1, 2),
        Run(" ⋯ 5 tokens left out, 3 trained on ⋯ ", "elided", 1, 5),
        Run("H", "label", 1, 1),
        Run("i", "text", 1, 1),
        Run(" ⋯ 1 conversation, 5 tokens left out, 2 trained on ⋯ ", "elided", 2, 5),
        Run("x", "text", 3, 1),
        Run("Y", "label", 3, 1),
    ]
    for limits in (None, None), (5, 2), (2, 3):
        assert sum(run.tokens for run in row_runs(arrays, 3, letters, *limits)) == 12 + 5 + 2
    assert "elided" not in {run.kind for run in row_runs(arrays, 3, letters, 10, 3)}


def test_wrapping():
    runs = [Run("▣1", "image", 1, 1), Run("ab cd", "text", 1, 2), Run(" ef ghijklmnop", "label", 1, 2)]
    assert [[(column, run.text, run.kind) for column, run in line] for line in wrap(runs, 8)] == [
        [(0, "▣1", "image"), (2, "ab cd", "text"), (7, " ", "label")],
        [(0, "ef ", "label")],
        [(0, "ghijklmn", "label")],
        [(0, "op", "label")],
    ]


def test_text_as_it_can_be_drawn(llama_tokenizer, small_tokenizer):
    text = "It is  a\n$5 猫?"
    for tokenizer in llama_tokenizer, small_tokenizer:
        decode, ids = make_decoder(tokenizer), tokenizer(text, add_special_tokens=False).input_ids
        assert decode([*ids, tokenizer.eos_token_id]).lstrip() == "It is  a↵$5 □?</s>"
    decode = make_decoder(llama_tokenizer)
    assert decode(llama_tokenizer("ASSISTANT: red", add_special_tokens=False).input_ids[-1:]) == " red"
    assert drawable("e\u0301 \U0001f600 \u0645 \u0007\t\ufe0f") == "é □ □ □→□"


def batch_of(rows: int, packs: int, conversation: Sample, each: int, images: int = 12) -> dict[str, np.ndarray]:
    length = max(1, each * len(conversation))
    arrays = row(*[conversation] * each, length=length, first_slot=[i % max(1, images) for i in range(each)])
    batch = {name: np.stack([x] * rows * packs) for name, x in arrays.items()}
    return batch | {"pixel_values": np.full((packs, images, 8, 8, 3), 200, np.uint8)}


@pytest.mark.parametrize(
    ("rows", "conversation", "each", "images", "shown"),
    [
        (4, sample("*" + "abcdefghi " * 13 + "JKLMNOPQR ", [0]), 20, 12, 2),
        (16, sample("abcdefghi " * 20 + "J"), 8, 0, 1),  # too much even of one
        (1, sample("abcdefghi JKLMNOPQR " * 100), 1, 0, 4),
        (1, sample("*" + "abcdefghi " * 9 + "J", [0]), 2, 64, 4),
        (4, sample(""), 0, 3, 4),  # nothing in it
    ],
)
def test_the_sheet_stays_low(tmp_path, rows, conversation, each, images, shown):
    file = tmp_path / "sheet.png"
    batch = batch_of(rows, 4, conversation, each, images)
    assert preview_sheet.draw_batch(batch, 1, letters, ["a config"], 99, file) == shown
    with Image.open(file) as sheet:
        assert sheet.width == 12 * 120 and 2 * 120 < sheet.height <= 20 * 120


@pytest.fixture
def drawn(monkeypatch) -> list[str]:
    """All texts of a sheet, in the order they are drawn."""
    texts, draw = [], preview_sheet.Sheet.text
    monkeypatch.setattr(
        preview_sheet.Sheet,
        "text",
        lambda self, x, y, text, *a, **k: texts.append(text) or draw(self, x, y, text, *a, **k),
    )
    return texts


def test_the_legend_of_several_tokens_a_picture(tmp_path, drawn):
    batch = batch_of(1, 1, sample("**aB", [0, 1]), 1, 1)
    preview_sheet.draw_batch(batch, 2, letters, ["a config"], 1, tmp_path / "sheet.png")
    assert "▣1×2" in drawn and " the 2 tokens of picture 1   " in drawn


def test_packs_of_their_own(tmp_path, drawn):
    """Two packs of two rows; the second's are of other text, other images, and with more padding."""
    rows = [row(sample("*aB", [0]), sample("cD"), length=10), row(length=10)]
    rows += [row(sample("***eF", [2, 3, 4]), length=10), row(sample("gHi"), length=10)]
    batch = {name: np.stack([x[name] for x in rows]) for name in rows[0]}
    colors = [[(20 * (5 * b + i) + 10, 0, 99) for i in range(5)] for b in range(2)]
    batch["pixel_values"] = np.broadcast_to(np.array(colors, np.uint8)[:, :, None, None], (2, 5, 8, 8, 3))
    assert preview_sheet.draw_batch(batch, 1, letters, ["one", "two"], 2, tmp_path / "sheet.png") == 2
    with Image.open(tmp_path / "sheet.png") as sheet:
        found = {color for n, color in sheet.convert("RGB").getcolors(1 << 20) if n > 5000}
    assert found & {*colors[0], *colors[1]} == {colors[0][0], *colors[1][2:]}
    legend = drawn.index("trained on") + 2
    assert drawn[legend - 4 : legend - 2] == ["▣1", " picture 1   "]
    assert drawn[:2] == ["one", "two"] and drawn[legend:] == [
        "pack 1", "conversations: 2   tokens: 5 of 20 (25.0%)   image slots: 1 of 5 (20.0%)", "▣1",
        "row 1", "padding: 5 of 10 (50.0%)", "1", "▣1", "a", "B", "2", "c", "D",
        "row 2", "padding: 10 of 10 (100.0%)",
        "pack 2", "conversations: 2   tokens: 8 of 20 (40.0%)   image slots: 3 of 5 (60.0%)",
        "▣3", "▣4", "▣5", "2 empty",
        "row 1", "padding: 5 of 10 (50.0%)", "1", "▣3", "▣4", "▣5", "e", "F",
        "row 2", "padding: 7 of 10 (70.0%)", "1", "g", "H", "i",
    ]  # fmt: skip


def test_the_demo(tmp_path, monkeypatch, capsys, drawn):
    out = tmp_path / "preview.png"
    changes = ["--config.data.batch_size=6", "--config.data.images_per_pack=2"]
    arguments = [f"--config={tiny.CONFIG_FILE}", "--out", out, "--batch=7", "--packs=2", *changes]
    status, said, err = run_main(preview, monkeypatch, capsys, *arguments)
    assert (status, err) == (0, "") and said.splitlines()[-1] == f"written: {out} (2 of 6 packs of batch 7)"
    assert drawn[:2] == [f"{tiny.CONFIG_FILE}, batch 7: step 8 of 850", " ".join(changes)]
    assert drawn[2] == "6 packs × 4 rows × 18 tokens; 24 conversations; longest in the data: 18 tokens"
    assert re.fullmatch(
        r"used: 8\d\.\d% of 432 tokens and 6 of 12 image slots; "
        r"in a whole epoch 85\.4% of the tokens and 50\.0% of the slots",
        drawn[3],
    )
    assert drawn.count("pack 1") == drawn.count("pack 2") == 1 and "pack 3" not in drawn
    assert sum(s.startswith("padding: ") for s in drawn) == 8 and sum(s.endswith("</s>") for s in drawn) == 8
    data = open_training_data(parse_command_line(["", f"--config={tiny.CONFIG_FILE}", *changes]), log=lambda line: None)
    batch = next(itertools.islice(data.batches, 7, None))
    seen = [
        data.tokenizer.decode(tokens[used > 0])
        for tokens, used in zip(batch["tokens"], batch["segment_ids"], strict=True)
    ]
    assert "▣1" in drawn and " picture 1   " in drawn  # of one token
    runs = "".join(s for s in drawn[drawn.index("pack 1") :] if "USER" in s or s.endswith("</s>"))
    assert runs.replace("↵", "<voco>\n") == "".join(seen[: 2 * 4])
    with Image.open(out) as sheet:
        colors = {color: n for n, color in sheet.convert("RGB").getcolors(1 << 20)}
        assert sheet.width == 1440 and 400 < sheet.height < 900
    assert colors[(0xC6, 0xF0, 0xCF)] > 5000  # behind what is trained on
    pictures = preview_sheet.STYLES["image"][1]
    assert colors[tuple(int(pictures[i : i + 2], 16) for i in (1, 3, 5))] > 1000  # badges


def test_colors_of_a_row():
    arrays = row(sample("*aB", [0]), sample("cD"), length=7)
    colors = preview_sheet.row_colors(arrays["segment_ids"], arrays["weights"], arrays["slot_index"])
    image, label, padding = "3d5a99", "6fcf85", "e4e7ea"
    expected = [image, "b58a2d", label, "7a5aa6", label, padding, padding]
    assert ["".join(f"{v:02x}" for v in color) for color in colors] == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch=-1"], "--batch: expected 0 to 849 (config.train.steps), found -1"),
        (["--batch=850"], "--batch: expected 0 to 849 (config.train.steps), found 850"),
        (["--packs=0"], "--packs: expected at least 1, found 0"),
        (["--out=preview.pdf"], "--out: expected a file ending in .png, found preview.pdf"),
        (["--out=nowhere/preview.png"], "--out: expected a file in a directory that is there"),
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
    (tmp_path / "preview.png").symlink_to("/dev/full")
    arguments = [f"--config={tiny.CONFIG_FILE}", "--packs=1", f"--out={tmp_path / 'preview.png'}"]
    status, _, err = run_main(preview, monkeypatch, capsys, *arguments)
    assert status == 2 and err.startswith("error: ") and "No space left" in err and err.count("\n") == 1
