"""Checkpoints of a run, by Orbax: parameters, optimizer, where the data stands, config and versions under one step."""

from collections.abc import Callable, Sequence
import contextlib
import functools
import json
import re
import sys
import time
from typing import Any, NamedTuple

from etils import epath
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, EveryNSteps, LatestN

from voco_jax.errors import UserError
from voco_jax.files import read_text
from voco_jax.parallel.distributed import texts_of_all, together
from voco_jax.storage import AnyPath, as_path, bucket_errors, in_bucket, plain_path, remove
from voco_jax.train import run_files
from voco_jax.train.checkpoint_errors import Damaged, FailedSave, read_errors, write_errors
from voco_jax.train.checksums import checksums
from voco_jax.train.run_files import ABOUT

_SMALL = 2**20  # bytes of a layer's parameter: chunks of less are slow to write and read
_NAMES = ocp.path.step.standard_name_format()  # of checkpoints' directories


class Restored(NamedTuple):
    """A checkpoint. `about` is what it says of itself (`run_files.describe`), `checksums` are of its parameters as they
    are stored, by dotted path; the optimizer's state is there where it was asked for."""

    step: int
    params: dict
    opt_state: Any
    about: dict
    checksums: dict[str, int]


class Checkpointer:
    """`<run>/checkpoints/<step>/`, of a directory or a bucket. A save is written apart and renamed (in a bucket: marked
    when it is whole), so a killed one leaves no half checkpoint.

    Of several processes, each writes and reads its own shards: all must call the same methods in the same order, with
    arrays that are spread over all devices (or copied to all), and one data_state, of which the first's is kept.
    """

    def __init__(self, run: str | AnyPath, *, create: bool = False, config: ConfigDict | None = None):
        """`config` says how many are kept (`train.keep…`), and is written into every checkpoint."""
        run = as_path(run)
        self._run = run if in_bucket(run) else run.resolve()
        self._manager = None  # which only saving needs
        self.directory = self._run / "checkpoints"
        with bucket_errors(self.directory):
            if not create and not self.directory.is_dir():
                raise UserError(f"{self.directory}: no checkpoint found")
            self._config, self._failure, self._writing = config, FailedSave(), ""
            if create:
                self._failure.listen()
                if not in_bucket(run):
                    self.directory.mkdir(parents=True, exist_ok=True)  # a link to it needs it
            run_files.check_tree(self.directory)
            self._tokenizer_sums = functools.cache(lambda: run_files.tokenizer_sums(self._run))
            if create:
                self._tokenizer_sums()  # of the files that the training has just written or read
            self._orbax_directory = epath.Path(plain_path(self.directory))

    def steps(self) -> list[int]:
        """Of all whole checkpoints, the newest first."""
        with bucket_errors(self.directory):
            return sorted((found.step for found in _NAMES.find_all(self._orbax_directory)), reverse=True)

    def latest_step(self) -> int | None:
        return next(iter(self.steps()), None)

    # ---- Saving ------------------------------------------------------------------------------------------------

    def _begin_to_save(self) -> None:
        """Make Orbax's manager, which writes, and deletes what need not be kept. It reads a little of all checkpoints:
        damaged ones must have been put aside."""
        with bucket_errors(self.directory), read_errors(self.directory, self._orbax_directory):
            self._manager = ocp.CheckpointManager(
                self._orbax_directory,
                options=ocp.CheckpointManagerOptions(
                    create=True,
                    async_options=ocp.AsyncOptions(post_finalization_callback=self._check_written),
                    cleanup_tmp_directories=True,  # of saves that were killed; it goes on beside
                    preservation_policy=_preservation_policy(self._config),
                    # Only where there is one are metrics kept, though the policy has the last word
                    best_fn=_eval_loss if self._config is not None and self._config.train.keep_best else None,
                ),
                item_handlers=_handlers(),
            )

    def save(self, step: int, params, opt_state, data_state: dict, metrics: dict | None = None) -> None:
        """Start writing, and return when the arrays may change; waits for the save before, if that is still written.

        metrics: what `train.keep_best` goes by. UserError where this or the save before cannot be written.
        """
        sums = {"params": checksums(params), "opt_state": checksums(opt_state)}
        about = run_files.describe(step, self._config, self._tokenizer_sums(), sums, data_state, metrics)
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params, save_args=jax.tree_util.tree_map_with_path(_by_layers, params)),
            opt_state=ocp.args.StandardSave(opt_state),
            **{ABOUT: ocp.args.JsonSave(about)},
        )
        self.wait()  # Orbax would too, but for good where the last one has failed
        self._writing, self._written = step, {"params": _shapes(params), "opt_state": _shapes(opt_state)}
        if self._manager is None:
            self._begin_to_save()
        with self._write_errors():
            self._manager.save(step, args=items, metrics=metrics, force=True)

    def saving(self) -> bool:
        """Whether a save is being written."""
        return self._manager is not None and self._manager.is_saving_in_progress()

    def check(self) -> None:
        """UserError if what is being written beside has failed; does not wait for it."""
        with self._write_errors():
            if self._failure.error is not None:
                raise self._failure.error
            if self._manager is not None:
                self._manager.check_for_errors()

    def wait(self) -> None:
        """Until the last save is whole; UserError where it could not be written."""
        self.check()
        while self.saving():
            time.sleep(0.01)
            self.check()
        with self._write_errors():
            if self._manager is not None:
                self._manager.wait_until_finished()

    def close(self) -> None:
        """As `wait`, for the last time."""
        self._failure.close()
        if self._failure.error is not None or self._manager is None:
            return  # it has been told, and Orbax would wait for what will not come; or nothing was written
        with self._write_errors():
            self._manager.close()

    def _check_written(self) -> None:
        """That a reader finds what has been written, by its listing and its metadata. Orbax calls it before the
        checkpoint gets its name and older ones are deleted; of several processes, in the first."""
        own = re.compile(rf"{self._writing}(\.orbax-.*)?")  # in a bucket it has its name already, and no mark yet
        (directory,) = (path for path in self._orbax_directory.iterdir() if own.fullmatch(path.name))
        for item, expected in self._written.items():
            if _shapes(ocp.StandardCheckpointHandler().metadata(directory / item).tree) != expected:
                raise ValueError(f"what was written of {item} is not there to be read")

    def _write_errors(self):
        return write_errors(self.directory / str(self._writing))

    # ---- Restoring ---------------------------------------------------------------------------------------------

    def resume(self, params, opt_state, say: Callable[[str], None]) -> Restored | None:
        """The newest checkpoint that is as it was written; None where there is none at all.

        What is newer and damaged is told by `say`, and put aside as `<step>.damaged`. UserError where all are damaged,
        or it is another model's. Arrays come as the abstract values given say: shape, dtype, sharding.
        """
        found, damaged = self._newest(lambda step: self.restore(step, params, opt_state))
        for step in self.steps():
            if found is not None and step < found.step:
                with together():
                    error = self._damage_of(step)
                if error := next(filter(None, texts_of_all(error)), ""):
                    damaged.append((step, error))
        for step, error in damaged:
            say(f"{error}; it is kept as {step}.damaged, and step {found.step} taken")
        self._put_aside([step for step, _ in damaged])
        self._begin_to_save()
        return found

    def _newest(self, read: Callable[[int], Any]) -> tuple[Any, list[tuple[int, str]]]:
        """What `read` gives of the newest step that is not damaged, None where there is no step; and what is wrong with
        newer ones, by step. `Damaged` where all are."""
        damaged: list[tuple[int, str]] = []
        for step in self.steps():
            error, found = "", None
            with together():
                try:
                    found = read(step)
                except Damaged as damage:
                    error = str(damage)
            error = next(filter(None, texts_of_all(error)), "")  # all processes take the same checkpoint
            if not error:
                return found, damaged
            damaged.append((step, error))
        if damaged:
            raise Damaged(damaged[0][1])
        return None, damaged

    def restore(self, step: int, params, opt_state) -> Restored:
        """The checkpoint of a step; `Damaged` where it is not as it was written, UserError for another model's."""
        about = self._read_about(step)
        if "opt_state" not in about.get("checksums", {}):
            there = self.directory / str(step)
            raise UserError(f"{there}: holds parameters alone, as converted runs do; begin with it (init_from)")
        run_files.check_run(self._run, step, about, self._tokenizer_sums)
        if error := self._damage_of(step):
            raise Damaged(error)
        self.check_shapes(step, params)
        found = {"params": self._restore(step, "params", params)}
        found["opt_state"] = self._restore(step, "opt_state", opt_state)
        for name, tree in found.items():
            self.compare_sums(step, name, about["checksums"][name], checksums(tree))
        return Restored(step, found["params"], found["opt_state"], about, about["checksums"]["params"])

    def _damage_of(self, step: int) -> str:
        """What keeps Orbax's manager from beginning with a checkpoint; '' where nothing does."""
        try:
            with self._read_errors(step):
                run_files.check_listing(self._orbax_directory / str(step))
        except Damaged as damage:
            return str(damage)
        return ""

    def restore_params(self, params, step: int | str | None = None):
        """(step, parameters) of `restore_params_and_sums`."""
        return self.restore_params_and_sums(params, step)[:2]

    def restore_params_and_sums(self, params, step: int | str | None = None) -> Restored:
        """Parameters alone of the newest checkpoint that is not damaged, that of a step, or the 'best'; UserError where
        there is none, it is another model's, or its run's config or tokenizer is. Without a sharding an array goes to
        one device, wherever it was when it was saved."""
        if step is None:
            return self.newest(lambda step: self._restore_params(step, params))
        if step == "best" and (step := self.best_step()) is None:
            raise UserError(f"{self.directory}: no checkpoint was evaluated while training (eval.every)")
        if step not in self.steps():
            there = f"; there are {', '.join(map(str, self.steps()))}" if self.steps() else ""
            raise UserError(f"{self.directory}: no checkpoint found of step {step}{there}")
        return self._restore_params(step, params)

    def newest(self, read: Callable[[int], Any]):
        """What `read` gives of the newest checkpoint that it does not find `Damaged`; a line says what is passed over.
        UserError where there is none."""
        found, damaged = self._newest(lambda step: (step, read(step)))
        if found is None:
            raise UserError(f"{self.directory}: no checkpoint found")
        if jax.process_index() == 0:
            for _, error in damaged:
                print(f"{error}; step {found[0]} is taken", file=sys.stderr, flush=True)
        return found[1]

    def _restore_params(self, step: int, params):
        about = self.about(step)
        stored = self.check_shapes(step, params)
        sums = about.get("checksums", {}).get("params")
        as_stored = jax.tree_util.tree_map_with_path(
            lambda path, x: jax.ShapeDtypeStruct(x.shape, stored[_name(path)].dtype, sharding=x.sharding), params
        )
        restored = self._restore(step, "params", as_stored)
        found = checksums(restored)
        if sums is not None:
            self.compare_sums(step, "params", sums, found)
        params = jax.tree.map(lambda x, wanted: x.astype(wanted.dtype), restored, params)
        return Restored(step, params, None, about, found)

    def best_step(self) -> int | None:
        """That with the lowest evaluation loss; None where no checkpoint has one."""
        losses = {}
        for step in self.steps():
            with contextlib.suppress(Damaged):  # such a one is not the best of them
                losses[step] = (self._read_about(step).get("metrics") or {}).get("eval_loss")
        known = {step: loss for step, loss in losses.items() if loss is not None}
        return min(known, key=known.get) if known else None

    def stored(self, step: int) -> dict:
        """What Orbax says of the stored parameters (`shape`, `dtype`) by dotted path; `Damaged` where that is not as it
        was written."""
        with self._read_errors(step):
            metadata = ocp.StandardCheckpointHandler().metadata(self._orbax_directory / str(step) / "params")
            found = dict(_named_leaves(metadata.tree))
            run_files.check_chunks(found)
            return found

    def about(self, step: int) -> dict:
        """What a checkpoint says of itself (`run_files.describe`), empty for a converted run of an earlier version.
        `Damaged` where that is not as it was written, UserError where its run's config or tokenizer is another."""
        about = self._read_about(step)
        run_files.check_run(self._run, step, about, self._tokenizer_sums)
        return about

    def _read_about(self, step: int) -> dict:
        directory = self.directory / str(step)
        with self._read_errors(step):
            if {item for item in ("params", "opt_state", ABOUT) if (directory / item).exists()} == {"params"}:
                return {}
            about = json.loads(read_text(directory / ABOUT / "metadata"))
            run_files.check_about(about, step)
            return about

    def _restore(self, step: int, item: str, tree):
        # By a handler of its own: Orbax's manager ends by waiting for all processes, of which one may have failed
        with self._read_errors(step):
            directory = self._orbax_directory / str(step) / item
            return ocp.StandardCheckpointHandler().restore(directory, args=ocp.args.StandardRestore(_placed(tree)))

    def check_shapes(self, step: int, params) -> dict:
        """UserError where the stored parameters have other names or shapes; `Damaged` where they cannot be found. What
        Orbax says of each, by dotted path."""
        expected, stored = _shapes(params), self.stored(step)
        found = {name: tuple(leaf.shape) for name, leaf in stored.items()}
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                shapes = (f"shape {x[name]}" if name in x else "no such parameter" for x in (expected, found))
                raise UserError("{}: {}: expected {}, found {}".format(self.directory / str(step), name, *shapes))
        return stored

    def compare_sums(self, step: int, item: str, expected: dict[str, int], found: dict[str, int]) -> None:
        """`Damaged` unless checksums of an item's arrays are those that were written."""
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise Damaged(f"{self.directory / str(step)}: the checkpoint is damaged: {item}.{name}: its checksum")

    def _read_errors(self, step: int):
        return read_errors(self.directory / str(step), self._orbax_directory / str(step))

    def _put_aside(self, steps: Sequence[int]) -> None:
        with together():
            if jax.process_index() == 0:
                for step in steps:
                    target = self.directory / f"{step}.damaged"
                    remove(target)
                    (self.directory / str(step)).rename(target)


