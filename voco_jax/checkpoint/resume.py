"""What a run needs to go on: its own directory, and a config whose numbers are those of the steps already done.

A run that has a checkpoint has its dimensions, tokenizer and parameters in its directory. The run that it began with
may be gone, data may lie elsewhere (`data/contents.py` compares what they hold), and `train.steps` may change as long
as the steps done would have been the same.
"""

from collections.abc import Sequence
import hashlib
import shlex

from ml_collections import ConfigDict
import numpy as np

from voco_jax.chat_templates import TOKENIZER, ChatTemplate
from voco_jax.checkpoint.init_from import inherit
from voco_jax.config import (
    ADDED_LATER,
    KEYS,
    first_difference,
    flatten,
    load_config,
    typed,
    value_of,
    with_earlier_values,
)  # fmt: skip
from voco_jax.config_keys import OWN_TEACHERS
from voco_jax.data.from_config import template_of
from voco_jax.data.tokenizer import load_run_tokenizer, load_tokenizer
from voco_jax.errors import UserError
from voco_jax.io.files import read_bytes
from voco_jax.io.json_files import read_object
from voco_jax.io.paths import AnyPath, as_path, bucket_errors, exists, same_place
from voco_jax.optim import learning_rates

# Of a run's directory: which checkpoint its parameters came from, and which one teaches it
BASE, TEACHER = "init_from.json", "teacher.json"

_SCHEDULE = [name for name, key in KEYS.items() if key.rules.on_resume == "schedule"]


def continued(config: ConfigDict, workdir: AnyPath) -> ConfigDict:
    """A config with what a run that goes on has of its own, whatever became of the place that it came from.

    That is the run named by `init_from`, the dimensions taken from there, and the tokenizer. UserError for a config
    that asks for another.
    """
    stored = load_config(workdir / "config.json")
    config = with_earlier_values(config, stored)
    config.data.rows_per_pack = config.data.rows_per_pack or stored.data.rows_per_pack  # 0: as the data chose them then
    if stored.init_from:
        _check_base(config.init_from, stored.init_from, workdir)
        config = inherit(config, stored, workdir, load_run_tokenizer(workdir))
        config.init_from, config.tokenizer.source = stored.init_from, stored.tokenizer.source
    elif _same_tokenizer(config.tokenizer.source, stored.tokenizer.source, workdir):
        config.tokenizer.source = stored.tokenizer.source
    if config.data.template == stored.data.template == TOKENIZER and template_of(config) == ChatTemplate():
        config.data.custom_template = stored.data.custom_template  # as it was read when the run began
    return config


def kept_values(asked: ConfigDict, config: ConfigDict, workdir: AnyPath) -> str:
    """A line about defaults that have changed since the run began, and that `continued` did not take; '' for none."""
    before, now = flatten(asked), flatten(config)
    changed = {key: old for key, old in ADDED_LATER.items() if before[key] != now[key] == old}
    kept = [f"{key} = {old!r} (now {before[key]!r})" for key, old in changed.items()]
    return f"{workdir}: goes on with the defaults of when it began: {', '.join(kept)}" if kept else ""


def check_same_run(config: ConfigDict, workdir: AnyPath, steps: Sequence[int]) -> None:
    """UserError where the run in `workdir`, with checkpoints of `steps`, is not what this config would make."""
    stored = load_config(workdir / "config.json")
    may_differ = [name for name, key in KEYS.items() if key.rules.on_resume != "refused"]
    there, here = ({name: source.weight for name, source in c.data.train.items()} for c in (stored, config))
    other_weights = ("data.train with the weights", there, here) if there != here else None
    if difference := first_difference(stored, config, ignore=may_differ) or other_weights:
        key, found, expected = difference
        raise UserError(
            f"workdir {workdir}: holds a run with {key} = {found!r}, this config has {expected!r}; "
            "take another --config.workdir"
        )
    _check_teacher(stored, config, workdir)
    _check_schedule(stored, config, workdir, steps)


