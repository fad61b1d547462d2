"""Conversations of any source of records, with the model's answers: exact match, token F1 and loss.

The first question of each conversation is answered (greedily) and compared with its answer; the loss is that of all of
the conversation's answers, in nats a token, as training has it.
"""

from collections.abc import Sequence
import dataclasses
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from voco_jax.api import Model
from voco_jax.data.conversations import Sample
from voco_jax.data.records import TOO_LONG, BadRecord
from voco_jax.data.reports import Report
from voco_jax.data.samples import SampleMaker
from voco_jax.data.turns import text_of
from voco_jax.errors import UserError
from voco_jax.eval.pictures import SHEET_COLUMNS, SHEET_ROWS
from voco_jax.eval.scoring import OVERALL, Answer, longest_answer, token_f1
from voco_jax.infer.memory import Item

SHORT, LONG = "short answers (up to 5 words)", "longer answers"
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
    """A conversation that is waiting: what it begins with, all of it, and the squares of its record's pictures."""

    prompt: Sample
    whole: Sample
    record: int
    squares: list[np.ndarray]
    text: str
    truth: str
    name: str
    picture: Image.Image | None


def score_conversations(
    model: Model, source, *, name: str = "", max_records: int | None = None
) -> tuple[dict, list[ScoredAnswer], Report]:
    """What `results.NAME.json` says of a source (of config.data.test, by its name), the answers, and what is left out.

    UserError where more than the config's `max_skipped_fraction` of the records cannot be used, or none can.
    """
    run, report = model.run, Report()
    config, key = run.config, f"config.data.test.{name}"
    count = len(source) if max_records is None else min(max_records, len(source))
    video = config.data.video
    maker = SampleMaker(run.encoder, 0, _MOST_IMAGES, model.frame_sampling(), video.timestamps, video.incomplete)
    limit = longest_answer(config.eval.max_new_tokens, _truths(source, count), run.encoder.tokenizer)
    answers: list[ScoredAnswer] = []
    waiting: list[_Asked] = []
    with tqdm(total=count, unit="record", desc=f"evaluating {name}".strip(), mininterval=0.5) as bar:
        for i in range(count):
            shown = len(answers) + len(waiting) < SHEET_COLUMNS * SHEET_ROWS
            waiting += _read(model, maker, source, i, limit, report, shown)
            try:
                report.check(config.data.max_skipped_fraction, count)
            except UserError as error:
                raise UserError(f"{key}: {str(error).removeprefix('data: ')}") from None
            while len(waiting) >= config.eval.batch_size or (waiting and i == count - 1):
                answers += _ask(model, waiting[: config.eval.batch_size], limit)
                del waiting[: config.eval.batch_size]
            bar.update()
    if not answers:
        reason = report.lines("conversations")[-1].strip()
        raise UserError(f"{key}: expected conversations, found none that can be asked: {reason}")
    results = {
        "step": run.step,
        "compressor": config.model.compressor,
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


def _first(turns) -> tuple[str, str] | None:
    """The first question of a conversation, without markers, and its answer; None for what is of another form."""
    try:
        human = next(i for i, turn in enumerate(turns) if turn["from"] == "human")
        return text_of(turns[human]["value"]), turns[human + 1]["value"] + ""
    except (StopIteration, IndexError, KeyError, TypeError, AttributeError):
        return None


def _truths(source, count: int) -> set[str]:
    """All expected answers; `_read` will count what is bad."""
    found = set()
    for i in range(count):
        try:
            found |= {first[1] for turns in source[i].conversations if (first := _first(turns))}
        except BadRecord:
            continue
    return found


def _read(model: Model, maker: SampleMaker, source, i: int, limit: int, report: Report, shown: bool) -> list[_Asked]:
    """A record's conversations that can be asked; the report hears of all."""
    if (read := maker.read(source, i, report)) is None:
        return []
    record, times = read
    usable = []
    for c, turns in enumerate(record.conversations):
        report.seen += 1
        try:
            (whole, _), prompt = maker.sample(record, c, times), maker.prompt(record, c, times)
            try:
                model.engine().check_length(len(prompt), limit)
                model.engine().check_length(len(whole), 0)
            except UserError as error:
                raise BadRecord(TOO_LONG, str(error)) from None
            usable.append((prompt, whole, *(_first(turns) or ("", ""))))
        except BadRecord as error:
            report.add_skipped(error, source.where(i))
    if not usable:
        return []
    try:
        images = maker.load_images(record, times, model.run.processor.load)
    except BadRecord as error:
        for _ in usable:
            report.add_skipped(error, source.where(i))
        return []
    squares, name = [model.square(image) for image in images], source.where(i)
    picture = images[len(images) // 2] if images and shown else None
    return [_Asked(prompt, whole, i, squares, *texts, name, picture) for prompt, whole, *texts in usable]


def _ask(model: Model, batch: Sequence[_Asked], limit: int) -> list[ScoredAnswer]:
    squares, places = [], {}
    for asked in batch:
        if asked.record not in places:
            places[asked.record] = range(len(squares), len(squares) + len(asked.squares))
            squares += asked.squares
    visual, _ = model.visual([model.encode_pixels(squares, [Item("")] * len(squares)) if squares else None])
    pictures = [places[asked.record] for asked in batch]
    engine = model.engine()
    with model.on_mesh():
        texts = engine.generate([asked.prompt for asked in batch], visual, pictures, limit)
        found = engine.score([asked.whole for asked in batch], visual, pictures)
    return [
        ScoredAnswer(a.name, a.text, a.truth, text, -score.log_probability, score.num_tokens, a.picture)
        for a, text, score in zip(batch, texts, found, strict=True)
    ]
