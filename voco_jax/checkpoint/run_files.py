"""`about`, the JSON beside a checkpoint's arrays, describes the checkpoint and its run.

It holds the step, the place in the data, the config, versions, and checksums of every array, of the tokenizer's files,
and of itself. Opening a checkpoint compares them with what is there (`check_run`).
"""

from collections.abc import Callable
import hashlib
import importlib.metadata
import json
import zlib

from etils import epath
import jax
from ml_collections import ConfigDict
import orbax.checkpoint as ocp

from voco_jax.config import KEYS, load_config, parse_config, stored_form, value_of
from voco_jax.data import tokenizer_files
from voco_jax.errors import UserError
from voco_jax.io.files import read_bytes
from voco_jax.io.json_files import read_object
from voco_jax.io.paths import AnyPath, bucket_errors, list_files
from voco_jax.terminal import log_once, shortened

ABOUT = "run"  # the item's name in a checkpoint
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
VERSIONS = {name: importlib.metadata.version(name) for name in _PACKAGES}  # written into every checkpoint


def describe(
    step: int, config: ConfigDict | None, tokenizer: dict[str, str], sums: dict[str, dict], data: dict, metrics=None
) -> dict:  # fmt: skip
    """The `about` of a checkpoint. `sums`: checksums by item and dotted path; `data`: the place in the data."""
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
    """SHA-256 of each file in a run's `tokenizer/` that the tokenizer is read from. Line ends do not count in text and
    JSON: Git and Windows change them."""
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
    """Raises any error where `about` is not what was written."""
    sums = about["checksums"]
    is_first = ABOUT not in sums and "tokenizer" not in about  # the first runs have no checksum of it
    if not is_first and sums[ABOUT] != _checksum(about):
        raise ValueError(f"{ABOUT}: its checksum")
    if about["step"] != step or sums.keys() - {ABOUT} not in ({"params", "opt_state"}, {"params"}):
        raise ValueError(f"{ABOUT}: it is another checkpoint's")
    dict(about["data"]), dict(about["versions"]), dict(sums["params"])


def _checksum(about: dict) -> int:
    """CRC-32 of `about` without this number."""
    about = json.loads(json.dumps(about))  # as it will be read
    about["checksums"].pop(ABOUT, None)
    return zlib.crc32(json.dumps(about, sort_keys=True).encode())


def check_run(run: AnyPath, step: int, about: dict, sums: Callable[[], dict[str, str]]) -> None:
    """Compare a run's config and tokenizer with those that a checkpoint of it was written with.

    `sums` returns the run's `tokenizer_sums`. UserError for another model's config or another tokenizer. A line on
    standard error, once each, for other changes that a user should know, and for what has no checksum.
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
            raise UserError(f"{said} {shortened(expected)}, found {shortened(found)}")
        _log_once(f"{said} {shortened(expected)}, {shortened(found)} is taken")


def _check_tokenizer(directory: AnyPath, expected: dict[str, str], found: dict[str, str], checkpoint: AnyPath) -> None:
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            there = "another" if name in expected and name in found else "one" if name in found else "none"
            wanted = f"the file that {checkpoint} was written with" if name in expected else "none"
            raise UserError(f"{directory / name}: expected {wanted}, found {there}")


def _log_once(line: str) -> None:
    if jax.process_index() == 0:
        log_once(line)


def check_listing(checkpoint: epath.Path) -> None:
    """Reads what Orbax's manager reads of every checkpoint when it starts, and raises whatever would end it."""
    found = ocp.path.step.standard_name_format().find_step(checkpoint.parent, int(checkpoint.name))
    found.commit_timestamp  # noqa: B018
    if (checkpoint / "metrics").exists():
        metrics = ocp.JsonCheckpointHandler(filename="metrics").restore(checkpoint / "metrics")
        if not isinstance(metrics["eval_loss"], int | float):
            raise ValueError("metrics: eval_loss is not a number")


def check_chunks(arrays: dict) -> None:
    """ValueError for an array (Orbax's metadata) with chunks larger than itself: reading would allocate a chunk."""
    for name, array in arrays.items():
        chunk = array.storage.chunk_shape if array.storage is not None else None
        if chunk is not None and any(c > max(1, n) for c, n in zip(chunk, array.shape, strict=True)):
            raise ValueError(f"{name}: shape {array.shape} in chunks of {chunk}")
