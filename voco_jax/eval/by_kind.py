"""A test source's questions, by kind: each picture or clip is encoded once, then asked all its questions, in batches
over many of them.

Beside all of it the same model may be shown less: a clip's frames in another order, one frame, nothing. What it still
answers right then needs no more than that.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
import dataclasses
from functools import partial
import hashlib
import itertools
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from voco_jax.api import Model
from voco_jax.config import typed
from voco_jax.data.records import NO_ANSWER, WRONG_FORM, BadRecord, Clip, Frames, Picture, Record, Source
from voco_jax.data.reports import Report
from voco_jax.data.turns import first_question, text_of
from voco_jax.errors import UserError
from voco_jax.eval.auto_scores import compare
from voco_jax.eval.runner import Answered, Question, Runner
from voco_jax.eval.scoring import OVERALL, Answer, Guesser, count_by_kind, longest_answer
from voco_jax.infer.auto_tokens import AUTO, AutoTokens, Try
from voco_jax.infer.image_cache import ImageCache
from voco_jax.infer.memory import EncodedImages
from voco_jax.infer.prompts import Prompt, encode_prompt
from voco_jax.terminal import shortened

NO_KIND = "other"  # of the rows without a kind, where some have one


@dataclasses.dataclass(frozen=True)
class Asked:
    """The first question of a conversation of the source's record `record`. `value` is its text with the markers.

    `about` numbers the source's pictures and clips (or what else a record has), `name` names them; `kind` is '' where
    no row of the source has one; `where` is for messages.
    """

    record: int
    about: int
    value: str
    truth: str
    kind: str
    name: str
    where: str

    @property
    def text(self) -> str:
        return text_of(self.value)


class SourceAnswers(NamedTuple):
    """Answers by what the model was shown, in the order of the questions `asked` (those about the same together), and
    for each clip, by its number, the seconds at which its frames were taken. `tries`: the answers of this run with
    every number of tokens, where they choose it themselves."""

    answers: dict[str, list[Answer]]
    asked: list[Asked]
    times: dict[int, list[float]]
    tries: Sequence[Sequence[Try]] = ()


# ---- What the model is shown -----------------------------------------------------------------------------------


def shuffled(images: EncodedImages, number: int) -> EncodedImages:
    """A clip's pictures in another order, under the ascending times of the right one. What order follows from the
    clip's `number`; a single picture has no other."""
    rng, right = np.random.default_rng([0, number]), np.arange(len(images))
    order = right
    while len(images) > 1 and (order == right).all():
        order = rng.permutation(len(images))
    return dataclasses.replace(images[order], items=images.items)


