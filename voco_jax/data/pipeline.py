"""The Grain pipeline: records to batches of fixed shape, shuffled by seed, resumable from a small state."""

from collections import Counter
from collections.abc import Sequence
import dataclasses

import grain
from ml_collections import ConfigDict
import numpy as np

from voco_jax.data.conversations import ConversationError, Encoder, Sample
from voco_jax.data.images import ImageProcessor, load_image
from voco_jax.data.packing import pack_row, truncate
from voco_jax.data.sources import Record
from voco_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class EncodedRecord:
    images: Sequence
    samples: Sequence[Sample]


def encode_records(records: Sequence[Record], encoder: Encoder, row_length: int) -> tuple[list[EncodedRecord], Counter]:
    """Tokenized records and a count of what became of the conversations, for `report_line`.

    Conversations that cannot be used are left out; text beyond `row_length` tokens (0: any number) is cut off, never
    an image, and where an image or every label lies beyond it the conversation is left out. UserError if none is left.
    """
    counts, encoded, memo = Counter(), [], {}
    for record in records:
        samples = []
        for turns in record.conversations:
            key = len(record.images), repr(turns)
            if key not in memo:
                memo[key] = _encode(turns, len(record.images), encoder, row_length)
            sample, outcome, lost = memo[key]
            counts[outcome] += 1
            counts["tokens cut"] += lost
            if sample is not None:
                samples.append(sample)
        if samples:
            encoded.append(EncodedRecord(record.images, samples))
    if not encoded:
        raise UserError(f"data: no usable conversation in the training set: {report_line(counts)}")
    return encoded, counts


def _encode(turns, num_images: int, encoder: Encoder, row_length: int) -> tuple[Sample | None, str, int]:
    try:
        sample = encoder.encode(turns, num_images)
    except ConversationError as error:
        return None, f"left out: {error}", 0
    kept = truncate(sample, row_length) if row_length else sample
    if kept is None:
        return None, f"left out: an image or every label beyond data.row_length = {row_length} tokens", 0
    return kept, "cut" if kept is not sample else "whole", len(sample) - len(kept)


def report_line(counts: Counter) -> str:
    """`38575 conversations: 38573 whole, 1 cut (12 tokens), 1 left out (turn 0 (human): expected text, found none)`"""
    left_out = {outcome: n for outcome, n in counts.items() if outcome.startswith("left out: ")}
    parts = [f"{counts['whole']} whole"]
    if counts["cut"]:
        parts.append(f"{counts['cut']} cut ({counts['tokens cut']} tokens)")
    if left_out:
        reasons = "; ".join(f"{n}× {outcome.removeprefix('left out: ')}" for outcome, n in left_out.items())
        parts.append(f"{sum(left_out.values())} left out ({reasons})")
    total = counts["whole"] + counts["cut"] + sum(left_out.values())
    return f"{total} conversations: {', '.join(parts)}"


class RecordToRows(grain.transforms.RandomMap):
    """A record's pictures and a random choice of its conversations, laid out over rows of fixed length."""

    def __init__(self, data: ConfigDict, row_length: int, processor: ImageProcessor):
        self._images_per_record = data.images_per_record
        self._conversations = data.conversations_per_record
        self._rows = data.rows_per_record
        self._row_length = row_length
        self._processor = processor

    def random_map(self, record: EncodedRecord, rng: np.random.Generator) -> dict[str, np.ndarray]:
        order = rng.permutation(len(record.samples))[: self._conversations]
        rows: list[list[Sample]] = [[] for _ in range(self._rows)]
        for i in order:  # first row with room; a conversation that finds none waits for the record's next turn
            sample = record.samples[i]
            for row in rows:
                if sum(map(len, row)) + len(sample) <= self._row_length:
                    row.append(sample)
                    break
        arrays = [pack_row(row, self._row_length).arrays() for row in rows]
        batch = {name: np.stack([row[name] for row in arrays]) for name in arrays[0]}
        batch["pixel_values"] = stack_images(record.images, self._images_per_record, self._processor)
        batch["num_conversations"] = np.int32(sum(map(len, rows)))
        return batch


def stack_images(images: Sequence, count: int, processor: ImageProcessor) -> np.ndarray:
    """`pixel_values` [count, size, size, 3] of picture files; places without a picture are zero, and never read."""
    if len(images) > count:
        raise UserError(f"data.images_per_record: expected at least {len(images)} ({images[0]} …), found {count}")
    pixels = np.zeros((count, processor.size, processor.size, 3), np.float32)
    for i, image in enumerate(images):
        pixels[i] = processor(load_image(image))
    return pixels


def make_dataset(records: Sequence[EncodedRecord], data: ConfigDict, processor: ImageProcessor, seed: int):
    """Endless batches, each record once an epoch: a Grain dataset whose iterator's state says where it stands.

    A batch is a dict: read rows [records·rows, T] as in `packing.Row`, `pixel_values` [records, I, size, size, 3].
    """
    if len(records) < data.batch_size:
        raise UserError(
            f"data.batch_size: expected at most {len(records)}, the number of records; found {data.batch_size}"
        )
    if not data.row_length and data.rows_per_record < data.conversations_per_record:
        raise UserError(
            f"data.rows_per_record: expected at least data.conversations_per_record ({data.conversations_per_record}) "
            f"where data.row_length is 0 and a row may hold one conversation only; found {data.rows_per_record}"
        )
    row_length = data.row_length or max(len(sample) for record in records for sample in record.samples)
    dataset = (
        grain.MapDataset.source(records)
        .seed(seed)
        .shuffle()
        .repeat()
        .random_map(RecordToRows(data, row_length, processor))
        .batch(data.batch_size)
        .map(_merge_rows)
    )
    options = grain.ReadOptions(num_threads=data.num_threads, prefetch_buffer_size=2 * data.num_threads)
    return dataset.to_iter_dataset(options)


def _merge_rows(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rows of a record to rows of the batch: [records, rows, T] to [records·rows, T]."""
    apart = ("pixel_values", "num_conversations")
    return {name: x if name in apart else x.reshape(-1, x.shape[-1]) for name, x in batch.items()}
