"""Questions about videos: each clip is compressed once, then asked all its questions, in batches over many clips.

Beside the clip the same model may be shown less of it: its frames in another order, one frame, none. What it still
answers right then needs no more than that.
"""

from collections.abc import Callable, Iterable, Sequence
import contextlib
import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from voco_jax.api import EncodedImages, Model, Request
from voco_jax.data.records import NO_ANSWER, TOO_LONG, WRONG_FORM, BadRecord
from voco_jax.data.reports import Report
from voco_jax.data.sources.easyvqa import Guesser
from voco_jax.data.sources.llava import VideoQuestionSource
from voco_jax.data.turns import VIDEO
from voco_jax.errors import UserError
from voco_jax.eval.scoring import OVERALL, Answer, count_by_kind, longest_answer

NO_KIND = "other"  # of the rows without a kind, where some have one


@dataclasses.dataclass(frozen=True)
class ClipQuestion:
    """A row of a question set; `kind` is '' where no row of the set has one, `where` is for messages."""

    text: str
    truth: str
    kind: str
    where: str


class AskedClip(NamedTuple):
    """A clip with all that is asked about it; `number` counts the clips of the set."""

    file: Path
    number: int
    questions: list[ClipQuestion]


class ClipAnswers(NamedTuple):
    """Answers by what the model was shown (in the questions' order, those of a clip together), the questions' kinds,
    and for each clip the seconds at which its frames were taken."""

    answers: dict[str, list[Answer]]
    kinds: list[str]
    times: dict[str, list[float]]


# ---- What the model is shown -----------------------------------------------------------------------------------


def shuffled(images: EncodedImages, number: int) -> EncodedImages:
    """A clip's pictures in another order, under the ascending times of the right one. What order follows from the
    clip's `number`; a single picture has no other."""
    rng, right = np.random.default_rng([0, number]), np.arange(len(images))
    order = right
    while len(images) > 1 and (order == right).all():
        order = rng.permutation(len(images))
    return dataclasses.replace(images[order], items=images.items)


