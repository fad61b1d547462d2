"""Our Orbax checkpoints, written and read one layer at a time.

Orbax by itself writes whole arrays, and stacked layers are arrays of gigabytes. The type handler here announces a
`Parameter` by shape and dtype and writes it layer by layer, as it is computed. The result is an ordinary checkpoint,
with one chunk per layer, and training restores it like any other.
"""

import asyncio
import collections
from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax
from ml_collections import ConfigDict
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers
import tensorstore as ts
from transformers import PreTrainedTokenizerFast

from voco_jax.checkpoint.checkpointer import Checkpointer
from voco_jax.checkpoint.checksums import PartedSum
from voco_jax.checkpoint.errors import read_errors
from voco_jax.checkpoint.run_files import ABOUT, describe, tokenizer_sums
from voco_jax.config import load_config
from voco_jax.convert.families import BY_OURS
from voco_jax.convert.vocabulary import VOCABULARY
from voco_jax.data.from_config import make_model_config
from voco_jax.data.tokenizer import load_run_tokenizer
from voco_jax.errors import cannot
from voco_jax.io.paths import plain_path
from voco_jax.io.tensors import read_ahead
from voco_jax.models.build import abstract_model
from voco_jax.models.voco import VoCoConfig

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Parameter:
    """An array to write. `read(i)` computes layer i of a stacked array; `read(0)` computes any other array."""

    shape: tuple[int, ...]
    dtype: np.dtype
    stacked: bool
    read: Callable[[int], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


_IN_FLIGHT = 2**28  # bytes being written while the next are computed; many small writes become one


class _ParameterHandler(type_handlers.TypeHandler):
    """Only writes. Orbax's own handler reads what it wrote, as `jax.Array`s."""

    def __init__(self, progress: Callable[[int], None]):
        self._progress = progress
        self.sums: dict[str, int] = {}  # checksums of what was written, by dotted path

    def typestr(self) -> str:
        return "jax.Array"  # names the handler that restores it

    async def metadata(self, infos):
        raise NotImplementedError

    async def deserialize(self, infos, args=None):
        raise NotImplementedError

    async def serialize(self, parameters, infos, args=None):
        pending = collections.deque()  # (write under way, bytes)
        try:
            return await self._serialize(parameters, infos, pending)
        except ValueError as error:  # TensorStore raises no other: a full disk, no permission …
            raise cannot(f"{infos[0].parent_dir}: cannot be written", error) from error
        finally:  # also after a failure: the directory cannot be deleted while files are still being written
            await asyncio.gather(*(write for write, _ in pending), return_exceptions=True)

    async def _serialize(self, parameters, infos, pending):
        context = ts.Context({"file_io_sync": False})  # `new_directory` syncs all files once, before the rename
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
    """Write `<run>/checkpoints/0` from a nested dict of `Parameter`s, with checksums of them and of the run's config
    and tokenizer, which is in the run already; calls `progress(bytes)` after each layer.

    UserError where the checkpoint cannot be written, or cannot be read afterwards.
    """
    ours = _ParameterHandler(progress)
    registry = type_handlers.create_type_handler_registry(
        (Parameter, ours),
        (jax.Array, type_handlers.ArrayHandler()),  # unused, but Orbax warns without it
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
    item = run / "checkpoints" / "0" / ABOUT  # after the arrays: only now are their checksums known
    item.mkdir()
    (item / "metadata").write_text(json.dumps(about))
    with contextlib.closing(Checkpointer(run)) as written:
        written.check_shapes(0, params)


def of_newest(run: Path, use: Callable[["StoredParams"], T]) -> T:
    """`use` of a run's newest checkpoint for which it does not raise `Damaged`; damaged ones are named in a line."""
    with contextlib.closing(Checkpointer(run)) as checkpointer:
        return checkpointer.newest(lambda step: use(StoredParams(checkpointer, step)))


class StoredRun(NamedTuple):
    """A run with one of its checkpoints, whose parameters have the shapes that the config gives them."""

    path: Path
    config: ConfigDict
    tokenizer: PreTrainedTokenizerFast
    model_config: VoCoConfig
    stored: "StoredParams"

    def their_shape(self, path: str, layer: int | None) -> tuple[int, ...]:
        """The shape of what `read_theirs` reads."""
        shape = BY_OURS[path].transform.their_shape(self.stored.shapes[path][layer is not None :])
        return (self.model_config.llama.vocab_size, *shape[1:]) if path in VOCABULARY else shape

    def read_theirs(self, path: str, layer: int | None) -> np.ndarray:
        """A parameter, or a layer of it, in PyTorch's layout, and without rows that only pad the vocabulary."""
        theirs = BY_OURS[path].transform.to_theirs(self.stored.read(path, layer))
        return theirs[: self.model_config.llama.vocab_size] if path in VOCABULARY else theirs


def of_run(path: Path, use: Callable[[StoredRun], T]) -> T:
    """`of_newest`, with the run's config and tokenizer. UserError where the parameters have other shapes."""
    config = load_config(path / "config.json")

    def use_stored(stored: StoredParams) -> T:
        tokenizer = load_run_tokenizer(path)
        model_config = make_model_config(config, tokenizer)
        stored.check_shapes(abstract_model(model_config)[1])
        return use(StoredRun(path, config, tokenizer, model_config, stored))

    return of_newest(path, use_stored)


class StoredParams:
    """The arrays of a checkpoint, by dotted path; nothing is read yet.

    What is read is not verified until `check` has compared it with the checksums.
    """

    def __init__(self, checkpointer: Checkpointer, step: int):
        """`Damaged` or UserError as in `Checkpointer.about`."""
        self.step, self._sums = step, checkpointer.about(step).get("checksums", {}).get("params")
        self.shapes = {path: tuple(leaf.shape) for path, leaf in checkpointer.stored(step).items()}
        self._checkpointer = checkpointer
        self._directory = checkpointer.directory / str(step) / "params"
        self._plain_directory = plain_path(checkpointer.directory) / str(step) / "params"
        self._open: dict[str, ts.TensorStore] = {}
        self._found: dict[str, PartedSum] = {}

    def check_shapes(self, params) -> None:
        """UserError where names or shapes are not those of a model's parameters."""
        self._checkpointer.check_shapes(self.step, params)

    def layers(self) -> Iterator[tuple[str, int | None]]:
        """(path, layer) of every layer of stacked arrays, and (path, None) of all others."""
        for path, shape in self.shapes.items():
            yield from ((path, layer) for layer in (range(shape[0]) if _is_stacked(path) else (None,)))

    def check(self) -> None:
        """`Damaged` unless all parameters are as they were written. Reads those that were not read yet."""
        for path, layer in self.layers():
            if layer not in self._found.get(path, ()):
                self.read(path, layer)
        if self._sums is not None:
            found = {path: sum_.value() for path, sum_ in self._found.items()}
            self._checkpointer.compare_sums(self.step, "params", self._sums, found)

    def dtype(self, path: str) -> np.dtype:
        return self._array(path).dtype.numpy_dtype

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        """A parameter, or a layer of it. `Damaged` where it is missing, or differs from what was read before."""
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
                    # Chunks of several layers: one stays in memory while its layers are read
                    context = ts.Context({"cache_pool": {"total_bytes_limit": 2**30}})
                    array = ts.open(array.spec(), open=True, context=context).result()
                self._open[path] = array
        return self._open[path]

    @contextlib.contextmanager
    def _read_errors(self):
        try:
            yield
        except (ValueError, OSError):  # TensorStore's
            # Entered only now: `read_errors` changes global hooks, and several threads read
            with read_errors(self._directory.parent, self._plain_directory.parent):
                raise


def _is_stacked(path: str) -> bool:
    return ".layers." in path
