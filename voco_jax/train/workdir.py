"""A run's directory comes into being whole, and holds one run only."""

from pathlib import Path
import shutil

from ml_collections import ConfigDict

from voco_jax.config import first_difference, load_config, save_config
from voco_jax.errors import UserError
from voco_jax.train.checkpoint import Checkpointer


def check_workdir(workdir: Path, config: ConfigDict) -> bool:
    """Whether the directory holds a checkpoint of this very run; UserError if it holds another run, or other things.

    A run that was stopped before its first checkpoint has nothing to keep, and may be replaced by any.
    """
    if not (workdir / "config.json").exists():
        if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
            raise UserError(f"workdir {workdir}: expected a run or an empty directory, found other files")
        return False
    if not _has_checkpoint(workdir):
        return False
    difference = first_difference(load_config(workdir / "config.json"), config)
    if difference:
        key, found, expected = difference
        raise UserError(
            f"workdir {workdir}: holds a run with {key} = {found!r}, this config has {expected!r}; "
            "take another --config.workdir or remove it"
        )
    return True


def _has_checkpoint(workdir: Path) -> bool:
    if not (workdir / "checkpoints").is_dir():
        return False
    checkpointer = Checkpointer(workdir)
    step = checkpointer.latest_step()
    checkpointer.close()
    return step is not None


def create_workdir(workdir: Path, config: ConfigDict, tokenizer) -> None:
    """A new run directory with config and tokenizer, where `check_workdir` found nothing to keep.

    Written apart and renamed, so that it is whole or not there.
    """
    workdir.parent.mkdir(parents=True, exist_ok=True)
    temporary = workdir.with_name(f".{workdir.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    tokenizer.save_pretrained(temporary / "tokenizer")
    save_config(config, temporary / "config.json")
    if workdir.exists():
        shutil.rmtree(workdir)  # empty, or a run without checkpoint
    temporary.rename(workdir)
