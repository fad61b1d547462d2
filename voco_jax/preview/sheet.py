"""The sheet of `python -m voco_jax.preview`: a figure, a pack's place on it, and what fits."""

from collections.abc import Callable, Mapping, Sequence
import functools
import itertools
import math
from pathlib import Path
import textwrap

import matplotlib

matplotlib.use("Agg")
from matplotlib.patches import Rectangle
import matplotlib.pyplot as plt
import numpy as np

from voco_jax.data.packing import PADDING_SEGMENT
from voco_jax.preview.text import FONT, Run, drawable, row_runs, wrap

# In inches
WIDTH, MAX_HEIGHT, MARGIN = 12.0, 20.0, 0.3
LINE, GAP, GUTTER = 0.165, 0.06, 0.62  # GUTTER: before a row's text, for its number and the conversations'
FONT_SIZE, COLUMN = 8.5, 8.5 / 72 * 1233 / 2048  # a letter is 1233 of the font's 2048 units wide

INK, FAINT, PADDING = "#1f2328", "#848d97", "#e4e7ea"
STYLES = {  # letters, ground
    "text": (INK, None),
    "label": ("#116329", "#c6f0cf"),
    "image": ("#ffffff", "#3d5a99"),
    "elided": ("#59636e", "#e4e7ea"),
}
CONVERSATIONS = ["#b58a2d", "#7a5aa6", "#2f8f8f", "#b5563f", "#6b7280"]  # taken in turn

# (tokens shown of a conversation, conversations of a row): one after the other, until the sheet is low enough. Rather
# than look at stubs of everything, leave out a pack; only the last one is cut further, by TIGHTER.
LIMITS = [(None, None), *((n, None) for n in (1024, 512, 384, 256, 192, 128)), (128, 8), (128, 6), (128, 4)]
TIGHTER = [(128, 2), (64, 2), (32, 2)]


class Sheet:
    """A figure in inches from its upper left corner."""

    def __init__(self, height: float):
        self.figure = plt.figure(figsize=(WIDTH, height))
        self.axis = self.figure.add_axes((0, 0, 1, 1))
        self.axis.axis("off")
        self.height = height

    def text(self, x: float, y: float, text: str, color: str = INK, **kwargs) -> None:
        """In the line from y to y + LINE."""
        kwargs = {"family": FONT, "fontsize": FONT_SIZE} | kwargs
        self.axis.text(x, y + 0.73 * LINE, text, color=color, va="baseline", parse_math=False, **kwargs)

    def runs(self, x: float, y: float, line: Sequence[tuple[int, Run]]) -> None:
        """A line of `wrap`."""
        for column, run in line:
            color, ground = STYLES[run.kind]
            if ground:
                self.box(x + column * COLUMN, y + 0.008, len(run.text) * COLUMN, LINE - 0.016, ground)
            self.text(x + column * COLUMN, y, run.text, color)

    def box(self, x: float, y: float, width: float, height: float, color: str = "none", **kwargs) -> None:
        self.axis.add_patch(Rectangle((x, y), width, height, facecolor=color, **{"edgecolor": "none"} | kwargs))

    def image(self, x: float, y: float, width: float, height: float, pixels: np.ndarray) -> None:
        self.axis.imshow(pixels, extent=(x, x + width, y + height, y), aspect="auto")

    def save(self, path: Path) -> None:
        self.axis.set(xlim=(0, WIDTH), ylim=(self.height, 0))
        # Hinting would move letters to whole pixels, away from the columns that the boxes behind them were put at
        with matplotlib.rc_context({"text.hinting": "none"}):
            self.figure.savefig(path, format="png", dpi=120)
        plt.close(self.figure)


