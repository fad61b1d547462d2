"""The JSON beside a checkpoint's arrays, `about`: it describes the checkpoint and the run that it belongs to.

It has the step, the place in the data, the config, versions, and checksums of every array, of the tokenizer's files,
and of itself. Whoever opens a checkpoint compares them with what is there (`check_run`).
"""

from collections.abc import Callable
import hashlib
import importlib.metadata
import json
import os
from pathlib import Path
import stat
import zlib

from etils import epath
import jax
from ml_collections import ConfigDict
import orbax.checkpoint as ocp

from voco_jax.config import KEYS, load_config, parse_config, stored_form, value_of
from voco_jax.data import tokenizer_files
from voco_jax.errors import UserError
from voco_jax.io.files import check_regular, read_bytes
from voco_jax.io.json_files import read_object
from voco_jax.io.paths import AnyPath, bucket_errors, in_bucket, list_files
from voco_jax.keys import in_one_line
from voco_jax.terminal import log_once

ABOUT = "run"  # the item's name in a checkpoint
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
VERSIONS = {name: importlib.metadata.version(name) for name in _PACKAGES}  # written into every checkpoint

_MOST_FILES = 200_000  # of all checkpoints of a run
_MOST_JSON = 2**24  # bytes of a file that Orbax reads as JSON
_JSON = ("_METADATA", "_CHECKPOINT_METADATA", "_sharding", "metadata", "metrics")


def describe(
    step: int, config: ConfigDict | None, tokenizer: dict[str, str], sums: dict[str, dict], data: dict, metrics=None
) -> dict:  # fmt: skip
    """The `about` of a checkpoint. `tokenizer`: its `tokenizer_sums`; `sums`: checksums by item and dotted path;
    `data`: where the iterator stands."""
    about = {
        "step": step,
        "data": data,
        "metrics": metrics,
        "config": stored_form(config) if config is not None else None,
        "tokenizer": tokenizer,
        "versions": VERSIONS,
        "checksums": dict(sums),
    }
    about["checksums"][ABOUT] = _checksum(about)
    return about


def tokenizer_sums(run: AnyPath) -> dict[str, str]:
    """SHA-256 by name of the files in a run's `tokenizer/` that the tokenizer is read from: of what text and JSON say,
    whose line ends Git and Windows change."""
    directory = run / "tokenizer"
    with bucket_errors(directory):
        if not directory.is_dir():
            return {}
        read = [name for name, *_ in list_files(directory) if name in tokenizer_files.OF_RUNS]
        return {name: hashlib.sha256(_content(directory / name)).hexdigest() for name in read}


def _content(file: AnyPath) -> bytes:
    if file.suffix == ".json" and file.name != "tokenizer.json":  # which may be large
        return json.dumps(read_object(file)).encode()
    content = read_bytes(file, tokenizer_files.MOST)
    return content if file.suffix == ".model" else content.replace(b"\r\n", b"\n")


def check_about(about: dict, step: int) -> None:
    """Any error where `about` is not what was written. Only its own checksum tells, for it is text."""
    sums = about["checksums"]
    is_first = ABOUT not in sums and "tokenizer" not in about  # the first runs have no such checksum
    if not is_first and sums[ABOUT] != _checksum(about):
        raise ValueError(f"{ABOUT}: its checksum")
    if about["step"] != step or sums.keys() - {ABOUT} not in ({"params", "opt_state"}, {"params"}):
        raise ValueError(f"{ABOUT}: it is another checkpoint's")
    dict(about["data"]), dict(about["versions"]), dict(sums["params"])


def _checksum(about: dict) -> int:
    """CRC-32 of all that is in it but this number."""
    about = json.loads(json.dumps(about))  # as it will come back
    about["checksums"].pop(ABOUT, None)
    return zlib.crc32(json.dumps(about, sort_keys=True).encode())


