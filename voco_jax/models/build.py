"""The model that a config describes, as shapes and with random parameters."""

from collections.abc import Collection

from flax import nnx
import jax

from voco_jax.errors import UserError
from voco_jax.models.voco import VoCoConfig, VoCoLlama


def resolve_dtype(name: str, key: str = "dtype") -> str:
    """The dtype that `config.model.<key>` names; 'auto' is bfloat16, but float32 on a CPU (which has no fast bf16)."""
    if name == "auto":
        return "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if name not in ("float32", "bfloat16", "float16"):
        raise UserError(f"config.model.{key}: expected auto, float32, bfloat16 or float16; found {name!r}")
    return name


def abstract_model(model_config: VoCoConfig):
    """(graphdef, parameters as shapes and dtypes) of a model; nothing is allocated."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: VoCoLlama(model_config, rngs=nnx.Rngs(0))))
    return graphdef, nnx.to_pure_dict(state)


def init_params(model_config: VoCoConfig, seed: int, parts: Collection[str] | None = None, shardings=None):
    """Random parameters, a nested dict of arrays: all, or some of the top level's ('projector' …) alone.

    With `shardings` each device makes its own shards, and no more; the numbers are the same on any mesh.
    """

    def init():
        params = nnx.to_pure_dict(nnx.state(VoCoLlama(model_config, rngs=nnx.Rngs(seed))))
        return params if parts is None else {part: params[part] for part in parts}

    return jax.jit(init, out_shardings=shardings)()
