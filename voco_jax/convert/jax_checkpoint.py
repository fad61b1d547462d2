"""Our Orbax checkpoints, written and read a layer at a time.

Orbax writes whole arrays, and our stacked layers make arrays of gigabytes. Its type handlers are the place to say
otherwise: a `Parameter` is announced by shape and dtype, and written layer by layer as it is computed. What comes out
is an ordinary checkpoint, chunked by layers, that trainers restore like any other.
"""

import asyncio
import collections
from collections.abc import Callable
import contextlib
import dataclasses
import functools
import math
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers
import tensorstore as ts

from voco_jax.convert.tensors import read_ahead
from voco_jax.errors import UserError
from voco_jax.storage import plain_path
from voco_jax.train.checkpoint import Checkpointer


@dataclasses.dataclass(frozen=True)
class Parameter:
    """An array to be written. `read(i)` gives layer i of a stacked one; `read(0)` the whole of any other."""

    shape: tuple[int, ...]
    dtype: np.dtype
    stacked: bool
    read: Callable[[int], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


_IN_FLIGHT = 2**28  # bytes being written while the next are computed; many small writes become one


class _ParameterHandler(type_handlers.TypeHandler):
    """Writes; what it wrote is read as the `jax.Array`s that it says it is, by Orbax's own handler."""

    def __init__(self, progress: Callable[[int], None]):
        self._progress = progress

    def typestr(self) -> str:
        return "jax.Array"  # what it is to whoever restores it

    async def metadata(self, infos):
        raise NotImplementedError("written only")

    async def deserialize(self, infos, args=None):
        raise NotImplementedError("written only")

    async def serialize(self, parameters, infos, args=None):
        pending = collections.deque()  # (write under way, bytes)
        try:
            return await self._serialize(parameters, infos, pending)
        except ValueError as error:  # TensorStore's only one: a full disk, no permission …
            reason = str(error).split(" [")[0].rsplit(": ", 1)[-1]
            raise UserError(f"{infos[0].parent_dir}: cannot be written: {reason}") from error
        finally:  # also after a failure: nobody can tidy up while files are still coming
            await asyncio.gather(*(write for write, _ in pending), return_exceptions=True)

    async def _serialize(self, parameters, infos, pending):
        context = ts.Context({"file_io_sync": False})  # whoever gives the directory its name syncs it before, once
        for parameter, info in zip(parameters, infos, strict=True):
            await info.await_path_creation()
            chunks = [1, *parameter.shape[1:]] if parameter.stacked else list(parameter.shape)
            spec = {
                "driver": "zarr",
                "kvstore": {
                    "driver": "ocdbt",
                    "base": f"file://{info.parent_dir}/ocdbt.process_0",
                    "path": f"{info.name}/",
                },
                "dtype": parameter.dtype.name,
                "metadata": {"shape": list(parameter.shape), "chunks": chunks, "compressor": None},
            }
            array = await ts.open(ts.Spec(spec), create=True, open=True, context=context)
            layers = range(parameter.shape[0] if parameter.stacked else 1)
            size = parameter.nbytes // len(layers)
            reads = ((size, functools.partial(parameter.read, i)) for i in layers)
            for i, values in zip(layers, read_ahead(reads), strict=True):
                target = array[i] if parameter.stacked else array
                pending.append((target.write(values, can_reference_source_data_indefinitely=True), values.nbytes))
                while sum(size for _, size in pending) > _IN_FLIGHT:
                    await pending[0][0]
                    pending.popleft()
                self._progress(values.nbytes)
        for write, _ in pending:
            await write
        return []


def write_checkpoint(run: Path, params: dict, progress: Callable[[int], None]) -> None:
    """`<run>/checkpoints/0` from a nested dict of `Parameter`s; `progress(bytes)` after each array. UserError where it
    cannot be written, or not be read afterwards."""
    registry = type_handlers.create_type_handler_registry(
        (Parameter, _ParameterHandler(progress)),
        (jax.Array, type_handlers.ArrayHandler()),  # unused, but Orbax warns where it is not known
    )
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=False, type_handler_registry=registry)
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    (run / "checkpoints").mkdir(parents=True)
    directory = plain_path(run.resolve() / "checkpoints")
    with contextlib.closing(
        ocp.CheckpointManager(directory, options=options, item_handlers={"params": handler})
    ) as manager:
        manager.save(0, args=ocp.args.Composite(params=ocp.args.PyTreeSave(params)))
    with contextlib.closing(Checkpointer(run)) as written:
        written.check_shapes(0, params)


class StoredParams:
    """The arrays of a run's newest checkpoint, by dotted path; nothing is read yet."""

    def __init__(self, run: Path):
        with contextlib.closing(Checkpointer(run)) as checkpointer:
            self.step, self.shapes = checkpointer.newest(lambda step: (step, checkpointer.param_shapes(step)))
            self._directory = checkpointer.directory / str(self.step) / "params"
        self._plain_directory = plain_path(self._directory)
        self._open: dict[str, ts.TensorStore] = {}

    def dtype(self, path: str) -> np.dtype:
        return self._array(path).dtype.numpy_dtype

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        array = self._array(path)
        try:
            return (array if layer is None else array[layer]).read().result()
        except ValueError as error:
            raise self._damaged(path, error) from None

    def _array(self, path: str) -> ts.TensorStore:
        if path not in self._open:
            kvstore = {"driver": "ocdbt", "base": f"file://{self._plain_directory}", "path": f"{path}/"}
            try:
                array = ts.open(ts.Spec({"driver": "zarr", "kvstore": kvstore}), open=True).result()
                if ".layers." in path and array.chunk_layout.read_chunk.shape[0] != 1:
                    # Not written by layers: a chunk stays in memory while its layers are read in turn
                    context = ts.Context({"cache_pool": {"total_bytes_limit": 2**30}})
                    array = ts.open(array.spec(), open=True, context=context).result()
                self._open[path] = array
            except ValueError as error:
                raise self._damaged(path, error) from None
        return self._open[path]

    def _damaged(self, path: str, error: Exception) -> UserError:
        reason = str(error).splitlines()[0].replace(str(self._plain_directory), str(self._directory))
        return UserError(f"{self._directory}: {path}: the checkpoint is damaged: {reason:.300}")
