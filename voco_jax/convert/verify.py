"""Compares two checkpoints of any formats tensor by tensor: both are read under our names, in PyTorch's layouts."""

from collections.abc import Callable, Collection, Mapping
import dataclasses
from pathlib import Path

import numpy as np
from tqdm import tqdm

from voco_jax.convert.adapters import FREE, is_adapter
from voco_jax.convert.families import BY_OURS
from voco_jax.convert.findings import listing
from voco_jax.convert.inspect import problems_of
from voco_jax.convert.jax_checkpoint import StoredRun, of_run
from voco_jax.convert.sources import Key, Source, open_source
from voco_jax.convert.tensors import same_bytes, worst_difference
from voco_jax.convert.tiles import Tiles, read_tiles
from voco_jax.convert.to_hf import IMAGE_TOKEN
from voco_jax.convert.to_jax import has_voco_row, load_source_tokenizer
from voco_jax.convert.vocabulary import VOCABULARY
from voco_jax.data.tokenizer import VOCO_TOKEN
from voco_jax.errors import UserError
from voco_jax.io.json_files import read_object

_NEWLINE: Key = ("image_newline", None)
_ADDED = {VOCO_TOKEN, IMAGE_TOKEN, "<pad>"}  # tokens that conversions add


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the checkpoints. `shapes` and what `read` returns are in PyTorch's layouts."""

    path: Path
    config: dict[str, object]
    shapes: dict[Key, tuple[int, ...]]
    read: Callable[[Key], np.ndarray]
    tokens: Mapping[int, str] | None = None  # by row; None: there is no tokenizer
    notes: list[str] = dataclasses.field(default_factory=list)

    def with_tiles(self, tiles: Tiles | None) -> "Side":
        """Its `image_newline` is one more tensor."""
        if tiles is None:
            return self
        config = self.config | {f"config.json: {key}": value for key, value in tiles.config.items()}
        shapes = self.shapes | {_NEWLINE: tiles.newline.shape}
        read = lambda key: tiles.newline if key == _NEWLINE else self.read(key)  # noqa: E731
        return dataclasses.replace(self, config=config, shapes=shapes, read=read)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """`worst`: the largest difference between two values, in float32; `where`: its tensor."""

    tensors: int
    identical: int
    worst: float
    where: str
    problems: list[str]
    notes: list[str]  # differences that do not change the model

    @property
    def equal(self) -> bool:
        return not self.problems and self.identical == self.tensors


def open_side(
    path: Path, vision_tower: Path | None = None, base: Path | None = None, ignored: Collection[str] = ()
) -> Side:
    """A run of ours, or any checkpoint that `open_source` reads with these arguments.

    UserError for a checkpoint that is not whole.
    """
    if (path / "checkpoints").is_dir():
        return of_run(path, _side_of_run)
    if not is_adapter(path):
        base = None
        if path.is_dir() and "mm_vision_tower" not in read_object(path / "config.json"):
            vision_tower = None
    source = open_source(path, vision_tower, base, ignored)
    problems = problems_of(source)
    if problems:
        raise UserError(f"{path}: {len(problems)} tensors do not fit: {listing(problems)}")
    shapes = {key: tensor.shape for key, tensor in source.tensors.items()}
    configs = _flat(llama=source.llama, vision=source.vision)
    side = Side(path, configs, shapes, lambda key: source.tensors[key].read()).with_tiles(source.tiles)
    try:
        return dataclasses.replace(side, tokens=None if source.tokenizer is None else _tokens_of(source))
    except UserError as error:  # only the meaning of rows is unknown then
        return dataclasses.replace(side, notes=[f"tokenizer not read: {error}"])


def _side_of_run(run: StoredRun) -> Side:
    stored, model = run.stored, run.model_config
    if others := [name for name in stored.shapes if name not in BY_OURS]:
        raise UserError(f"{run.path}: {others[0]}: no format can store it, and it cannot be compared")
    stored.check()
    shapes = {key: run.their_shape(*key) for key in stored.layers()}
    configs = _flat(llama=model.llama, vision=model.vision)
    side = Side(run.path, configs, shapes, lambda key: run.read_theirs(*key), _tokens(run.tokenizer))
    return side.with_tiles(read_tiles(run.path, model.llama.hidden_size))


def _tokens_of(source: Source) -> dict[int, str]:
    tokenizer, known = load_source_tokenizer(source, None)
    tokens = {row: token for row, token in _tokens(tokenizer).items() if row in known}
    voco = tokenizer.convert_tokens_to_ids(VOCO_TOKEN)
    return tokens | ({voco: VOCO_TOKEN} if has_voco_row(source, voco) else {})


