"""A run's directory: one run only, held by one process at a time, and nothing in it that is not the run's."""

from collections.abc import Iterator
import contextlib
import fcntl
from pathlib import Path

from ml_collections import ConfigDict

from voco_jax.config import first_difference, load_config, save_config
from voco_jax.data.tokenizer import save_tokenizer
from voco_jax.errors import UserError
from voco_jax.train.checkpoint import Checkpointer

# What training writes before its first checkpoint; a directory of these alone has nothing to keep.
_BEGINNINGS = {".lock", "tokenizer", "config.json", "metrics.jsonl", "checkpoints"}

# What may change when a run goes on: the numbers that it computes do not depend on these.
_FREE = ("workdir", "eval", "train.log_every", "train.checkpoint_every", "data.num_threads")


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
    if not (workdir / "checkpoints").is_dir():
        return False
    with contextlib.closing(Checkpointer(workdir)) as checkpointer:
        return checkpointer.latest_step() is not None


@contextlib.contextmanager
def open_workdir(workdir: Path, config: ConfigDict, tokenizer) -> Iterator[None]:
    """Hold a run's directory for writing, made or brought up to date; UserError if another process holds it.

    The config is written last: a directory without it has not begun.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"workdir {workdir}: another process is training in it") from None
        if not check_workdir(workdir, config):
            (workdir / "metrics.jsonl").unlink(missing_ok=True)
            save_tokenizer(tokenizer, workdir / "tokenizer")
        save_config(config, workdir / "config.json")
        yield
