"""Conversations of any source of records, with the model's answers: exact match, token F1 and loss.

The first question of each conversation is answered (greedily) and compared with its answer; the loss is that of all of
the conversation's answers, in nats a token, as training has it.
"""

from collections.abc import Iterator, Sequence
import dataclasses
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from voco_jax.api import Model
from voco_jax.data.images import ImageProcessor
from voco_jax.data.records import BadRecord, Source
from voco_jax.data.reports import Report
from voco_jax.data.samples import SampleMaker
from voco_jax.data.turns import first_question, text_of
from voco_jax.errors import UserError
from voco_jax.eval.pictures import SHEET_COLUMNS, SHEET_ROWS
from voco_jax.eval.runner import Question, Runner
from voco_jax.eval.scoring import OVERALL, Answer, longest_answer, token_f1
from voco_jax.infer.image_cache import ImageCache
from voco_jax.infer.prompts import Prompt

SHORT, LONG = "short answers (up to 5 words)", "longer answers"
SHOWN = SHEET_COLUMNS * SHEET_ROWS  # answers on a sheet, the first ones
SHORT_WORDS = 5  # nobody says more than that in the same words
_MOST_IMAGES = 2**31  # of a record: here it need not fit a pack


@dataclasses.dataclass(frozen=True)
class ScoredAnswer(Answer):
    """`loss` is the sum over the `num_tokens` labels of the whole conversation, in nats."""

    loss: float
    num_tokens: int
    picture: Image.Image | None = None  # of the first ones, to be shown; of a video the frame in the middle

    @property
    def kind(self) -> str:
        return SHORT if len(self.truth.split()) <= SHORT_WORDS else LONG


class _Asked(NamedTuple):
    """A conversation's first question and answer, its record's name, and the picture to show."""

    text: str
    truth: str
    name: str
    picture: Image.Image | None


def score_conversations(
    model: Model, source: Source, *, name: str = "", max_records: int | None = None, tokens: int | None = None
) -> tuple[dict, list[ScoredAnswer], Report]:
    """What `results.NAME.json` says of a source (of config.data.test, by its name), the answers, and what is left out.

    `tokens`: the first so many of each memory are read. UserError where more than `max_skipped_fraction` of the records
    cannot be used, or none can.
    """
    images, report = model.image_encoder, Report()
    cache = ImageCache(images, tokens=tokens, in_tiles=False)
    engine = model.engine if tokens is None else model.engine.for_tokens(tokens)
    encoder = engine.encoder
    data, limits, key = model.run.config.data, model.run.config.eval, f"config.data.test.{name}"
    count = len(source) if max_records is None else min(max_records, len(source))
    maker = SampleMaker(encoder, 0, _MOST_IMAGES, images.sampling, data.video.timestamps, data.video.incomplete)
    limit = longest_answer(limits.max_new_tokens, _truths(source, count), encoder.tokenizer)
    answers: list[ScoredAnswer] = []

    def questions() -> Iterator[Question[_Asked]]:
        with tqdm(total=count, unit="record", desc=f"evaluating {name}".strip(), mininterval=0.5) as bar:
            for i in range(count):
                # Questions are read before those that are asked with them are answered
                of_record = _read(maker, source, i, images.processor, report, len(answers) < SHOWN)
                report.check(data.max_skipped_fraction, count, name=key)
                yield from of_record
                bar.update()

    runner = Runner(engine, cache, limits.batch_size, limit)
    for answered in runner.run(questions()):
        asked = answered.id
        if answered.score is None:
            if not isinstance(answered.error, BadRecord):
                raise answered.error or AssertionError(asked)
            report.add_skipped(answered.error, asked.name)
            report.check(data.max_skipped_fraction, count, name=key)
            continue
        loss, num_tokens = -answered.score.log_probability, answered.score.num_tokens
        picture = asked.picture if len(answers) < SHOWN else None
        answers.append(ScoredAnswer(asked.name, asked.text, asked.truth, answered.text, loss, num_tokens, picture))
    if not answers:
        reason = report.lines("conversation")[-1].strip()
        raise UserError(f"{key}: expected conversations, found none that can be asked: {reason}")
    results = {
        "step": model.run.step,
        "compressor": model.config.compressor,
        "tokens": encoder.num_visual_tokens,
        **scores(answers)[OVERALL],
        "scores": scores(answers),
        "max_new_tokens": limit,
        "left_out": dict(report.skipped),
    }
    return results, answers, report


def scores(answers: Sequence[ScoredAnswer]) -> dict[str, dict[str, float]]:
    """Exact match and token F1 (means over the answers) and loss (over their tokens) by kind of answer and overall."""
    kinds = sorted({answer.kind for answer in answers}, reverse=True)  # short ones first
    groups = {kind: [a for a in answers if a.kind == kind] for kind in kinds if len(kinds) > 1} | {OVERALL: answers}
    return {
        kind: {
            "answers": len(group),
            "exact_match": float(np.mean([a.correct for a in group])),
            "token_f1": float(np.mean([token_f1(a.given, a.truth) for a in group])),
            "loss": sum(a.loss for a in group) / sum(a.num_tokens for a in group),
        }
        for kind, group in groups.items()
    }


def table(of_kinds: dict[str, dict[str, float]]) -> str:
    """Of `scores`, as Markdown."""
    lines = ["| answers | number | exact match | token F1 | loss |", "|---|---:|---:|---:|---:|"]
    for kind, of in of_kinds.items():
        shares = f"{100 * of['exact_match']:.1f} % | {100 * of['token_f1']:.1f} %"
        lines.append(f"| {kind} | {of['answers']:,} | {shares} | {of['loss']:.3f} |")
    return "\n".join(lines)


def _truths(source: Source, count: int) -> set[str]:
    """All expected answers; `_read` will count what is bad."""
    found = set()
    for i in range(count):
        try:
            found |= {first[1] for turns in source[i].conversations if (first := first_question(turns))}
        except BadRecord:
            continue
    return found


def _read(
    maker: SampleMaker, source: Source, i: int, processor: ImageProcessor, report: Report, shown: bool
) -> list[Question[_Asked]]:
    """A record's conversations that can be asked; the report hears of all."""
    if (read := maker.read(source, i, report)) is None:
        return []
    record, times = read
    where, usable = source.where(i), []
    for c, turns in enumerate(record.conversations):
        report.seen += 1
        try:
            conversation, prompt = maker.sample(record, c, times).sample, maker.prompt(record, c, times)
            text, truth = first_question(turns) or ("", "")
            usable.append((prompt, conversation, text_of(text), truth))
        except BadRecord as error:
            report.add_skipped(error, where)
    if not usable:
        return []
    try:
        pictures = maker.load_images(record, times, processor)
    except BadRecord as error:
        for _ in usable:
            report.add_skipped(error, where)
        return []
    picture = pictures[len(pictures) // 2] if pictures and shown else None
    return [
        Question(
            _Asked(text, truth, where, picture), pictures, where, partial(Prompt, prompt),
            partial(Prompt, conversation),
        )
        for prompt, conversation, text, truth in usable
    ]  # fmt: skip
