"""A run of ours to a PyTorch checkpoint: the released code's format, or Hugging Face's LLaVA, -NeXT or -OneVision."""

from collections.abc import Collection, Iterator
import dataclasses
import json
import math
from pathlib import Path
import shlex

from ml_collections import ConfigDict
import numpy as np
from tqdm import tqdm

from voco_jax.chat_templates import CHAT_TEMPLATES, CUSTOM, TOKENIZER, ChatTemplate
from voco_jax.checkpoint.init_from import TILES
from voco_jax.config import default_config
from voco_jax.convert.chat_templates import write_chat_template
from voco_jax.convert.families import BY_OURS, clip, language_to_hf, llava
from voco_jax.convert.families.vision import family_of_tower
from voco_jax.convert.findings import Findings
from voco_jax.convert.formats import FORMATS, LLAVA_LINEAR, VISION, Format
from voco_jax.convert.jax_checkpoint import StoredParams, StoredRun, of_run
from voco_jax.convert.processors import processor_to_hf
from voco_jax.convert.tiles import Tiles, check_tiles, read_tiles
from voco_jax.convert.vocabulary import VOCABULARY, with_fresh_rows
from voco_jax.data.conversations import Encoder
from voco_jax.data.from_config import is_llava, make_encoder, make_processor
from voco_jax.data.template_reader import named_alike, read_chat_template, takes_parts
from voco_jax.data.tokenizer import save_tokenizer, set_stop_ids
from voco_jax.errors import UserError
from voco_jax.io.atomic import check_is_new, check_space, new_directory
from voco_jax.io.safetensors import write_safetensors
from voco_jax.io.tensors import DTYPES, Tensor
from voco_jax.models.voco import VoCoConfig

WRITTEN = {format.name: format for format in reversed(FORMATS)}  # the first of each name
WRITTEN |= dict.fromkeys(llava.TILED, WRITTEN["llava-hf"])
IMAGE_TOKEN = "<image>"


def to_hf(run: Path, destination: Path, format_name: str, dtype: str | None, max_shard_size: int) -> list[str]:
    """Write a directory with sharded safetensors, config, tokenizer and image processor; returns warnings."""
    check_is_new(destination)
    return of_run(run, lambda read: _to_hf(read, destination, format_name, dtype, max_shard_size))


def _to_hf(
    read: StoredRun, destination: Path, format_name: str, dtype: str | None, max_shard_size: int
) -> list[str]:  # fmt: skip
    run, config, tokenizer, model_config, stored = read
    check_run(run, stored, model_config, format_name)
    kept = read_tiles(run, model_config.llama.hidden_size)
    tiles = check_tiles(kept, run, config, format_name) if format_name in llava.TILED else None
    processor = {} if tiles else processor_to_hf(make_processor(config), run, format_name)
    format, num_image_rows, tokens = WRITTEN[format_name], 0, set(tokenizer.get_vocab().values())
    if model_config.projector_layers == 1:
        format = LLAVA_LINEAR
    encoder = make_encoder(config, tokenizer, model_config)
    if encoder.stop_ids != (tokenizer.eos_token_id,):  # those that the source had, and the template's
        set_stop_ids(tokenizer, tuple(dict.fromkeys([*tokenizer.origin.stop_ids, *encoder.stop_ids])))
    if format_name != "voco":
        if is_llava(config):
            set_chat_template(tokenizer, encoder)
        num_image_rows = add_image_token(tokenizer, model_config)
    findings = Findings()
    tensors = list(named_tensors(read, format, DTYPES[dtype] if dtype else None, findings, num_image_rows, tokens))
    # The released code reads the vision tower from a directory of its own
    beside = [(n.removeprefix(format.vision), t) for n, t in tensors if n.startswith(format.vision)]
    beside = [(VISION[0].vision + n, t) for n, t in beside] if format_name == "voco" else []
    dtypes = {tensor.dtype.name for _, tensor in tensors}
    written_dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    if tiles:
        newline = tiles.cast(dtype, findings).newline
        tensors.append((llava.IMAGE_NEWLINE[0], Tensor(newline.shape, newline.dtype, run / TILES, lambda: newline)))
    total = sum(tensor.nbytes for _, tensor in tensors + beside)
    check_space(destination, total)
    with new_directory(destination) as directory, tqdm(total=total, unit="B", unit_scale=True, desc="to-hf") as bar:
        if beside:
            tower = directory / "vision_tower"
            tower.mkdir()
            write_safetensors(tower / "model.safetensors", beside, bar.update)
            fields = clip.to_hf(model_config.vision) | {"architectures": ["CLIPVisionModel"]}
            write_json(tower / "config.json", fields | {"torch_dtype": beside[0][1].dtype.name})
        write_shards(directory, tensors, max_shard_size, bar.update)
        if format_name == "voco":
            write_released_configs(
                directory, model_config, config.data.aspect_ratio, processor, tokenizer, written_dtype
            )
        else:
            write_hf_configs(directory, model_config, tiles, processor, tokenizer, written_dtype)
        save_tokenizer(tokenizer, directory)
        stored.check()
        return findings.finish(run) + _lost(config, kept, tiles)


