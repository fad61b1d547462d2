"""LLaVA's question files in, its answer files out: the official scripts of most benchmarks start from these.

    {"question_id": 7, "image": "a.png", "text": "What is this?", "category": "…"}       a line of --questions
    {"question_id": 7, "prompt": "What is this?", "text": "A bus.", "answer_id": "…", "model_id": "…", "metadata": {…}}

A JSON array of such rows, or of ScienceQA's, will do too: `{"id": "7", "conversations": [{"from": "human", "value": …`,
whose first turn is asked. Answers are in the questions' order, appended batch by batch. The same command goes on where
it was interrupted, and writes the same file as without the interruption: the batches are the same ones, and a line that
was cut off is written anew.
"""

import argparse
from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
from functools import partial
import json
import os
from pathlib import Path
from typing import BinaryIO
import uuid

from tqdm import tqdm

from voco_jax.api import Model, Tokens
from voco_jax.arguments import add_answer_arguments, auto_of, load_model, sampling_of
from voco_jax.data.records import BadRecord
from voco_jax.data.sources.json_rows import JsonRows
from voco_jax.data.sources.roots import check_file, inside, path_here
from voco_jax.data.turns import without_markers
from voco_jax.errors import UserError
from voco_jax.eval.runner import Question, Runner
from voco_jax.infer.auto_tokens import AUTO, AutoTokens, Try
from voco_jax.infer.engine import GREEDY, Engine
from voco_jax.infer.generate import Sampling
from voco_jax.infer.image_cache import ImageCache
from voco_jax.infer.prompts import encode_prompt
from voco_jax.io.files import check_regular
from voco_jax.io.locks import lock
from voco_jax.options import at_least_1
from voco_jax.terminal import count_of, shortened

