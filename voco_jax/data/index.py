"""Second of sources → index → plan → pipeline → batches: what is known of every record before training.

That is how many images a record has, and how many tokens its conversations have. The plan of an epoch (`plan.py`)
depends on these lengths alone, so it is the same on every host and in every worker. Most records that cannot be used
are found here, by their text and their videos' headers.
"""

from collections.abc import Callable
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from pathlib import Path
import struct
import time
from typing import Any
import zipfile
import zlib

import numpy as np
from tqdm import tqdm

from voco_jax.data.processes import run_tasks
from voco_jax.data.records import DAMAGED, MISSING, UNREADABLE_VIDEO, BadRecord, Picture, Record, Source
from voco_jax.data.reports import Report
from voco_jax.data.samples import SampleMaker
from voco_jax.errors import UserError
from voco_jax.io.atomic import open_for_writing
from voco_jax.io.files import open_regular
from voco_jax.terminal import log_once

CHUNK = 256  # records that a worker process looks at in one go
WORTH_WORKERS = 10_000  # records; with fewer it takes longer to start the workers than to look at all
KEPT_FROM = 5.0  # seconds; an index that took longer is kept in the cache directory
VERSION = 7  # of the arrays' meaning: an older cache is made anew


_OF_CONVERSATIONS = ("conversations", "lengths", "digests", "answers")


@dataclasses.dataclass
class Index:
    """Arrays of the n usable records of a source and their m usable conversations.

    records [n]: their places in the source. num_images [n]. pictures [n]: equal where the images are the same, 0 for
    none. offsets [n + 1]: record i has conversations offsets[i] … offsets[i + 1]. conversations [m]: which of the
    record's. lengths [m]: tokens. digests [m]: checksums of the tokens. answers [m]: those of all labels, before a
    conversation is cut: the same for prompts of any other form in which the answers have the same tokens.
    """

    records: np.ndarray
    num_images: np.ndarray
    pictures: np.ndarray
    offsets: np.ndarray
    conversations: np.ndarray
    lengths: np.ndarray
    digests: np.ndarray
    answers: np.ndarray
    report: Report

    def __len__(self):
        return len(self.records)

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "report"}

    def every(self, n: int) -> "Index":
        """About one record of n; those about the same images stay together."""
        if n == 1:
            return self
        keys = np.where(self.pictures, self.pictures, 1 + np.arange(len(self))).astype(np.uint64)
        mixed = (keys * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)
        kept = np.flatnonzero(mixed % np.uint64(n) == 0)
        return self.select(kept)

    def select(self, kept: np.ndarray) -> "Index":
        """Some of the records, by their places among the index's, ascending."""
        counts = np.diff(self.offsets)[kept]
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        within = np.arange(offsets[-1]) - np.repeat(offsets[:-1] - self.offsets[kept], counts)
        of_records = {name: getattr(self, name)[kept] for name in ("records", "num_images", "pictures")}
        of_conversations = {name: getattr(self, name)[within] for name in _OF_CONVERSATIONS}
        return dataclasses.replace(self, offsets=offsets, **of_records, **of_conversations)

    @property
    def keys(self) -> np.ndarray:
        """Of each conversation record << 32 | conversation, [m], ascending."""
        return np.repeat(self.records, np.diff(self.offsets)) << 32 | self.conversations

    def locate(self, i: int) -> tuple[int, int]:
        """(record's place in the source, conversation of the record) of the i-th of all conversations."""
        record = int(np.searchsorted(self.offsets, i, side="right")) - 1
        return int(self.records[record]), int(self.conversations[i])

    def find(self, there: np.ndarray) -> np.ndarray:
        """Where this index's conversations stand among others of the same source, of which `there` are the keys,
        ascending: [m]; -1: nowhere."""
        if not len(there):
            return np.full(len(self.keys), -1)
        at = np.minimum(np.searchsorted(there, self.keys), len(there) - 1)
        return np.where(there[at] == self.keys, at, -1)

    def text_checksum(self) -> str:
        """A checksum of the usable conversations, their places and tokens; names of pictures do not count."""
        digest = hashlib.sha256()
        for name, array in self.arrays.items():
            if name == "answers":  # checkpoints have this checksum, and the tokens are in it
                continue
            digest.update(same_pictures(array).tobytes() if name == "pictures" else array.tobytes())
        return digest.hexdigest()[:16]


