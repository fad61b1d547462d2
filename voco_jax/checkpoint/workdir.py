"""A run's directory: it holds one run and nothing else, and one training at a time writes to it.

A training may be several processes (`voco_jax/parallel/distributed.py`) on hosts that share the directory: the first
writes, all look. It may lie in a bucket (`gs://…`), which needs no sharing, and which cannot be locked.
"""

from collections.abc import Iterator
import contextlib
import os
from pathlib import Path
import socket
import tempfile
import time

import jax
from ml_collections import ConfigDict

from voco_jax.checkpoint.init_from import TILES
from voco_jax.checkpoint.resume import BASE, TEACHER, check_same_run
from voco_jax.config import save_config
from voco_jax.data.tokenizer import save_tokenizer
from voco_jax.errors import UserError, cannot
from voco_jax.io import paths
from voco_jax.io.atomic import temporary_name
from voco_jax.io.files import check_regular, read_bytes
from voco_jax.io.json_files import MOST
from voco_jax.io.locks import holding
from voco_jax.io.paths import AnyPath, as_path, bucket_errors, exists, in_bucket, upload
from voco_jax.outages import passing
from voco_jax.parallel.distributed import together

# What training writes before its first checkpoint; a directory of these alone has nothing to keep.
_LOGS = ("metrics.jsonl", "goodput.json", "tensorboard", "wandb", "answers", "profile")
_BEGINNINGS = {".lock", "tokenizer", TILES, "config.json", BASE, TEACHER, "checkpoints", *_LOGS}
# And what a killed process left of them (`.new` without a dot: earlier versions)
_BEGINNINGS |= {unfinished for name in _BEGINNINGS for unfinished in (f"{name}.new", temporary_name(Path(name)).name)}

_SEEN_WITHIN = 60  # seconds until a network file system must show what another host has made


class Workdir:
    """A run's directory, open for writing.

    `logs` is where metrics, TensorBoard's files, sheets and traces are written: the directory itself; or, of a bucket,
    whose files cannot grow, a temporary one that `publish` copies there.
    """

    def __init__(self, path: AnyPath, logs: Path, descriptor: int | None = None):
        """`descriptor` is of the open directory, in the process that holds it: while it is open, no other directory
        gets its number."""
        self.path, self.logs, self._descriptor = path, logs, descriptor
        self._published: dict = {}  # what `upload` remembers of the files that it has copied

    def save_config(self, config: ConfigDict) -> None:
        """What the run goes on with, once nothing more speaks against it; by the first process."""
        if jax.process_index() == 0:
            with bucket_errors(self.path):
                save_config(config, self.path / "config.json")

    def check(self) -> None:
        """UserError where the directory is gone or another has its name: it would hold nothing but a checkpoint."""
        if in_bucket(self.path):
            with bucket_errors(self.path):
                there = jax.process_index() > 0 or exists(self.path / "config.json")
        elif self._descriptor is None:
            return
        else:
            try:
                there = os.path.samestat(os.stat(self.path), os.fstat(self._descriptor))
                there = there and any(exists(self.path / name) for name in (".lock", "config.json"))  # not emptied
            except (FileNotFoundError, NotADirectoryError):
                there = False
            except OSError as error:
                if passing(error):
                    return  # saving will meet it, and may try again
                raise cannot(f"workdir {self.path}: cannot be looked up", error) from error
        if not there:
            raise UserError(
                f"workdir {self.path}: is there no more, or is another directory: it was deleted, moved or replaced "
                "while this training ran"
            )

    def publish(self) -> None:
        """Bring what is new in `logs` to the bucket, if the directory lies in one."""
        if in_bucket(self.path):
            with bucket_errors(self.path):
                upload(self.logs, self.path, self._published)


def workdir_path(workdir: str) -> AnyPath:
    """The path of `config.workdir`; UserError for what is neither a local path nor gs://."""
    try:
        return as_path(workdir)
    except UserError as error:
        raise UserError(f"config.workdir: {error}") from None


