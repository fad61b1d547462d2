"""What LLaVA-NeXT and LLaVA-OneVision have for the tiles of a picture: kept in a run for the way back.

No run computes with it. It is `image_newline`, the keys of config.json about tiles, and the processor's files. `to-jax`
writes it into the run (`tiles.json`); `merge`, and training that begins with the run, copy it.
"""

import base64
import dataclasses
import json
from pathlib import Path
from typing import Any
import zlib

from ml_collections import ConfigDict
import numpy as np

from voco_jax.checkpoint.init_from import PIXELS, TILES
from voco_jax.config import flatten
from voco_jax.convert.families.llava import TILED
from voco_jax.convert.findings import Findings
from voco_jax.errors import UserError
from voco_jax.io.json_files import read_object
from voco_jax.io.tensors import DTYPES
from voco_jax.terminal import shortened

_VERSION = 1  # of the file
_KEYS = ("model_type", "image_grid_pinpoints", "vision_aspect_ratio", "use_image_newline_parameter", "image_seq_length",
         "video_token_index", "video_token_id")  # fmt: skip
_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
_MOST = 2**18  # bytes of each
_LEFT_OUT = ("auto_map", "chat_template")  # names of code; the tokenizer has the run's


@dataclasses.dataclass(frozen=True)
class Tiles:
    """newline: `image_newline`, [hidden size of the language model], in its own dtype.
    config: keys of config.json, model_type among them. files: the processor's files by name.
    pixels: keys of the run's config for the pixels that these files give the whole picture.
    """

    newline: np.ndarray
    config: dict[str, Any]
    files: dict[str, dict]
    pixels: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def format(self) -> str:
        """The format of `to-hf` that writes it."""
        return next(name for name, (kind, _) in TILED.items() if kind == self.config["model_type"])

    def cast(self, dtype: str | None, findings: Findings) -> "Tiles":
        """With `image_newline` in another dtype; None: its own."""
        newline = findings.check("image_newline", self.newline, DTYPES[dtype] if dtype else self.newline.dtype)
        return dataclasses.replace(self, newline=newline)

    def __str__(self) -> str:
        newline = f"{self.newline.dtype.name} {list(self.newline.shape)}"
        return f"image_newline: {newline}, kept for to-hf --format {self.format}"


def tiles_of(directory: Path, fields: dict, newline: np.ndarray) -> Tiles:
    """Of a checkpoint's directory, with the fields of its config.json. UserError for files that cannot be read."""
    config = {key: fields[key] for key in _KEYS if key in fields}
    there = [name for name in _FILES if (directory / name).exists()]
    return Tiles(newline, config, {name: _kept(read_object(directory / name, most=_MOST)) for name in there})


def _kept(value):
    """JSON without the keys that are left out, at any depth."""
    if isinstance(value, list):
        return [_kept(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: _kept(item) for key, item in value.items() if key not in _LEFT_OUT}


def pixels_of(config: ConfigDict) -> dict[str, Any]:
    """What a run's config says of the pixels of whole pictures, by key, in the types of JSON."""
    groups = tuple(f"data.{key}." for key in PIXELS)
    return json.loads(json.dumps({k: v for k, v in flatten(config).items() if f"{k}.".startswith(groups)}))


def check_tiles(tiles: Tiles | None, run: Path, config: ConfigDict, format_name: str) -> Tiles:
    """UserError for a run that the format, one of LLaVA-NeXT's or LLaVA-OneVision's, cannot store."""
    expected = f"{run}: format {format_name}: expected a run with the image_newline of a {TILED[format_name][0]}"
    if tiles is None:
        raise UserError(f"{expected}, found none (earlier versions did not keep it: convert the checkpoint again)")
    if tiles.format != format_name:
        raise UserError(f"{expected}, found that of a {tiles.config['model_type']}")
    there = pixels_of(config)
    for key, value in tiles.pixels.items():
        if there.get(key, value) != value:
            raise UserError(
                f"{run / 'config.json'}: {key}: format {format_name} has the processor of the checkpoint that was "
                f"converted: expected {shortened(value)}, found {shortened(there[key])}; --format llava-hf can store it"
            )
    return tiles


def write_tiles(run: Path, tiles: Tiles) -> None:
    newline = {"dtype": tiles.newline.dtype.name, "values": base64.b64encode(tiles.newline.tobytes()).decode()}
    content = {"version": _VERSION} | dataclasses.asdict(tiles) | {"newline": newline}
    (run / TILES).write_text(json.dumps(content | {"checksum": _checksum(content)}, indent=2) + "\n")


def read_tiles(run: Path, hidden_size: int) -> Tiles | None:
    """What a run keeps; None where it keeps nothing. UserError for a file that is damaged, or another run's."""
    file = run / TILES
    if not file.exists():
        return None
    content = read_object(file)
    if content.pop("checksum", None) != _checksum(content):
        raise UserError(f"{file}: damaged: expected its checksum, found another")
    if content.pop("version", None) != _VERSION:
        raise UserError(f"{file}: expected version {_VERSION}: written by a later version")
    try:
        stored = content.pop("newline")
        newline = np.frombuffer(base64.b64decode(stored["values"], validate=True), DTYPES[stored["dtype"]])
        tiles = Tiles(newline, **_kept(content))
        tiles.format  # noqa: B018
        if unknown := sorted(tiles.config.keys() - {*_KEYS} | tiles.files.keys() - {*_FILES}):
            raise ValueError(f"{unknown[0]} unknown")
        if not all(isinstance(value, dict) for value in (tiles.pixels, *tiles.files.values())):
            raise TypeError("expected objects")
    except (AttributeError, KeyError, TypeError, ValueError, StopIteration) as error:
        raise UserError(f"{file}: not what to-jax writes: {error!r:.100}") from None
    if newline.shape != (hidden_size,):
        raise UserError(f"{file}: newline: expected {hidden_size} values, found {newline.size}: another run's")
    return tiles


def _checksum(content: dict) -> int:
    """CRC-32 of the file's content without this number."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