def same_pictures(keys: np.ndarray) -> np.ndarray:
    """Which pictures are the same, not what they are called: the place of each key's first occurrence."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return first[inverse]


def make_index(source: Source, maker: SampleMaker, cache_dir: str | os.PathLike, num_workers: int, label: str) -> Index:
    """The index of a source: from the cache directory, or made by looking at every record in `num_workers` processes
    (0: this one).

    A line on standard error tells where the cache cannot be written (no home, no permission, a full disk).
    """
    file = _cache_file(source, maker, cache_dir)
    if (kept := _kept(file)) is not None:
        return kept
    start = time.monotonic()
    chunks = [range(at, min(at + CHUNK, len(source))) for at in range(0, len(source), CHUNK)]
    with tqdm(total=len(source), unit="record", desc=f"indexing {label}", mininterval=0.5, delay=2) as bar:
        scan = functools.partial(_scan, source, maker)
        if num_workers == 0 or len(source) < WORTH_WORKERS:
            parts = {chunk: scan(chunk, bar.update) for chunk in chunks}
        else:
            with contextlib.closing(run_tasks(scan, chunks, num_workers, bar.update)) as found:
                parts = dict(found)
    index = _join([parts[chunk] for chunk in chunks])
    # Files that may come, or were not read for an error of the disk: shards say no more than that it failed
    passing = {MISSING, UNREADABLE_VIDEO, DAMAGED} & index.report.skipped.keys()
    if time.monotonic() - start > KEPT_FROM and not passing:
        _save(index, file)
    return index


def _scan(source: Source, maker: SampleMaker, chunk: range, step: Callable[[], Any]) -> Index:
    records: list[int] = []
    num_images: list[int] = []
    pictures: list[int] = []
    offsets = [0]
    conversations: list[int] = []
    lengths: list[int] = []
    digests: list[int] = []
    answers: list[int] = []
    report = Report()
    for i in chunk:
        step()
        if (read := maker.read(source, i, report)) is None:
            continue
        record, times = read
        found = _lengths(record, times, maker, report, source.where(i))
        if found:
            records.append(i)
            num_images.append(len(record.images) if times is None else len(times))
            pictures.append(_picture_key(record))
            conversations += found
            lengths += [length for length, _, _ in found.values()]
            digests += [digest for _, digest, _ in found.values()]
            answers += [answer for _, _, answer in found.values()]
            offsets.append(len(lengths))
    return Index(
        np.array(records, np.int64), np.array(num_images, np.int32), np.array(pictures, np.int64),
        np.array(offsets, np.int64), np.array(conversations, np.int32), np.array(lengths, np.int32),
        np.array(digests, np.int64), np.array(answers, np.int64), report,
    )  # fmt: skip


def _lengths(record: Record, times, maker: SampleMaker, report: Report, where: str) -> dict[int, tuple[int, int, int]]:
    """(tokens, their checksum, that of the answers) of the record's usable conversations; the report counts all."""
    lengths = {}
    for i in range(len(record.conversations)):
        report.seen += 1
        try:
            sample, cut, answers = maker.sample(record, i, times)
        except BadRecord as error:
            report.add_skipped(error, where)
            continue
        lengths[i] = len(sample), zlib.crc32(sample.tokens.tobytes()), answers
        report.cut += cut > 0
        report.tokens_cut += cut
    return lengths


def _picture_key(record: Record) -> int:
    names = [_picture_name(picture) for picture in record.images]
    if record.video is not None:
        names = ["video", str(record.video)]  # a picture may be called the same
    if not names:
        return 0
    digest = hashlib.blake2b("\0".join(names).encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def _picture_name(picture: Picture) -> str:
    if picture.name or picture.data is None:
        return str(picture)
    return hashlib.sha256(picture.data).hexdigest()


def _join(parts: list[Index]) -> Index:
    joined, report = {}, Report()
    for part in parts:
        report.merge(part.report)
    for name in parts[0].arrays:
        joined[name] = np.concatenate([part.arrays[name] for part in parts])
    counts = [np.diff(part.offsets) for part in parts]
    joined["offsets"] = np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64)
    return Index(**joined, report=report)


# ---- The cache: an .npz file a source and way of encoding -------------------------------------------------------


def _cache_file(source: Source, maker: SampleMaker, directory: str | os.PathLike) -> Path:
    encoder = maker.encoder
    parts = (
        VERSION, source.fingerprint(), encoder.tokenizer.backend_tokenizer.to_str(), encoder.template,
        encoder.num_voco_tokens, encoder.num_visual_tokens, encoder.compressed, encoder.verbatim,
        encoder.system, encoder.image_position,
        maker.row_length, maker.max_images, maker.sampling, maker.timestamps, maker.incomplete,
    )  # fmt: skip
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()
    return Path(os.path.expanduser(directory)) / f"index-{digest[:24]}.npz"


def _save(index: Index, file: Path) -> None:
    try:
        if str(file).startswith("~"):
            raise OSError("there is no home directory")
        file.parent.mkdir(parents=True, exist_ok=True)
        report = np.array(json.dumps(index.report.to_dict()))
        with open_for_writing(
            file, shared=True
        ) as stream:  # several processes of a host may do this, and write the same
            np.savez(stream, **{**index.arrays, "report": report})  # type: ignore[arg-type]  # of numpy's own option
    except OSError as error:
        log_once(
            f"data: {file.parent}: indices cannot be kept there: {error.strerror or error} (config.data.cache_dir)"
        )


# Of numpy and zipfile, where a file is not what they have written
_DAMAGE = (
    ValueError, LookupError, TypeError, AttributeError, ArithmeticError, EOFError, MemoryError, RuntimeError,
    struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def _kept(file: Path) -> Index | None:
    try:
        return _load(file) if file.is_file() else None
    except OSError:  # no permission, a file system that is away: it is made anew
        return None


def _load(file: Path) -> Index:
    try:
        with open_regular(file) as stream, np.load(stream, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored}
        report = Report.from_dict(json.loads(str(arrays.pop("report"))))
        return Index(**arrays, report=report)
    except _DAMAGE as error:
        raise UserError(f"{file}: damaged ({error!r:.100}); delete it, and the index is made anew") from None
