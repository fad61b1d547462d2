"""The model of a config: its dataclass, made here once, its shapes, and its random parameters."""

from collections.abc import Collection
import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
from jax.sharding import AbstractMesh

from voco_jax.models.config import ModelConfig, VoCoConfig
from voco_jax.models.voco import VoCoLlama


def make_model_config(m: ModelConfig, vocab_size: int | None = None, **prompt: Any) -> VoCoConfig:
    """The model of `config.model`, for a tokenizer's vocabulary and its voco_token_id, prefix_ids and suffix_ids.

    Without these, for estimates, the vocabulary is the config's, and Llama's tokens are around an image. ValueError for
    values that do not fit together.
    """
    llama = m.llama if vocab_size is None else dataclasses.replace(m.llama, vocab_size=vocab_size)
    prompt = {"voco_token_id": llama.vocab_size - 1} | prompt
    fast = "float32" if jax.default_backend() == "cpu" else "bfloat16"  # a CPU has no fast bfloat16
    dtypes = {name: fast if (dtype := getattr(m, name)) == "auto" else dtype for name in ("dtype", "param_dtype")}
    return VoCoConfig(**(vars(m) | dtypes | prompt | {"llama": llama, "lora": m.lora if m.lora.rank else None}))


def abstract_model(model_config: VoCoConfig) -> tuple[nnx.GraphDef, dict]:
    """(graphdef, parameters as shapes and dtypes) of a model; nothing is allocated."""
    graphdef, state = _abstract(model_config, jax.sharding.get_abstract_mesh())
    return graphdef, nnx.to_pure_dict(state)


@functools.lru_cache(maxsize=16)  # making a model takes half a second, and loading or converting one asks several times
def _abstract(model_config: VoCoConfig, mesh: AbstractMesh) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: VoCoLlama(model_config, rngs=nnx.Rngs(0))))


def init_params(
    model_config: VoCoConfig, seed: int, parts: Collection[str] | None = None, shardings: Any = None
) -> dict:  # fmt: skip
    """Random parameters, a nested dict of arrays: all, or some of the top level's ('projector' …) alone.

    With `shardings` each device makes its own shards, and no more; the numbers are the same on any mesh.
    """

    def init() -> dict:
        params = nnx.to_pure_dict(nnx.state(VoCoLlama(model_config, rngs=nnx.Rngs(seed))))
        return params if parts is None else {part: params[part] for part in parts}

    return jax.jit(init, out_shardings=shardings)()
