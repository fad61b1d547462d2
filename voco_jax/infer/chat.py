"""Conversations of several turns: what has been read stays in the cache, and a turn costs its own tokens alone."""

from collections.abc import Iterator
import dataclasses

import numpy as np

from voco_jax.data.conversations import Sample
from voco_jax.data.turns import IMAGE
from voco_jax.errors import UserError
from voco_jax.infer.engine import bucket, grow_cache
from voco_jax.infer.generate import DecodeState, Sampling
from voco_jax.infer.memory import Embeddings, MemoryBank
from voco_jax.models.voco import Cache


class Chat:
    """A conversation about pictures, made by `Model.chat`. `turns` is what was said, in LLaVA's form."""

    def __init__(self, model, images: MemoryBank | Embeddings | None, max_new_tokens: int, sampling: Sampling):
        self._model, self._images = model, images
        self._max_new_tokens, self._sampling = max_new_tokens, sampling
        self._cache: Cache | None = None
        self._filled = 0  # places of the cache
        self._pending: list[int] = []  # tokens said, and not in the cache yet
        self.turns: list[dict] = []

    def ask(self, question: str) -> str:
        """The whole answer to the next turn."""
        return "".join(self.stream(question))

    def stream(self, question: str) -> Iterator[str]:
        """The answer to the next turn, in pieces, as they come; where nobody reads on, what was read is the answer.

        UserError for a question without text, and where the model has not positions enough: the conversation is then
        as it was.
        """
        if not question.strip():
            raise UserError("question: expected text, found none")
        engine = self._model.engine(getattr(self._images, "num_tokens", None))
        prompt, visual, pictures = self._prompt(question, engine.encoder)
        needed = self._filled + len(prompt) + self._max_new_tokens
        engine.check_length(self._filled + len(prompt), self._max_new_tokens)
        with self._model.on_mesh():
            past = None
            if self._cache is not None:
                positions = self._model.config.llama.max_position_embeddings
                self._cache = grow_cache(self._cache, min(bucket(needed, 32), positions))
                past = self._cache, self._filled
            sampling = dataclasses.replace(self._sampling, seed=(self._sampling.seed + len(self.turns)) % 2**32)
            state = engine.prefill([prompt], visual, [pictures], self._max_new_tokens, sampling, [0], past)
        said = []
        turn = {"from": "human", "value": prompt_text(question, self._images if not self.turns else None)}

        def keep(state: DecodeState, count: int) -> None:
            self._keep(state, count)
            self.turns += [turn, {"from": "gpt", "value": "".join(said)}]

        pieces = engine.stream(state, keep)
        try:
            while True:
                with self._model.on_mesh():
                    piece = next(pieces, None)
                if piece is None:
                    break
                said.append(piece)
                yield piece
        finally:
            pieces.close()

    def _keep(self, state: DecodeState, count: int) -> None:
        encoder = self._model.run.encoder
        ids = np.asarray(state.output)[0, :count].tolist()
        # Places of tokens that nobody has read are written anew
        self._cache, self._filled = state.cache, int(np.asarray(state.positions)[0]) - (int(state.count) - count)
        # The last one has been chosen and not been read; an answer ends as those before a later question do
        said = [token for token in ids[-1:] if token not in encoder.stop_ids]
        self._pending = said if encoder.stop_id is None else [*said, encoder.stop_id]

    def _prompt(self, question: str, encoder):
        """The next turn's tokens, and the pictures that it brings."""
        if not self.turns:
            if self._images is not None and self._images.is_video:
                turns, count = self._model.turns(question, self._images), len(self._images)
                sample = encoder.encode(turns, count)
            else:
                sample = encoder.encode_question(question, 0 if self._images is None else len(self._images))
            visual, (pictures,) = self._model.visual([self._images])
            return sample, visual, pictures
        # What stands after the last answer; the answers' own words do not matter for it
        count = 0 if self._images is None else len(self._images)
        first = {"from": "human", "value": encoder.question("x", count)}
        turns = [first, {"from": "gpt", "value": ("x",)}, {"from": "human", "value": (question,)}]
        sample = encoder.encode(turns, count)
        end = np.flatnonzero(sample.labels)[-1]
        tokens = np.concatenate([np.array(self._pending, np.int32), sample.tokens[end + 1 :]])
        return Sample(tokens, np.zeros(len(tokens), bool), np.full(len(tokens), -1, np.int32), 0), None, range(0)


def prompt_text(question: str, images) -> str:
    return question if images is None else IMAGE.value * len(images) + "\n" + question
