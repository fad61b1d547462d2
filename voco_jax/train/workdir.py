"""A run's directory: one run only, held by one training at a time, and nothing in it that is not the run's.

A training may be several processes (`voco_jax/parallel/distributed.py`) on hosts that share the directory: the first
writes, all look.
"""

from collections.abc import Iterator
import contextlib
import fcntl
from pathlib import Path
import socket
import time

import jax
from ml_collections import ConfigDict

from voco_jax.config import first_difference, load_config, save_config
from voco_jax.data.tokenizer import save_tokenizer
from voco_jax.errors import UserError
from voco_jax.parallel.distributed import together

# What training writes before its first checkpoint; a directory of these alone has nothing to keep.
_BEGINNINGS = {
    ".lock", "tokenizer", "config.json", "metrics.jsonl", "checkpoints",
    "tensorboard", "goodput.json", "goodput.json.new", "metrics.jsonl.new", "answers", "profile",
}  # fmt: skip

_SEEN_WITHIN = 60  # seconds until a network file system must show what another host has made

# What may change when a run goes on: the numbers that it computes do not depend on these, but for rounding.
_FREE = (
    "workdir", "eval", "train.log_every", "train.checkpoint_every",
    "train.tensorboard", "train.profile_at", "train.profile_steps",
    "data.num_workers", "data.num_threads", "data.prefetch", "data.cache_dir", "data.max_bad_share",
    "mesh", "model.attention", "model.remat", "model.unroll_layers",
)  # fmt: skip


def workdir_path(config: ConfigDict) -> Path:
    """`config.workdir`; UserError for an address: the directory is locked, and its files grow."""
    if "://" in config.workdir:
        expected = "expected a directory of a file system that all hosts share"
        raise UserError(f"config.workdir: {expected}; found {config.workdir!r}")
    return Path(config.workdir).expanduser()


def check_workdir(workdir: Path, config: ConfigDict) -> bool:
    """Whether the directory holds a checkpoint of this very run; UserError if it holds another run, or other things.

    A run that was stopped before its first checkpoint has nothing to keep, and may be replaced by any.
    """
    if not workdir.exists():
        return False
    if not _has_checkpoint(workdir):
        entries = {path.name for path in workdir.iterdir()} if workdir.is_dir() else {workdir.name}
        if entries - _BEGINNINGS or entries and ".lock" not in entries:
            raise UserError(f"workdir {workdir}: expected a run or an empty directory, found other files")
        return False
    difference = first_difference(load_config(workdir / "config.json"), config, ignore=_FREE)
    if difference:
        key, found, expected = difference
        raise UserError(
            f"workdir {workdir}: holds a run with {key} = {found!r}, this config has {expected!r}; "
            "take another --config.workdir"
        )
    return True


def _has_checkpoint(workdir: Path) -> bool:
    """Without Orbax, whose manager waits for the other processes. A checkpoint has its name when it is whole."""
    directory = workdir / "checkpoints"
    return directory.is_dir() and any(path.name.isdecimal() for path in directory.iterdir())


@contextlib.contextmanager
def open_workdir(workdir: Path, config: ConfigDict, tokenizer) -> Iterator[None]:
    """Hold a run's directory for writing, made or brought up to date; UserError if another training holds it.

    The config is written last: a directory without it has not begun. All processes of a training enter together, and
    if one cannot, none does.
    """
    first = jax.process_index() == 0
    with contextlib.ExitStack() as held:
        with together():
            if first:
                workdir.mkdir(parents=True, exist_ok=True)
                _lock(workdir, held.enter_context((workdir / ".lock").open("w")))
        with together():
            _check_shared(workdir)
            resuming = check_workdir(workdir, config)
        with together():  # and not before all have looked
            if first:
                if not resuming:
                    (workdir / "metrics.jsonl").unlink(missing_ok=True)
                    save_tokenizer(tokenizer, workdir / "tokenizer")
                save_config(config, workdir / "config.json")
        yield


def _lock(workdir: Path, lock) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"workdir {workdir}: another process is training in it") from None


def _check_shared(workdir: Path) -> None:
    """UserError where this host does not see what the first process has made."""
    deadline = time.monotonic() + _SEEN_WITHIN
    while not (workdir / ".lock").exists():
        if time.monotonic() > deadline:
            raise UserError(
                f"workdir {workdir}: expected a directory that all hosts share; {socket.gethostname()} does not see "
                "what process 0 has made there"
            )
        time.sleep(0.1)