class PackBlock:
    """A pack's part of the sheet: its pictures beside its rows where they are one or two, else in lines above them."""

    def __init__(
        self,
        number: int,
        arrays: Mapping[str, np.ndarray],
        visual_tokens: int,
        decode: Callable[[Sequence[int]], str],
        limits: tuple[int | None, int | None],
    ):
        """`arrays` are `pack_arrays`; `limits` are the last two arguments of `row_runs`."""
        self.number, self.arrays = number, arrays
        self.images = used_images(arrays["slot_index"], visual_tokens)
        self.num_empty = len(arrays["pixel_values"]) - len(self.images)

        self.beside = len(self.images) <= 2
        places = len(self.images) + (self.num_empty > 0 and not self.beside)
        width, least = WIDTH - 2 * MARGIN, 0.9 if places <= 24 else 0.7
        self.per_line = 2 if self.beside else math.ceil(places / math.ceil(places * least / width))
        self.step = min(1.31, width / self.per_line)  # from a picture to the next
        self.left = MARGIN + GUTTER + (places * self.step + 0.1 if self.beside and places else 0)

        rows = ({name: x[r] for name, x in arrays.items() if name != "pixel_values"} for r in range(self.num_rows))
        self.blocks = []  # of each row, of each conversation: its number (None for those left out) and its lines
        for row in rows:
            runs = row_runs(row, visual_tokens, decode, *limits)
            groups = [list(group) for _, group in itertools.groupby(runs, lambda run: run.segment)]
            self.blocks.append([(conversation_number(group), wrap(group, self.columns)) for group in groups])

        pictures = math.ceil(places / self.per_line) * self.step
        text = sum(LINE * (1 + sum(len(lines) for _, lines in row)) + GAP for row in self.blocks)
        self.text_top = 1.4 * LINE + (0 if self.beside else pictures)
        self.height = 1.4 * LINE + (max(pictures, text) if self.beside else pictures + text) + 2 * GAP

    @property
    def num_rows(self) -> int:
        return len(self.arrays["tokens"])

    @property
    def columns(self) -> int:
        return int((WIDTH - MARGIN - self.left) / COLUMN)

    def draw(self, sheet: Sheet, y: float) -> None:
        segments = self.arrays["segment_ids"]
        sheet.box(MARGIN, y, WIDTH - 2 * MARGIN, 1.15 * LINE, "#f0f2f4")
        sheet.text(MARGIN + 0.05, y + 0.01, f"pack {self.number + 1}", weight="bold")
        used, slots = int((segments != PADDING_SEGMENT).sum()), len(self.images) + self.num_empty
        facts = f"conversations: {count_conversations(segments)}   tokens: {used:,} of {segments.size:,}"
        facts += f" ({used / segments.size:.1%})   image slots: "
        facts += f"{len(self.images)} of {slots} ({len(self.images) / slots:.1%})" if slots else "none"
        sheet.text(MARGIN + GUTTER, y + 0.01, facts)
        self._draw_pictures(sheet, y + 1.4 * LINE)
        y += self.text_top
        for r, blocks in enumerate(self.blocks):
            y = self._draw_row(sheet, y, r, blocks)

    def _draw_pictures(self, sheet: Sheet, top: float) -> None:
        empty = [None] if self.num_empty and not self.beside else []
        for i, image in enumerate([*self.images, *empty]):
            x, y = MARGIN + i % self.per_line * self.step, top + i // self.per_line * self.step
            side = self.step - 0.06
            if image is None:
                sheet.box(x, y, side, side, edgecolor=FAINT, linestyle=":")
                sheet.text(x + side / 2, y + side / 2 - LINE / 2, f"{self.num_empty} empty", FAINT, ha="center")
                continue
            sheet.image(x, y, side, side, self.arrays["pixel_values"][image])
            badge = f"▣{image + 1}"
            sheet.box(x, y, (len(badge) + 0.6) * COLUMN, LINE, STYLES["image"][1])
            sheet.text(x + 0.3 * COLUMN, y, badge, STYLES["image"][0])

    def _draw_row(self, sheet: Sheet, y: float, r: int, blocks: list) -> float:
        segments, weights, slot_index = (self.arrays[name][r] for name in ("segment_ids", "weights", "slot_index"))
        length, padding = len(segments), int((segments == PADDING_SEGMENT).sum())
        note = f"padding: {padding:,} of {length:,} ({padding / length:.1%})"
        if self.num_rows > 1:
            sheet.text(self.left - GUTTER, y, f"row {r + 1}", FAINT)
        width = (self.columns - 33) * COLUMN
        sheet.image(self.left, y + 0.3 * LINE, width, 0.5 * LINE, row_colors(segments, weights, slot_index)[None])
        sheet.text(self.left + width + COLUMN, y, note, FAINT)
        y += LINE
        for number, lines in blocks:
            if number is not None:
                color = CONVERSATIONS[(number - 1) % len(CONVERSATIONS)]
                sheet.box(self.left - 0.09, y + 0.015, 0.035, len(lines) * LINE - 0.03, color)
                sheet.text(self.left - 0.14, y, str(number), color, ha="right")
            for line in lines:
                sheet.runs(self.left, y, line)
                y += LINE
        return y + GAP


