"""`voco evaluate --run runs/easyvqa`: every test question, a table, and a sheet of answers to look at.

Each source of the run's config.data.test has a table and files of its own: easyvqa results.json and answers.png;
video_qa results.NAME.json, kinds.NAME.png (accuracy by kind) and strip.NAME.png (clips with answers); all others
results.NAME.json (exact match, token F1, loss) and answers.NAME.png.

With --questions FILE.jsonl --images DIR --answers OUT.jsonl: the answers to LLaVA's question files, as its own scripts
write them. Started again, it goes on where it stopped.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

from voco_jax.api import Model
from voco_jax.arguments import add_model_arguments
from voco_jax.checkpoint.run import Run, load_run
from voco_jax.config import sources_to_score, typed
from voco_jax.data.records import BadRecord, Source
from voco_jax.data.sources import easyvqa, open_sources
from voco_jax.data.sources.llava import VideoQuestionSource
from voco_jax.data.turns import text_of
from voco_jax.errors import UserError, one_line_errors
from voco_jax.eval import conversations, question_files
from voco_jax.eval.answering import answer_all
from voco_jax.eval.clip_pictures import draw_kinds, draw_strip
from voco_jax.eval.clips import GUESS, THIS_RUN, score_clips
from voco_jax.eval.conversations import score_conversations
from voco_jax.eval.pictures import draw_answers, draw_sheet
from voco_jax.eval.scoring import OVERALL, Answer, count_by_kind, table
from voco_jax.io.atomic import write_text
from voco_jax.io.paths import files_for
from voco_jax.models.compressors import COMPRESSORS
from voco_jax.options import Parser, at_least_1
from voco_jax.terminal import count_of, printable


class Scored(NamedTuple):
    """What is known of a source: `results` for its JSON file, its table, `notes` for below it, and what draws its
    pictures, by the name of the file (without ending)."""

    results: dict
    table: str
    notes: list[str]
    pictures: Mapping[str, Callable[[Path], None]]


def score_easyvqa(
    model: Model, source: Source, guesser: easyvqa.Guesser | None = None, max_records: int | None = None
) -> tuple[dict, list[Answer]]:
    """What `results.json` says of an easyvqa source, and the answers."""
    limits = model.run.config.eval
    records = [source[i] for i in range(len(source))][:max_records]
    answers = answer_all(
        model.image_encoder, records, batch_size=limits.batch_size, max_new_tokens=limits.max_new_tokens
    )
    kinds = [easyvqa.question_kind(answer.question) for answer in answers]
    columns = {THIS_RUN: count_by_kind(answers, kinds)}
    if guesser is not None:
        for column, guess in ((GUESS, guesser), ("most frequent answer", lambda question: guesser.majority)):
            guessed = [dataclasses.replace(answer, given=guess(answer.question)) for answer in answers]
            columns[column] = count_by_kind(guessed, kinds)
    right, total = columns[THIS_RUN][OVERALL]
    results = {
        "step": model.run.step,
        "compressor": model.config.compressor,
        "accuracy": right / total,
        "counts": columns,
    }
    return results, answers


def score_sources(run: Run, max_records: int | None = None, baselines: bool = False) -> Iterator[tuple[str, Scored]]:
    """Every source of the run's config.data.test by its name, in turn. UserError for a run without any, and for files
    that are not there, before the first is scored."""
    by_name = sources_to_score(run.config.data)
    if not by_name:
        raise UserError(
            f"{run.directory}: config.data.test: expected a test set, found none; set it in the config file and give "
            "the command of the training again (a complete run takes it without training), or use --questions FILE"
        )
    opened = _open(run, "test", by_name)
    clips = {name: source for name, source in opened.items() if isinstance(source, VideoQuestionSource)}
    if baselines and not clips:
        raise UserError(f"--baselines: expected a video_qa source in {run.directory}'s config.data.test, found none")
    guesser = _guesser(run, "video_qa") if baselines else None
    model = Model(run)
    for name in sorted(by_name):
        if by_name[name].kind == "easyvqa":
            results, given = score_easyvqa(model, opened[name], _guesser(run, "easyvqa"), max_records)
            draw = functools.partial(draw_answers, given)
            yield name, Scored(results, table(results["counts"]), [], {"answers": draw})
            continue
        if name not in clips:
            results, answers, report = score_conversations(model, opened[name], name=name, max_records=max_records)
            notes = [line.strip() for line in report.lines("conversation")] if report.skipped else []
            draw = functools.partial(draw_conversations, answers)
            yield name, Scored(results, conversations.table(results["scores"]), notes, {"answers": draw})
            continue
        results, found, report = score_clips(
            model, clips[name], name=name, max_clips=max_records, baselines=baselines, guesser=guesser
        )
        notes = [line.strip() for line in report.lines("question")] if report.skipped else []
        if baselines and guesser is None:
            notes.append(f"{GUESS}: config.data.train has no video_qa source to guess from")
        right, total = results["counts"][THIS_RUN][OVERALL]
        about = f"about {count_of(results['clips'], 'clip')}, step {run.step:,}"
        title = f"{right:,} of {count_of(total, 'question')} right {about}"
        pictures = {
            "kinds": functools.partial(draw_kinds, results["counts"], title=title),
            "strip": functools.partial(draw_strip, found, title=title),
        }
        yield name, Scored(results, table(results["counts"]), notes, pictures)


def draw_conversations(answers: list[conversations.ScoredAnswer], path: Path) -> None:
    """The first ones, those with longer answers grey: these are hardly ever given word by word."""
    shown, overall = answers[: conversations.SHOWN], conversations.scores(answers)[OVERALL]
    shares = f"exact match {overall['exact_match']:.1%}, token F1 {overall['token_f1']:.1%}"
    title = f"{count_of(len(answers), 'answer')}: {shares}"
    judged = [answer.kind == conversations.SHORT for answer in shown]
    draw_sheet(shown, [answer.picture for answer in shown], path, title, judged=judged)


def _guesser(run: Run, kind: str) -> easyvqa.Guesser | None:
    """Guesses as the sources of a kind answer that the run was trained on; None where it was trained on none."""
    by_name = {name: keys for name, keys in run.config.data.train.items() if keys.kind == kind}
    known = []
    for source in _open(run, "train", by_name).values() if by_name else ():
        for i in range(len(source)):
            with contextlib.suppress(BadRecord):  # training has counted it
                pairs = [(text_of(turns[0]["value"]), turns[1]["value"]) for turns in source[i].conversations]
                known += [(question, answer) for question, answer in pairs if question and answer.strip()]
    return easyvqa.Guesser(known) if known else None


def _open(run: Run, key: str, by_name: Mapping) -> dict[str, Source]:
    changed: dict[str, Any] = {key: by_name}
    found, _ = open_sources(dataclasses.replace(typed(run.config).data, **changed), key)
    return dict(zip(sorted(by_name), found, strict=True))


@one_line_errors
def main() -> None:
    parser = Parser(prog="voco evaluate", description=__doc__)
    add_model_arguments(parser)
    parser.add_argument(
        "--compressor", choices=COMPRESSORS,
        help="run the model with another compressor than it was trained with ('voco': the lower bound)",
    )  # fmt: skip
    parser.add_argument(
        "--max-records", type=at_least_1, metavar="N", help="only the first N pictures or clips of each test source"
    )
    parser.add_argument(
        "--baselines", action="store_true",
        help="video_qa: also ask with the frames shuffled, one frame, and none; and guess as the training set answers",
    )  # fmt: skip
    question_files.add_arguments(parser)
    args = parser.parse_args()
    others = question_files.OPTIONS if args.questions is None else ("compressor", "max_records", "baselines")
    for name in others:
        if getattr(args, name) != parser.get_default(name):
            with_what = "expected --questions with it" if args.questions is None else "does not go with --questions"
            raise UserError(f"--{name.replace('_', '-')}: {with_what}")
    if args.questions is not None:
        question_files.run_command(args)
        return
    run = load_run(args.run, step=args.step, compressor=args.compressor, attention=args.attention)
    suffix = f".{args.compressor}" if args.compressor else ""
    suffix += f".step{run.step}" if args.step else ""
    suffix += f".first{args.max_records}" if args.max_records else ""
    kinds = {name: keys.kind for name, keys in sources_to_score(run.config.data).items()}
    several, one_easyvqa = len(kinds) > 1, [*kinds.values()].count("easyvqa") == 1
    for name, scored in score_sources(run, args.max_records, args.baselines):
        if several:
            print(f"## {printable(name)}\n")
        # First, whatever becomes of the files
        print("\n".join([printable(scored.table, keep="\n"), *map(printable, scored.notes)]))
        of_source = suffix if one_easyvqa and kinds[name] == "easyvqa" else f".{name}{suffix}"
        written = [f"results{of_source}.json", *(f"{picture}{of_source}.png" for picture in scored.pictures)]
        with files_for(args.run) as directory:
            write_text(directory / written[0], json.dumps(scored.results, indent=2) + "\n")
            for file, draw in zip(written[1:], scored.pictures.values(), strict=True):
                draw(directory / file)
        print(f"written: {', '.join(f'{args.run}/{file}' for file in written)}" + ("\n" if several else ""))


if __name__ == "__main__":
    main()
