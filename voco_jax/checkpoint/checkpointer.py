"""Checkpoints of a run, written by Orbax: parameters, optimizer, place in the data, config and versions of a step."""

from collections.abc import Callable, Iterator, Sequence
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

from voco_jax.checkpoint import errors, run_files
from voco_jax.checkpoint.checksums import as_earlier, checksums, is_same
from voco_jax.checkpoint.errors import Damaged, FailedSave, check_files, write_error
from voco_jax.checkpoint.orbax_manager import make_manager
from voco_jax.checkpoint.run_files import ABOUT
from voco_jax.config import typed
from voco_jax.errors import TryAgain, UserError, cannot
from voco_jax.io import paths
from voco_jax.io.files import read_text
from voco_jax.io.paths import AnyPath, as_path, in_bucket
from voco_jax.outages import reason
from voco_jax.parallel.distributed import texts_of_all, together
from voco_jax.terminal import log

_MARK = "commit_success.txt"  # Orbax writes it last into a checkpoint in a bucket: it is complete
_PAUSES = (1, 5, 20)  # seconds before a save that an outage has ended is tried again
_LONGEST = 3600.0  # seconds of waiting for a save
_POLL = 0.01  # seconds
_SMALL = 2**20  # bytes of a layer's parameter: chunks of less are slow to write and read


class Restored(NamedTuple):
    """A checkpoint that was read. `opt_state` is None where only parameters were asked for.

    about: its JSON (`run_files.describe`). checksums: of the parameters as they are stored, by dotted path.
    """

    step: int
    params: dict
    opt_state: Any
    about: dict
    checksums: dict[str, int]


