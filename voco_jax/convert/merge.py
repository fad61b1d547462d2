"""A run with LoRA to a plain one: its matrices' products added to the kernels, a layer at a time."""

from pathlib import Path

from flax.traverse_util import flatten_dict, unflatten_dict
import numpy as np
from tqdm import tqdm

from voco_jax.config import save_config
from voco_jax.convert.jax_checkpoint import Parameter, StoredParams, StoredRun, of_run, write_checkpoint
from voco_jax.convert.tiles import read_tiles, write_tiles
from voco_jax.data.from_config import make_model_config
from voco_jax.data.tokenizer import save_tokenizer
from voco_jax.errors import UserError
from voco_jax.io.atomic import check_is_new, check_space, new_directory
from voco_jax.models.build import abstract_model
from voco_jax.models.linear import LoRAConfig


def merge(run: Path, destination: Path) -> None:
    """Write a run directory whose checkpoint 0 computes what the run's newest does, without LoRA.

    Kernels keep their dtype: W + scale · A B is computed in float32 and rounded once. UserError for a run without LoRA.
    """
    check_is_new(destination)
    of_run(run, lambda read: _merge(read, destination))


def _merge(read: StoredRun, destination: Path) -> None:
    stored, tokenizer, lora = read.stored, read.tokenizer, read.model_config.lora
    if lora is None:
        raise UserError(f"{read.path}: expected a run with LoRA, found model.lora.rank 0")
    config = read.config.copy_and_resolve_references()
    config.model.lora.rank = 0
    config.workdir = str(destination)
    _, plain = abstract_model(make_model_config(config, tokenizer))
    shapes = {name: leaf.shape for name, leaf in flatten_dict(plain, sep=".").items()}
    parameters = {name: _parameter(stored, name, shape, lora) for name, shape in shapes.items()}
    tiles = read_tiles(read.path, config.model.llama.hidden_size)
    total = sum(parameter.nbytes for parameter in parameters.values())
    check_space(destination, total)
    with new_directory(destination) as directory, tqdm(total=total, unit="B", unit_scale=True, desc="merge") as bar:
        save_config(config, directory / "config.json")
        save_tokenizer(tokenizer, directory / "tokenizer")
        if tiles is not None:
            write_tiles(directory, tiles)
        write_checkpoint(directory, unflatten_dict(parameters, sep="."), config, bar.update)
        stored.check()


def _parameter(stored: StoredParams, name: str, shape: tuple[int, ...], lora: LoRAConfig) -> Parameter:
    dtype, stacked = stored.dtype(name), ".layers." in name
    matrices = [name.removesuffix("kernel") + f"lora.{matrix}" for matrix in ("lora_a", "lora_b")]

    def read(layer: int) -> np.ndarray:
        at = layer if stacked else None
        values = stored.read(name, at)
        if matrices[0] not in stored.shapes:
            return values
        a, b = (stored.read(matrix, at).astype(np.float32) for matrix in matrices)
        return (values.astype(np.float32) + lora.scale * (a @ b).reshape(values.shape)).astype(dtype)

    return Parameter(shape, dtype, stacked, read)
