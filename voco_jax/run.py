"""A run directory: `config.json`, `tokenizer/`, `checkpoints/<step>/`, `metrics.jsonl`. Training makes it; the other
commands take it."""

import argparse
from collections.abc import Collection
import contextlib
import dataclasses
import shlex

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from voco_jax.attention import ADAPTERS, check_platform
from voco_jax.config import default_config, first_difference, llama_config, load_config, lora_config, vision_config
from voco_jax.data.conversations import Encoder, Template, get_template
from voco_jax.data.images import ImageProcessor
from voco_jax.data.tokenizer import load_run_tokenizer, prompt_ids, vocabulary_sum
from voco_jax.errors import UserError
from voco_jax.models.voco import LONG_PROMPT, VoCoConfig, VoCoLlama
from voco_jax.parallel.mesh import find_devices
from voco_jax.parallel.sharding import param_shardings, with_shardings
from voco_jax.storage import AnyPath, as_path
from voco_jax.train.checkpoint import Checkpointer


@dataclasses.dataclass(frozen=True, repr=False)
class Run:
    """What a run directory holds, restored."""

    directory: AnyPath
    config: ConfigDict
    model: VoCoLlama
    encoder: Encoder
    processor: ImageProcessor
    step: int
    checksums: dict[str, int]  # of the parameters as they are stored, by dotted path
    vocabulary: str = ""  # SHA-256 of the tokenizer's; '' where the checkpoint says nothing of its tokenizer
    mesh: Mesh | None = None

    def __repr__(self) -> str:
        return f"Run({str(self.directory)!r}, step {self.step})"


def load_run(
    directory: str | AnyPath,
    *,
    step: int | str | None = None,
    compressor: str | None = None,
    attention: str | None = None,
    mesh: Mesh | None = None,
) -> Run:
    """Restore a checkpoint of a run, to be used: the newest, that of a `step`, or the 'best' (lowest evaluation loss).

    UserError says what is missing or does not fit. Kernels and embeddings are in the dtype of the computation, or in a
    smaller one that they are stored in; over a `mesh` they are spread as in training, else on one device.

    `compressor='voco'` runs a model that was trained uncompressed (with VoCo tokens in its text) as two streams: the
    paper's lower bound. `attention` is another kernel than it was trained with, which may be for other devices.
    """
    find_devices()
    directory = as_path(directory)
    config = load_config(directory / "config.json")
    if compressor is not None:
        config.model.compressor = compressor
    if attention is not None:
        config.model.attention = attention
    tokenizer = load_run_tokenizer(directory)
    model_config = make_model_config(config, tokenizer)
    try:
        check_platform(model_config.attention)
        model_config.check_kernels(LONG_PROMPT, training=False)
    except ValueError as error:
        raise UserError(f"{directory}: {error} (--attention)") from None
    if model_config.dtype == "float16" and jax.default_backend() == "cpu":  # XLA has no such products there
        raise UserError(
            f"{directory / 'config.json'}: model.dtype: float16 needs a GPU, found cpu; 'auto' takes float32"
        )
    graphdef, params = abstract_model(model_config)
    params = _for_use(params, model_config.dtype)
    if mesh is not None:
        params = with_shardings(params, param_shardings(mesh, params, for_use=True))
    with contextlib.closing(Checkpointer(directory)) as checkpointer:
        restored = checkpointer.restore_params_and_sums(params, step)
    return Run(
        directory=directory,
        config=config,
        model=nnx.merge(graphdef, restored.params),
        encoder=make_encoder(config, tokenizer, model_config),
        processor=make_processor(config),
        step=restored.step,
        checksums=restored.checksums,
        vocabulary=vocabulary_sum(tokenizer) if "tokenizer" in restored.about else "",
        mesh=mesh,
    )