def check_workdir(workdir: AnyPath, config: ConfigDict) -> bool:
    """Whether the directory holds a checkpoint of this run; UserError if it holds another run, or other files."""
    steps = checkpointed_steps(workdir)
    if steps:
        check_same_run(config, workdir, steps)
    return bool(steps)


def checkpointed_steps(workdir: AnyPath) -> list[int]:
    """Steps of the checkpoints in a run's directory; UserError where there are other files, and for broken links.

    A run that was stopped before its first checkpoint has nothing to keep, and may be replaced by any. Orbax's manager
    is not asked, because it waits for the other processes. In a bucket, a checkpoint may not be complete yet.
    """
    with bucket_errors(workdir):
        directory = workdir / "checkpoints"
        found = [path for path in paths.entries(directory) if path.name.isdecimal()]
        for path in (workdir, directory, *found):
            paths.check_link(path)
        if not exists(workdir):
            return []
        steps = [int(path.name) for path in found]
        if not steps:
            names = {path.name for path in paths.entries(workdir)} if paths.is_directory(workdir) else {workdir.name}
            ours = in_bucket(workdir) or ".lock" in names
            if names - _BEGINNINGS or names and not ours:
                raise UserError(f"workdir {workdir}: expected a run or an empty directory, found other files")
    return steps


@contextlib.contextmanager
def open_workdir(workdir: AnyPath, config: ConfigDict, tokenizer) -> Iterator[Workdir]:
    """Create a run's directory if need be, and hold it for writing; UserError if another training holds it.

    A new run's config is written last: a directory without it is not a run. All processes of a training enter together,
    and if one cannot, none does.
    """
    first = jax.process_index() == 0
    bucket, descriptor = in_bucket(workdir), None
    with contextlib.ExitStack() as held:
        with together(), bucket_errors(workdir):
            if first:
                workdir.mkdir(parents=True, exist_ok=True)
                if not bucket:
                    _check_kinds(workdir)
                    held.enter_context(
                        holding(workdir / ".lock", f"workdir {workdir}: another process is training in it")
                    )
                    descriptor = os.open(workdir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                    held.callback(os.close, descriptor)
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
                    for name in ("metrics.jsonl", "goodput.json", BASE, TEACHER, TILES):
                        (workdir / name).unlink(missing_ok=True)
                    _save_tokenizer(tokenizer, workdir / "tokenizer")
                    if config.init_from:
                        _copy_tiles(as_path(config.init_from), workdir)
                    save_config(config, workdir / "config.json")
        run = Workdir(workdir, logs, descriptor)
        try:
            yield run
        except OSError:
            run.check()  # a directory that went away is why nothing could be opened in it
            raise
        finally:
            run.publish()


def _check_kinds(workdir: Path) -> None:
    """UserError where training would write into a pipe or a device instead of a file."""
    for path in workdir.iterdir():
        if path.name in _BEGINNINGS and path.exists() and not path.is_dir():
            check_regular(path, path.stat())


def _fetch_logs(workdir: AnyPath, logs: Path) -> None:
    """What is gone on with; TensorBoard has a file of its own for each time that a run is started."""
    for name in ("metrics.jsonl", "goodput.json", "wandb/id"):
        if (workdir / name).exists():
            (logs / name).parent.mkdir(exist_ok=True)
            (logs / name).write_bytes((workdir / name).read_bytes())


def _copy_tiles(base: AnyPath, workdir: AnyPath) -> None:
    with bucket_errors(base):
        kept = read_bytes(base / TILES, MOST) if exists(base / TILES) else None
    if kept is not None:
        (workdir / TILES).write_bytes(kept)


def _save_tokenizer(tokenizer, directory: AnyPath) -> None:
    if not in_bucket(directory):
        save_tokenizer(tokenizer, directory)
        return
    with tempfile.TemporaryDirectory() as temporary:
        save_tokenizer(tokenizer, Path(temporary) / "tokenizer")
        upload(Path(temporary) / "tokenizer", directory)


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