def check_run(run: AnyPath, step: int, about: dict, sums: Callable[[], dict[str, str]]) -> None:
    """Compare a run's config and tokenizer with what a checkpoint of it says; `sums` gives its `tokenizer_sums`.

    UserError for another model's config or another tokenizer. A line on standard error says which input of the model is
    prepared in another way than in training, and what has no checksum; each line is printed once.
    """
    checkpoint = run / "checkpoints" / str(step)
    if not about:
        _log_once(f"{checkpoint}: written by an earlier version, without checksums: damage may not be noticed")
        return
    if about["config"] is not None and (run / "config.json").exists():
        _check_config(run / "config.json", about["config"], checkpoint)
    if "tokenizer" not in about:
        _log_once(f"{checkpoint}: written by an earlier version, without a checksum of the tokenizer")
    elif about["tokenizer"]:
        _check_tokenizer(run / "tokenizer", about["tokenizer"], sums(), checkpoint)


def _check_config(file: AnyPath, written: dict, checkpoint: AnyPath) -> None:
    here, there = load_config(file), parse_config(written, checkpoint)
    for _, key in sorted(KEYS.items()):
        found, expected = value_of(here, key.name), value_of(there, key.name)
        if found == expected or key.rules.on_load == "free":
            continue
        said = f"{file}: {key.name}: {checkpoint} was written with"
        if key.rules.on_load == "refused":
            raise UserError(f"{said} {in_one_line(expected)}, found {in_one_line(found)}")
        _log_once(f"{said} {in_one_line(expected)}, {in_one_line(found)} is taken")


def _check_tokenizer(directory: AnyPath, expected: dict[str, str], found: dict[str, str], checkpoint: AnyPath) -> None:
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            there = "another" if name in expected and name in found else "one" if name in found else "none"
            wanted = f"the file that {checkpoint} was written with" if name in expected else "none"
            raise UserError(f"{directory / name}: expected {wanted}, found {there}")


def _log_once(line: str) -> None:
    if jax.process_index() == 0:
        log_once(line)


def check_tree(directory: AnyPath) -> None:
    """UserError where Orbax would wait for a pipe or a device among the checkpoints, or read gigabytes of JSON.

    Orbax opens whatever lies there. Links are followed.
    """
    if in_bucket(directory):
        return
    left, seen, count = [Path(directory)], set(), 0
    while left:
        here = left.pop()
        try:
            status = os.stat(here)
            entries = () if (status.st_dev, status.st_ino) in seen else [*os.scandir(here)]
        except OSError:  # a training removes what it does not keep; and who needs it will say why it cannot be read
            continue
        seen.add((status.st_dev, status.st_ino))
        count += len(entries)
        if count > _MOST_FILES:  # a link leads out, to the root directory perhaps
            raise UserError(f"{directory}: expected {_MOST_FILES} files at most, found more, in {here} among others")
        for entry in entries:
            try:
                status = entry.stat()
            except OSError:  # removed since, or a link to nothing: whoever needs it will say so
                continue
            if stat.S_ISDIR(status.st_mode):
                left.append(Path(entry.path))
                continue
            check_regular(entry.path, status)
            is_json = entry.name in _JSON or here.name == "array_metadatas"
            if is_json and status.st_size > _MOST_JSON:
                raise UserError(f"{entry.path}: expected {_MOST_JSON} bytes at most, found {status.st_size}")


# What Orbax reads of a checkpoint, under its names


def check_listing(checkpoint: epath.Path) -> None:
    """Any error with which Orbax's manager would end: it reads these of every checkpoint when it starts."""
    found = ocp.path.step.standard_name_format().find_step(checkpoint.parent, int(checkpoint.name))
    found.commit_timestamp  # noqa: B018
    if (checkpoint / "metrics").exists():
        metrics = ocp.JsonCheckpointHandler(filename="metrics").restore(checkpoint / "metrics")
        if not isinstance(metrics["eval_loss"], int | float):
            raise ValueError("metrics: eval_loss is not a number")


def check_chunks(arrays: dict) -> None:
    """ValueError for an array, as Orbax describes it, in chunks larger than itself, which reading it would allocate."""
    for name, array in arrays.items():
        chunk = array.storage.chunk_shape if array.storage is not None else None
        if chunk is not None and any(c > max(1, n) for c, n in zip(chunk, array.shape, strict=True)):
            raise ValueError(f"{name}: shape {array.shape} in chunks of {chunk}")