THIS_RUN, SHUFFLED, ONE_FRAME, NOTHING = "this run", "frames shuffled", "one frame", "question only"
GUESS, MAJORITY = "guess from the question", "most frequent answer"  # without a model
FRAMES_SHOWN: dict[str, Callable[[EncodedImages, int], EncodedImages]] = {  # of a clip, by its number
    THIS_RUN: lambda images, number: images,
    SHUFFLED: shuffled,
    ONE_FRAME: lambda images, number: images[len(images) // 2],
}


# ---- Scores ----------------------------------------------------------------------------------------------------


def score_by_kind(
    model: Model, source: Source, *, name: str = "", max_about: int | None = None,
    tokens: int | AutoTokens | None = None, baselines: bool = False, guesser: Guesser | None = None,
) -> tuple[dict, SourceAnswers, Report]:  # fmt: skip
    """What `results.NAME.json` says of a source (of config.data.test, by its name), the answers, and what is left out.

    `max_about`: only the first so many pictures and clips. `tokens`: the first so many of each memory are read, or as
    many as each answer needs; then all numbers of tokens are tried, and the results compare confidences to go by.
    `baselines` are answered with less to go by; `guesser` guesses. UserError where more than `max_skipped_fraction` of
    the questions cannot be used, or none can.
    """
    report, config = Report(), typed(model.run.config)
    key = f"config.data.test.{name}"

    def check() -> None:
        report.check(config.data.max_skipped_fraction, len(source), len(source), name=key)

    asked = read_questions(source, report, max_about)
    check()
    has_clips = any(source[q.record].video is not None for q in asked)
    less = ((SHUFFLED, ONE_FRAME) if has_clips else ()) + (NOTHING,) if baselines else ()
    found = answer_questions(model, source, asked, report, check, less, name=name, tokens=tokens)
    if not found.asked:
        reason = report.lines("question")[-1].strip()
        raise UserError(f"{key}: expected questions, found none that can be asked: {reason}")
    kinds = [question.kind for question in found.asked]
    counts = {column: count_by_kind(answers, kinds) for column, answers in found.answers.items()}
    if guesser is not None:
        guesses: dict[str, Callable[[str], str]] = {GUESS: guesser, MAJORITY: lambda question: guesser.majority}
        for column, guess in guesses.items():
            guessed = [dataclasses.replace(a, given=guess(a.question)) for a in found.answers[THIS_RUN]]
            counts[column] = count_by_kind(guessed, kinds)
    right, total = counts[THIS_RUN][OVERALL]
    frames = [len(times) for times in found.times.values()]
    results = {
        "step": model.run.step,
        "compressor": model.config.compressor,
        # Of each image
        "tokens": AUTO if isinstance(tokens, AutoTokens) else tokens or model.run.encoder.num_visual_tokens,
        "accuracy": right / total,
        "counts": counts,
        "pictures": len({question.about for question in found.asked if question.name}) - len(frames),
        "clips": len(frames),
        **({"frames_per_clip": [min(frames), max(frames)]} if frames else {}),
        "left_out": dict(report.skipped),
    }
    if isinstance(tokens, AutoTokens):
        results["auto"] = compare(tokens, found.tries, [question.truth for question in found.asked])
    return results, found, report


# ---- Reading and asking ----------------------------------------------------------------------------------------


def has_kinds(source: Source) -> bool:
    """Whether any row of a source has a kind."""
    for i in range(len(source)):
        try:
            if source[i].kinds:
                return True
        except BadRecord:  # reading for the score counts it
            continue
    return False


def read_questions(source: Source, report: Report, max_about: int | None = None) -> list[Asked]:
    """The first question of every conversation, those about the same picture or clip together, in the order in which
    these first come; what cannot be used goes to the report."""
    numbers: dict[Hashable, int] = {}
    asked = []
    for i in range(len(source)):
        try:
            record = source[i]
        except BadRecord as error:
            report.seen += 1
            report.add_skipped(error, source.where(i))
            continue
        about = _content(record) or i
        if about not in numbers and len(numbers) == max_about:
            continue
        for c, turns in enumerate(record.conversations):
            report.seen += 1
            try:
                value, truth = _read(turns)
                kind = _kind(record, c)
            except BadRecord as error:
                report.add_skipped(error, source.where(i))
                continue
            number = numbers.setdefault(about, len(numbers))
            name = ", ".join(dict.fromkeys(map(str, _media(record))))  # tiles of a picture have one name
            asked.append(Asked(i, number, value, truth, kind, name, source.where(i)))
    if any(question.kind for question in asked):
        asked = [q if q.kind else dataclasses.replace(q, kind=NO_KIND) for q in asked]
    return sorted(asked, key=lambda question: question.about)


def answer_questions(
    model: Model, source: Source, asked: Sequence[Asked], report: Report, check: Callable[[], None],
    less: Iterable[str] = (), *, name: str = "", tokens: int | AutoTokens | None = None,
) -> SourceAnswers:  # fmt: skip
    """Greedy answers to the questions, of a clip with the run's frames; also with less to go by (`FRAMES_SHOWN`,
    `NOTHING`).

    A picture, clip or question that cannot be used goes to the report, and `check` is called: it may raise.
    """
    config, images = typed(model.run.config), model.image_encoder
    auto = dataclasses.replace(tokens, every=True) if isinstance(tokens, AutoTokens) else None
    tokens = tokens if isinstance(tokens, int) else None
    engine, limits = images.engine if tokens is None else images.engine.for_tokens(tokens), config.eval
    limit = longest_answer(limits.max_new_tokens, {question.truth for question in asked}, engine.encoder.tokenizer)
    # Single pictures of as many questions as to fill a batch are encoded together; a clip is a batch by itself
    is_about_pictures = all(source[q.record].video is None for q in asked)
    window = round(len(asked) / max(1, len({q.about for q in asked}))) if is_about_pictures else 1
    cache = ImageCache(images, tokens=tokens)
    runner = Runner(engine, cache, limits.batch_size, limit, window=max(1, window), auto=auto)
    last: tuple = (None, None)  # a record's number, and the record: several questions may be of one

    def media(i: int) -> Sequence[Picture | Clip | Frames]:
        nonlocal last
        last = last if last[0] == i else (i, source[i])
        return _media(last[1], config.data.video.incomplete)

    def ask(column: str, asked: Sequence[Asked]) -> Iterator[Answered[Asked]]:
        shown: tuple = (None, None, None)  # what was asked about before, its images, and what is shown of them

        def prompt(question: Asked, images: EncodedImages | None) -> Prompt:
            nonlocal shown
            if images is None:
                return encode_prompt(engine, question.text)
            if shown[0] != question.about or shown[1] is not images:
                show = FRAMES_SHOWN[column if images.is_video else THIS_RUN]
                shown = question.about, images, show(images, question.about)
            return encode_prompt(engine, question.value, shown[2], interleaved=True)

        questions = (
            Question(q, [] if column == NOTHING else media(q.record), q.where, partial(prompt, q)) for q in asked
        )
        bar_name = " ".join(f"evaluating {name} ({column})".split())
        with tqdm(total=len(asked), unit="question", desc=bar_name, mininterval=0.5) as bar:
            yield from runner.run(questions, bar)

    tries: list[Sequence[Try]] = []
    found, usable = SourceAnswers({}, [], {}, tries), list[Asked]()
    for column in (THIS_RUN, *less):
        answers: list[Answer] = []
        found.answers[column] = answers
        for _, of_same in itertools.groupby(ask(column, asked), lambda answered: answered.id.about):
            for answered in of_same:
                question = answered.id
                if isinstance(answered.images, EncodedImages) and answered.images.is_video:
                    found.times[question.about] = [item.time or 0.0 for item in answered.images.items]
                if answered.error is None:
                    usable.append(question)
                    tries += [answered.tries] if column == THIS_RUN and auto is not None else []
                    answers.append(Answer(question.name, question.text, question.truth, answered.text))
                elif isinstance(answered.error, BadRecord):
                    is_of_file = answered.images is answered.error  # the message names it
                    report.add_skipped(answered.error, "" if is_of_file else question.where)
                else:
                    raise answered.error
            check()
        asked, usable = usable, []
    found.asked.extend(asked)
    return found


def _media(record: Record, incomplete: bool = False) -> Sequence[Picture | Clip | Frames]:
    if isinstance(record.video, Clip):
        return [dataclasses.replace(record.video, incomplete=incomplete)]
    return list(record.images) if record.video is None else [record.video]


def _content(record: Record) -> Hashable:
    """What tells a record's pictures or clip from others; None where it has none."""
    return tuple(_of_file(one) for one in _media(record)) or None


def _of_file(one: Picture | Clip | Frames) -> Hashable:
    if isinstance(one, Frames):
        return tuple(_of_file(picture) for picture in one.pictures)
    return str(one.file) if one.data is None else hashlib.blake2b(one.data).digest()


def _read(turns: list[dict]) -> tuple[str, str]:
    first = first_question(turns)
    if first is None:
        raise BadRecord(WRONG_FORM, f"expected a question with its answer, found {shortened(turns)}")
    if not text_of(first[0]):
        raise BadRecord(WRONG_FORM, "question: expected text, found none")
    if not first[1].strip():
        raise BadRecord(NO_ANSWER, "answer: expected text, found none")
    return first


def _kind(record: Record, conversation: int) -> str:
    kind = record.kinds[conversation] if record.kinds else ""
    if not isinstance(kind, str):
        raise BadRecord(WRONG_FORM, f"kind: expected text, found {shortened(kind)}")
    if kind == OVERALL:
        raise BadRecord(WRONG_FORM, f"kind: expected a name other than {OVERALL!r}, which is all kinds together")
    return kind
