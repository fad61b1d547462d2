"""Pictures as several images: the whole picture, and tiles of it in more detail (`config.data.image_grid`).

LLaVA-NeXT's idea, with one grid for all pictures. Each of them is an image of its own, with K VoCo tokens of its own.
"""

import dataclasses
from typing import Any

from voco_jax.data.records import Record, Source, tiles_of
from voco_jax.data.turns import IMAGE


class TiledSource:
    """A source whose records have all of a picture and its tiles in its place, and as many `<image>` markers.

    Clips stay as they are.
    """

    def __init__(self, source: Source, grid: int):
        self._source, self._grid = source, grid
        self._tiles = tiles_of(grid)

    def __len__(self):
        return len(self._source)

    def __getitem__(self, i: int) -> Record:
        record = self._source[i]
        if not record.images:
            return record
        images = [dataclasses.replace(picture, tile=tile) for picture in record.images for tile in self._tiles]
        conversations = [[self._turn(turn) for turn in turns] for turns in record.conversations]
        return dataclasses.replace(record, images=images, conversations=conversations)

    def _turn(self, turn: Any) -> Any:
        value = turn.get("value") if isinstance(turn, dict) else None
        if not isinstance(value, str):  # for whoever reads it to refuse
            return turn
        return turn | {"value": value.replace(IMAGE.value, IMAGE.value * len(self._tiles))}

    def where(self, i: int) -> str:
        return self._source.where(i)

    def fingerprint(self) -> str:
        return f"{self._source.fingerprint()} in {self._grid} × {self._grid} tiles"