def _lost(config: ConfigDict, kept: Tiles | None, written: Tiles | None) -> list[str]:
    """What is left out, and how it comes in again. `kept`: what the run has for tiles; `written`: what is written."""
    data, default, lost = config.data, default_config().data, []
    if kept and not written:
        lost = [f"image_newline is left out; --format {kept.format} writes it"]
    elif written and not written.files:
        lost = ["no processor is written: the checkpoint that was converted had none"]
    if is_llava(config):
        return lost
    if data.template not in (default.template, TOKENIZER):
        again = f"--template {data.template}" if data.template != CUSTOM else "config.data.custom_template"
        lost += [f"chat template {data.template!r}: the format cannot store it; to-jax sets it again with {again}"]
    others = [key for key in ("system", "image_position") if data[key] != default[key]]
    return lost + [f"config.data.{key} = {data[key]!r}: the format cannot store it" for key in others]


def check_run(run: Path, stored: StoredParams, config: VoCoConfig, format_name: str) -> None:
    """UserError for what the format cannot store."""
    if config.lora is not None:
        raise UserError(
            f"{run}: format {format_name} cannot store LoRA; merge it first: "
            f"voco convert merge {shlex.quote(str(run))} DST"
        )
    tower = family_of_tower(config.vision)
    released = format_name == "voco"
    for found, can in (
        (f"projector_layers {config.projector_layers}", config.projector_layers in ((1, 2, 3) if released else (2,))),
        (f"projector_bias {config.projector_bias}", config.projector_bias or not released),
        (f"vision.further_layers {config.vision.further_layers}", not config.vision.further_layers or not released),
        ("a vision tower that is not CLIP's", tower is clip or not released),
        ("a vision tower that is neither CLIP's nor SigLIP's", tower is not None),
    ):
        if not can:
            raise UserError(f"{run}: {found}: format {format_name} cannot store it")
    others = sorted(path for path in stored.shapes if path not in BY_OURS)
    if others:
        raise UserError(f"{run}: {others[0]}: format {format_name} cannot store compressor {config.compressor}")
    llama = config.llama
    try:
        model_type = language_to_hf(llama)["model_type"]
    except ValueError as error:
        raise UserError(f"{run}: {error}") from None
    if format_name == "voco" and model_type != "llama":
        raise UserError(f"{run}: a {model_type}: format voco is Llama's alone; --format llava-hf can store it")
    if format_name == "voco" and llama.head_dim * llama.num_attention_heads != llama.hidden_size:
        raise UserError(
            f"{run}: head_dim {llama.head_dim}: the released code knows only hidden_size / num_attention_heads; "
            "--format llava-hf can store it"
        )


def named_tensors(
    run: StoredRun, format: Format, dtype: np.dtype | None, findings: Findings, num_image_rows: int,
    tokens: Collection[int],
) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
    """(name, tensor) in the order of the layers; values are read and checked when they are written.

    The vocabulary's padding is cut. Rows for `<image>` follow: the mean of the `tokens`' rows.
    """

    def tensor(path: str, layer: int | None, name: str) -> Tensor:
        shape, wanted = run.their_shape(path, layer), dtype or run.stored.dtype(path)
        rows = num_image_rows if path in VOCABULARY else 0
        shape = (shape[0] + rows, *shape[1:])

        def read() -> np.ndarray:
            values = findings.check(name, run.read_theirs(path, layer), wanted)
            return with_fresh_rows(values, shape[0], tokens=tokens) if rows else values

        return Tensor(shape, wanted, Path(path), read)

    for path, layer in run.stored.layers():
        name = format.their_name(BY_OURS[path], layer)
        yield name, tensor(path, layer, name)


