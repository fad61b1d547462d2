"""Samples laid out in rows of fixed length, as the pipeline does: one-dimensional arrays give every mask."""

from collections.abc import Sequence
import dataclasses

import numpy as np

from voco_jax.data.conversations import Sample
from voco_jax.errors import UserError

PADDING_SEGMENT = 0
OF_PACKS = ("pixel_values", "num_tokens")  # arrays of a batch with an entry a pack; all others have one a read row


@dataclasses.dataclass
class Row:
    """One read row, every array [T]. `targets` is the next token, `weights` above 0 where it is a label, else 0."""

    tokens: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    slot_index: np.ndarray
    targets: np.ndarray
    weights: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def truncate(sample: Sample, length: int) -> Sample | None:
    """The sample cut to `length` tokens; None where an image would be cut or no label would be left."""
    if len(sample) <= length:
        return sample
    if (sample.slot_index[length:] >= 0).any() or not sample.labels[:length].any():
        return None
    return Sample(sample.tokens[:length], sample.labels[:length], sample.slot_index[:length], sample.num_images)


WEIGHTINGS = ("token", "conversation")


def pack_row(
    samples: Sequence[Sample], length: int, first_slot: Sequence[int] | None = None, weighting: str = "token"
) -> Row:
    """Lay whole samples one after the other, each a segment (1, 2, …) with positions from 0; 0 is padding.

    `first_slot[i]` is where sample i's first visual token stands among the row's (default 0: all samples speak of
    the same images). With `weighting` 'conversation' a sample's weights sum to 1, however many labels it has. Raises
    UserError where they do not fit.

    >>> sample = Sample(tokens=np.array([9, 5, 6, 7]), labels=np.array([0, 0, 1, 1], bool),
    ...                 slot_index=np.array([0, -1, -1, -1]), num_images=1)
    >>> row = pack_row([sample, sample], length=9)
    >>> row.segment_ids.tolist(), row.positions.tolist()
    ([1, 1, 1, 1, 2, 2, 2, 2, 0], [0, 1, 2, 3, 0, 1, 2, 3, 0])
    >>> row.targets.tolist(), row.weights.tolist()
    ([5, 6, 7, 0, 5, 6, 7, 0, 0], [0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0])
    """
    total = sum(len(sample) for sample in samples)
    if total > length:
        raise UserError(f"row: {len(samples)} samples of {total} tokens do not fit into {length}")
    tokens, positions, segment_ids, slot_index, targets = np.zeros((5, length), np.int32)
    row = Row(tokens, positions, segment_ids, slot_index, targets, np.zeros(length, np.float32))
    row.slot_index[:] = -1
    start = 0
    for i, sample in enumerate(samples):
        end = start + len(sample)
        row.tokens[start:end] = sample.tokens
        row.positions[start:end] = np.arange(len(sample))
        row.segment_ids[start:end] = i + 1
        offset = first_slot[i] if first_slot is not None else 0
        row.slot_index[start:end] = np.where(sample.slot_index >= 0, sample.slot_index + offset, -1)
        row.targets[start : end - 1] = sample.tokens[1:]
        labels = sample.labels[1:]
        row.weights[start : end - 1] = labels / max(1, labels.sum()) if weighting == "conversation" else labels
        start = end
    return row
