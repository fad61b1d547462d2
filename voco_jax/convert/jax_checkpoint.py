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
import json
import math
from pathlib import Path
from typing import TypeVar

import jax
from ml_collections import ConfigDict
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers
import tensorstore as ts

from voco_jax.checkpoint.checkpointer import Checkpointer
from voco_jax.checkpoint.checksums import PartedSum
from voco_jax.checkpoint.errors import read_errors
from voco_jax.checkpoint.run_files import ABOUT, describe, tokenizer_sums
from voco_jax.errors import cannot
from voco_jax.io.paths import plain_path
from voco_jax.io.tensors import read_ahead

T = TypeVar("T")


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
        self.sums: dict[str, int] = {}  # of what was written

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
            raise cannot(f"{infos[0].parent_dir}: cannot be written", error) from error
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
            size, sum_ = parameter.nbytes // len(layers), PartedSum(parameter.shape)
            reads = ((size, functools.partial(parameter.read, i)) for i in layers)
            for i, values in zip(layers, read_ahead(reads), strict=True):
                target = array[i] if parameter.stacked else array
                sum_.add(i, values)
                pending.append((target.write(values, can_reference_source_data_indefinitely=True), values.nbytes))
                while sum(size for _, size in pending) > _IN_FLIGHT:
                    await pending[0][0]
                    pending.popleft()
                self._progress(values.nbytes)
            self.sums[info.name] = sum_.value()
        for write, _ in pending:
            await write
        return []


def write_checkpoint(run: Path, params: dict, config: ConfigDict, progress: Callable[[int], None]) -> None:
    """`<run>/checkpoints/0` from a nested dict of `Parameter`s, with their checksums and what else it says of the run,
    whose config is given and whose tokenizer is written; `progress(bytes)` after each array. UserError where it cannot
    be written, or not be read afterwards."""
    ours = _ParameterHandler(progress)
    registry = type_handlers.create_type_handler_registry(
        (Parameter, ours),
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
    about = describe(0, config, tokenizer_sums(run), {"params": ours.sums}, data={})
    item = run / "checkpoints" / "0" / ABOUT  # after the arrays, for only now their checksums are known
    item.mkdir()
    (item / "metadata").write_text(json.dumps(about))
    with contextlib.closing(Checkpointer(run)) as written:
        written.check_shapes(0, params)


def of_newest(run: Path, use: Callable[["StoredParams"], T]) -> T:
    """What `use` gives of a run's newest checkpoint that it does not find `Damaged`; a line names newer ones."""
    with contextlib.closing(Checkpointer(run)) as checkpointer:
        return checkpointer.newest(lambda step: use(StoredParams(checkpointer, step)))


class StoredParams:
    """The arrays of a checkpoint, by dotted path; nothing is read yet.

    Once all that is needed was read, `check` compares it with the checksums: before, it may be anything.
    """

    def __init__(self, checkpointer: Checkpointer, step: int):
        """`Damaged` and UserError as `Checkpointer.about` says."""
        self.step, self._sums = step, checkpointer.about(step).get("checksums", {}).get("params")
        self.shapes = {path: tuple(leaf.shape) for path, leaf in checkpointer.stored(step).items()}
        self._checkpointer = checkpointer
        self._directory = checkpointer.directory / str(step) / "params"
        self._plain_directory = plain_path(checkpointer.directory) / str(step) / "params"
        self._open: dict[str, ts.TensorStore] = {}
        self._found: dict[str, PartedSum] = {}

    def check_shapes(self, params) -> None:
        """UserError where they are not those of a model, whose parameters are given as shapes."""
        self._checkpointer.check_shapes(self.step, params)

    def check(self) -> None:
        """`Damaged` unless all parameters are as they were written; those that were not read yet are read."""
        for path, shape in self.shapes.items():
            for layer in range(shape[0]) if _is_stacked(path) else (None,):
                if layer not in self._found.get(path, ()):
                    self.read(path, layer)
        if self._sums is not None:
            found = {path: sum_.value() for path, sum_ in self._found.items()}
            self._checkpointer.compare_sums(self.step, "params", self._sums, found)

    def dtype(self, path: str) -> np.dtype:
        return self._array(path).dtype.numpy_dtype

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        """A parameter, or a layer of one; `Damaged` where it is not there, or another time was another."""
        array = self._array(path)
        with self._read_errors():
            values = (array if layer is None else array[layer]).read().result()
            found = self._found.setdefault(path, PartedSum(self.shapes[path]))
            if (layer is not None) == _is_stacked(path) and not found.add(layer, values):
                raise ValueError(f"{path}: it changes while it is read")
        return values

    def _array(self, path: str) -> ts.TensorStore:
        if path not in self._open:
            kvstore = {"driver": "ocdbt", "base": f"file://{self._plain_directory}", "path": f"{path}/"}
            with self._read_errors():
                array = ts.open(ts.Spec({"driver": "zarr", "kvstore": kvstore}), open=True).result()
                shape, chunk = self.shapes[path], array.chunk_layout.read_chunk.shape or ()
                if array.shape != shape or any((c or 0) > max(1, s) for c, s in zip(chunk, shape, strict=True)):
                    raise ValueError(f"{path}: expected shape {shape}, found {array.shape} in chunks of {chunk}")
                if _is_stacked(path) and chunk[0] != 1:
                    # Not written by layers: a chunk stays in memory while its layers are read in turn
                    context = ts.Context({"cache_pool": {"total_bytes_limit": 2**30}})
                    array = ts.open(array.spec(), open=True, context=context).result()
                self._open[path] = array
        return self._open[path]

    @contextlib.contextmanager
    def _read_errors(self):
        try:
            yield
        except (ValueError, OSError):  # TensorStore's
            with read_errors(self._directory.parent, self._plain_directory.parent):  # not around what threads do
                raise


def _is_stacked(path: str) -> bool:
    return ".layers." in path