def set_chat_template(tokenizer, encoder: Encoder) -> None:
    """Give the tokenizer the run's prompt as a chat template, unless its own renders the same, images in parts too."""
    own = tokenizer.chat_template
    if not own or encoder.system is not None or not _is_alike(own, tokenizer, encoder.template):
        tokenizer.chat_template = write_chat_template(encoder)


def _is_alike(own: str, tokenizer, template: ChatTemplate) -> bool:
    """Whether a chat template is a processor's, and the one that a run's was read from, by this version or an earlier
    one."""
    try:
        if not takes_parts(own, tokenizer):
            return False
        read = read_chat_template(own, tokenizer)
    except UserError:
        return CHAT_TEMPLATES.get(named_alike(own, tokenizer, about_images=True) or "") == template
    return template in (read, dataclasses.replace(read, with_system="", keeps_newlines=False))


def add_image_token(tokenizer, model_config: VoCoConfig) -> int:
    """Add `<image>`, a token of Hugging Face's LLaVA. Returns how many rows it needs beyond the model's."""
    if IMAGE_TOKEN in tokenizer.get_added_vocab():
        return 0
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    return max(0, len(tokenizer) - model_config.llama.vocab_size)


def write_shards(directory: Path, tensors: list[tuple[str, Tensor]], max_shard_size: int, progress) -> None:
    """`model.safetensors`, or `model-00001-of-….safetensors` with an index. A larger tensor is a shard by itself."""
    shards: list[list[tuple[str, Tensor]]] = [[]]
    size = 0
    for name, tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append((name, tensor))
        size += tensor.nbytes
    if len(shards) == 1:
        write_safetensors(directory / "model.safetensors", shards[0], progress)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(directory / file, shard, progress)
        weight_map |= dict.fromkeys((name for name, _ in shard), file)
    total = sum(tensor.nbytes for _, tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(directory / "model.safetensors.index.json", index)


def write_released_configs(
    directory: Path, model_config: VoCoConfig, aspect_ratio: str, processor: dict, tokenizer, dtype: str
) -> None:  # fmt: skip
    """config.json and what the image processor needs to know, for the released code."""
    config = llava.to_released(model_config.llama, model_config.vision, dtype, _ids(tokenizer), aspect_ratio)
    layers = model_config.projector_layers
    config["mm_projector_type"] = "linear" if layers == 1 else f"mlp{layers}x_gelu"
    write_json(directory / "config.json", config)
    write_json(directory / "vision_tower" / "preprocessor_config.json", processor)


def write_hf_configs(
    directory: Path, model_config: VoCoConfig, tiles: Tiles | None, processor: dict, tokenizer, dtype: str
) -> None:  # fmt: skip
    """config.json and the processor's files, for transformers. With `tiles` these are the ones that were kept."""
    llama, vision = model_config.llama, model_config.vision
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    text_config = language_to_hf(llama) | {"vocab_size": max(llama.vocab_size, len(tokenizer))}
    config = llava.to_hf(text_config, vision, model_config.projector_bias, dtype, _ids(tokenizer), image)
    outer = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE_TOKEN,
        "patch_size": vision.patch_size,
        "num_additional_image_tokens": int(vision.class_token),
        "vision_feature_select_strategy": config["vision_feature_select_strategy"],
    }
    files = {"preprocessor_config.json": processor, "processor_config.json": outer}
    if tiles is not None:
        del config["image_seq_length"]  # kept where there was one
        config |= tiles.config | {"architectures": [llava.TILED[tiles.format][1]]}
        token = {"image_token": IMAGE_TOKEN}
        files = {name: file | (token if "image_token" in file else {}) for name, file in tiles.files.items()}
    for name, content in {"config.json": config, **files}.items():
        write_json(directory / name, content)


def _ids(tokenizer) -> dict[str, int | None]:
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        # Without a padding token, <unk>, as in the released code
        "pad_token_id": tokenizer.unk_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    }


def write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")


def parse_size(text: str) -> int:
    """Bytes of '5GB', '200MB' or a plain number."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "": 1}
    number = text.upper().rstrip("KMGB")
    try:
        size = float(number) * units[text.upper()[len(number) :]]
    except (ValueError, KeyError):
        size = math.nan
    if not 1 <= size < 1e18:
        raise UserError(f"--max-shard-size: expected a size such as 5GB, found {text!r}")
    return int(size)
