"""A packed batch as text to look at: what `voco preview` shows, before it is a page."""

from collections.abc import Callable, Mapping, Sequence
import itertools
from typing import NamedTuple

import numpy as np

from voco_jax.data.packing import OF_PACKS, PADDING_SEGMENT


class Run(NamedTuple):
    """Text that is shown in one style. It stands for `tokens` tokens of a segment; `kind` is text, label or image."""

    text: str
    kind: str
    segment: int
    tokens: int


def row_runs(row: Mapping[str, np.ndarray], visual_tokens: int, decode: Callable[[Sequence[int]], str]) -> list[Run]:
    """A row, arrays [T] as in `packing.Row`, as runs; padding has none.

    `visual_tokens` is M, the tokens of an image. Together they are one run: `▣3×8` for the 8 of the pack's third image.
    """
    segments, slots = row["segment_ids"], row["slot_index"]
    images = np.where(slots >= 0, slots // visual_tokens, -1).tolist()
    is_label = np.concatenate([[False], row["weights"][:-1] > 0]).tolist()  # a weight stands before its label
    places = np.flatnonzero(segments != PADDING_SEGMENT).tolist()
    runs = []
    for (segment, image, label), group in itertools.groupby(
        places, lambda t: (int(segments[t]), images[t], is_label[t])
    ):
        tokens = list(group)
        if image >= 0:
            text, kind = f"▣{image + 1}" + (f"×{len(tokens)}" if len(tokens) > 1 else ""), "image"
        else:
            text, kind = decode(row["tokens"][tokens].tolist()), "label" if label else "text"
        runs.append(Run(text, kind, segment, len(tokens)))
    return runs


def make_decoder(tokenizer) -> Callable[[Sequence[int]], str]:
    """A function from ids to their text, also from the middle of a text, spaces included."""
    before = [tokenizer.eos_token_id]  # at the very front of a text some tokenizers drop a space

    def text(ids: Sequence[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    return lambda ids: text([*before, *ids])[len(text(before)) :]


def pack_arrays(batch: Mapping[str, np.ndarray], i: int) -> dict[str, np.ndarray]:
    """The arrays of the batch's pack i: those of its rows [R, T], and those of `OF_PACKS` without a pack's axis."""
    packs = len(batch["pixel_values"])
    return {name: x[i] if name in OF_PACKS else x.reshape(packs, -1, *x.shape[1:])[i] for name, x in batch.items()}


def used_images(slots: np.ndarray, visual_tokens: int) -> list[int]:
    """Numbers of the images that the text of some rows [R, T] speaks of."""
    return np.unique(slots[slots >= 0] // visual_tokens).tolist()


def count_conversations(segments: np.ndarray) -> int:
    """How many conversations stand in rows [R, T]."""
    return sum(len(np.unique(row[row != PADDING_SEGMENT])) for row in segments)