THIS_RUN, GUESS = "this run", "guess from the question"
BASELINES: dict[str, Callable[[EncodedImages, int], EncodedImages | None]] = {
    "frames shuffled": shuffled,
    "one frame": lambda images, number: images[len(images) // 2],
    "question only": lambda images, number: None,
}


# ---- Scores ----------------------------------------------------------------------------------------------------


def score_clips(
    model: Model, source: VideoQuestionSource, *, name: str = "", max_clips: int | None = None,
    baselines: bool = False, guesser: Guesser | None = None,
) -> tuple[dict, ClipAnswers, Report]:  # fmt: skip
    """What `results.NAME.json` says of a source (of config.data.test, by its name), the answers, and what is left out.

    UserError where more than the config's `max_skipped_fraction` of the questions cannot be used, or none can.
    """
    run, report = model.run, Report()
    key = f"config.data.test.{name}"

    def check(report: Report) -> None:
        try:
            report.check(run.config.data.max_skipped_fraction, len(source), len(source))
        except UserError as error:
            raise UserError(f"{key}: {str(error).removeprefix('data: ')}") from None

    clips = read_clips(source, report, max_clips)
    check(report)
    found = answer_clips(model, clips, report, check, baselines=BASELINES if baselines else (), name=name)
    if not found.kinds:
        reason = report.lines("questions")[-1].strip()
        raise UserError(f"{key}: expected questions, found none that can be asked: {reason}")
    counts = {column: count_by_kind(answers, found.kinds) for column, answers in found.answers.items()}
    if guesser is not None:
        guessed = [dataclasses.replace(a, given=guesser(a.question)) for a in found.answers[THIS_RUN]]
        counts[GUESS] = count_by_kind(guessed, found.kinds)
    right, total = counts[THIS_RUN][OVERALL]
    frames = [len(times) for times in found.times.values()]
    results = {
        "step": run.step,
        "compressor": run.config.model.compressor,
        "accuracy": right / total,
        "counts": counts,
        "clips": len(frames),
        "frames_per_clip": [min(frames), max(frames)],
        "tokens_per_frame": run.encoder.num_visual_tokens,
        "left_out": dict(report.skipped),
    }
    return results, found, report


def training_answers(sources: Iterable[VideoQuestionSource]) -> list[tuple[str, str]]:
    """(question, answer) of all rows that can be used."""
    found = []
    for source in sources:
        for i in range(len(source)):
            with contextlib.suppress(BadRecord):  # training has counted it
                _, question = _read(source, i)
                found.append((question.text, question.truth))
    return found


# ---- Reading and asking ----------------------------------------------------------------------------------------


def read_clips(source: VideoQuestionSource, report: Report, max_clips: int | None = None) -> list[AskedClip]:
    """The rows by their clips, in the order in which these first come; rows that cannot be used go to the report."""
    clips: dict[Path, AskedClip] = {}
    for i in range(len(source)):
        try:
            file, question = _read(source, i)
        except BadRecord as error:
            report.seen += 1
            report.add_skipped(error, source.where(i))
            continue
        if file not in clips and len(clips) == max_clips:
            continue
        report.seen += 1
        clips.setdefault(file, AskedClip(file, len(clips), [])).questions.append(question)
    if any(question.kind for clip in clips.values() for question in clip.questions):
        for clip in clips.values():
            clip.questions[:] = [q if q.kind else dataclasses.replace(q, kind=NO_KIND) for q in clip.questions]
    return list(clips.values())


def answer_clips(
    model: Model, clips: Sequence[AskedClip], report: Report, check: Callable[[Report], None], *,
    baselines: Iterable[str] = (), name: str = "",
) -> ClipAnswers:  # fmt: skip
    """Greedy answers to all questions of the clips, with the run's frames; also with what `baselines` show.

    A clip or a question that cannot be used goes to the report, which is then given to `check`: it may raise.
    """
    limits = model.run.config.eval
    truths = {question.truth for clip in clips for question in clip.questions}
    max_new_tokens = longest_answer(limits.max_new_tokens, truths, model.run.encoder.tokenizer)
    views = {THIS_RUN: lambda images, number: images} | {baseline: BASELINES[baseline] for baseline in baselines}
    found = ClipAnswers({column: [] for column in views}, [], {})
    waiting: list[tuple[AskedClip, ClipQuestion, dict[str, EncodedImages | None]]] = []
    asked = []

    def ask() -> None:
        nonlocal asked
        batch = waiting[: limits.batch_size]
        del waiting[: limits.batch_size]
        # The last one is filled up from the one before: programs for its size would take longer to compile than to run
        asked = batch + asked[: limits.batch_size - len(batch)]
        for column, answers in found.answers.items():
            requests = [Request(question.text, shown[column]) for _, question, shown in asked]
            texts = model.answers(requests, max_new_tokens=max_new_tokens, batch_size=limits.batch_size)
            for (clip, question, _), text in zip(batch, texts[: len(batch)], strict=True):
                answers.append(Answer(str(clip.file), question.text, question.truth, text))
        found.kinds.extend(question.kind for _, question, _ in batch)
        bar.update(len(batch))

    total = sum(len(clip.questions) for clip in clips)
    with tqdm(total=total, unit="question", desc=f"evaluating {name}".strip(), mininterval=0.5) as bar:
        for clip in clips:
            skipped_before = report.num_skipped
            images = _look(model, clip, report)
            if images is not None:
                shown = {column: view(images, clip.number) for column, view in views.items()}
                usable = [q for q in clip.questions if _can_be_asked(model, q, images, max_new_tokens, report)]
                waiting += [(clip, question, shown) for question in usable]
                found.times[str(clip.file)] = [item.time for item in images.items]
            if report.num_skipped > skipped_before:
                bar.update(report.num_skipped - skipped_before)
                check(report)
            while len(waiting) >= limits.batch_size:
                ask()
        if waiting:
            ask()
    return found


def _read(source: VideoQuestionSource, i: int) -> tuple[Path, ClipQuestion]:
    record, kind = source[i], source.kind(i)
    question, answer = (turn["value"] for turn in record.conversations[0])
    question = question.removeprefix(f"{VIDEO.value}\n").strip()
    if not question:
        raise BadRecord(WRONG_FORM, "question: expected text, found none")
    if not answer.strip():
        raise BadRecord(NO_ANSWER, "answer: expected text, found none")
    if kind == OVERALL:
        raise BadRecord(WRONG_FORM, f"kind: expected a name other than {OVERALL!r}, which is all kinds together")
    return record.video.file, ClipQuestion(question, answer, kind, source.where(i))


def _look(model: Model, clip: AskedClip, report: Report) -> EncodedImages | None:
    """None for a broken clip, which counts once for each of its questions."""
    try:
        return model.encode_video(clip.file, incomplete=model.run.config.data.video.incomplete)
    except BadRecord as error:
        for _ in clip.questions:
            report.add_skipped(error)
        return None


def _can_be_asked(
    model: Model, question: ClipQuestion, images: EncodedImages, max_new_tokens: int, report: Report
) -> bool:
    try:
        prompt = model.prompt(Request(question.text, images))
        try:
            model.engine().check_length(len(prompt), max_new_tokens)
        except UserError as error:
            raise BadRecord(TOO_LONG, str(error)) from None
    except BadRecord as error:
        report.add_skipped(error, question.where)
        return False
    return True