class Checkpointer:
    """`<run>/checkpoints/<step>/`, in a directory or a bucket.

    A save gets its name when it is complete (in a bucket, a mark), so a killed one leaves no half checkpoint.

    Each of several processes writes and reads its own shards. All must call the same methods in the same order, with
    arrays that are spread over all devices or copied to all; the first one's data_state is kept.
    """

    def __init__(self, run: str | AnyPath, *, create: bool = False, config: ConfigDict | None = None):
        """`config` is written into every checkpoint; its `train.keep…` say how many are kept."""
        run = as_path(run)
        self._run = run if in_bucket(run) else run.resolve()
        self.directory = self._run / "checkpoints"
        self._config, self._failure = config, FailedSave()
        self._writing: int | None = None  # the step that was begun to be saved last
        self._failed, self._again = 0, False  # failed attempts since the last good save; whether to try again
        # Only saving needs it: what it cannot read, it reports as not there
        self._manager: ocp.CheckpointManager | None = None
        with self._listing():
            paths.check_link(self.directory)
            if create and not in_bucket(run):
                self.directory.mkdir(parents=True, exist_ok=True)  # a link to it needs it
            elif not create and not paths.is_directory(self.directory):
                raise UserError(f"{self.directory}: no checkpoint found")
        self._tokenizer_sums = functools.cache(lambda: run_files.tokenizer_sums(self._run))
        self._orbax_directory = epath.Path(paths.plain_path(self.directory))
        if create:
            self._failure.listen()
            with self._listing():
                self._tokenizer_sums()  # of the files that the training has just written or read

    @contextlib.contextmanager
    def _listing(self) -> Iterator[None]:
        try:
            with paths.bucket_errors(self.directory, but=FileNotFoundError):
                yield
        except OSError as error:
            raise cannot(f"{self.directory}: the checkpoints cannot be reached", error) from error

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, the newest first; UserError or TryAgain where they cannot be listed.

        A broken link counts: reading it is an error, while skipping it would silently take an older step.
        """
        with self._listing():
            named = [path for path in paths.entries(self.directory) if path.name.isdecimal()]
            if in_bucket(self.directory):
                whole = [path for path in named if paths.exists(path / _MARK)]
            else:
                whole = [path for path in named if paths.is_directory(path) or paths.is_dangling(path)]
        return sorted((int(path.name) for path in whole), reverse=True)

    # ---- Saving ------------------------------------------------------------------------------------------------

    def _make_manager(self) -> ocp.CheckpointManager:
        """What writes, and deletes what need not be kept. It reads a little of all checkpoints: damaged ones must have
        been put aside."""
        keep = None if self._config is None else typed(self._config).train
        return make_manager(self._orbax_directory, keep, self._check_written)

    def save(self, step: int, params, opt_state, data_state: dict, metrics: dict | None = None) -> None:
        """Start to save, and return as soon as the arrays may change. Waits for the save before.

        metrics: of an evaluation, for `train.keep_best`. A save that cannot start is tried again as in `has_failed`.
        """
        sums = {"params": checksums(params), "opt_state": checksums(opt_state)}
        about = run_files.describe(step, self._config, self._tokenizer_sums(), sums, data_state, metrics)
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params, save_args=jax.tree_util.tree_map_with_path(_by_layers, params)),
            opt_state=ocp.args.StandardSave(opt_state),
            **{ABOUT: ocp.args.JsonSave(about)},
        )
        self._settle()  # Orbax would wait for a failed one for ever
        self._writing, self._written = step, {"params": _shapes(params), "opt_state": _shapes(opt_state)}
        while True:
            try:
                manager = self._manager = self._manager or self._make_manager()
                manager.save(step, args=items, metrics=metrics, force=True)
                self._again = False
                return
            except Exception as error:
                if not self._fail(error):
                    return

    def has_failed(self) -> bool:
        """Whether the save in the background has failed, and the state of now is to be saved instead. Does not wait.

        A single process tries three more times after an outage, then raises TryAgain. A full disk or a missing
        permission is a UserError at once. Older checkpoints stay.
        """
        if self._again or self._manager is None:
            return self._again
        try:
            if self._failure.error is not None:
                raise self._failure.error
            self._manager.check_for_errors()
        except Exception as error:
            return self._fail(error)
        return False

    def wait(self) -> bool:
        """Wait for the last save. False where it is to be made again (`has_failed`); UserError where it was deleted."""
        if not self._settle():
            return False
        if self._writing is not None and jax.process_index() == 0 and self._is_there(self._writing) is False:
            raise UserError(f"{self._place()}: the checkpoint was written, and is there no more")
        return True

    def _settle(self) -> bool:
        polls = 0
        while not (failed := self.has_failed()) and self._manager and self._manager.is_saving_in_progress():
            time.sleep(_POLL)  # adds up to the time in which this process was not stopped, unlike a clock
            polls += 1
            if polls * _POLL > _LONGEST:
                self._failure.error = TimeoutError(f"it has not come to an end in {_LONGEST / 60:.0f} minutes")
        if failed:
            return False
        try:
            if self._manager is not None:
                self._manager.wait_until_finished()
        except Exception as error:
            if self._fail(error):
                return False
        self._failed = 0
        return True

    def _fail(self, error: Exception) -> bool:
        """Log that a save has failed, and pause before the next attempt; raises if there is to be none. False where
        the save is complete and only deleting older ones failed."""
        line = write_error(self._place(), error)
        alone = jax.process_count() == 1
        if alone:
            errors.await_writers()  # or their errors would be taken for those of the next attempt
        if alone and self._writing is not None and self._is_there(self._writing):
            log(f"{self.directory}: an older checkpoint cannot be deleted: {reason(error)}")
            self._manager, self._failure.error, self._again = None, None, False
            return False
        if not alone or not isinstance(line, TryAgain) or self._failed == len(_PAUSES):
            self._failure.error = self._failure.error or error
            raise line from error
        pause = _PAUSES[self._failed]
        log(f"{line}; the one before is kept, and the next attempt made in {pause} s")
        self._failed += 1
        self._manager, self._failure.error, self._again = None, None, True
        time.sleep(pause)
        return True

    def _place(self) -> AnyPath:
        """Where the save goes that was begun last."""
        return self.directory if self._writing is None else self.directory / str(self._writing)

    def _is_there(self, step: int) -> bool | None:
        """Whether a step's checkpoint is complete; None where the disk or the bucket does not answer."""
        try:
            return step in self.steps()
        except UserError:
            return None

    def close(self) -> None:
        """Wait for the last save, and end Orbax's threads."""
        self._failure.close()
        if self._failure.error is not None or self._manager is None:
            return  # the error has been raised already, and Orbax would wait for ever
        try:
            self._manager.close()
        except Exception as error:
            raise write_error(self._place(), error) from error

    def _check_written(self) -> None:
        """Read the listing and the metadata of what has been written. Orbax calls this, in the first process, before
        the checkpoint gets its name and older ones are deleted."""
        own = re.compile(rf"{self._writing}(\.orbax-.*)?")  # in a bucket it has its name already, and no mark yet
        (directory,) = (path for path in self._orbax_directory.iterdir() if own.fullmatch(path.name))
        for item, expected in self._written.items():
            if _shapes(ocp.StandardCheckpointHandler().metadata(directory / item).tree) != expected:
                raise ValueError(f"what was written of {item} is not there to be read")

    # ---- Restoring ---------------------------------------------------------------------------------------------

    def resume(self, params, opt_state, log: Callable[[str], None]) -> Restored | None:
        """The newest checkpoint that is not damaged; None where there is no checkpoint.

        Newer, damaged ones are renamed to `<step>.damaged`, and `log` is told. UserError where all are damaged or it
        is another model's. Arrays have the shapes, dtypes and shardings of the abstract values given.
        """
        found, damaged = self._newest(lambda step: self.restore(step, params, opt_state))
        for step in self.steps():
            if found is not None and step < found.step:
                with together():
                    error = self._damage_of(step)
                if error := next(filter(None, texts_of_all(error)), ""):
                    damaged.append((step, error))
        self._put_aside([step for step, _ in damaged])
        for step, error in damaged:
            log(f"{error}; it is kept as {step}.damaged, and step {found.step} taken")
        try:
            self._manager = self._manager or self._make_manager()
        except Exception as error:  # TensorStore, Orbax and the file system have kinds of their own
            raise write_error(self.directory, error) from error
        return found

    def _newest(self, read: Callable[[int], Any]) -> tuple[Any, list[tuple[int, str]]]:
        """(`read(step)` of the newest step that is not damaged, or None without steps; what is wrong with newer ones,
        by step). `Damaged` where all are."""
        damaged: list[tuple[int, str]] = []
        for step in self.steps():
            for _ in range(2):  # a disk may return wrong data once, and right data the next time
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
        """The checkpoint of a step; `Damaged` where it differs from what was written, UserError for another model's."""
        about = self._read_about(step)
        if "opt_state" not in about.get("checksums", {}):
            there = self.directory / str(step)
            raise UserError(f"{there}: holds parameters alone, as converted runs do; begin with it (init_from)")
        with self._read_errors(step):
            run_files.check_run(self._run, step, about, self._tokenizer_sums)
        if error := self._damage_of(step):
            raise Damaged(error)
        self.check_shapes(step, params)
        found = {name: self._restore(step, name, x) for name, x in (("params", params), ("opt_state", opt_state))}
        for name, tree in found.items():
            self.compare_sums(step, name, about["checksums"][name], checksums(tree))
        return Restored(step, found["params"], found["opt_state"], about, about["checksums"]["params"])

    def _damage_of(self, step: int) -> str:
        """Why Orbax's manager cannot start with this checkpoint; '' if it can."""
        try:
            with self._read_errors(step):
                run_files.check_listing(self._orbax_directory / str(step))
        except Damaged as damage:
            return str(damage)
        return ""

    def restore_params(self, params, step: int | str | None = None) -> Restored:
        """Parameters of the newest checkpoint that is not damaged, of a given step, or of the 'best'.

        Arrays without a sharding go to one device. UserError where there is no such checkpoint, or where it or its
        run's config or tokenizer is another model's.
        """
        if step is None:
            return self.newest(lambda step: self._restore_params(step, params))
        if step == "best" and (step := self.best_step()) is None:
            raise UserError(f"{self.directory}: no checkpoint was evaluated while training (eval.every)")
        if step not in self.steps():
            there = f"; there are {', '.join(map(str, self.steps()))}" if self.steps() else ""
            raise UserError(f"{self.directory}: no checkpoint found of step {step}{there}")
        return self._restore_params(step, params)

    def newest(self, read: Callable[[int], Any]):
        """`read(step)` of the newest checkpoint for which it does not raise `Damaged`; a line on standard error names
        those that are skipped. UserError where none is left."""
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
        else:  # of an earlier version, whose memories are known by these
            sums = {name: as_earlier(checksum) for name, checksum in found.items()}
        params = jax.tree.map(lambda x, wanted: x.astype(wanted.dtype), restored, params)
        return Restored(step, params, None, about, sums)

    def best_step(self) -> int | None:
        """The step with the lowest evaluation loss; None where no checkpoint has one."""
        losses = {}
        for step in self.steps():
            with contextlib.suppress(Damaged):  # a damaged one cannot be the best
                losses[step] = (self._read_about(step).get("metrics") or {}).get("eval_loss")
        known = {step: loss for step, loss in losses.items() if loss is not None}
        return min(known, key=lambda step: known[step]) if known else None

    def stored(self, step: int) -> dict:
        """Orbax's metadata (`shape`, `dtype`) of the stored parameters by dotted path; `Damaged` where it is."""
        with self._read_errors(step):
            metadata = ocp.StandardCheckpointHandler().metadata(self._orbax_directory / str(step) / "params")
            found = dict(_named_leaves(metadata.tree))
            run_files.check_chunks(found)
            return found

    def about(self, step: int) -> dict:
        """A checkpoint's JSON (`run_files.describe`), empty for a converted run of an earlier version.

        `Damaged` where it differs from what was written, UserError where the run's config or tokenizer does.
        """
        about = self._read_about(step)
        with self._read_errors(step):
            run_files.check_run(self._run, step, about, self._tokenizer_sums)
        return about

    def _read_about(self, step: int) -> dict:
        directory = self.directory / str(step)
        with self._read_errors(step):
            if {item for item in ("params", "opt_state", ABOUT) if paths.exists(directory / item)} == {"params"}:
                return {}
            about = json.loads(read_text(directory / ABOUT / "metadata"))
            run_files.check_about(about, step)
            return about

    def _restore(self, step: int, item: str, tree):
        # Not by Orbax's manager, which waits for all processes: one of them may have failed
        with self._read_errors(step):
            directory = self._orbax_directory / str(step) / item
            return ocp.StandardCheckpointHandler().restore(directory, args=ocp.args.StandardRestore(_placed(tree)))

    def check_shapes(self, step: int, params) -> dict:
        """Orbax's metadata of the stored parameters by dotted path (see `stored`). UserError where names or shapes
        differ from those of `params`."""
        expected, stored = _shapes(params), self.stored(step)
        found = {name: tuple(leaf.shape) for name, leaf in stored.items()}
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                shapes = (f"shape {x[name]}" if name in x else "no such parameter" for x in (expected, found))
                raise UserError("{}: {}: expected {}, found {}".format(self.directory / str(step), name, *shapes))
        return stored

    def compare_sums(self, step: int, item: str, expected: dict[str, int], found: dict[str, int]) -> None:
        """`Damaged` unless the checksums of an item's arrays are those that were written."""
        for name in sorted(expected.keys() | found.keys()):
            if name not in expected or name not in found or not is_same(expected[name], found[name]):
                raise Damaged(f"{self.directory / str(step)}: the checkpoint is damaged: {item}.{name}: its checksum")

    @contextlib.contextmanager
    def _read_errors(self, step: int) -> Iterator[None]:
        with errors.read_errors(self.directory / str(step), self._orbax_directory / str(step)):
            check_files(self.directory / str(step))
            yield

    def _put_aside(self, steps: Sequence[int]) -> None:
        with together():
            if jax.process_index() == 0:
                for step in steps:
                    target = self.directory / f"{step}.damaged"
                    try:
                        paths.remove(target)
                        (self.directory / str(step)).rename(target)
                    except OSError as error:
                        line = f"{self.directory / str(step)}: the checkpoint is damaged, and cannot be renamed"
                        raise cannot(f"{line} {target.name}", error) from error


@jax.jit
def all_finite(params) -> jax.Array:
    """Whether no number of a tree is NaN or infinite."""
    # A sum of floats is what XLA is fast at on a CPU; 0 · inf and 0 · nan are nan
    return jnp.isfinite(jnp.stack([(leaf * 0).sum(dtype=jnp.float32) for leaf in jax.tree.leaves(params)]).sum())


def _by_layers(path, param) -> ocp.SaveArgs:
    """Large stacked layers are stored one per chunk, so that a converter need not hold the stack."""
    layered = any(getattr(key, "key", None) == "layers" for key in path)
    if not layered or param.nbytes // param.shape[0] < _SMALL:
        return ocp.SaveArgs()
    return ocp.SaveArgs(chunk_byte_size=param.nbytes // param.shape[0], shard_axes=(0,))


def _placed(tree):
    """Abstract values, all with a sharding: without one, Orbax wants the devices that the arrays were saved from."""
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
