"""Checkpoints of a run, by Orbax: parameters, optimizer and the data iterator's place, together under one step."""

import contextlib
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from voco_jax.errors import UserError

_HANDLERS = {
    "params": ocp.StandardCheckpointHandler,
    "opt_state": ocp.StandardCheckpointHandler,
    "data": ocp.JsonCheckpointHandler,
}


class Checkpointer:
    """`<run>/checkpoints/<step>/`. A save is written apart and renamed, so a killed one leaves no half checkpoint.

    Of several processes, each writes and reads its own shards: all must call the same methods in the same order, with
    arrays that are spread over all devices (or copied to all), and one data_state, of which the first's is kept.
    """

    def __init__(self, run: Path, *, create: bool = False, keep: int = 2):
        self.directory = Path(run).resolve() / "checkpoints"
        if not create and not self.directory.is_dir():
            raise UserError(f"{self.directory}: no checkpoint found")
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=create)
        handlers = {name: handler() for name, handler in _HANDLERS.items()}
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, params, opt_state, data_state: dict) -> None:
        """Start writing; returns before it is done."""
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params, save_args=jax.tree_util.tree_map_with_path(_by_layers, params)),
            opt_state=ocp.args.StandardSave(opt_state),
            data=ocp.args.JsonSave(data_state),
        )
        self._manager.save(step, args=items, force=True)

    def restore(self, step: int, params, opt_state):
        """(params, opt_state, data_state) of a step, shaped, typed and sharded as the abstract values given.

        What has no sharding goes to one device, wherever it was when it was saved.
        """
        self._check_shapes(step, params)
        items = self._restore(
            step,
            params=ocp.args.StandardRestore(_placed(params)),
            opt_state=ocp.args.StandardRestore(_placed(opt_state)),
            data=ocp.args.JsonRestore(),
        )
        return items.params, items.opt_state, items.data

    def restore_params(self, params):
        """(step, parameters) of the newest checkpoint; UserError where there is none or it is another model's."""
        step = self.latest_step()
        if step is None:
            raise UserError(f"{self.directory}: no checkpoint found")
        self._check_shapes(step, params)
        return step, self._restore(step, params=ocp.args.StandardRestore(_placed(params))).params

    def param_shapes(self, step: int) -> dict[str, tuple[int, ...]]:
        """Shape by dotted path of the stored parameters; UserError for a damaged checkpoint."""
        with self._damage_as_user_error(step):
            metadata = self._manager.item_metadata(step)["params"]
            if metadata is None:
                raise ValueError("params has no metadata")
            return dict(_named_shapes(metadata.tree))

    def wait(self) -> None:
        """Until the last save is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for the last save."""
        self._manager.close()

    def _restore(self, step: int, **args):
        with self._damage_as_user_error(step):
            return self._manager.restore(step, args=ocp.args.Composite(**args))

    def _check_shapes(self, step: int, params) -> None:
        expected, found = dict(_named_shapes(params)), self.param_shapes(step)
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                shapes = (f"shape {x[name]}" if name in x else "no such parameter" for x in (expected, found))
                raise UserError("{}: {}: expected {}, found {}".format(self.directory / str(step), name, *shapes))

    @contextlib.contextmanager
    def _damage_as_user_error(self, step: int):
        try:
            yield
        except Exception as error:  # Orbax raises all kinds, bare Exception among them
            cause = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            reason = next(iter(str(cause).splitlines()), type(cause).__name__)
            raise UserError(f"{self.directory / str(step)}: the checkpoint is damaged: {reason:.300}") from error


def _by_layers(path, param) -> ocp.SaveArgs:
    """Stacked layers are stored one a chunk, so that a converter need not hold the stack."""
    if not any(getattr(key, "key", None) == "layers" for key in path):
        return ocp.SaveArgs()
    return ocp.SaveArgs(chunk_byte_size=max(1, param.nbytes // param.shape[0]), shard_axes=(0,))


def _placed(tree):
    """Abstract values, all with a sharding: Orbax would ask for the devices that they were saved from."""
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda x: x if x.sharding is not None else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), tree
    )


def _named_shapes(tree):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield jax.tree_util.keystr(path, simple=True, separator="."), tuple(leaf.shape)
