"""What a checkpoint is and holds, in a page of text."""

import dataclasses
import math
from pathlib import Path

from ml_collections import ConfigDict

from voco_jax.config import load_config
from voco_jax.convert.jax_checkpoint import StoredParams, of_newest
from voco_jax.convert.sources import Source
from voco_jax.convert.to_jax import check_source
from voco_jax.convert.vocabulary import VOCABULARY
from voco_jax.data.from_config import make_model_config
from voco_jax.data.tokenizer import load_run_tokenizer
from voco_jax.models.build import abstract_model
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
    rows: list[list[str]] = []
    layers: dict[str, set[int]] = {}
    for (path, layer), tensor in source.tensors.items():
        if layer is not None:
            layers.setdefault(path, set()).add(layer)
            if layer != min(layers[path]):
                continue
        rows.append([source.names[path, layer], tensor.dtype.name, str(list(tensor.shape)), path])
    for row in rows:
        count = len(layers.get(row[3], ()))
        row[3] += f"  (× {count} layers)" if count else ""
    lines += _columns(rows)
    problems = problems_of(source)
    lines += ["", "what does not fit" if problems else "everything fits", *(f"  {problem}" for problem in problems)]
    return "\n".join(map(printable, lines)), not problems


def describe_run(run: Path) -> str:
    """Report on a run directory of ours, all of whose parameters are read and compared with their checksums."""
    config = load_config(run / "config.json")
    return of_newest(run, lambda stored: _describe_run(run, config, stored))


def _describe_run(run: Path, config: ConfigDict, stored: StoredParams) -> str:
    model_config = make_model_config(config, load_run_tokenizer(run))
    llama = model_config.llama
    stored.check_shapes(abstract_model(model_config)[1])
    stored.check()
    num_tables = sum(path in stored.shapes for path in VOCABULARY)
    padding = num_tables * (llama.padded_vocab_size - llama.vocab_size) * llama.hidden_size
    parameters = sum(math.prod(shape) for shape in stored.shapes.values())
    size = sum(math.prod(shape) * stored.dtype(path).itemsize for path, shape in stored.shapes.items())
    lines = [f"format: voco_jax run, step {stored.step}", f"tokenizer: {run / 'tokenizer'}", "", "configuration"]
    lines += [f"  compressor = {config.model.compressor!r}", f"  num_voco_tokens = {config.model.num_voco_tokens}"]
    lines += _configuration("llama", llama) + _configuration("vision", model_config.vision)
    count = f"{parameters - padding:,} parameters" + (f" and {padding:,} of padding" if padding else "")
    lines += ["", f"{len(stored.shapes)} arrays, {count}, {size / 1e9:.2f} GB", ""]
    lines += _columns([[p, stored.dtype(p).name, str(list(s))] for p, s in stored.shapes.items()])
    return "\n".join(map(printable, lines))


def _configuration(part: str, config) -> list[str]:
    return [f"  {part}.{key} = {value!r}" for key, value in dataclasses.asdict(config).items()]


def _columns(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def problems_of(source: Source) -> list[str]:
    """As `to-jax` would find them, parts that the format should have included."""
    config = VoCoConfig(
        llama=source.llama,
        vision=source.vision or ViTConfig(),
        projector_layers=source.projector_layers,
        voco_token_id=0,
    )
    return [f"{part} missing" for part in source.missing_parts()] + check_source(source, config)