def used_images(slot_index: np.ndarray, visual_tokens: int) -> list[int]:
    """Numbers of the images that the text of some rows [R, T] speaks of."""
    return np.unique(slot_index[slot_index >= 0] // visual_tokens).tolist()


def count_conversations(segments: np.ndarray) -> int:
    """Of rows [R, T]."""
    return sum(len(np.unique(row[row != PADDING_SEGMENT])) for row in segments)


def conversation_number(runs: Sequence[Run]) -> int | None:
    """Of a segment's runs; None where they stand for conversations that are left out."""
    return None if all(run.kind == "elided" for run in runs) else runs[0].segment


def row_colors(segments: np.ndarray, weights: np.ndarray, slot_index: np.ndarray) -> np.ndarray:
    """Colours [T, 3] of a row's tokens, uint8: images and labels as in the text, the rest as its conversation."""
    colors = np.tile(_rgb(PADDING), (len(segments), 1))
    for i, color in enumerate(CONVERSATIONS):
        colors[(segments != PADDING_SEGMENT) & ((segments - 1) % len(CONVERSATIONS) == i)] = _rgb(color)
    colors[1:][weights[:-1] > 0] = _rgb("#6fcf85")
    colors[slot_index >= 0] = _rgb(STYLES["image"][1])
    return colors


def _rgb(color: str) -> np.ndarray:
    return np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)], np.uint8)


def pack_arrays(batch: Mapping[str, np.ndarray], i: int) -> dict[str, np.ndarray]:
    """Of the batch's pack i: its rows' arrays [R, T], and pixel_values [I, S, S, 3]."""
    packs = len(batch["pixel_values"])
    return {
        name: x.reshape(packs, -1, *x.shape[1:])[i] if name != "pixel_values" else x[i] for name, x in batch.items()
    }


def draw_batch(
    batch: Mapping[str, np.ndarray],
    visual_tokens: int,
    decode: Callable[[Sequence[int]], str],
    header: Sequence[str],
    packs: int,
    path: Path,
) -> int:
    """A sheet of a batch's first `packs` packs, fewer where more would not fit; returns how many."""
    step = LINE * 1.15
    columns = int((WIDTH - 2 * MARGIN) / COLUMN)
    first, *rest = (textwrap.wrap(drawable(line), columns) for line in header)
    lines = [(line, "bold") for line in first] + [(line, "normal") for part in rest for line in part]
    top = MARGIN + (len(lines) + 1) * step

    @functools.cache
    def block(i: int, limits: tuple) -> PackBlock:
        return PackBlock(i, pack_arrays(batch, i), visual_tokens, decode, limits)

    total = len(batch["pixel_values"])
    blocks = _fit(block, min(packs, total), MAX_HEIGHT - top - MARGIN)
    sheet = Sheet(top + sum(block.height for block in blocks) + MARGIN)
    for i, (line, weight) in enumerate(lines):
        sheet.text(MARGIN, MARGIN / 2 + i * step, line, weight=weight)
    of_picture = (f"▣1×{visual_tokens}", f" the {visual_tokens} tokens of") if visual_tokens > 1 else ("▣1", "")
    legend = [(of_picture[0], "image"), (f"{of_picture[1]} picture 1   ", "text"), ("trained on", "label")]
    legend += [("   read only   ↵ new line   □ not in this font", "text")]
    legend += [(f"   the first {len(blocks)} of {total} packs", "text")] if len(blocks) < total else []
    runs = [Run(text, kind, PADDING_SEGMENT, 0) for text, kind in legend]
    sheet.runs(MARGIN, MARGIN / 2 + len(lines) * step, wrap(runs, columns)[0])
    y = top
    for pack_block in blocks:
        pack_block.draw(sheet, y)
        y += pack_block.height
    sheet.save(path)
    return len(blocks)


def _fit(block: Callable[[int, tuple], PackBlock], packs: int, room: float) -> list[PackBlock]:
    """As many packs, up to `packs`, as there is room for, with as much of their text; one in any case."""
    for n in range(packs, 0, -1):
        for limits in LIMITS if n > 1 else LIMITS + TIGHTER:
            blocks, height = [], 0.0
            while len(blocks) < n and height <= room:
                blocks.append(block(len(blocks), limits))
                height += blocks[-1].height
            if height <= room:
                return blocks
    return blocks
