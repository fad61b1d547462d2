"""The parameters that a run begins with: drawn, or those of the run that `init_from` names."""

from collections.abc import Callable
import contextlib

from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
import jax

from voco_jax.checkpoint.checkpointer import Checkpointer
from voco_jax.config import load_config
from voco_jax.io.paths import as_path
from voco_jax.models.build import init_params
from voco_jax.models.compressors import COMPRESSORS
from voco_jax.models.voco import VoCoConfig, VoCoLlama
from voco_jax.train.state import AbstractState
from voco_jax.train.trainable import is_lora


def load_initial_params(
    init_from: str, seed: int, model_config: VoCoConfig, state: AbstractState, log: Callable[[str], None] = print
) -> tuple[dict, int | None]:
    """(parameters, step): those of the run `init_from`, in this run's dtype and shards, and of which of its steps;
    where it is '', random ones of a seed, and None.

    A run with LoRA, or with a compressor that has weights, may begin with one without: these parameters are drawn.
    `begin_with_run` refuses the reverse.
    """
    shardings = state.shardings[0]
    if not init_from:
        return init_params(model_config, seed, shardings=shardings), None
    directory = as_path(init_from)
    run = load_config(directory / "config.json").model
    lora = model_config.lora is not None and not run.lora.rank
    compressor = model_config.compressor_class.has_weights and not COMPRESSORS[run.compressor].has_weights

    def part(params: dict, *, drawn: bool) -> dict:
        def is_drawn(keys: tuple[str, ...]) -> bool:
            return lora and is_lora(keys) or compressor and keys[0] == "compressor"

        return unflatten_dict({keys: leaf for keys, leaf in flatten_dict(params).items() if is_drawn(keys) == drawn})

    with contextlib.closing(Checkpointer(directory)) as checkpointer:
        step, params = checkpointer.restore_params(part(state.params, drawn=False))[:2]
    log(f"parameters: {init_from}, step {step}" + ", and LoRA's" * lora + ", and the compressor's" * compressor)
    if not (lora or compressor):
        return params, step

    def draw():
        drawn = nnx.to_pure_dict(nnx.state(VoCoLlama(model_config, rngs=nnx.Rngs(seed))))
        return part(drawn, drawn=True)  # nothing else is computed

    drawn = jax.jit(draw, out_shardings=part(shardings, drawn=True))()
    return unflatten_dict(flatten_dict(params) | flatten_dict(drawn)), step