def _check_teacher(stored: ConfigDict, config: ConfigDict, workdir: AnyPath) -> None:
    """UserError where another kind of teacher teaches; of a run its parameters are compared when they are there."""
    found, expected = stored.train.distill.teacher, config.train.distill.teacher
    if found != expected and any(name in ("", *OWN_TEACHERS) for name in (found, expected)):
        raise UserError(
            f"workdir {workdir}: holds a run with train.distill.teacher = {found!r}, this config has {expected!r}; "
            "take another --config.workdir"
        )


def _check_schedule(stored: ConfigDict, config: ConfigDict, workdir: AnyPath, steps: Sequence[int]) -> None:
    """UserError unless every step done had the learning rate, and the share of a teacher, that the config gives it."""
    keys = {key: (value_of(stored, key), value_of(config, key)) for key in _SCHEDULE}
    changed = next((key for key, (was, wanted) in keys.items() if was != wanted), None)
    if changed is None:
        return
    done, (was, wanted) = max(steps), keys[changed]
    if config.train.steps < done:
        raise UserError(f"config.train.steps: {workdir} has done {done} steps already; found {config.train.steps}")
    distill, was_steps = config.train.distill, stored.train.steps
    if distill.alpha_end not in (None, distill.alpha) and config.train.steps != was_steps and done > 1:
        raise UserError(
            f"config.train.steps: {workdir} has {was_steps}, this config {config.train.steps}; step 2, which is done, "
            "had another train.distill.alpha, which goes to alpha_end over all steps: "
            f"keep {was_steps}, or begin another run with --config.init_from={shlex.quote(str(workdir))}"
        )
    before, now = (learning_rates(typed(c).optim, c.train.steps)[:done] for c in (stored, config))
    differ = np.flatnonzero(before != now)
    if not len(differ):
        return
    same = int(differ[0])  # steps
    earlier = max((step for step in steps if step <= same), default=None)
    rates = f"{before[same]:.4g}, not {now[same]:.4g}"
    ways = [f"keep {was!r}", f"begin another run with --config.init_from={shlex.quote(str(workdir))}"]
    if earlier:
        ways.append(f"remove the checkpoints after that of step {earlier}")
    raise UserError(
        f"config.{changed}: {workdir} has {was!r}, this config {wanted!r}; step {same + 1}, which is done, had "
        f"a learning rate of {rates} (schedule {config.optim.schedule!r}): {', '.join(ways[:-1])}, or {ways[-1]}"
    )


# ---- The run that it began with ---------------------------------------------------------------------------------


def base_of(run: AnyPath, step: int) -> dict:
    """What `BASE` holds of a run's checkpoint. It stays the same when the run is moved or copied."""
    with bucket_errors(run):
        metadata = run / "checkpoints" / str(step) / "_CHECKPOINT_METADATA"  # when it was made, to the nanosecond
        made = hashlib.sha256(read_bytes(metadata)).hexdigest() if exists(metadata) else ""
    return {"run": str(run), "step": step, "made": made}


def _check_base(found: str, stored: str, workdir: AnyPath) -> None:
    if not found or same_place(found, stored):
        return
    with bucket_errors(workdir):
        base = read_object(workdir / BASE) if exists(workdir / BASE) else {}
    made, step = base.get("made"), base.get("step")
    if made and type(step) is int and base_of(as_path(found), step)["made"] == made:
        return
    raise UserError(
        f"config.init_from: {workdir} began with {stored}, and {found} is another run; leave it out to go on, or "
        "take another --config.workdir"
    )


def _same_tokenizer(found: str, stored: str, workdir: AnyPath) -> bool:
    """Whether a tokenizer is the one that a run has, wherever it lies; UserError where it cannot be loaded."""
    if "train" in (found, stored) or found == stored:
        return found == stored
    if same_place(found, stored):
        return True
    ours, other = load_run_tokenizer(workdir), load_tokenizer(found)
    return ours.backend_tokenizer.to_str() == other.backend_tokenizer.to_str()
