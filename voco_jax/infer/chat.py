"""Conversations of several turns: what has been read stays in the cache, and a turn costs its own tokens alone."""

from collections.abc import Iterator, Sequence
import dataclasses
from typing import cast

import numpy as np

from voco_jax.data.conversations import Sample
from voco_jax.data.turns import IMAGE
from voco_jax.infer.auto_tokens import AutoTokens, confidence_of
from voco_jax.infer.engine import Engine, bucket, grow_cache
from voco_jax.infer.generate import DecodeState, Sampling
from voco_jax.infer.memory import EncodedImages, MemoryBank, pictures_of
from voco_jax.infer.prompts import Prompt, check_question, encode_prompt, gather
from voco_jax.models.voco import Cache


class Chat:
    """A conversation about images, made by `Model.chat`. `turns` is what was said, in LLaVA's form."""

    def __init__(
        self, engine: Engine, images: EncodedImages | None, max_new_tokens: int, sampling: Sampling,
        auto: AutoTokens | None = None,
    ):  # fmt: skip
        self._engine, self._images = engine.for_images(images), images
        self._auto = auto if isinstance(images, MemoryBank) else None
        self._tokens = 0  # of each memory that are in the cache, with `auto`
        self._read: Sample | None = None  # what is in the cache, with all tokens of the memories
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
        whole = sample if self._read is None else self._read + sample
        engine.check_length(len(whole), self._max_new_tokens)
        with engine.on_mesh():
            if self._auto is None:
                state = self._prefill(Prompt(sample, self._images if is_first else None))
            else:
                state = self._as_sure(self._auto, sample, whole)
        said: list[str] = []
        # One for each picture, as data have it, however many tiles that is
        pictures = () if self._images is None else pictures_of(self._images.items)
        markers = IMAGE.value * len([*pictures]) + "\n" if is_first and self._images is not None else ""
        turn = {"from": "human", "value": markers + question}

        def keep(state: DecodeState, count: int) -> None:
            self._keep(state, count, whole)
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

    def _prefill(self, prompt: Prompt, anew: bool = False) -> DecodeState:
        """The first token of the next answer, after what is in the cache, or `anew`."""
        engine, past = self._engine.for_images(prompt.images), None
        if self._cache is not None and not anew:
            positions = engine.config.llama.max_position_embeddings
            needed = self._filled + len(prompt.sample) + self._max_new_tokens
            self._cache = grow_cache(self._cache, min(bucket(needed, 32), positions))
            past = self._cache, self._filled
        sampling = dataclasses.replace(self._sampling, seed=(self._sampling.seed + len(self.turns)) % 2**32)
        visual, indices = gather([prompt.images])
        return engine.prefill([prompt.sample], visual, indices, self._max_new_tokens, sampling, [0], past)

    def _as_sure(self, auto: AutoTokens, sample: Sample, whole: Sample) -> DecodeState:
        """The next answer, all of it: with the tokens that are in the cache if it is sure enough, else with more, for
        which the conversation is read anew."""
        images = cast(MemoryBank, self._images)
        steps = [tokens for tokens in auto.steps(images.num_tokens) if tokens >= self._tokens]
        for tokens in steps:
            if self._cache is not None and tokens == self._tokens:
                state = self._prefill(Prompt(sample))
            else:
                cut = Prompt(whole, images).first_tokens(tokens, images.first_tokens(tokens))
                state = self._prefill(cut, anew=True)
            state = self._engine.decode(state, self._max_new_tokens)
            sure = np.asarray(state.log_probabilities)[0, : int(state.num_tokens)]
            if tokens == steps[-1] or confidence_of(sure) >= auto.confidence:
                break
        self._tokens = tokens
        return state

    def _keep(self, state: DecodeState, count: int, whole: Sample) -> None:
        encoder = self._engine.encoder
        ids = np.asarray(state.output)[0, :count].tolist()
        # Places of tokens that the caller has not read are written anew
        self._cache, self._filled = state.cache, int(np.asarray(state.positions)[0]) - (int(state.num_tokens) - count)
        self._read = whole + _text(ids[:-1])
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
        return _text([*self._pending, *sample.tokens[end + 1 :]])


def _text(ids: Sequence[int]) -> Sample:
    return Sample(np.array(ids, np.int32), np.zeros(len(ids), bool), np.full(len(ids), -1, np.int32), 0)
