"""Records of a source, every one looked at, into ArrayRecord shards; what cannot be used is counted and skipped.

Which records a shard holds follows from the source's order alone, so shards are the same with any number of processes,
and a build that was killed goes on with the shards that are missing.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Any
import warnings

from voco_jax.data.processes import run_tasks
from voco_jax.data.records import BadRecord
from voco_jax.data.reports import Report
from voco_jax.data.shards.files import MANIFEST, REPORT, SHARD, begin, shard_names, write_json
from voco_jax.data.shards.record_packer import RecordPacker
from voco_jax.errors import UserError
from voco_jax.io.atomic import replacing
from voco_jax.io.json_files import read_object

WRITER_OPTIONS = "group_size:1,uncompressed"  # each record by itself, for any order; pictures are compressed already


@dataclasses.dataclass(frozen=True)
class ShardWriter:
    """What a worker process does: writes the shard with the number `task`, and beside it what became of its records."""

    directory: Path
    ranges: Sequence[range]  # the records of the source that each shard takes
    packer: RecordPacker

    def __call__(self, task: int, step: Callable[[], Any]) -> None:
        warnings.filterwarnings("ignore", module="PIL")  # large pictures, damaged EXIF: the report has what matters
        name = shard_names(len(self.ranges))[task]
        file = self.directory / f"{name}{SHARD}"
        with replacing(file, shared=True) as temporary:
            temporary.touch(exist_ok=False)  # OSError here; ArrayRecord would say nothing until there is much to write
            result = self._write(temporary, self.ranges[task], step)
            write_json(self.directory / f"{name}.json", result)

    def _write(self, temporary: Path, records: range, step: Callable[[], Any]) -> dict:
        report, written = Report(), 0
        with open_writer(temporary, WRITER_OPTIONS) as write:
            for i in records:
                report.seen += 1
                warned: list[tuple[str, str]] = []
                try:
                    content = self.packer(i, lambda *found, warned=warned: warned.append(found))
                except BadRecord as error:
                    report.add_skipped(error, self.packer.source.where(i))
                else:
                    write(content)
                    written += 1
                    for kind, picture in warned:
                        report.add_warned(kind, f"{self.packer.source.where(i)}: {picture}")
                step()
        return {"records": written, **file_digest(temporary), "report": report.to_dict()}


@contextlib.contextmanager
def open_writer(file: Path, options: str) -> Iterator[Callable[[bytes], None]]:
    """A new ArrayRecord file; the function that is given appends a record. UserError for a full disk."""
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(file), options)

    def guarded(function: Callable, *args) -> None:
        try:
            function(*args)
        except RuntimeError as error:  # "write() failed: No space left on device; writing …"
            raise UserError(f"{file}: {str(error).split(';')[0]}") from None

    yield functools.partial(guarded, writer.write)
    guarded(writer.close)


def file_digest(file: Path) -> dict:
    """Size and SHA-256, for the manifest."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return {"bytes": stream.tell(), "sha256": digest}


def split_records(num_records: int, records_per_shard: int = 0, num_shards: int = 0) -> list[range]:
    """The records of each shard, in order: so many a shard, or so many shards of nearly the same size.

    >>> split_records(5, records_per_shard=2)
    [range(0, 2), range(2, 4), range(4, 5)]
    >>> split_records(5, num_shards=2)
    [range(0, 2), range(2, 5)]
    """
    if num_shards:
        ends = [i * num_records // num_shards for i in range(num_shards + 1)]
    else:
        ends = [*range(0, num_records, records_per_shard), num_records]
    return [range(start, end) for start, end in zip(ends, ends[1:], strict=False)]


def build(
    packer: RecordPacker,
    directory: Path,
    arguments: dict,
    ranges: Sequence[range],
    num_workers: int,
    max_skipped_fraction: float,
    on_records: Callable[[int], Any],
) -> Report:
    """Write all shards that are not there yet. `arguments` is all that their bytes depend on, for the manifest.

    `on_records` is called with the number of records done. UserError if more than `max_skipped_fraction` of the records
    are skipped; the shards that are whole then stay for another attempt.
    """
    fingerprint = packer.source.fingerprint()
    names, total, reports = shard_names(len(ranges)), sum(map(len, ranges)), Report()

    def add(shard: int) -> None:
        reports.merge(Report.from_dict(read_result(directory, names[shard])["report"]))
        reports.check(max_skipped_fraction, total, option="--max-skipped-fraction")

    with begin(directory, arguments, len(ranges)) as manifest:
        done = [shard for shard, name in enumerate(names) if (directory / f"{name}{SHARD}").exists()]
        for shard in done:
            add(shard)
            on_records(len(ranges[shard]))
        missing = sorted(set(range(len(ranges))) - set(done))
        writer = ShardWriter(directory, ranges, packer)
        with contextlib.closing(run_tasks(writer, missing, num_workers, on_records)) as written:
            for shard, _ in written:
                add(shard)
        results = [read_result(directory, name) for name in names]
        report = Report()  # in the order of the shards, whatever the order they were made in
        for result in results:
            report.merge(Report.from_dict(result.pop("report")))
        write_json(directory / REPORT, report.to_dict())
        records = sum(result["records"] for result in results)
        if packer.source.fingerprint() != fingerprint:
            raise UserError(f"{packer.source.where(0)}: the file changed meanwhile; build anew, in another directory")
        if not records:
            raise UserError(f"{packer.source.where(0)} …: no record that can be used; {directory / REPORT} tells why")
        write_json(
            directory / MANIFEST,
            manifest | {"complete": True, "rows": total, "records": records, "shards": results},
        )
    return report


def read_result(directory: Path, name: str) -> dict:
    """What a worker wrote beside a shard; UserError where the two do not match."""
    file = directory / f"{name}.json"
    result = read_object(file)
    size = (directory / f"{name}{SHARD}").stat().st_size
    if not isinstance(result.get("report"), dict) or result.get("bytes") != size:
        raise UserError(f"{directory / name}{SHARD}: does not match {file.name}; delete it to have it made anew")
    return result
