"""Checkpoints of a run, by Orbax: parameters, optimizer, where the data stands, config and versions under one step."""

from collections.abc import Callable, Sequence
import contextlib
import importlib.metadata
import json
import re
import sys
import time
from typing import Any, NamedTuple
import zlib

from etils import epath
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, EveryNSteps, LatestN

from voco_jax.errors import UserError
from voco_jax.parallel.distributed import texts_of_all, together
from voco_jax.storage import AnyPath, as_path, bucket_errors, in_bucket, plain_path, remove
from voco_jax.train.checkpoint_errors import Damaged, FailedSave, read_errors, write_errors
from voco_jax.train.checksums import checksums

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
VERSIONS = {name: importlib.metadata.version(name) for name in _PACKAGES}  # written into every checkpoint
_SMALL = 2**20  # bytes of a layer's parameter: chunks of less are slow to write and read
_ABOUT = "run"  # {"step", "data", "metrics", "config", "versions", "checksums"}, as JSON


class Restored(NamedTuple):
    """A checkpoint: `about` has its step, the data iterator's state, config, versions and checksums."""

    step: int
    params: dict
    opt_state: Any
    about: dict


class Checkpointer:
    """`<run>/checkpoints/<step>/`, of a directory or a bucket. A save is written apart and renamed (in a bucket: marked
    when it is whole), so a killed one leaves no half checkpoint.

    Of several processes, each writes and reads its own shards: all must call the same methods in the same order, with
    arrays that are spread over all devices (or copied to all), and one data_state, of which the first's is kept.
    """

    def __init__(self, run: str | AnyPath, *, create: bool = False, config: ConfigDict | None = None):
        """`config` says how many are kept (`train.keep…`), and is written into every checkpoint."""
        run = as_path(run)
        self.directory = run / "checkpoints" if in_bucket(run) else run.resolve() / "checkpoints"
        with bucket_errors(self.directory):
            if not create and not self.directory.is_dir():
                raise UserError(f"{self.directory}: no checkpoint found")
            self._config, self._failure, self._writing = config, FailedSave(), ""
            if create:
                self._failure.listen()
                if not in_bucket(run):
                    self.directory.mkdir(parents=True, exist_ok=True)  # a link to it needs it
            self._orbax_directory = epath.Path(plain_path(self.directory))
            self._manager = ocp.CheckpointManager(
                self._orbax_directory,
                options=ocp.CheckpointManagerOptions(
                    create=create,
                    async_options=ocp.AsyncOptions(post_finalization_callback=self._check_written),
                    cleanup_tmp_directories=create,  # of saves that were killed
                    preservation_policy=_preservation_policy(config),
                    # Only where there is one are metrics kept, though the policy has the last word
                    best_fn=_eval_loss if config is not None and config.train.keep_best else None,
                ),
                item_handlers=_handlers(),
            )

    def steps(self) -> list[int]:
        """Of all whole checkpoints, the newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def latest_step(self) -> int | None:
        return next(iter(self.steps()), None)

    # ---- Saving ------------------------------------------------------------------------------------------------

    def save(self, step: int, params, opt_state, data_state: dict, metrics: dict | None = None) -> None:
        """Start writing, and return when the arrays may change; waits for the save before, if that is still written.

        metrics: what `train.keep_best` goes by. UserError where this or the save before cannot be written.
        """
        about = {
            "step": step,
            "data": data_state,
            "metrics": metrics,
            "config": self._config.to_dict() if self._config is not None else None,
            "versions": VERSIONS,
            "checksums": {"params": checksums(params), "opt_state": checksums(opt_state)},
        }
        about["checksums"][_ABOUT] = _checksum(about)
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params, save_args=jax.tree_util.tree_map_with_path(_by_layers, params)),
            opt_state=ocp.args.StandardSave(opt_state),
            **{_ABOUT: ocp.args.JsonSave(about)},
        )
        self.wait()  # Orbax would too, but for good where the last one has failed
        self._writing, self._written = step, {"params": _shapes(params), "opt_state": _shapes(opt_state)}
        with self._write_errors():
            self._manager.save(step, args=items, metrics=metrics, force=True)

    def saving(self) -> bool:
        """Whether a save is being written."""
        return self._manager.is_saving_in_progress()

    def check(self) -> None:
        """UserError if what is being written beside has failed; does not wait for it."""
        with self._write_errors():
            if self._failure.error is not None:
                raise self._failure.error
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Until the last save is whole; UserError where it could not be written."""
        self.check()
        while self.saving():
            time.sleep(0.01)
            self.check()
        with self._write_errors():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """As `wait`, for the last time."""
        self._failure.close()
        if self._failure.error is not None:
            return  # it has been told, and Orbax would wait for what will not come
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
        for step, error in damaged:
            say(f"{error}; it is kept as {step}.damaged, and step {found.step} taken")
        self._put_aside([step for step, _ in damaged])
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
        directory = self.directory / str(step)
        if (directory / "params").exists() and not any((directory / n).exists() for n in ("opt_state", _ABOUT)):
            raise UserError(f"{directory}: holds parameters alone, as converted runs do; begin with it (init_from)")
        self.check_shapes(step, params)
        items = self._restore(
            step,
            params=ocp.args.StandardRestore(_placed(params)),
            opt_state=ocp.args.StandardRestore(_placed(opt_state)),
            **{_ABOUT: ocp.args.JsonRestore()},
        )
        about = items[_ABOUT]
        self._check_about(step, about)
        for name in ("params", "opt_state"):
            self._compare_sums(step, name, about["checksums"][name], checksums(items[name]))
        return Restored(step, items.params, items.opt_state, about)

    def restore_params(self, params, step: int | str | None = None):
        """`restore_params_and_sums` without the checksums."""
        return self.restore_params_and_sums(params, step)[:2]

    def restore_params_and_sums(self, params, step: int | str | None = None):
        """(step, parameters, checksums) of the newest checkpoint that is not damaged, that of a step, or the 'best';
        UserError where there is none or it is another model's. Without a sharding an array goes to one device, wherever
        it was when it was saved. Checksums are by dotted path, of the parameters as they are stored."""
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
        self.check_shapes(step, params)
        sums = self._about(step).get("checksums", {}).get("params")  # a converted run has none
        stored = dict(_named_leaves(self._metadata(step)))
        as_stored = jax.tree_util.tree_map_with_path(
            lambda path, x: jax.ShapeDtypeStruct(x.shape, stored[_name(path)].dtype, sharding=x.sharding), params
        )
        restored = self._restore(step, params=ocp.args.StandardRestore(_placed(as_stored))).params
        found = checksums(restored)
        if sums is not None:
            self._compare_sums(step, "params", sums, found)
        return step, jax.tree.map(lambda x, wanted: x.astype(wanted.dtype), restored, params), found

    def best_step(self) -> int | None:
        """That with the lowest evaluation loss; None where no checkpoint has one."""
        losses = {}
        for step in self.steps():
            with contextlib.suppress(Damaged):  # such a one is not the best of them
                losses[step] = (self._about(step).get("metrics") or {}).get("eval_loss")
        known = {step: loss for step, loss in losses.items() if loss is not None}
        return min(known, key=known.get) if known else None

    def param_shapes(self, step: int) -> dict[str, tuple[int, ...]]:
        """Shape by dotted path of the stored parameters; `Damaged` for a damaged checkpoint."""
        return _shapes(self._metadata(step))

    def _metadata(self, step: int):
        with self._read_errors(step):
            metadata = self._manager.item_metadata(step)["params"]
            if metadata is None:
                raise ValueError("params has no metadata")
            return metadata.tree

    def _about(self, step: int) -> dict:
        if not (self.directory / str(step) / _ABOUT).exists():
            return {}
        about = self._restore(step, **{_ABOUT: ocp.args.JsonRestore()})[_ABOUT]
        self._check_about(step, about)
        return about

    def _restore(self, step: int, **args):
        # By a handler of its own: Orbax's manager ends by waiting for all processes, of which one may have failed
        with self._read_errors(step):
            handler = ocp.CompositeCheckpointHandler(**_handlers())
            return handler.restore(self._orbax_directory / str(step), ocp.args.Composite(**args))

    def check_shapes(self, step: int, params) -> None:
        """UserError where the stored parameters have other names or shapes; `Damaged` where they cannot be found."""
        expected = _shapes(params)
        found = self.param_shapes(step)
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                shapes = (f"shape {x[name]}" if name in x else "no such parameter" for x in (expected, found))
                raise UserError("{}: {}: expected {}, found {}".format(self.directory / str(step), name, *shapes))

    def _check_about(self, step: int, about: dict) -> None:
        """That it is what was written: of text, no array's checksum would tell."""
        with self._read_errors(step):
            sums = about["checksums"]
            if sums.get(_ABOUT, expected := _checksum(about)) != expected:  # the first runs have none
                raise ValueError(f"{_ABOUT}: its checksum")
            if about["step"] != step or sums.keys() - {_ABOUT} != {"params", "opt_state"}:
                raise ValueError(f"{_ABOUT}: it is another checkpoint's")
            dict(about["data"]), dict(about["versions"])

    def _compare_sums(self, step: int, item: str, expected: dict[str, int], found: dict[str, int]) -> None:
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
        if steps:
            self._manager.reload()


def newest_saved(checkpoints: AnyPath) -> int:
    """The newest step that a directory of checkpoints has whole, 0 without one: a step gets its name when it is."""
    return max((int(path.name) for path in checkpoints.iterdir() if path.name.isdecimal()), default=0)


def _checksum(about: dict) -> int:
    """Of all that is in it, but for this very number."""
    about = json.loads(json.dumps(about))  # as it will come back
    about["checksums"].pop(_ABOUT, None)
    return zlib.crc32(json.dumps(about, sort_keys=True).encode())


@jax.jit
def all_finite(params) -> jax.Array:
    """Whether every number of a tree is one."""
    # A sum of floats is what XLA is fast at on a CPU; 0 · inf and 0 · nan are nan
    return jnp.isfinite(jnp.stack([(leaf * 0).sum(dtype=jnp.float32) for leaf in jax.tree.leaves(params)]).sum())


def _handlers() -> dict:
    return {
        "params": ocp.StandardCheckpointHandler(),
        "opt_state": ocp.StandardCheckpointHandler(),
        _ABOUT: ocp.JsonCheckpointHandler(),
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
