"""A rule that chooses how many tokens of each memory an answer is read with (`--tokens auto`).

A question is answered with few tokens first. Where the answer's confidence is low, it is answered again with more
tokens of the same memory, and so on up to all of them: nothing is compressed again. The first k tokens of a memory are
what compressing to k tokens gives, so the answer is the one that `--tokens k` gives.
"""

from collections.abc import Sequence
import dataclasses
from typing import NamedTuple

import numpy as np

from voco_jax.errors import UserError
from voco_jax.infer.engine import GREEDY, Engine
from voco_jax.infer.generate import Sampling
from voco_jax.infer.memory import MemoryBank
from voco_jax.infer.prompts import Prompt, answer

AUTO = "auto"
CONFIDENCE = 0.9


class Try(NamedTuple):
    """An answer read with so many tokens of each memory (0: text alone), and its confidence."""

    tokens: int
    text: str
    confidence: float


@dataclasses.dataclass(frozen=True)
class AutoTokens:
    """How many tokens are tried, from few to many, and the confidence from which on an answer is taken.

    `ladder`: numbers of tokens to try, ascending; empty: 1, 2, 4, 8, … and all. `every`: all are tried, for who wants
    to compare.
    """

    confidence: float = CONFIDENCE
    ladder: tuple[int, ...] = ()
    every: bool = False

    def __post_init__(self):
        if not 0 <= self.confidence <= 1:
            raise UserError(f"confidence: expected 0 … 1, found {self.confidence}")

    def steps(self, tokens: int) -> tuple[int, ...]:
        """The numbers to try of a memory with so many tokens.

        >>> AutoTokens().steps(6), AutoTokens(ladder=(2, 4, 16)).steps(8)
        ((1, 2, 4, 6), (2, 4))
        """
        if self.ladder:
            return tuple(k for k in self.ladder if k <= tokens) or (tokens,)
        return (*(2**i for i in range((tokens - 1).bit_length())), tokens)

    def decide(self, tries: Sequence[Try]) -> Try:
        """The answer that is taken of those with more and more tokens: the first that is sure enough, or the last."""
        return next((one for one in tries if one.confidence >= self.confidence), tries[-1])


def confidence_of(log_probabilities: np.ndarray) -> float:
    """Of an answer: the least probability that one of its tokens has under the model.

    On answers of a word this tells right from wrong as well as their geometric mean does; where it is high, fewer are
    wrong, as sure tokens (the end-of-sequence token, which is nearly always sure) cannot make up for an unsure one.
    """
    return float(np.exp(np.min(log_probabilities)))


def answer_auto(
    engine: Engine, prompts: Sequence[Prompt], auto: AutoTokens, *, max_new_tokens: int, sampling: Sampling = GREEDY,
    until: Sequence[str] = (), streams: Sequence[int] | None = None, batch_size: int = 64,
) -> list[list[Try]]:  # fmt: skip
    """For each prompt about whole memories (or text alone) the answers that were tried, of which `auto.decide` takes
    one: the last, unless all were tried. Other arguments as `prompts.answer`'s."""
    streams = range(len(prompts)) if streams is None else streams
    steps = [(0,) if prompt.images is None else auto.steps(prompt.images.num_tokens) for prompt in prompts]
    tries: list[list[Try]] = [[] for _ in prompts]
    for tokens in sorted({step for of_prompt in steps for step in of_prompt}):
        going = [
            i for i, of_prompt in enumerate(steps)
            if tokens in of_prompt and (auto.every or not tries[i] or tries[i][-1].confidence < auto.confidence)
        ]  # fmt: skip
        cut: dict[int, MemoryBank] = {}  # prompts about the same images go on holding the same object
        asked = []
        for prompt in (prompts[i] for i in going):
            if prompt.images is not None and id(prompt.images) not in cut:
                cut[id(prompt.images)] = prompt.images.first_tokens(tokens)
            asked.append(prompt if not tokens else prompt.first_tokens(tokens, cut[id(prompt.images)]))
        given = answer(
            engine, asked, max_new_tokens=max_new_tokens, sampling=sampling, until=until,
            streams=[streams[i] for i in going], batch_size=batch_size,
        )  # fmt: skip
        for i, one in zip(going, given, strict=True):
            tries[i].append(Try(tokens, one.text, confidence_of(one.log_probabilities)))
    return tries
