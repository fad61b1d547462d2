"""Video as it comes: frames are compressed in small batches and join the memory; a question can come at any time."""

from collections.abc import Sequence
from typing import cast

import numpy as np

from voco_jax.data.images import PictureLike
from voco_jax.errors import UserError
from voco_jax.infer.auto_tokens import AutoTokens, answer_auto
from voco_jax.infer.engine import GREEDY
from voco_jax.infer.generate import Sampling
from voco_jax.infer.image_encoder import ImageEncoder
from voco_jax.infer.memory import Item, MemoryBank, check_tokens, join
from voco_jax.infer.prompts import encode_prompt, generate


class LiveVideo:
    """A video that has not ended, made by `Model.watch`. It keeps the memory of each frame, and no pixels."""

    def __init__(
        self, images: ImageEncoder, source: str, tokens: int | None, batch_size: int, auto: AutoTokens | None = None
    ):  # fmt: skip
        images.require_memories()
        check_tokens("tokens", tokens, images.num_voco_tokens)
        self._auto = auto
        self._images, self._source, self._tokens, self._batch_size = images, source, tokens, batch_size
        self._banks: list[MemoryBank] = []
        self._waiting: list[tuple[np.ndarray, float]] = []  # frames as the model takes them, and their times
        self._last = -np.inf

    def __len__(self) -> int:
        """Frames so far."""
        return sum(map(len, self._banks)) + len(self._waiting)

    def add(self, frame: PictureLike, time: float) -> None:
        """A frame (as `Model.compress` takes images) at a time in seconds, later than all before."""
        if not time > self._last:
            raise UserError(f"{self._source}: expected a frame after {self._last} s, found one at {time} s")
        self._waiting.append((self._images.square(frame), float(time)))
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

    def ask(
        self, question: str | Sequence[str], *, max_new_tokens: int = 64, sampling: Sampling = GREEDY
    ) -> str | list[str]:  # fmt: skip
        """As `Model.ask`, about all frames so far. For the last sixty: `model.ask(question, watch.memory[-60:])`."""
        engine, memory = self._images.engine, self.memory
        prompts = [encode_prompt(engine, q, memory) for q in ([question] if isinstance(question, str) else question)]
        if self._auto is None:
            answers = generate(engine, prompts, max_new_tokens=max_new_tokens, sampling=sampling)
        else:
            tries = answer_auto(engine, prompts, self._auto, max_new_tokens=max_new_tokens, sampling=sampling)
            answers = [self._auto.decide(of_prompt).text for of_prompt in tries]
        return answers[0] if isinstance(question, str) else answers

    def _compress(self) -> None:
        if not self._waiting:
            return
        squares, times = zip(*self._waiting, strict=True)
        items = [Item(self._source, time=time) for time in times]
        images = self._images.encode_pixels(squares, items, self._batch_size)
        self._banks.append(cast(MemoryBank, images).first_tokens(self._tokens))
        self._waiting = []