def newest_saved(checkpoints: AnyPath) -> int:
    """The newest step that a directory of checkpoints has whole, 0 without one: a step gets its name when it is."""
    return max((int(path.name) for path in checkpoints.iterdir() if path.name.isdecimal()), default=0)


@jax.jit
def all_finite(params) -> jax.Array:
    """Whether every number of a tree is one."""
    # A sum of floats is what XLA is fast at on a CPU; 0 · inf and 0 · nan are nan
    return jnp.isfinite(jnp.stack([(leaf * 0).sum(dtype=jnp.float32) for leaf in jax.tree.leaves(params)]).sum())


def _handlers() -> dict:
    return {
        "params": ocp.StandardCheckpointHandler(),
        "opt_state": ocp.StandardCheckpointHandler(),
        ABOUT: ocp.JsonCheckpointHandler(),
    }


def _preservation_policy(config: ConfigDict | None):
    if config is None:
        return LatestN()  # a reader deletes nothing
    policies = [LatestN(config.train.keep)]
    if config.train.keep_every:
        policies.append(EveryNSteps(config.train.keep_every))
    if config.train.keep_best:
        best = BestN(
            get_metric_fn=_eval_loss,
            reverse=True,  # the lowest last, which are kept
            n=config.train.keep_best,
            keep_checkpoints_without_metrics=False,
        )
        policies.append(best)
    return AnyPreservationPolicy(policies)


def _eval_loss(metrics: dict) -> float:
    return metrics["eval_loss"]


def _by_layers(path, param) -> ocp.SaveArgs:
    """Stacked layers are stored one a chunk, so that a converter need not hold the stack; small ones together."""
    layered = any(getattr(key, "key", None) == "layers" for key in path)
    if not layered or param.nbytes // param.shape[0] < _SMALL:
        return ocp.SaveArgs()
    return ocp.SaveArgs(chunk_byte_size=param.nbytes // param.shape[0], shard_axes=(0,))


def _placed(tree):
    """Abstract values, all with a sharding: Orbax would ask for the devices that they were saved from."""
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda x: x if x.sharding is not None else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), tree
    )


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _named_leaves(tree):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield _name(path), leaf


def _shapes(tree) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in _named_leaves(tree)}
