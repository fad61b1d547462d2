"""Questions about videos: each clip is compressed once, then asked all its questions, in batches over many clips.

Beside the clip the same model may be shown less of it: its frames in another order, one frame, none. What it still
answers right then needs no more than that.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
from functools import partial
import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from voco_jax.api import Model
from voco_jax.config import typed
from voco_jax.config_keys import EvalConfig
from voco_jax.data.records import NO_ANSWER, WRONG_FORM, BadRecord, Clip
from voco_jax.data.reports import Report
from voco_jax.data.sources.easyvqa import Guesser
from voco_jax.data.sources.llava import VideoQuestionSource
from voco_jax.data.turns import VIDEO
from voco_jax.errors import UserError
from voco_jax.eval.runner import Answered, Question, Runner
from voco_jax.eval.scoring import OVERALL, Answer, count_by_kind, longest_answer
from voco_jax.infer.image_cache import ImageCache
from voco_jax.infer.image_encoder import ImageEncoder
from voco_jax.infer.memory import EncodedImages
from voco_jax.infer.prompts import Prompt, encode_prompt

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
View = Callable[[EncodedImages, int], EncodedImages | None]
BASELINES: dict[str, View] = {
    "frames shuffled": shuffled,
    "one frame": lambda images, number: images[len(images) // 2],
    "question only": lambda images, number: None,
}
VIEWS: dict[str, View] = {THIS_RUN: lambda images, number: images} | BASELINES


# ---- Scores ----------------------------------------------------------------------------------------------------


def score_clips(
    model: Model, source: VideoQuestionSource, *, name: str = "", max_clips: int | None = None,
    baselines: bool = False, guesser: Guesser | None = None,
) -> tuple[dict, ClipAnswers, Report]:  # fmt: skip
    """What `results.NAME.json` says of a source (of config.data.test, by its name), the answers, and what is left out.

    UserError where more than `max_skipped_fraction` of the questions cannot be used, or none can.
    """
    report, config = Report(), typed(model.run.config)
    key = f"config.data.test.{name}"

    def check() -> None:
        report.check(config.data.max_skipped_fraction, len(source), len(source), name=key)

    clips = read_clips(source, report, max_clips)
    check()
    found = answer_clips(
        model.image_encoder, clips, report, check, config.eval, BASELINES if baselines else (), name,
        incomplete=config.data.video.incomplete,
    )  # fmt: skip
    if not found.kinds:
        reason = report.lines("question")[-1].strip()
        raise UserError(f"{key}: expected questions, found none that can be asked: {reason}")
    counts = {column: count_by_kind(answers, found.kinds) for column, answers in found.answers.items()}
    if guesser is not None:
        guessed = [dataclasses.replace(a, given=guesser(a.question)) for a in found.answers[THIS_RUN]]
        counts[GUESS] = count_by_kind(guessed, found.kinds)
    right, total = counts[THIS_RUN][OVERALL]
    frames = [len(times) for times in found.times.values()]
    results = {
        "step": model.run.step,
        "compressor": model.config.compressor,
        "accuracy": right / total,
        "counts": counts,
        "clips": len(frames),
        "frames_per_clip": [min(frames), max(frames)],
        "tokens_per_frame": model.run.encoder.num_visual_tokens,
        "left_out": dict(report.skipped),
    }
    return results, found, report


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
    images: ImageEncoder, clips: Sequence[AskedClip], report: Report, check: Callable[[], None], limits: EvalConfig,
    baselines: Iterable[str] = (), name: str = "", incomplete: bool = False,
) -> ClipAnswers:  # fmt: skip
    """Greedy answers to all questions of the clips, with the run's frames; also with what `baselines` show.

    A clip or a question that cannot be used goes to the report, and `check` is called: it may raise.
    """
    engine, found = images.engine, ClipAnswers({}, [], {})
    asked = [(clip, question) for clip in clips for question in clip.questions]
    truths = {question.truth for _, question in asked}
    limit = longest_answer(limits.max_new_tokens, truths, engine.encoder.tokenizer)
    runner = Runner(engine, ImageCache(images), limits.batch_size, limit)

    def ask(column: str, asked: Sequence[tuple[AskedClip, ClipQuestion]]) -> Iterator[Answered]:
        view = VIEWS[column]
        shown: tuple = (None, None, None)  # the clip before, its images, and what is shown of them

        def prompt(clip: AskedClip, question: ClipQuestion, images: EncodedImages) -> Prompt:
            nonlocal shown
            if shown[0] is not clip or shown[1] is not images:
                shown = clip, images, view(images, clip.number)
            return encode_prompt(engine, question.text, shown[2])

        questions = (
            Question((clip, q), [Clip(clip.file, incomplete=incomplete)], q.where, partial(prompt, clip, q))
            for clip, q in asked
        )
        with tqdm(total=len(asked), unit="question", desc=f"evaluating {name} ({column})", mininterval=0.5) as bar:
            yield from runner.run(questions, bar)

    usable: list[tuple[AskedClip, ClipQuestion]] = []
    for column in (THIS_RUN, *baselines):
        answers: list[Answer] = []
        found.answers[column] = answers
        for _, of_clip in itertools.groupby(ask(column, asked), lambda answered: answered.id[0].number):
            for answered in of_clip:
                clip, question = answered.id
                if isinstance(answered.images, EncodedImages):
                    found.times[str(clip.file)] = [item.time or 0.0 for item in answered.images.items]
                if answered.error is None:
                    usable.append((clip, question))
                    answers.append(Answer(str(clip.file), question.text, question.truth, answered.text))
                elif isinstance(answered.error, BadRecord):
                    is_clip = answered.images is answered.error  # the message names it
                    report.add_skipped(answered.error, "" if is_clip else question.where)
                else:
                    raise answered.error
            check()
        asked, usable = usable, []
    found.kinds.extend(question.kind for _, question in asked)
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
    if not isinstance(record.video, Clip) or record.video.file is None:
        raise BadRecord(WRONG_FORM, "video: expected a file, found none")
    return record.video.file, ClipQuestion(question, answer, kind, source.where(i))
