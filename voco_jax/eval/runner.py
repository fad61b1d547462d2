"""The one runner that puts questions to an engine: test sets, video questions, question files and lmms-eval use it.

Questions are read a window at a time. The images of a window are encoded together, each once; its prompts are asked in
batches of like length, and the answers come in the questions' order.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
import itertools
from typing import Any, Generic, TypeVar

import numpy as np
from tqdm import tqdm

from voco_jax.data.records import TOO_LONG, BadRecord
from voco_jax.errors import UserError
from voco_jax.infer.auto_tokens import AutoTokens, Try, answer_auto
from voco_jax.infer.engine import GREEDY, Engine, Score
from voco_jax.infer.generate import Sampling
from voco_jax.infer.image_cache import ImageCache
from voco_jax.infer.prompts import Gathered, Prompt, gather, generate, score

Id = TypeVar("Id")
MakePrompt = Callable[[Any], Prompt]  # of the encoded images; may raise UserError


@dataclasses.dataclass(frozen=True)
class Question(Generic[Id]):
    """What is asked about some media (pictures and videos). `id` is the caller's own, `where` is for messages.

    `prompt` is answered, with random numbers of the stream `stream`; the labels of `conversation` are scored. Either
    may be None.
    """

    id: Id
    media: Sequence | np.ndarray
    where: str = ""
    prompt: MakePrompt | None = None
    conversation: MakePrompt | None = None
    stream: int = 0


@dataclasses.dataclass(frozen=True)
class Answered(Generic[Id]):
    """A question's answer, score and encoded images; or the `error` because of which it was not asked. Where it is the
    images that cannot be read, `images` is that error too. `tries`: the answers that the runner's `auto` tried."""

    id: Id
    images: Any = None
    text: str = ""
    tries: Sequence[Try] = ()
    score: Score | None = None
    error: UserError | None = None


@dataclasses.dataclass(frozen=True)
class Runner:
    """How questions are asked: `batch_size` together, of the `window` batches that are read at once.

    A question cannot be asked where its images cannot be read, or its prompt is wrong or too long: it then has an error
    instead of an answer, or with `must_ask` the error is raised before its window is asked. `gather` turns the encoded
    images of a batch into what the engine reads; without `images` it is given the media. `auto` chooses how many tokens
    of each memory an answer is read with.
    """

    engine: Engine
    images: ImageCache | None
    batch_size: int
    max_new_tokens: int = 0
    sampling: Sampling = GREEDY
    until: Sequence[str] = ()
    window: int = 1
    must_ask: bool = False
    gather: Callable[[list], Gathered] = gather
    auto: AutoTokens | None = None

    def run(self, questions: Iterable[Question[Id]], bar: tqdm | None = None) -> Iterator[Answered[Id]]:
        """Answers in the questions' order; `bar` counts them."""
        questions = iter(questions)
        while window := list(itertools.islice(questions, self.window * self.batch_size)):
            for answered in self._ask(window):
                yield answered
                if bar is not None:
                    bar.update()

    def _ask(self, window: Sequence[Question[Id]]) -> Iterator[Answered[Id]]:
        media: list[Any] = [question.media for question in window]
        encoded: Sequence = media if self.images is None else self.images.encode(media)
        prompts: dict[int, Prompt] = {}
        conversations: dict[int, Prompt] = {}
        errors: dict[int, UserError] = {}
        for i, (question, images) in enumerate(zip(window, encoded, strict=True)):
            try:
                prompt = self._made(question.prompt, images, self.max_new_tokens)
                conversation = self._made(question.conversation, images, 0)
            except UserError as error:
                if self.must_ask:
                    raise UserError(f"{question.where}: {error}") from None
                errors[i] = error
                continue
            prompts |= {} if prompt is None else {i: prompt}
            conversations |= {} if conversation is None else {i: conversation}
        how: dict[str, Any] = dict(
            max_new_tokens=self.max_new_tokens, sampling=self.sampling, until=self.until,
            streams=[window[i].stream for i in prompts], batch_size=self.batch_size,
        )  # fmt: skip
        tries: dict[int, list[Try]] = {}
        if self.auto is None:
            texts = generate(self.engine, list(prompts.values()), gather=self.gather, **how)
        else:
            found = answer_auto(self.engine, list(prompts.values()), self.auto, **how)
            tries = dict(zip(prompts, found, strict=True))
            texts = [self.auto.decide(of_prompt).text for of_prompt in found]
        scores = score(self.engine, list(conversations.values()), batch_size=self.batch_size, gather=self.gather)
        text_of, score_of = dict(zip(prompts, texts, strict=True)), dict(zip(conversations, scores, strict=True))
        for i, (question, images) in enumerate(zip(window, encoded, strict=True)):
            yield Answered(
                question.id, images, text_of.get(i, ""), tries.get(i, ()), score_of.get(i), errors.get(i)
            )  # fmt: skip

    def _made(self, make: MakePrompt | None, images: Any, max_new_tokens: int) -> Prompt | None:
        if isinstance(images, BadRecord):
            raise images
        if make is None:
            return None
        prompt = make(images)
        try:
            self.engine.check_length(len(prompt.sample), max_new_tokens)
        except UserError as error:
            raise BadRecord(TOO_LONG, str(error)) from None
        return prompt
