"""Checksums of the records of a run, without the names of their files: a run can go on with data that were moved.

The plan's fingerprint tells whether text and lengths are the same. This module names the difference, and compares
pictures and clips, which the plan does not read.
"""

from collections.abc import Sequence
import concurrent.futures
import contextlib
import hashlib
import io

import numpy as np

from voco_jax.data.index import Index
from voco_jax.data.records import BadRecord, Encoded, Frames, Source
from voco_jax.data.sources.roots import open_file

SAMPLED = 64  # records of a source whose pictures or clip are read; of a smaller source it is all
_EDGE = 2**20  # bytes at each end of a file; of a clip, all that is read beside its size
_THREADS = 16  # a bucket takes its time


def contents_of(source: Source, index: Index) -> dict:
    """The contents of a source, for JSON: how many records and conversations can be used, a checksum of their text, and
    checksums of the pictures or clips of `SAMPLED` records spread evenly, as far as these can be read.

    The latter are keyed by the record's place in the source.
    """
    places = np.unique(np.linspace(0, len(index) - 1, min(SAMPLED, len(index))).round().astype(np.int64))
    return {
        "records": len(index),
        "conversations": len(index.lengths),
        "text": index.text_checksum(),
        "visual": visual_checksums(source, index.records[places].tolist()),
    }


def visual_checksums(source: Source, records: Sequence[int]) -> dict[str, str]:
    """Checksums of the pictures or clips of some records of a source, as far as these can be read."""
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        checksums = list(pool.map(lambda i: _visual_checksum(source, i), records))
    return {str(i): checksum for i, checksum in zip(records, checksums, strict=True) if checksum}


def difference(before: dict, now: dict, source: Source) -> str:
    """One line on how `now` differs from `before`; '' where it does not."""
    for what in ("records", "conversations"):
        if before[what] != now[what]:
            return f"{before[what]:,} usable {what} when this run began, {now[what]:,} now"
    if before["text"] != now["text"]:
        return "conversations of other text than when this run began"
    both = before["visual"].keys() & now["visual"].keys()
    changed = [int(i) for i in both if before["visual"][i] != now["visual"][i]]
    if changed:
        return f"{source.where(min(changed))} has another picture or clip than when this run began"
    if before["visual"] and not both:
        i = min(map(int, before["visual"]))
        return (
            f"no picture or clip of the {len(before['visual'])} looked at can be read now, as that of {source.where(i)}"
        )
    return ""


def _visual_checksum(source: Source, i: int) -> str:
    """A checksum of a record's pictures or clip; '' where it has none, or one cannot be read."""
    with contextlib.suppress(BadRecord, OSError):
        record = source[i]
        seen: Sequence[Encoded] = record.images
        if record.video is not None:
            seen = record.video.pictures if isinstance(record.video, Frames) else [record.video]
        digest = hashlib.blake2b(digest_size=8)
        for encoded in seen:
            _update(digest, encoded)
        return digest.hexdigest() if seen else ""
    return ""


def _update(digest, encoded: Encoded) -> None:
    with io.BytesIO(encoded.data) if encoded.data is not None else open_file(encoded.file) as stream:
        size = stream.seek(0, io.SEEK_END)
        digest.update(size.to_bytes(8))
        for start in (0, max(_EDGE, size - _EDGE)):
            stream.seek(start)
            digest.update(stream.read(_EDGE))
