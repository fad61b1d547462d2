"""A read row as text to look at: what `python -m voco_jax.preview` writes, before it is drawn."""

from collections.abc import Callable, Mapping, Sequence
import functools
import itertools
from typing import NamedTuple
import unicodedata

from matplotlib import font_manager
import numpy as np

from voco_jax.data.packing import PADDING_SEGMENT

FONT = "DejaVu Sans Mono"  # comes with matplotlib


class Run(NamedTuple):
    """Text drawn alike, which stands for so many tokens of a segment; `kind` is text, label, image or elided."""

    text: str
    kind: str
    segment: int
    tokens: int


def row_runs(
    row: Mapping[str, np.ndarray],
    visual_tokens: int,
    decode: Callable[[Sequence[int]], str],
    max_tokens: int | None = None,
    max_conversations: int | None = None,
) -> list[Run]:
    """A read row, arrays [T] as in `packing.Row`, as runs; padding has none.

    `visual_tokens` is M, those of an image: together they are one run, `▣3×8` for the 8 of the pack's third. Of a
    conversation only the first and last tokens are shown, `max_tokens` in all (an image counts as one), and likewise
    of a row's conversations.
    """
    segments, slot_index = row["segment_ids"], row["slot_index"]
    images = np.where(slot_index >= 0, slot_index // visual_tokens, -1)
    is_label = np.concatenate([[False], row["weights"][:-1] > 0])  # a weight stands at the token before the label
    begins_unit = (images < 0) | np.concatenate([[True], images[1:] != images[:-1]])
    runs = []

    def show(places: np.ndarray) -> None:
        kinds = itertools.groupby(places.tolist(), lambda t: (int(images[t]), bool(is_label[t])))
        for (image, label), group in kinds:
            group, segment = list(group), int(segments[places[0]])
            if image >= 0:
                text, kind = f"▣{image + 1}" + (f"×{len(group)}" if len(group) > 1 else ""), "image"
            else:
                text, kind = decode(row["tokens"][group].tolist()), "label" if label else "text"
            runs.append(Run(text, kind, segment, len(group)))

    def leave_out(places: np.ndarray, what: str) -> None:
        labels = int(is_label[places].sum())
        text = f" ⋯ {what}{len(places):,} tokens left out, {labels:,} trained on ⋯ "
        runs.append(Run(text, "elided", int(segments[places[0]]), len(places)))

    conversations = [np.flatnonzero(segments == s) for s in np.unique(segments[segments != PADDING_SEGMENT])]
    first, hidden, last = _middle_out(conversations, max_conversations)
    for i, places in enumerate([*first, *last]):
        if hidden and i == len(first):
            leave_out(np.concatenate(hidden), f"{len(hidden)} conversation{'s' * (len(hidden) > 1)}, ")
        units = np.split(places, np.flatnonzero(begins_unit[places])[1:])
        head, middle, tail = _middle_out(units, max_tokens)
        show(np.concatenate(head))
        if middle:
            leave_out(np.concatenate(middle), "")
            show(np.concatenate(tail))
    return runs


def _middle_out(things: list, most: int | None) -> tuple[list, list, list]:
    """(the first, those left out, the last), so that at most `most` (2 or above) are not left out."""
    if most is None or len(things) <= most:
        return things, [], []
    return things[: most - most // 2], things[most - most // 2 : len(things) - most // 2], things[-(most // 2) :]


def wrap(runs: Sequence[Run], columns: int) -> list[list[tuple[int, Run]]]:
    """Lines of (column, run): runs one after the other, broken at spaces (which may hang over the end by one)."""
    text, kinds = "".join(run.text for run in runs), [i for i, run in enumerate(runs) for _ in run.text]
    lines, start = [], 0
    while start < len(text):
        end = min(len(text), start + columns)
        if end < len(text) and " " in text[start + 1 : end + 1]:
            end = text.rindex(" ", start + 1, end + 1) + 1
        line = []
        for i, group in itertools.groupby(range(start, end), lambda place: kinds[place]):
            group = list(group)
            line.append((group[0] - start, runs[i]._replace(text=text[group[0] : group[-1] + 1])))
        lines.append(line)
        start = end
    return lines


def make_decoder(tokenizer) -> Callable[[Sequence[int]], str]:
    """Ids to text that the font can draw, a character a column; also from the middle of a text, spaces included."""
    before = [tokenizer.eos_token_id]  # at the very front of a text some tokenizers drop a space

    def text(ids: Sequence[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def decode(ids: Sequence[int]) -> str:
        return drawable(text([*before, *ids])[len(text(before)) :])

    return decode


def drawable(text: str) -> str:
    """One character of the drawing's font for each of the text's: □ for those that it has not.

    >>> drawable("Où est\\nle 猫?")
    'Où est↵le □?'
    """
    return "".join(map(_glyph, unicodedata.normalize("NFC", text)))


@functools.cache
def _glyph(letter: str) -> str:
    if letter in "\n\t":
        return "↵" if letter == "\n" else "→"
    # Letters written from right to left would be moved to other columns than were computed for them
    has_column = letter.isprintable() and unicodedata.bidirectional(letter) not in ("R", "AL", "AN", "NSM")
    return letter if has_column and _font().get_char_index(ord(letter)) else "□"


@functools.cache
def _font():
    return font_manager.get_font(font_manager.findfont(FONT))
