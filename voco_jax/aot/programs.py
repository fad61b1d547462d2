"""The programs of a run as shapes: what `voco aot` compiles for machines that are not there."""

import dataclasses
import os
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.stages import Wrapped
from ml_collections import ConfigDict

from voco_jax.config import typed
from voco_jax.config_keys import DataConfig
from voco_jax.data.from_config import check_elastic_k, make_model_config
from voco_jax.data.tokenizer import load_tokenizer
from voco_jax.errors import UserError
from voco_jax.io.paths import as_path, exists, in_bucket
from voco_jax.models.build import abstract_model
from voco_jax.models.compressors import KEYS_AND_VALUES
from voco_jax.models.config import VoCoConfig
from voco_jax.models.flops import training_flops
from voco_jax.models.voco import Cache, Memory, Read
from voco_jax.parallel.mesh import ROWS
from voco_jax.parallel.sharding import batch_shardings, param_shardings, with_shardings
from voco_jax.train.distillation_checks import check_models
from voco_jax.train.from_config import abstract_state, make_optimizer, train_step_of
from voco_jax.train.teachers import TeacherRun, abstract_teacher, find_teacher, place_teacher, run_of
from voco_jax.train.teaching_flops import teaching_flops

STEPS = ("train", "compress", "read", "decode")


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function with abstract arguments, and what a step of it does, all devices together.

    `tokens` counts read tokens, the slots (or the uncompressed images' tokens) among them, `compress_tokens` those of
    the images' segments; padding is in neither. `model_flops` is by the formula of `models/flops.py`.
    """

    function: Wrapped
    arguments: tuple[Any, ...]
    model_flops: float
    tokens: int
    images: int
    compress_tokens: int = 0


def make_program(config: ConfigDict, step: str, mesh: Mesh, tokenizer=None) -> Program:
    """One of `STEPS` for a config over a mesh; UserError for shapes that the mesh does not divide.

    A batch is `data.batch_size` packs of `images_per_pack` images and `rows_per_pack` rows of `row_length`
    tokens. 'compress' takes the images, 'read' puts their slots into a cache of `row_length` places and reads the text
    of the rest, 'decode' is one more token a row. `tokenizer`: as for `model_of`.
    """
    if step not in STEPS:
        raise UserError(f"step: expected one of {', '.join(STEPS)}; found {step!r}")
    for key, what in (("row_length", "tokens of a row"), ("rows_per_pack", "rows of a pack")):
        if not config.data[key]:
            raise UserError(f"config.data.{key}: expected the {what}, found 0 (no data is read here)")
    with jax.set_mesh(mesh):
        model = model_of(config, tokenizer)
        return (
            _train(config, model, mesh, tokenizer) if step == "train" else _infer(typed(config).data, model, step, mesh)
        )


def find_tokenizer(source: str):
    """The tokenizer of `config.tokenizer.source`; None where it is neither on this machine nor in a bucket.

    Nothing is downloaded.
    """
    if source == "train":
        return None
    if in_bucket(source) or os.path.isdir(os.path.expanduser(source)):
        return load_tokenizer(source)
    from huggingface_hub import snapshot_download

    try:
        return load_tokenizer(snapshot_download(source, local_files_only=True))
    except (OSError, ValueError):  # not in the hub's cache, or not a name of the hub's
        return None


def model_of(config: ConfigDict, tokenizer=None) -> VoCoConfig:
    """The model of a config; without a tokenizer the prompt has Llama's tokens, and the vocabulary is the config's."""
    model = make_model_config(config, tokenizer)
    # 'auto' is bfloat16 on the accelerators that are asked about, whatever it is on this machine
    return dataclasses.replace(model, dtype="bfloat16") if config.model.dtype == "auto" else model


def _train(config: ConfigDict, model_config: VoCoConfig, mesh: Mesh, tokenizer) -> Program:
    optimizer = make_optimizer(config)
    state = abstract_state(config, model_config, optimizer, mesh)
    data, train, teacher = typed(config).data, typed(config).train, _teacher(config, model_config, mesh, tokenizer)
    check_models(train.distill, model_config, teacher)
    function = train_step_of(config, state, optimizer, teacher, data.images_per_pack)
    batch = abstract_batch(data, model_config.vision.image_size)
    check_elastic_k(config)
    if train.elastic_k:
        batch["num_tokens"] = jax.ShapeDtypeStruct((data.batch_size,), jnp.int32)
    rows, images, length = data.batch_size * data.rows_per_pack, data.batch_size * data.images_per_pack, data.row_length
    images_per_row, own_length = train.distill.images_per_row or data.images_per_pack, 0
    if teacher is not None and teacher.by_rows:
        own_length = length + images_per_row * teacher.model_config.num_visual_tokens
        own_rows = jax.ShapeDtypeStruct((rows, own_length), jnp.int32)
        batch |= {f"teacher_{name}": own_rows for name in Read._fields} | {"teacher_places": batch["tokens"]}
    batch = with_shardings(batch, batch_shardings(mesh, batch))
    flops = training_flops(model_config, rows, length, images, train.freeze, train.compress_gradients)
    if train.loss == "distillation":
        model = None if teacher is None else teacher.model_config
        flops += teaching_flops(train.distill, model_config, model, rows, length, images, images_per_row, own_length)
    return Program(
        function,
        (state.params, state.opt_state, batch, None if teacher is None else teacher.params),
        flops,
        rows * length,
        images,
        images * model_config.compress_length,
    )


def _teacher(config: ConfigDict, student: VoCoConfig, mesh: Mesh, tokenizer) -> TeacherRun | None:
    """The run that teaches; where it is not on this machine, one of the student's dimensions that reads its rows."""
    if config.train.distill.logits:
        raise UserError(
            f"config.train.distill.logits: expected '', as no data is read here; found {config.train.distill.logits!r}"
        )
    name = run_of(config)
    if not name:
        return None
    found = find_teacher(config) if exists(as_path(name) / "config.json") else None
    if found is None:
        return abstract_teacher(name, student, student, mesh, by_rows=False)
    if tokenizer is None:
        return abstract_teacher(name, found.model_config, student, mesh, found.by_rows)
    return place_teacher(found, student, tokenizer, mesh)


def abstract_batch(data: DataConfig, size: int) -> dict:
    """A batch of `data/pipeline.py`, as the training step takes it, by shapes. `size`: pixels of a picture's side."""
    rows = (data.batch_size * data.rows_per_pack, data.row_length)
    integers = jax.ShapeDtypeStruct(rows, jnp.int32)
    return dict.fromkeys((*Read._fields, "targets"), integers) | {
        "weights": jax.ShapeDtypeStruct(rows, jnp.float32),
        "pixel_values": jax.ShapeDtypeStruct((data.batch_size, data.images_per_pack, size, size, 3), jnp.float32),
    }


def _infer(data: DataConfig, c: VoCoConfig, step: str, mesh: Mesh) -> Program:
    graphdef, params = abstract_model(c)
    params = with_shardings(params, param_shardings(mesh, params))
    batch = abstract_batch(data, c.vision.image_size)
    batch = with_shardings(batch, batch_shardings(mesh, batch))
    rows, length = batch["tokens"].shape
    num_images, dtype = data.batch_size * data.images_per_pack, jnp.dtype(c.dtype)

    def array(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

    def keys_and_values(batch_size, places):
        llama = c.llama
        shape = (llama.num_hidden_layers, batch_size, places, llama.num_key_value_heads, llama.head_dim)
        return (array(shape, dtype, None, ROWS, None, "tensor"),) * 2

    def jitted(function, **kwargs):
        return jax.jit(lambda params, *inputs: function(nnx.merge(graphdef, params), *inputs), **kwargs)

    if step == "compress":
        if not num_images:
            raise UserError("config.data.images_per_pack: expected at least 1 for step compress, found 0")
        function = jitted(lambda model, pixels: model.compress(model.encode_images(pixels)))
        flops = c.vision.flops(num_images) + c.projector_flops(num_images) + c.compress_flops(num_images)
        return Program(function, (params, batch["pixel_values"]), flops, 0, num_images, num_images * c.compress_length)
    slots = data.images_per_pack * c.num_visual_tokens
    in_slots = bool(slots) and c.memory_kind == KEYS_AND_VALUES
    cache = Cache(*keys_and_values(rows, length))
    if step == "decode":
        one = array((rows, 1), jnp.int32, ROWS)
        function = jitted(lambda model, *inputs: _next_logits(model, *model.extend(*inputs)), donate_argnums=(3,))
        flops = c.llama.layers_flops(rows, 2 * length, c.lora)  # all places are seen, not half
        return Program(function, (params, one, one, cache), flops + c.llama.head_flops(rows), rows, 0)
    if in_slots and slots >= length:
        raise UserError(f"config.data.row_length: expected room for text beside {slots} slots, found {length}")
    # Slots are in the cache, and cost nothing; embeddings stand among the tokens
    tokens = length - slots if in_slots else length
    text = array((rows, tokens), jnp.int32, ROWS)
    memory = Memory(*keys_and_values(data.batch_size, slots)) if in_slots else None
    features = None
    if slots and not in_slots:
        shape = (data.batch_size, data.images_per_pack, c.num_visual_tokens, c.llama.hidden_size)
        features = array(shape, dtype, ROWS)

    def read(model, tokens, positions, slots, slot_index, memory, features):
        cache = model.empty_cache(*slots.shape) if memory is None else model.fill(memory, slots)
        return _next_logits(model, *model.extend(tokens, positions, cache, slot_index, features))

    flops = c.llama.layers_flops(rows * tokens, 2 * length, c.lora)  # all places are scored, seen or not
    flops += c.llama.head_flops(rows)  # of each last token alone
    places = array((rows, length), jnp.int32, ROWS)
    return Program(jitted(read), (params, text, text, places, text, memory, features), flops, rows * tokens, 0)


def _next_logits(model, hidden: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """Of each row's last token."""
    return model.llama.logits(hidden[:, -1:]), cache
