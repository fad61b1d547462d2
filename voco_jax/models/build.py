"""The model of a config: its dataclass, made here once, its shapes, and its random parameters."""

from collections.abc import Collection
import dataclasses
import functools
from typing import Any

from flax import nnx
import jax

from voco_jax.errors import UserError
from voco_jax.models.config import ModelConfig, VoCoConfig
from voco_jax.models.voco import VoCoLlama


@dataclasses.dataclass(frozen=True)
class TokenizerFacts:
    """What a model has to know of its tokenizer; the last three fields are those of `VoCoConfig`.

    Where the tokenizer was trained with the model (`sets_vocabulary`), its size is the vocabulary; a pretrained model
    only gets rows for added tokens.
    """

    size: int
    sets_vocabulary: bool
    voco_token_id: int
    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]


def make_model_config(m: ModelConfig, tokenizer: TokenizerFacts | None) -> VoCoConfig:
    """The model that `config.model` and a tokenizer describe; ValueError for values that do not fit together.

    Without a tokenizer, for estimates, the vocabulary is the config's, and Llama's tokens are around an image.
    """
    llama = m.llama
    prompt: dict[str, Any] = {"voco_token_id": llama.vocab_size - 1}
    if tokenizer is not None:
        if llama.vocab_size < tokenizer.size or tokenizer.sets_vocabulary:
            llama = dataclasses.replace(llama, vocab_size=tokenizer.size)
        prompt = {name: getattr(tokenizer, name) for name in ("voco_token_id", "prefix_ids", "suffix_ids")}
    return VoCoConfig(
        llama=llama,
        vision=m.vision,
        compressor=m.compressor,
        num_voco_tokens=m.num_voco_tokens,
        **prompt,
        num_compressed_tokens=m.num_compressed_tokens,
        num_qformer_layers=m.num_qformer_layers,
        projector_layers=m.projector_layers,
        dtype=resolve_dtype(m.dtype),
        param_dtype=resolve_dtype(m.param_dtype, "param_dtype"),
        attention=m.attention,
        remat=m.remat,
        unroll_layers=m.unroll_layers,
        lora=m.lora if m.lora.rank else None,
    )


def resolve_dtype(name: str, key: str = "dtype") -> str:
    """The dtype that `config.model.<key>` names; 'auto' is bfloat16, but float32 on a CPU (which has no fast bf16)."""
    if name == "auto":
        return "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if name not in ("float32", "bfloat16", "float16"):
        raise UserError(f"config.model.{key}: expected auto, float32, bfloat16 or float16; found {name!r}")
    return name


def abstract_model(model_config: VoCoConfig) -> tuple[nnx.GraphDef, dict]:
    """(graphdef, parameters as shapes and dtypes) of a model; nothing is allocated."""
    graphdef, state = _abstract(model_config)
    return graphdef, nnx.to_pure_dict(state)


@functools.lru_cache(maxsize=16)  # making a model takes half a second, and loading or converting one asks several times
def _abstract(model_config: VoCoConfig) -> tuple[nnx.GraphDef, nnx.State]:
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
