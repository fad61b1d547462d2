"""Prompts: a question's tokens, laid out as in training, and the encoded images that it speaks of; asked in batches."""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import jax.numpy as jnp

from voco_jax.data.conversations import Sample
from voco_jax.data.turns import IMAGE, VIDEO, spread_video
from voco_jax.data.video import format_time
from voco_jax.errors import UserError
from voco_jax.infer.engine import GREEDY, Engine, GeneratedAnswer, Score, Visual, bucket
from voco_jax.infer.generate import Sampling
from voco_jax.infer.memory import Embeddings, EncodedImages, MemoryBank, join_images, pictures_of

# What several prompts speak of, as the engine reads it, and for each prompt the indices of its images in it
Gathered = tuple[Visual, list[range]]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """An encoded question, or a whole conversation to be scored, and its images (None: text alone).

    Prompts about the same images hold the same object: a batch then holds it once. `images` are `EncodedImages`, or
    whatever else the `gather` of `generate` and `score` takes.
    """

    sample: Sample
    images: Any = None

    def first_tokens(self, count: int, cut: MemoryBank) -> "Prompt":
        """About the first `count` tokens of each of its memories, which are `cut`."""
        return Prompt(self.sample.first_tokens(self.images.num_tokens, count), cut)


def encode_prompt(
    engine: Engine, question: str, images: EncodedImages | None = None, *, interleaved: bool = False,
    answer: str | None = None,
) -> Prompt:  # fmt: skip
    """A question as training lays it out: images before the text, or with `interleaved` at its `<image>` markers (one
    for each picture, or for each of its tiles) or `<video>`; the frames of a video with their times where the run was
    trained so. The tokens of an `answer` are labels.

    UserError for a question without text.
    """
    check_question(question)
    encoder, count = engine.for_images(images).encoder, 0 if images is None else len(images)
    if interleaved and images is not None and not images.is_video:
        question = _with_tiles(question, [len(one.items) for one in pictures_of(images.items)])
    turns: list[dict] = [{"from": "human", "value": question}]
    if images is not None and images.is_video and not (interleaved and VIDEO.value not in question):
        turns = turns if interleaved else [{"from": "human", "value": (VIDEO, f"\n{question}")}]
        times = [f"{format_time(item.time or 0)} " if engine.timestamps else "" for item in images.items]
        turns = spread_video(turns, times)
    elif not interleaved:
        turns = [{"from": "human", "value": encoder.question(question, count)}]
    if answer is not None:
        turns.append({"from": "gpt", "value": (answer,)})
    return Prompt(encoder.encode(turns, count), images)


def _with_tiles(question: str, images: Sequence[int]) -> str:
    """A question with a marker for each picture, as one with a marker for each of a picture's images."""
    if question.count(IMAGE.value) != len(images):
        return question
    before, *after = question.split(IMAGE.value)
    return before + "".join(IMAGE.value * count + text for count, text in zip(images, after, strict=True))


def check_question(question: object) -> None:
    """UserError for anything but text, and for text of spaces alone."""
    if not isinstance(question, str) or not question.strip():
        found = "none" if question is None or isinstance(question, str) else type(question).__name__
        raise UserError(f"question: expected text, found {found}")


def gather(images: Sequence[EncodedImages | None]) -> Gathered:
    """The images of several prompts as one row, each object once."""
    held: dict[int, tuple[int, EncodedImages]] = {}
    count = 0
    for one in images:
        if one is not None and id(one) not in held:
            held[id(one)] = count, one
            count += len(one)
    first = [(0, 0) if one is None else (held[id(one)][0], len(one)) for one in images]
    indices = [range(start, start + length) for start, length in first]
    if not count:
        return None, indices
    joined, places = join_images([one for _, one in held.values()]), bucket(count, 1)
    if isinstance(joined, Embeddings):
        return jnp.pad(joined.features, [(0, places - count), (0, 0), (0, 0)])[None], indices
    return joined.memory(places), indices


def generate(
    engine: Engine, prompts: Sequence[Prompt], *, max_new_tokens: int, sampling: Sampling = GREEDY,
    until: Sequence[str] = (), streams: Sequence[int] | None = None, batch_size: int = 64,
    gather: Callable[[list], Gathered] = gather,
) -> list[str]:  # fmt: skip
    """Texts of `answer`."""
    given = answer(
        engine, prompts, max_new_tokens=max_new_tokens, sampling=sampling, until=until, streams=streams,
        batch_size=batch_size, gather=gather,
    )  # fmt: skip
    return [one.text for one in given]


def answer(
    engine: Engine, prompts: Sequence[Prompt], *, max_new_tokens: int, sampling: Sampling = GREEDY,
    until: Sequence[str] = (), streams: Sequence[int] | None = None, batch_size: int = 64,
    gather: Callable[[list], Gathered] = gather,
) -> list[GeneratedAnswer]:  # fmt: skip
    """Answers in the prompts' order; prompts of like length share a batch. Other arguments as `Engine.answers`'."""
    streams = range(len(prompts)) if streams is None else streams

    def ask(engine: Engine, batch: list[int], visual: Visual, indices: list[range]) -> list[GeneratedAnswer]:
        samples, numbers = [prompts[i].sample for i in batch], [streams[i] for i in batch]
        return engine.answers(samples, visual, indices, max_new_tokens, sampling, until, numbers)

    return _in_batches(engine, prompts, batch_size, gather, ask)


def score(
    engine: Engine, prompts: Sequence[Prompt], *, batch_size: int = 64, gather: Callable[[list], Gathered] = gather
) -> list[Score]:
    """How likely the labels of each prompt are, in the prompts' order."""

    def ask(engine: Engine, batch: list[int], visual: Visual, indices: list[range]) -> list[Score]:
        return engine.score([prompts[i].sample for i in batch], visual, indices)

    return _in_batches(engine, prompts, batch_size, gather, ask)


def _in_batches(engine: Engine, prompts: Sequence[Prompt], batch_size: int, gather: Callable, ask: Callable) -> list:
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].sample))
    found: dict[int, Any] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        images = [prompts[i].images for i in batch]
        with engine.on_mesh():
            found |= zip(batch, ask(engine.for_images(*images), batch, *gather(images)), strict=True)
    return [found[i] for i in range(len(prompts))]
