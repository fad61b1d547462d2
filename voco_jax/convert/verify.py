"""Two checkpoints compared tensor by tensor, whatever their formats: each is read under our names and layouts."""

from collections.abc import Callable
import dataclasses
from pathlib import Path

import numpy as np
from tqdm import tqdm

from voco_jax.config import load_config, vision_config
from voco_jax.convert.findings import listing
from voco_jax.convert.inspect import problems_of
from voco_jax.convert.jax_checkpoint import StoredParams
from voco_jax.convert.rules import BY_OURS
from voco_jax.convert.sources import Key, open_source
from voco_jax.convert.tensors import same_bytes, worst_difference
from voco_jax.convert.vocabulary import VOCABULARY, true_shape, without_padding
from voco_jax.data.tokenizer import load_tokenizer
from voco_jax.errors import UserError
from voco_jax.json_files import read_object
from voco_jax.run import make_model_config

# Of the configurations; these do not change what a model computes, and rows, but for padding, are compared as tensors.
_FREE = ("vocab_size", "vocab_multiple", "initializer_range", "max_position_embeddings")


@dataclasses.dataclass(frozen=True)
class Side:
    """A checkpoint: its dimensions, their shape of each tensor, and how to read it in their layout."""

    path: Path
    config: dict[str, object]
    shapes: dict[Key, tuple[int, ...]]
    read: Callable[[Key], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """`worst` is the largest difference of two values, in float32, and `where` its tensor."""

    tensors: int
    identical: int
    worst: float
    where: str
    problems: list[str]
    notes: list[str]  # rows that only one of the two has, where that is allowed

    @property
    def equal(self) -> bool:
        return not self.problems and self.identical == self.tensors


def open_side(path: Path, vision_tower: Path | None = None) -> Side:
    """A run of ours or any checkpoint that `to-jax` reads; `vision_tower` for one that only names its own.

    UserError for a checkpoint that is not whole.
    """
    if (path / "checkpoints").is_dir():
        stored, config = StoredParams(path), load_config(path / "config.json")
        llama = make_model_config(config, load_tokenizer(path / "tokenizer")).llama
        shapes = {}
        for name, shape in stored.shapes.items():
            rule = BY_OURS.get(name)
            if rule is None:
                raise UserError(f"{path}: {name}: no format has a place for it; it cannot be compared")
            for layer in range(shape[0]) if rule.stacked else (None,):
                theirs = rule.transform.their_shape(shape[layer is not None :])
                if name in VOCABULARY and theirs[0] != llama.padded_vocab_size:
                    expected = f"{llama.padded_vocab_size} rows with padding"
                    raise UserError(f"{path}: {name}: config.json has {expected}, found {theirs[0]}")
                shapes[name, layer] = true_shape(name, theirs, llama.vocab_size)

        def read(key: Key) -> np.ndarray:
            theirs = BY_OURS[key[0]].transform.to_theirs(stored.read(*key))
            return without_padding(key[0], theirs, llama.vocab_size)

        return Side(path, _flat(llama=llama, vision=vision_config(config)), shapes, read)
    if path.is_dir() and "mm_vision_tower" not in read_object(path / "config.json"):
        vision_tower = None
    source = open_source(path, vision_tower)
    problems = problems_of(source)
    if problems:
        raise UserError(f"{path}: {len(problems)} tensors do not fit: {listing(problems)}")
    shapes = {key: tensor.shape for key, tensor in source.tensors.items()}
    configs = _flat(llama=source.llama, vision=source.vision)
    return Side(path, configs, shapes, lambda key: source.tensors[key].read())


def _flat(**configs) -> dict[str, object]:
    return {
        f"{part}.{key}": value
        for part, config in configs.items()
        if config is not None
        for key, value in dataclasses.asdict(config).items()
        if key not in _FREE
    }


def verify(a: Side, b: Side, *, allow_more_rows: bool = False) -> Comparison:
    """Compare all tensors. Equal means equal bytes: one dtype, one value.

    `allow_more_rows`: the embedding and the head of one may have rows at the end that the other has not (of `<voco>`,
    `<image>` or other added tokens).
    """
    problems, notes, identical, worst, where = [], [], 0, 0.0, ""
    for key in sorted(a.config.keys() & b.config.keys()):
        if a.config[key] != b.config[key]:
            problems.append(f"{key}: {a.config[key]!r} and {b.config[key]!r}")
    keys = sorted(a.shapes.keys() | b.shapes.keys(), key=lambda key: (key[0], key[1] or 0))
    for key in tqdm(keys, unit="tensor", desc="verify"):
        name = key[0] if key[1] is None else f"{key[0]} (layer {key[1]})"
        lacking = next((side.path for side in (a, b) if key not in side.shapes), None)
        if lacking is not None:
            problems.append(f"{name}: missing in {lacking}")
            continue
        shapes = a.shapes[key], b.shapes[key]
        rows = None
        if shapes[0] != shapes[1]:
            if key[0] not in VOCABULARY or shapes[0][1:] != shapes[1][1:]:
                problems.append(f"{name}: shape {list(shapes[0])} and {list(shapes[1])}")
                continue
            rows = min(shape[0] for shape in shapes)
            line = f"{name}: {shapes[0][0]} and {shapes[1][0]} rows, the first {rows} compared"
            (notes if allow_more_rows else problems).append(line)
        x, y = a.read(key)[:rows], b.read(key)[:rows]
        if same_bytes(x, y):
            identical += 1
            continue
        difference = worst_difference(x, y)
        if not where or np.isnan(difference) or difference > worst:
            worst, where = (worst, where) if np.isnan(worst) else (difference, name)
    return Comparison(len(keys), identical, worst, where, problems, notes)
