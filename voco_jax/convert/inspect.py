"""What a checkpoint is and holds, in a page of text."""

from collections import Counter
import dataclasses
import math
from pathlib import Path

from voco_jax.convert.jax_checkpoint import StoredRun, of_run
from voco_jax.convert.sources import Source
from voco_jax.convert.tiles import Tiles, read_tiles
from voco_jax.convert.to_jax import check_source
from voco_jax.convert.vocabulary import VOCABULARY
from voco_jax.models.vit import ViTConfig
from voco_jax.models.voco import VoCoConfig
from voco_jax.terminal import printable


def describe(source: Source) -> tuple[str, bool]:
    """(report, whether every tensor is understood and none is missing)."""
    lines = [f"format: {source.format}", f"tokenizer: {source.tokenizer or 'none'}", "", "configuration"]
    for part in ("llama", "vision"):
        config = getattr(source, part)
        lines += _configuration(part, config) if config else []
    parameters = sum(tensor.size for tensor in source.tensors.values())
    size = sum(tensor.nbytes for tensor in source.tensors.values())
    lines += ["", f"{len(source.tensors)} tensors, {parameters:,} parameters, {size / 1e9:.2f} GB", ""]
    lines += _about(source.tiles)
    layers = Counter(path for path, layer in source.tensors if layer is not None)
    rows: dict[str, list[str]] = {}  # of a stack, the first layer that is there
    for (path, layer), tensor in source.tensors.items():
        ours = f"{path}  (× {layers[path]} layers)" if path in layers else path
        rows.setdefault(path, [source.names[path, layer], tensor.dtype.name, str(list(tensor.shape)), ours])
    lines += _columns([*rows.values()])
    problems = problems_of(source)
    lines += ["", "what does not fit" if problems else "everything fits", *(f"  {problem}" for problem in problems)]
    return "\n".join(map(printable, lines)), not problems


def describe_run(run: Path) -> str:
    """Report on a run. All of its parameters are read and compared with their checksums."""
    return of_run(run, _describe_run)


def _describe_run(run: StoredRun) -> str:
    stored, model, llama = run.stored, run.model_config, run.model_config.llama
    stored.check()
    num_tables = sum(path in stored.shapes for path in VOCABULARY)
    padding = num_tables * (llama.padded_vocab_size - llama.vocab_size) * llama.hidden_size
    parameters = sum(math.prod(shape) for shape in stored.shapes.values())
    size = sum(math.prod(shape) * stored.dtype(path).itemsize for path, shape in stored.shapes.items())
    lines = [f"format: voco_jax run, step {stored.step}", f"tokenizer: {run.path / 'tokenizer'}", "", "configuration"]
    lines += [f"  compressor = {model.compressor!r}", f"  num_voco_tokens = {model.num_voco_tokens}"]
    lines += _configuration("llama", llama) + _configuration("vision", model.vision)
    count = f"{parameters - padding:,} parameters" + (f" and {padding:,} of padding" if padding else "")
    lines += ["", f"{len(stored.shapes)} arrays, {count}, {size / 1e9:.2f} GB", ""]
    lines += _about(read_tiles(run.path, llama.hidden_size))
    lines += _columns([[p, stored.dtype(p).name, str(list(s))] for p, s in stored.shapes.items()])
    return "\n".join(map(printable, lines))


def _about(tiles: Tiles | None) -> list[str]:
    return [] if tiles is None else [str(tiles), ""]


def _configuration(part: str, config) -> list[str]:
    return [f"  {part}.{key} = {value!r}" for key, value in dataclasses.asdict(config).items()]


def _columns(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def problems_of(source: Source) -> list[str]:
    """What `to-jax` would refuse in a checkpoint, and parts of its format that are missing."""
    config = VoCoConfig(
        llama=source.llama,
        vision=source.vision or ViTConfig(),
        projector_layers=source.projector_layers,
        projector_bias=source.projector_bias,
        voco_token_id=0,
    )
    return [f"{part} missing" for part in source.missing_parts()] + check_source(source, config)
