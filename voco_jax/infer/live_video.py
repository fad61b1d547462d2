"""Video as it comes: frames are compressed in small batches and join the memory; a question can come at any time."""

import numpy as np

from voco_jax.errors import UserError
from voco_jax.infer.memory import Item, MemoryBank, join


class LiveVideo:
    """A video that has not ended, made by `Model.watch`. What it keeps of a frame is its memory, and no pixels."""

    def __init__(self, model, source: str, tokens: int | None, batch_size: int):
        model.require_voco()
        self._model, self._source, self._tokens, self._batch_size = model, source, tokens, batch_size
        self._banks: list[MemoryBank] = []
        self._waiting: list[tuple[np.ndarray, float]] = []  # frames as the model takes them, and their times
        self._last = -np.inf

    def __len__(self) -> int:
        """Frames so far."""
        return sum(map(len, self._banks)) + len(self._waiting)

    def add(self, frame, time: float) -> None:
        """A frame (as `Model.compress` takes pictures) at a time in seconds, later than all before."""
        if not time > self._last:
            raise UserError(f"{self._source}: expected a frame after {self._last} s, found one at {time} s")
        self._waiting.append((self._model.square(frame), float(time)))
        self._last = float(time)
        if len(self._waiting) == self._batch_size:
            self._compress()

    @property
    def memory(self) -> MemoryBank:
        """Of all frames so far."""
        self._compress()
        if not self._banks:
            raise UserError(f"{self._source}: expected a frame, found none yet")
        self._banks = [join(self._banks)]
        return self._banks[0]

    def ask(self, question, **options):
        """As `Model.ask`, about all frames so far; `watch.memory[-60:]` is what to ask about the last sixty."""
        return self._model.ask(question, self.memory, **options)

    def _compress(self) -> None:
        if not self._waiting:
            return
        squares, times = zip(*self._waiting, strict=True)
        items = [Item(self._source, time=time) for time in times]
        self._banks.append(self._model.encode_pixels(squares, items, self._batch_size).first_tokens(self._tokens))
        self._waiting = []
