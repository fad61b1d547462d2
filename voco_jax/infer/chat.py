"""Conversations of several turns: what has been read stays in the cache, and a turn costs its own tokens alone."""

from collections.abc import Iterator
import dataclasses

import numpy as np

from voco_jax.data.conversations import Sample
from voco_jax.data.turns import IMAGE
from voco_jax.infer.engine import Engine, bucket, grow_cache
from voco_jax.infer.generate import DecodeState, Sampling
from voco_jax.infer.memory import EncodedImages
from voco_jax.infer.prompts import check_question, encode_prompt, gather
from voco_jax.models.voco import Cache


class Chat:
    """A conversation about images, made by `Model.chat`. `turns` is what was said, in LLaVA's form."""

    def __init__(self, engine: Engine, images: EncodedImages | None, max_new_tokens: int, sampling: Sampling):
        self._engine, self._images = engine.for_images(images), images
        self._max_new_tokens, self._sampling = max_new_tokens, sampling
        self._cache: Cache | None = None
        self._filled = 0  # places of the cache
        self._pending: list[int] = []  # tokens said that are not in the cache yet
        self.turns: list[dict] = []

    def ask(self, question: str) -> str:
        """The whole answer to the next turn."""
        return "".join(self.stream(question))

    def stream(self, question: str) -> Iterator[str]:
        """The answer to the next turn, in pieces, as they come. Where the caller stops, what was read is the answer.

        UserError for a question without text, and where the model has too few positions: the conversation is then as it
        was.
        """
        check_question(question)
        engine, is_first = self._engine, not self.turns
        sample = encode_prompt(engine, question, self._images).sample if is_first else self._later_turn(question)
        needed = self._filled + len(sample) + self._max_new_tokens
        engine.check_length(self._filled + len(sample), self._max_new_tokens)
        with engine.on_mesh():
            past = None
            if self._cache is not None:
                positions = engine.config.llama.max_position_embeddings
                self._cache = grow_cache(self._cache, min(bucket(needed, 32), positions))
                past = self._cache, self._filled
            sampling = dataclasses.replace(self._sampling, seed=(self._sampling.seed + len(self.turns)) % 2**32)
            visual, indices = gather([self._images if is_first else None])
            state = engine.prefill([sample], visual, indices, self._max_new_tokens, sampling, [0], past)
        said: list[str] = []
        markers = IMAGE.value * len(self._images) + "\n" if is_first and self._images is not None else ""
        turn = {"from": "human", "value": markers + question}

        def keep(state: DecodeState, count: int) -> None:
            self._keep(state, count)
            self.turns += [turn, {"from": "gpt", "value": "".join(said)}]

        pieces = engine.stream(state, keep)
        try:
            while True:
                with engine.on_mesh():
                    piece = next(pieces, None)
                if piece is None:
                    break
                said.append(piece)
                yield piece
        finally:
            pieces.close()

    def _keep(self, state: DecodeState, count: int) -> None:
        encoder = self._engine.encoder
        ids = np.asarray(state.output)[0, :count].tolist()
        # Places of tokens that the caller has not read are written anew
        self._cache, self._filled = state.cache, int(np.asarray(state.positions)[0]) - (int(state.num_tokens) - count)
        # The last token is not in the cache; before a later question, an answer ends with the stop token
        said = [token for token in ids[-1:] if token not in encoder.stop_ids]
        self._pending = said if encoder.stop_id is None else [*said, encoder.stop_id]

    def _later_turn(self, question: str) -> Sample:
        """The tokens after the last answer, up to the next one."""
        # The words of earlier turns do not matter for it
        encoder, count = self._engine.encoder, 0 if self._images is None else len(self._images)
        first = {"from": "human", "value": encoder.question("x", count)}
        turns: list[dict] = [first, {"from": "gpt", "value": ("x",)}, {"from": "human", "value": (question,)}]
        sample = encoder.encode(turns, count)
        end = np.flatnonzero(sample.labels)[-1]
        tokens = np.concatenate([np.array(self._pending, np.int32), sample.tokens[end + 1 :]])
        return Sample(tokens, np.zeros(len(tokens), bool), np.full(len(tokens), -1, np.int32), 0)