MAX_NEW_TOKENS = 128  # as LLaVA's script has it
OPTIONS = (  # that go with --questions alone
    "mesh", "images", "answers", "batch_size", "max_new_tokens", "temperature", "top_p", "top_k", "seed",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class QuestionRow:
    """A row of a question file; `picture` is None where it has no image."""

    id: int | str
    text: str
    picture: Path | None
    where: str  # file and line (or row), for messages

    @property
    def asked(self) -> str:
        """The text without the image markers at its ends, which some files have. Markers elsewhere are text."""
        return without_markers(self.text)


def read_questions(file: Path, images: Path | None) -> list[QuestionRow]:
    """All questions of a file; UserError names the place of one that cannot be asked, or whose picture is not there."""
    rows, questions = JsonRows(file), []
    for n, place in enumerate(rows.places()):
        where = f"{file}, {place}"
        try:
            row = rows[n]
        except BadRecord as error:
            raise UserError(f"{where}: {error.kind}: {error}") from None
        questions.append(_question(row, where, images))
    return questions


def answer_questions(
    model: Model, questions: Sequence[QuestionRow], file: Path, *, tokens: Tokens = None,
    max_new_tokens: int = MAX_NEW_TOKENS, sampling: Sampling = GREEDY, batch_size: int = 64,
) -> int:  # fmt: skip
    """Append what `file` has not yet of the questions' answers; returns how many it had. `tokens` as `Model.answers`';
    with "auto" each line has the number that its answer was read with.

    UserError for a file that has other answers than these: to other questions, of another model, or otherwise chosen;
    it is then as it was.
    """
    auto = model.auto_tokens(tokens) if isinstance(tokens, str | AutoTokens) else None
    tokens = tokens if isinstance(tokens, int) else None
    cache = ImageCache(model.image_encoder, tokens=tokens)
    engine = model.engine if tokens is None else model.engine.for_tokens(tokens)
    _check_lengths(engine, questions, len(model.image_encoder.processor.tiles), max_new_tokens)
    settings = {
        "model": model.fingerprint, "step": model.run.step,
        "tokens": tokens or model.run.encoder.num_visual_tokens if auto is None else AUTO,
        **({"confidence": auto.confidence, "ladder": list(auto.ladder)} if auto is not None else {}),
        "max_new_tokens": max_new_tokens,
        **dataclasses.asdict(sampling),
    }  # fmt: skip
    alike = {"model_id": Path(str(model.run.directory)).name, "metadata": settings}

    def line(number: int, text: str, tries: Sequence[Try]) -> bytes:
        answer = _answer(questions[number], text)
        if auto is not None:
            answer["tokens"] = auto.decide(tries).tokens
        name = uuid.uuid5(uuid.NAMESPACE_OID, json.dumps([number, answer, alike]))
        return json.dumps(answer | {"answer_id": name.hex} | alike).encode() + b"\n"

    with _opened(file) as stream:
        done = _answered(stream, file, questions, alike)
        # From the beginning of the batch that was interrupted: its rows are computed alike then
        start = done - done % batch_size
        asked = (
            Question(i, [q.picture] if q.picture else [], q.where, partial(encode_prompt, engine, q.asked), stream=i)
            for i, q in enumerate(questions[start:], start)
        )
        runner = Runner(engine, cache, batch_size, max_new_tokens, sampling, must_ask=True, auto=auto)
        with tqdm(total=len(questions), initial=start, unit="question", desc="answering", mininterval=0.5) as bar:
            for answered in runner.run(asked, bar):
                if answered.id >= done:
                    stream.write(line(answered.id, answered.text, answered.tries))
                    stream.flush()
    return done


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options, beside those of the model."""
    parser.add_argument(
        "--questions", type=path_here, metavar="FILE", help="LLaVA's question file, JSONL or a JSON array"
    )
    parser.add_argument(
        "--images", type=path_here, metavar="DIR", help="directory that the paths of the pictures start from"
    )
    parser.add_argument(
        "--answers", type=path_here, metavar="OUT", help="answer file to write; an interrupted one is continued"
    )
    parser.add_argument("--batch-size", type=at_least_1, default=64, metavar="N", help="questions at once (default 64)")
    add_answer_arguments(parser, MAX_NEW_TOKENS)


def run_command(args: argparse.Namespace) -> None:
    """`--questions`, with the model that `add_model_arguments` name."""
    sampling = sampling_of(args)
    if args.answers is None:
        raise UserError("--questions: expected --answers with it, the file to write")
    if args.images is not None and not args.images.is_dir():
        raise UserError(f"--images: {args.images}: expected a directory")
    questions = read_questions(args.questions, args.images)  # first: what is wrong with them shows itself at once
    model = load_model(args)
    had = answer_questions(
        model, questions, args.answers, tokens=auto_of(args, model) or args.tokens,
        max_new_tokens=args.max_new_tokens, sampling=sampling, batch_size=args.batch_size,
    )  # fmt: skip
    before = f", {had} of them already in the file" if had else ""
    print(f"{args.answers}: {count_of(len(questions), 'answer')}{before}")


def _question(row: object, where: str, images: Path | None) -> QuestionRow:
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object, found {shortened(row)}")
    key = "id" if "question_id" not in row and "conversations" in row else "question_id"
    number, image = row.get(key), row.get("image")
    if isinstance(number, bool) or not isinstance(number, int | str):
        raise UserError(f"{where}: {key}: expected a number or text, found {shortened(number)}")
    key, text = ("text", row.get("text")) if "text" in row or "conversations" not in row else _first_turn(row)
    if not isinstance(text, str) or not without_markers(text):
        raise UserError(f"{where}: {key}: expected a question, found {shortened(text)}")
    if image is None or image == "":
        return QuestionRow(number, text, None, where)
    if images is None:
        raise UserError(f"{where}: image: expected --images, the directory that {shortened(image)} is in")
    try:
        picture = inside(images, image)
        check_file(picture)
    except BadRecord as error:
        raise UserError(f"{where}: image: {error}") from None
    return QuestionRow(number, text, picture, where)


def _first_turn(row: dict) -> tuple[str, object]:
    """Which key has the question of a row of conversations, and what it has; the answer in it is not looked at."""
    turns = row["conversations"]
    turn = turns[0] if isinstance(turns, list) and turns else None
    if isinstance(turn, dict) and turn.get("from") == "human":
        return "conversations", turn.get("value")
    return "conversations", turns


def _check_lengths(engine: Engine, questions: Sequence[QuestionRow], tiles: int, max_new_tokens: int) -> None:
    """UserError for a question that the model cannot be asked, before any is. A picture is so many images."""
    for question in questions:
        try:
            prompt = engine.encoder.encode_question(question.asked, 0 if question.picture is None else tiles)
            engine.check_length(len(prompt), max_new_tokens)
        except UserError as error:
            raise UserError(f"{question.where}: {error}") from None


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    """The answer file, for this process alone, to be read and appended to."""
    with open(file, "a+b") as stream:
        check_regular(file, os.fstat(stream.fileno()))
        if not lock(stream.fileno(), file):
            raise UserError(f"{file}: another process is writing answers into it")
        yield stream


def _answered(stream: BinaryIO, file: Path, questions: Sequence[QuestionRow], alike: dict) -> int:
    """How many of the questions have answers in the stream; what was cut off at its end is cut off whole."""
    stream.seek(0)
    *lines, rest = stream.read().split(b"\n")
    hint = "another --answers file begins anew"
    if len(lines) > len(questions):
        raise UserError(f"{file}: expected at most {len(questions)} answers, found {len(lines)}; {hint}")
    for n, (line, question) in enumerate(zip(lines, questions, strict=False), 1):
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(
                f"{file}, line {n}: expected an answer, found {shortened(line.decode(errors='replace'))}"
            ) from None
        answer = answer if isinstance(answer, dict) else {}
        if (answer.get("question_id"), answer.get("prompt")) != (question.id, question.text):
            expected = f"the answer to question {shortened(question.id)} of {question.where}"
            raise UserError(
                f"{file}, line {n}: expected {expected}, found {shortened(answer.get('question_id'))}; {hint}"
            )
        for key, value in alike.items():
            if answer.get(key) != value:
                what, expected, found = _difference(key, value, answer.get(key))
                raise UserError(f"{file}, line {n}: {what}: expected {expected}, found {found}; {hint}")
    if rest:  # the process was killed as it wrote: but only if this is how it would have begun
        head = b""
        if len(lines) < len(questions):
            head = json.dumps(_answer(questions[len(lines)], "")).encode().removesuffix(b'"}')
        if not head or not (rest.startswith(head) or head.startswith(rest)):
            found = shortened(rest.decode(errors="replace"))
            raise UserError(f"{file}, line {len(lines) + 1}: expected an answer, or half of one; found {found}; {hint}")
        stream.truncate(sum(len(line) + 1 for line in lines))
    return len(lines)


def _answer(question: QuestionRow, text: str) -> dict:
    return {"question_id": question.id, "prompt": question.text, "text": text}


def _difference(key: str, expected: object, found: object) -> tuple[str, str, str]:
    if isinstance(expected, dict) and isinstance(found, dict):
        name = next((name for name in expected if found.get(name) != expected[name]), None)
        if name is not None:
            return f"{key}.{name}", shortened(expected[name]), shortened(found.get(name))
    return key, shortened(expected), shortened(found)
