"""A directory of shards: what its files are called, how they become whole, and the manifest of what belongs there.

    manifest.json                      what it was made from and how; when all is done, every shard's size and SHA-256
    data-00003-of-00120.array_record   records
    data-00003-of-00120.json           how many, and what was skipped; written before the shard
    report.json                        what was skipped in all

Every file is written under a temporary name, a new one at each attempt, and renamed when it is whole.
"""

from collections.abc import Iterator
import contextlib
import json
import os
from pathlib import Path
import re
from typing import NamedTuple

from voco_jax.errors import UserError
from voco_jax.io.atomic import write_text
from voco_jax.io.json_files import read_object
from voco_jax.io.locks import holding
from voco_jax.outages import reason

MANIFEST, REPORT = "manifest.json", "report.json"
MOST_SHARDS = 10**6
VERSION = 1
SHARD = ".array_record"
_OURS = re.compile(r"(data-\d{5,}-of-\d{5,}\.(array_record|json)|manifest\.json|report\.json)")
# What killed builds leave: `io/atomic.py`'s names, and those of earlier versions
_PARTIAL = re.compile(rf"\.{_OURS.pattern}\.[0-9a-f]{{8}}\.new|{_OURS.pattern}\.[0-9a-f]{{8}}\.partial")


class Kind(NamedTuple):
    """What shards hold, as their manifest says, and the command that writes them."""

    format: str
    command: str


RECORDS = Kind("voco_jax records", "voco build-records")
LOGITS = Kind("voco_jax logits", "voco store-logits")


def shard_names(num_shards: int) -> list[str]:
    """File names of the shards, without their endings.

    >>> shard_names(2)
    ['data-00000-of-00002', 'data-00001-of-00002']
    """
    return [f"data-{i:05d}-of-{num_shards:05d}" for i in range(num_shards)]


def write_json(file: Path, content: dict) -> None:
    """An object as JSON: the file is whole, or as it was."""
    try:
        write_text(file, json.dumps(content, indent=1) + "\n", shared=True)
    except OSError as error:
        raise UserError(f"{file}: {reason(error)}") from None


@contextlib.contextmanager
def begin(directory: Path, arguments: dict, num_shards: int, kind: Kind = RECORDS) -> Iterator[dict]:
    """A directory to write in, and its manifest; for no other process meanwhile.

    A new or empty one gets a manifest. One that was begun with the same `arguments` goes on: whole files stay, and what
    is left over of a killed attempt goes. UserError, and nothing changed, for any other.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with holding(directory, f"{directory}: another process is writing there"):
        manifest = _begin(directory, arguments, num_shards, kind)
        try:
            yield manifest
        finally:
            _remove_left_over(directory)  # of processes that were killed


def _begin(directory: Path, arguments: dict, num_shards: int, kind: Kind) -> dict:
    names = sorted(os.listdir(directory))
    begun = MANIFEST in names
    foreign = foreign_files(names, num_shards) if begun else [n for n in names if not _PARTIAL.fullmatch(n)]
    manifest = read_manifest(directory, kind) if begun else {}
    if begun and manifest["arguments"] != arguments:
        was = manifest["arguments"]
        key = next(key for key in {**arguments, **was} if arguments.get(key) != was.get(key))
        found = f"{key} = {was.get(key)!r:.200}, not {arguments.get(key)!r:.200}"
        raise UserError(f"{directory}: was begun with {found}; nothing was changed (choose another directory)")
    if foreign:
        raise UserError(f"{directory}: expected a new or empty directory, found {foreign[0]!r}; nothing was changed")
    _remove_left_over(directory)
    if not begun:
        manifest = {"format": kind.format, "version": VERSION, "arguments": arguments, "num_shards": num_shards}
        manifest["complete"] = False
        write_json(directory / MANIFEST, manifest)
    return manifest


def foreign_files(names: list[str], num_shards: int) -> list[str]:
    """Names that no build with so many shards writes; what is left over of a killed one is not foreign."""
    expected = {MANIFEST, REPORT, *(n + end for n in shard_names(num_shards) for end in (SHARD, ".json"))}
    return [name for name in names if name not in expected and not _PARTIAL.fullmatch(name)]


def _remove_left_over(directory: Path) -> None:
    for name in left_over(os.listdir(directory)):
        (directory / name).unlink(missing_ok=True)


def left_over(names: list[str]) -> list[str]:
    return [name for name in names if _PARTIAL.fullmatch(name)]


def read_manifest(directory: Path, kind: Kind = RECORDS) -> dict:
    """The manifest of a directory of shards; UserError where there is none, or one of another format."""
    file = directory / MANIFEST
    manifest = read_object(file, f"it stands beside the shards that {kind.command} writes")
    types = {"arguments": dict, "complete": bool, "num_shards": int}
    if manifest.get("complete"):
        types |= {"shards": list, "records": int, "rows": int}
    wrong = [key for key, expected in types.items() if not isinstance(manifest.get(key), expected)]
    if manifest.get("format") != kind.format or manifest.get("version") != VERSION or wrong:
        what = f"of {kind.format}, version {VERSION}" + (f"; {wrong[0]} is missing" if wrong else "")
        raise UserError(f"{file}: expected the manifest {what}")
    count = manifest["num_shards"]
    if not 1 <= count <= MOST_SHARDS:
        raise UserError(f"{file}: num_shards: expected 1 … {MOST_SHARDS}, found {count}")
    if manifest["complete"] and not (
        len(manifest["shards"]) == count and all(_has_sizes(shard) for shard in manifest["shards"])
    ):
        raise UserError(f"{file}: shards: expected bytes and records of {count} shards, found another form")
    return manifest


def _has_sizes(shard: object) -> bool:
    return isinstance(shard, dict) and all(isinstance(shard.get(key), int) for key in ("bytes", "records"))


def check_complete(directory: Path, kind: Kind = RECORDS) -> dict:
    """The manifest. UserError unless every shard that it names is there in its full length."""
    manifest = read_manifest(directory, kind)
    if not manifest["complete"]:
        raise UserError(f"{directory}: not complete; run {kind.command} again with the same arguments")
    for name, shard in zip(shard_names(manifest["num_shards"]), manifest["shards"], strict=True):
        file = directory / f"{name}{SHARD}"
        size = file.stat().st_size if file.exists() else None
        if size != shard["bytes"]:
            found = "none" if size is None else f"{size} bytes"
            raise UserError(f"{file}: expected {shard['bytes']} bytes, found {found}; the manifest says so")
    return manifest