def _tokens(tokenizer) -> dict[int, str]:
    return {row: token for token, row in tokenizer.get_vocab().items()}


def _flat(**configs) -> dict[str, object]:
    return {
        f"{part}.{key}": value
        for part, config in configs.items()
        if config is not None
        for key, value in dataclasses.asdict(config).items()
        if key not in FREE
    }


def verify(a: Side, b: Side, *, allow_more_rows: bool = False) -> Comparison:
    """Compare all tensors. Equal means equal bytes: the same dtype and the same values.

    Some rows of the embedding and the head do not count, and are noted: those that one side has for `<voco>`, `<image>`
    or padding, where the other has no row, or a row without a token. `allow_more_rows`: nor do any rows at the end that
    only one side has.
    """
    problems, notes, identical, worst, where = [], a.notes + b.notes, 0, 0.0, ""
    for key in sorted(a.config.keys() & b.config.keys()):
        if a.config[key] != b.config[key]:
            problems.append(f"{key}: {a.config[key]!r} and {b.config[key]!r}")
    keys = sorted(a.shapes.keys() | b.shapes.keys(), key=lambda key: (key[0], key[1] or 0))
    if len(alone := [side.path for side in (a, b) if _NEWLINE in side.shapes]) == 1:  # not every format has it
        keys.remove(_NEWLINE)
        notes.append(f"image_newline: in {alone[0]} alone, and not compared")
    for key in tqdm(keys, unit="tensor", desc="verify"):
        name = key[0] if key[1] is None else f"{key[0]} (layer {key[1]})"
        lacking = next((side.path for side in (a, b) if key not in side.shapes), None)
        if lacking is not None:
            problems.append(f"{name}: missing in {lacking}")
            continue
        shapes = a.shapes[key], b.shapes[key]
        if shapes[0] != shapes[1] and (key[0] not in VOCABULARY or shapes[0][1:] != shapes[1][1:]):
            problems.append(f"{name}: shape {list(shapes[0])} and {list(shapes[1])}")
            continue
        x, y = a.read(key), b.read(key)
        if key[0] in VOCABULARY:
            rows = min(len(x), len(y))
            if len(x) != len(y):
                line = f"{name}: {len(x)} and {len(y)} rows, the first {rows} compared"
                sides = (a, b) if len(x) > rows else (b, a)
                spare = _spare(*sides, range(rows, max(len(x), len(y))))
                if spare or allow_more_rows:
                    notes.append(f"{line}; the others are of {spare}" if spare else line)
                else:
                    problems.append(f"{line} (--allow-more-rows, if the others are of added tokens)")
            x, y = x[:rows], y[:rows]
            new = [row for row in _new_rows(a, b, rows) if not same_bytes(x[row], y[row])]
            if new and x.dtype == y.dtype:
                both = (a.tokens or {}, b.tokens or {})
                tokens = sorted({of_side[row] for of_side in both for row in new if row in of_side})
                notes.append(
                    f"{name}: row {', '.join(map(str, new))} differs: {', '.join(tokens)} in one, no token in the other"
                )
                x, y = np.delete(x, new, axis=0), np.delete(y, new, axis=0)
        if same_bytes(x, y):
            identical += 1
            continue
        difference = worst_difference(x, y)
        if not where or np.isnan(difference) or difference > worst:
            worst, where = (worst, where) if np.isnan(worst) else (difference, name)
    return Comparison(len(keys), identical, worst, where, problems, notes)


def _spare(side: Side, other: Side, rows: range) -> str:
    """The tokens of rows that only one side has, if all are padding, our added tokens, or tokens that the other side
    knows without having rows for them; else ''."""
    if side.tokens is None:
        return ""
    tokens = {row: side.tokens[row] for row in rows if row in side.tokens}
    known = other.tokens or {}
    if any(token not in _ADDED and known.get(row) != token for row, token in tokens.items()):
        return ""
    return listing([*tokens.values()] + ["padding"] * (len(tokens) < len(rows)))


def _new_rows(a: Side, b: Side, rows: int) -> list[int]:
    """Rows that belong to one of our added tokens on one side and are padding on the other."""
    if a.tokens is None or b.tokens is None:
        return []
    known = [*a.tokens.items(), *b.tokens.items()]
    ours = {row for row, token in known if token in _ADDED and row < rows}
    return sorted(row for row in ours if (row in a.tokens) != (row in b.tokens))