def _for_use(params, dtype: str):
    """Parameters' shapes with the dtype that they are used in, where that is the smaller one: matrices are rounded to
    it anyway, norms are not."""

    def wanted(path, x):
        is_matrix = getattr(path[-1], "key", None) in ("kernel", "embedding")
        rounded = is_matrix and jnp.dtype(dtype).itemsize < x.dtype.itemsize
        return jax.ShapeDtypeStruct(x.shape, dtype if rounded else x.dtype)

    return jax.tree_util.tree_map_with_path(wanted, params)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Which run, which of its checkpoints, and by which kernel."""
    parser.add_argument("--run", type=as_path, required=True, help="run directory (training's workdir), or gs://…")
    parser.add_argument("--step", type=_step, help="checkpoint: a step, or 'best' by evaluation loss (default: newest)")
    parser.add_argument("--attention", choices=ADAPTERS, help="another kernel than it was trained with")


def _step(text: str) -> int | str:
    if text != "best" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a step or 'best', found {text!r}")
    return text if text == "best" else int(text)


def begin_with_run(config: ConfigDict) -> ConfigDict:
    """A config with the dimensions and the tokenizer of the run that `init_from` names, or as it is without one. Plain
    LLaVA that goes on as such has its prompt too, where the config names no other.

    UserError for a config that asks for other dimensions than the run has, or, where the run has LoRA, other LoRA.
    """
    if not config.init_from:
        return config
    directory = as_path(config.init_from)
    run = load_config(directory / "config.json")
    difference = first_difference(run.model.lora, config.model.lora) if run.model.lora.rank else None
    if difference:
        key, there, found = difference
        raise UserError(
            f"config.model.lora.{key}: {config.init_from} has LoRA with {there!r}, found {found!r}; "
            f"merge it first: python tools/convert_weights.py merge {shlex.quote(str(config.init_from))} DST"
        )
    # What its parameters have: a tokenizer trained with it has set its vocabulary, and its config does not say so
    run.model.llama.vocab_size = make_model_config(run, load_run_tokenizer(directory)).llama.vocab_size
    config = inherit(config, run, config.init_from)
    config.tokenizer.source = str(directory / "tokenizer")
    return config


def inherit(config: ConfigDict, run: ConfigDict, name: str | AnyPath) -> ConfigDict:
    """A copy with what goes with a run's parameters: their dimensions, pixels that no config has by default, and the
    prompt of plain LLaVA. UserError, which calls the run `name`, for a config that asks for others."""
    config, default = config.copy_and_resolve_references(), default_config()
    with config.unlocked():
        _take_over(config.model, run.model, default.model, ("llama", "vision", "projector_layers"), name)
        if first_difference(run.data.processor, default.data.processor):  # pixels that no config has by default
            keys = "aspect_ratio", "transparency", "processor"
            _take_over(config.data, run.data, default.data, keys, name, "config.data")
    data, theirs = config.data, run.data
    unnamed = data.template in (default.data.template, theirs.template)
    if is_llava(config) and is_llava(run) and unnamed and data.custom_template == default.data.custom_template:
        data.template, data.custom_template = theirs.template, theirs.custom_template
    return config


def other_pixels(config: ConfigDict) -> str:
    """A line where pictures are prepared otherwise than in the run that `init_from` names; '' where they are not."""
    if not config.init_from:
        return ""
    there, here = load_config(as_path(config.init_from) / "config.json").data, config.data
    differing = [key for key in ("aspect_ratio", "transparency") if there[key] != here[key]]
    said = [f"config.data.{key}: {config.init_from} has {there[key]!r}, this config {here[key]!r}" for key in differing]
    return f"{'; '.join(said)}: the weights know other pictures" if said else ""


def _take_over(config, run, default, keys, name, where: str = "config.model") -> None:
    """Keys, and groups of keys, as the run has them; UserError where the config asks for something else."""
    for key in keys:
        if isinstance(default[key], ConfigDict):
            _take_over(config[key], run[key], default[key], default[key].keys(), name, f"{where}.{key}")
            continue
        if config[key] not in (default[key], run[key]):
            raise UserError(
                f"{where}.{key}: {name} has {run[key]!r}, found {config[key]!r}; with init_from it need not be given"
            )
        config[key] = run[key]


def make_model_config(config: ConfigDict, tokenizer) -> VoCoConfig:
    """The model that a config and a tokenizer describe; UserError names a value that cannot be.

    Without a tokenizer (None), for estimates: the vocabulary is the config's, around an image stand Llama's tokens."""
    m = config.model
    try:
        llama = llama_config(config)
        prompt: dict = {"voco_token_id": llama.vocab_size - 1}
        if tokenizer is not None:
            # A tokenizer trained with the model sets its vocabulary; a pretrained one may need rows for added tokens.
            if llama.vocab_size < len(tokenizer) or config.tokenizer.source == "train":
                llama = dataclasses.replace(llama, vocab_size=len(tokenizer))
            ids = prompt_ids(tokenizer)
            prompt = {name: getattr(ids, name) for name in ("voco_token_id", "prefix_ids", "suffix_ids")}
        return VoCoConfig(
            llama=llama,
            vision=vision_config(config),
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
            lora=lora_config(config),
        )
    except ValueError as error:
        raise UserError(f"config.model: {error}") from None


def resolve_dtype(name: str, key: str = "dtype") -> str:
    """The dtype that `config.model.<key>` names; 'auto' is bfloat16, but float32 on a CPU (which has no fast bf16)."""
    if name == "auto":
        return "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if name not in ("float32", "bfloat16", "float16"):
        raise UserError(f"config.model.{key}: expected auto, float32, bfloat16 or float16; found {name!r}")
    return name


# Keys of `config.data.processor` whose names in ImageProcessor are others
_PROCESSOR_FIELDS = {"image_mean": "mean", "image_std": "std"}


def make_processor(config: ConfigDict) -> ImageProcessor:
    """What makes pixel values of a picture; UserError names a value that cannot be."""
    data = config.data
    fields = {_PROCESSOR_FIELDS.get(key, key): value for key, value in data.processor.items()}
    try:
        return ImageProcessor(
            config.model.vision.image_size,
            data.aspect_ratio,
            transparency=data.transparency,
            max_pixels=data.limits.picture_pixels,
            max_side=data.limits.picture_side,
            **fields,
        )
    except ValueError as error:
        raise UserError(f"config.data.{error}") from None


def set_processor(config: ConfigDict, processor: ImageProcessor) -> None:
    """Write a processor into a config, for `make_processor` to make it again."""
    config.data.update(aspect_ratio=processor.aspect_ratio, transparency=processor.transparency)
    for key in config.data.processor:
        config.data.processor[key] = getattr(processor, _PROCESSOR_FIELDS.get(key, key))


def make_encoder(config: ConfigDict, tokenizer, model_config: VoCoConfig) -> Encoder:
    """The prompt rules of a config for the kind of visual tokens its model has."""
    external = model_config.compressor in ("average_pool", "qformer")
    return Encoder(
        tokenizer=tokenizer,
        template=template_of(config),
        num_voco_tokens=0 if external else model_config.num_voco_tokens,
        num_visual_tokens=model_config.num_visual_tokens,
        compressed=model_config.compressor == "voco",
        verbatim=is_llava(config),
    )


def is_llava(config: ConfigDict) -> bool:
    """Whether a config's model is plain LLaVA, in whose text no VoCo tokens stand."""
    return config.model.compressor == "none" and not config.model.num_voco_tokens


def template_of(config: ConfigDict) -> Template:
    """The text around a conversation's turns."""
    return get_template(config.data.template, config.data.custom_template)


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
