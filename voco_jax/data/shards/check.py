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
from voco_jax.data.reports import Report, one_line
from voco_jax.data.shards.build import file_digest
from voco_jax.data.shards.files import MANIFEST, REPORT, SHARD, foreign_files, left_over, read_manifest, shard_names
from voco_jax.data.shards.record_packer import check_clip, check_conversations
from voco_jax.data.sources.array_records import unpack_record
from voco_jax.data.video import probe
from voco_jax.errors import UserError
from voco_jax.io.json_files import read_object


def check(directory: Path, num_workers: int, on_records: Callable[[int], Any]) -> list[str]:
    """What is wrong with a directory of `build`, a line each: shard, record, what. UserError without a manifest."""
    manifest = read_manifest(directory)
    problems = check_manifest(directory, manifest)
    names = shard_names(manifest["num_shards"])
    incomplete = bool(manifest["arguments"].get("incomplete"))
    work = ShardCheck(directory, manifest["shards"] if manifest["complete"] else [], incomplete)
    shards = [i for i, name in enumerate(names) if (directory / f"{name}{SHARD}").exists()]
    with contextlib.closing(run_tasks(work, shards, num_workers, on_records)) as results:
        found = dict(results)
    return problems + [line for shard in sorted(found) for line in found[shard]]


def check_manifest(directory: Path, manifest: dict) -> list[str]:
    """What is missing or too much, and sums that are not right."""
    names = sorted(os.listdir(directory))
    expected = shard_names(manifest["num_shards"])
    problems = [f"{name}: not of this build" for name in foreign_files(names, manifest["num_shards"])]
    problems += [f"{name}: left over of a build that was killed" for name in left_over(names)]
    problems += [f"{n}{SHARD}: missing" for n in expected if f"{n}{SHARD}" not in names]
    if not manifest["complete"]:
        return [*problems, f"{MANIFEST}: the build is not complete; run it again with the same arguments"]
    listed = manifest["shards"]
    if len(listed) != len(expected) or not all(isinstance(shard, dict) for shard in listed):
        problems.append(f"{MANIFEST}: expected {len(expected)} shards, found {len(listed)}")
    elif sum(shard.get("records", 0) for shard in listed) != manifest["records"]:
        problems.append(f"{MANIFEST}: expected as many records as the shards have, found {manifest['records']}")
    return problems + _check_reports(directory, manifest, expected)


def _check_reports(directory: Path, manifest: dict, names: list[str]) -> list[str]:
    """The reports' counts: of each shard and of all, as the manifest has them."""
    problems, total = [], Report()
    for i, name in enumerate(names):
        file = f"{name}.json"
        try:
            result = read_object(directory / file)
            report = Report.from_dict(result.pop("report"))
        except (UserError, KeyError, TypeError, ValueError) as error:
            problems.append(f"{file}: {error}" if isinstance(error, UserError) else f"{file}: not a shard's report")
            continue
        total.merge(report)
        if i < len(manifest["shards"]) and result != manifest["shards"][i]:
            problems.append(f"{file}: is not what {MANIFEST} says")
        if result.get("records") != report.seen - report.num_skipped:
            problems.append(f"{file}: expected records = seen - skipped, found {result.get('records')}")
    if not problems:
        try:
            same = Report.from_dict(read_object(directory / REPORT)) == total
        except UserError as error:
            return [str(error)]
        except (KeyError, TypeError, ValueError):
            same = False
        if not same:
            problems.append(f"{REPORT}: is not the sum of the shards' reports")
        if total.seen != manifest["rows"]:
            problems.append(f"{MANIFEST}: expected rows = {total.seen}, found {manifest['rows']}")
    return problems


@dataclasses.dataclass(frozen=True)
class ShardCheck:
    """What a worker process does: reads the shard with the number `task`."""

    directory: Path
    listed: list[dict]  # of the manifest; empty where the build is not complete
    incomplete: bool = False  # clips may be cut off

    def __call__(self, task: int, step: Callable[[], Any]) -> list[str]:
        num_shards = len(self.listed) or read_manifest(self.directory)["num_shards"]
        file = self.directory / f"{shard_names(num_shards)[task]}{SHARD}"
        expected = self.listed[task] if self.listed else {}
        problems = []
        for key, found in file_digest(file).items():
            if expected and found != expected.get(key):
                problems.append(f"{file.name}: expected {key} = {expected.get(key)}, found {found}")
        return problems + [f"{file.name}: {line}" for line in _check_records(file, expected, step, self.incomplete)]


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
    if expected and num_records != expected.get("records"):
        problems.append(f"expected {expected.get('records')} records, found {num_records}")
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
