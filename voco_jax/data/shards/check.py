"""Are shards what was written? All of them are read back: every record unpacked, picture decoded, video opened."""

from collections.abc import Callable
import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any

from voco_jax.data.images import load_image
from voco_jax.data.processes import run_tasks
from voco_jax.data.records import BadRecord, Clip, Frames, Record
from voco_jax.data.reports import Report
from voco_jax.data.shards.build import file_digest
from voco_jax.data.shards.files import MANIFEST, REPORT, SHARD, foreign_files, left_over, read_manifest, shard_names
from voco_jax.data.shards.record_packer import check_clip, check_conversations
from voco_jax.data.sources.array_records import unpack_record
from voco_jax.data.video import probe
from voco_jax.errors import UserError
from voco_jax.io.json_files import read_object
from voco_jax.terminal import one_line


def check(directory: Path, num_workers: int, on_records: Callable[[int], Any]) -> list[str]:
    """What is wrong with a directory of `build`, a line each: shard, record, what. UserError without a manifest."""
    manifest = read_manifest(directory)
    names = shard_names(manifest["num_shards"])
    listed = dict(zip(names, manifest["shards"], strict=True)) if manifest["complete"] else {}
    problems = _check_files(directory, manifest, names, listed)
    work = ShardCheck(directory, listed, bool(manifest["arguments"].get("incomplete")))
    there = [name for name in names if (directory / f"{name}{SHARD}").exists()]
    with contextlib.closing(run_tasks(work, there, num_workers, on_records)) as results:
        found = dict(results)
    return problems + [line for name in there for line in found[name]]


def _check_files(directory: Path, manifest: dict, names: list[str], listed: dict[str, dict]) -> list[str]:
    """What is missing or too much, and reports that do not agree with the manifest or with each other."""
    there = sorted(os.listdir(directory))
    problems = [f"{name}: not of this build" for name in foreign_files(there, len(names))]
    problems += [f"{name}: left over of a build that was killed" for name in left_over(there)]
    problems += [f"{name}{SHARD}: missing" for name in names if f"{name}{SHARD}" not in there]
    if not manifest["complete"]:
        return [*problems, f"{MANIFEST}: the build is not complete; run it again with the same arguments"]
    if sum(shard["records"] for shard in listed.values()) != manifest["records"]:
        problems.append(f"{MANIFEST}: expected as many records as the shards have, found {manifest['records']}")
    total = Report()
    for name, expected in listed.items():
        try:
            result = read_object(directory / f"{name}.json")
            total.merge(Report.from_dict(result.pop("report")))
        except (UserError, KeyError, TypeError, ValueError) as error:
            problems.append(str(error) if isinstance(error, UserError) else f"{name}.json: not the report of a shard")
            continue
        if result != expected:
            problems.append(f"{name}.json: is not what {MANIFEST} says")
    return problems or _check_total(directory, manifest["rows"], total)


def _check_total(directory: Path, rows: int, total: Report) -> list[str]:
    """What differs from the sum of the shards' reports: the report of all, or the manifest's number of rows."""
    problems = []
    try:
        if Report.from_dict(read_object(directory / REPORT)) != total:
            problems.append(f"{REPORT}: is not the sum of the shards' reports")
    except UserError as error:
        problems.append(str(error))
    except (KeyError, TypeError, ValueError):
        problems.append(f"{REPORT}: not a report")
    if rows != total.seen:
        problems.append(f"{MANIFEST}: expected rows = {total.seen}, found {rows}")
    return problems


@dataclasses.dataclass(frozen=True)
class ShardCheck:
    """What a worker process does: reads the shard of this name."""

    directory: Path
    listed: dict[str, dict]  # of the manifest; empty where the build is not complete
    incomplete: bool  # clips may be cut off

    def __call__(self, name: str, step: Callable[[], Any]) -> list[str]:
        file, expected = self.directory / f"{name}{SHARD}", self.listed.get(name, {})
        problems = [
            f"expected {key} = {expected.get(key)}, found {found}"
            for key, found in file_digest(file).items()
            if expected and found != expected.get(key)
        ]
        problems += _check_records(file, expected, step, self.incomplete)
        return [f"{file.name}: {problem}" for problem in problems]


def _check_records(file: Path, expected: dict, step, incomplete: bool) -> list[str]:
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        reader = ArrayRecordReader(str(file), "readahead_buffer_size:0,max_parallelism:0")
        num_records = reader.num_records()
    except (RuntimeError, ValueError) as error:
        return [f"not readable as ArrayRecord: {one_line(str(error))}"]
    if not reader.ok():
        return ["not readable as ArrayRecord, or cut off"]
    problems = []
    if expected and num_records != expected["records"]:
        problems.append(f"expected {expected['records']} records, found {num_records}")
    for i in range(num_records):
        name = ""
        try:
            record = unpack_record(reader.read([i])[0])
            name = f" ({record.name})"
            check_record(record, incomplete)
        except (BadRecord, RuntimeError) as error:
            problems.append(one_line(f"record {i}{name}: {error}"))
        step()
    return problems


def check_record(record: Record, incomplete: bool = False) -> None:
    """BadRecord unless all of it can be used: conversations, pictures, the beginning of a video."""
    check_conversations(record)
    pictures = [*record.images, *(record.video.pictures if isinstance(record.video, Frames) else ())]
    for picture in pictures:
        load_image(picture)
    if isinstance(record.video, Clip):
        check_clip(dataclasses.replace(record.video, incomplete=incomplete))
    elif record.video is not None:
        probe(record.video)  # whether times ascend
