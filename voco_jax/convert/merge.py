"""A run with LoRA to a plain one: its matrices' products added to the kernels, a layer at a time."""

from pathlib import Path

import jax
from ml_collections import ConfigDict
import numpy as np
from tqdm import tqdm

from voco_jax.config import load_config, save_config
from voco_jax.convert.jax_checkpoint import Parameter, StoredParams, of_newest, write_checkpoint
from voco_jax.data.from_config import make_model_config
from voco_jax.data.tokenizer import load_run_tokenizer, save_tokenizer
from voco_jax.errors import UserError
from voco_jax.io.atomic import check_is_new, check_space, new_directory
from voco_jax.models.build import abstract_model
from voco_jax.models.linear import LoRAConfig


def merge(run: Path, destination: Path) -> None:
    """Write a run directory whose checkpoint 0 computes what the run's newest does, without LoRA.

    Kernels keep their dtype: W + scale · A B is computed in float32 and rounded once. UserError for a run without LoRA,
    and for a checkpoint that is not its config's.
    """
    check_is_new(destination)
    config = load_config(run / "config.json")
    of_newest(run, lambda stored: _merge(run, config.copy_and_resolve_references(), stored, destination))


def _merge(run: Path, config: ConfigDict, stored: StoredParams, destination: Path) -> None:
    tokenizer = load_run_tokenizer(run)
    model_config = make_model_config(config, tokenizer)
    lora = model_config.lora
    if lora is None:
        raise UserError(f"{run}: expected a run with LoRA, found model.lora.rank 0")
    stored.check_shapes(abstract_model(model_config)[1])
    config.model.lora.rank = 0
    config.workdir = str(destination)
    _, plain = abstract_model(make_model_config(config, tokenizer))
    parameters = jax.tree_util.tree_map_with_path(lambda path, leaf: _parameter(stored, path, leaf, lora), plain)
    total = sum(parameter.nbytes for parameter in jax.tree.leaves(parameters))
    check_space(destination, total)
    with new_directory(destination) as directory, tqdm(total=total, unit="B", unit_scale=True, desc="merge") as bar:
        save_config(config, directory / "config.json")
        save_tokenizer(tokenizer, directory / "tokenizer")
        write_checkpoint(directory, parameters, config, bar.update)
        stored.check()


def _parameter(stored: StoredParams, path, leaf, lora: LoRAConfig) -> Parameter:
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    dtype, stacked = stored.dtype(name), ".layers." in name
    matrices = [name.removesuffix("kernel") + f"lora.{matrix}" for matrix in ("lora_a", "lora_b")]

    def read(layer: int) -> np.ndarray:
        at = layer if stacked else None
        values = stored.read(name, at)
        if matrices[0] not in stored.shapes:
            return values
        a, b = (stored.read(matrix, at).astype(np.float32) for matrix in matrices)
        return (values.astype(np.float32) + lora.scale * (a @ b).reshape(values.shape)).astype(dtype)

    return Parameter(leaf.shape, dtype, stacked, read)
