"""A run's directory: one run only, held by one training at a time, and nothing in it that is not the run's.

A training may be several processes (`voco_jax/parallel/distributed.py`) on hosts that share the directory: the first
writes, all look. It may lie in a bucket (`gs://…`), which all hosts share without more; nobody can hold that one.
"""

from collections.abc import Iterator
import contextlib
import fcntl
from pathlib import Path
import socket
import tempfile
import time

import jax
from ml_collections import ConfigDict

from voco_jax.config import first_difference, load_config, save_config, with_earlier_values
from voco_jax.data.tokenizer import save_tokenizer
from voco_jax.errors import UserError
from voco_jax.parallel.distributed import together
from voco_jax.storage import AnyPath, as_path, bucket_errors, in_bucket, upload

# What training writes before its first checkpoint; a directory of these alone has nothing to keep.
_LOGS = ("metrics.jsonl", "metrics.jsonl.new", "goodput.json", "goodput.json.new", "tensorboard", "answers", "profile")
_BEGINNINGS = {".lock", "tokenizer", "config.json", "config.json.new", "checkpoints", *_LOGS}

_SEEN_WITHIN = 60  # seconds until a network file system must show what another host has made

# What may change when a run goes on: the numbers that it computes do not depend on these, but for rounding.
_FREE = (
    "workdir", "eval", "data.test", "train.log_every", "train.tensorboard", "train.profile_at", "train.profile_steps",
    "train.checkpoint_every", "train.keep", "train.keep_every", "train.keep_best",
    "data.num_workers", "data.num_threads", "data.prefetch", "data.cache_dir", "data.max_bad_share",
    "mesh", "model.attention", "model.remat", "model.unroll_layers", "train.accumulate",
    "train.on_bad_step", "train.spike_factor", "train.max_skipped",  # a run that stopped at a step may skip it
)  # fmt: skip


class Workdir:
    """A run's directory, open for writing.

    `logs` is where metrics, TensorBoard's files, sheets and traces are written: the directory itself; or, of a bucket,
    whose files cannot grow, a temporary one that `publish` copies there.
    """

    def __init__(self, path: AnyPath, logs: Path):
        self.path, self.logs, self._published = path, logs, {}

    def publish(self) -> None:
        """Bring what is new in `logs` to the bucket, if the directory lies in one."""
        if in_bucket(self.path):
            with bucket_errors(self.path):
                upload(self.logs, self.path, self._published)


def workdir_path(config: ConfigDict) -> AnyPath:
    """`config.workdir`; UserError for what is no directory and no bucket's."""
    try:
        return as_path(config.workdir)
    except UserError as error:
        raise UserError(f"config.workdir: {error}") from None


def check_workdir(workdir: AnyPath, config: ConfigDict) -> bool:
    """Whether the directory holds a checkpoint of this very run; UserError if it holds another run, or other things.

    A run that was stopped before its first checkpoint has nothing to keep, and may be replaced by any.
    """
    with bucket_errors(workdir):
        if not workdir.exists():
            return False
        if not _has_checkpoint(workdir):
            entries = {path.name for path in workdir.iterdir()} if workdir.is_dir() else {workdir.name}
            ours = in_bucket(workdir) or ".lock" in entries
            if entries - _BEGINNINGS or entries and not ours:
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


def resumed_config(workdir: AnyPath, config: ConfigDict) -> ConfigDict:
    """The config to train by: where a run goes on that began before a key was there, the key as it was then."""
    with bucket_errors(workdir):
        if not _has_checkpoint(workdir):
            return config
    return with_earlier_values(config, load_config(workdir / "config.json"))


def _has_checkpoint(workdir: AnyPath) -> bool:
    """Without Orbax, whose manager waits for the other processes. A checkpoint has its name when it is whole; in a
    bucket it may only be under way: then Orbax will say that there is none."""
    directory = workdir / "checkpoints"
    return directory.is_dir() and any(path.name.isdecimal() for path in directory.iterdir())


@contextlib.contextmanager
def open_workdir(workdir: AnyPath, config: ConfigDict, tokenizer) -> Iterator[Workdir]:
    """Hold a run's directory for writing, made or brought up to date; UserError if another training holds it.

    The config is written last: a directory without it has not begun. All processes of a training enter together, and
    if one cannot, none does.
    """
    first = jax.process_index() == 0
    bucket = in_bucket(workdir)
    with contextlib.ExitStack() as held:
        with together(), bucket_errors(workdir):
            if first:
                workdir.mkdir(parents=True, exist_ok=True)
                if not bucket:
                    _lock(workdir, held.enter_context((workdir / ".lock").open("w")))
        with together():
            if not bucket:
                _check_shared(workdir)
            resuming = check_workdir(workdir, config)
        with together(), bucket_errors(workdir):  # and not before all have looked
            logs = Path(held.enter_context(tempfile.TemporaryDirectory())) if bucket else Path(workdir)
            if first:
                if resuming and bucket:
                    _fetch_logs(workdir, logs)
                if not resuming:
                    for name in ("metrics.jsonl", "goodput.json"):
                        (workdir / name).unlink(missing_ok=True)
                    _save_tokenizer(tokenizer, workdir / "tokenizer")
                save_config(config, workdir / "config.json")
        run = Workdir(workdir, logs)
        try:
            yield run
        finally:
            run.publish()


def _fetch_logs(workdir: AnyPath, logs: Path) -> None:
    """What is gone on with; TensorBoard has a file of its own for each time that a run is started."""
    for name in ("metrics.jsonl", "goodput.json"):
        if (workdir / name).exists():
            (logs / name).write_bytes((workdir / name).read_bytes())


def _save_tokenizer(tokenizer, directory: AnyPath) -> None:
    if not in_bucket(directory):
        save_tokenizer(tokenizer, directory)
        return
    with tempfile.TemporaryDirectory() as temporary:
        save_tokenizer(tokenizer, Path(temporary) / "tokenizer")
        upload(Path(temporary) / "tokenizer", directory)


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
