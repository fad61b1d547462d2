"""`voco evaluate --run runs/easyvqa`: every test question, a table, and a sheet of answers to look at.

Each source of the run's config.data.test has a table and files of its own: results.NAME.json and, where its rows carry
a `kind` of question, kinds.NAME.png (accuracy by kind), answers.NAME.png (pictures with answers) and strip.NAME.png
(clips with answers); of easy-VQA results.json, kinds.png and answers.png. Of other sources results.NAME.json has exact
match, token F1 and loss. --tokens auto adds a table of accuracy against the tokens read, and auto.NAME.png.

With --questions FILE.jsonl --images DIR --answers OUT.jsonl: the answers to LLaVA's question files, as its own scripts
write them. Started again, it goes on where it stopped.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, NamedTuple, cast

from voco_jax.api import Model
from voco_jax.arguments import add_model_arguments, add_token_arguments, check_confidence, untrained_note
from voco_jax.checkpoint.run import Run, load_run
from voco_jax.config import sources_to_score, typed
from voco_jax.data.records import BadRecord, Source
from voco_jax.data.sources import open_sources
from voco_jax.data.sources.llava import VideoQuestionSource
from voco_jax.data.turns import first_question, text_of
from voco_jax.errors import UserError, one_line_errors
from voco_jax.eval import auto_scores, conversations, question_files
from voco_jax.eval.by_kind import GUESS, THIS_RUN, has_kinds, score_by_kind
from voco_jax.eval.conversations import score_conversations
from voco_jax.eval.kind_pictures import draw_kinds, draw_strip
from voco_jax.eval.pictures import draw_answers, draw_sheet
from voco_jax.eval.scoring import OVERALL, Guesser, table
from voco_jax.infer.auto_tokens import AUTO, AutoTokens
from voco_jax.infer.memory import check_tokens
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


def score_sources(
    run: Run, max_records: int | None = None, baselines: bool = False, tokens: int | AutoTokens | None = None
) -> Iterator[tuple[str, Scored]]:  # fmt: skip
    """Every source of the run's config.data.test by its name, in turn. UserError for a run without any, and for files
    that are not there, before the first is scored."""
    by_name = sources_to_score(run.config.data)
    if not by_name:
        raise UserError(
            f"{run.directory}: config.data.test: expected a test set, found none; set it in the config file and give "
            "the command of the training again (a complete run takes it without training), or use --questions FILE"
        )
    opened = _open(run, "test", by_name)
    with_kinds = {name for name, one in opened.items() if isinstance(one, VideoQuestionSource) or has_kinds(one)}
    if baselines and not with_kinds:
        found = f"{run.directory}'s config.data.test, found none"
        raise UserError(f"--baselines: expected a source whose rows carry a kind of question in {found}")
    if isinstance(tokens, AutoTokens) and (others := opened.keys() - with_kinds):
        found = f"{run.directory}'s config.data.test.{min(others)} has none"
        raise UserError(f"--tokens {AUTO}: expected sources whose rows carry a kind of question: {found}")
    model = Model(run)
    if isinstance(tokens, AutoTokens):
        tokens = model.auto_tokens(tokens, "--tokens")
    elif tokens is not None:
        model.image_encoder.require_memories()
        check_tokens("--tokens", tokens, model.config.num_voco_tokens)
    for name in sorted(by_name):
        if name in with_kinds:
            yield name, _by_kind(model, opened[name], name, by_name[name].kind, max_records, baselines, tokens)
            continue
        results, answers, report = score_conversations(
            model, opened[name], name=name, max_records=max_records, tokens=cast(int | None, tokens)
        )
        notes = [line.strip() for line in report.lines("conversation")] if report.skipped else []
        draw = functools.partial(draw_conversations, answers)
        yield name, Scored(results, conversations.table(results["scores"]), notes, {"answers": draw})


def _by_kind(
    model: Model, source: Source, name: str, source_kind: str, max_about: int | None, baselines: bool,
    tokens: int | AutoTokens | None,
) -> Scored:  # fmt: skip
    guesser = _guesser(model.run, source_kind) if baselines or source_kind == "easyvqa" else None
    results, found, report = score_by_kind(
        model, source, name=name, max_about=max_about, tokens=tokens, baselines=baselines, guesser=guesser
    )
    notes = [line.strip() for line in report.lines("question")] if report.skipped else []
    if baselines and guesser is None:
        notes.append(f"{GUESS}: config.data.train has no {source_kind} source to guess from")
    right, total = results["counts"][THIS_RUN][OVERALL]
    about = [count_of(results[key], key[:-1]) for key in ("pictures", "clips") if results[key]]
    title = f"{right:,} of {count_of(total, 'question')} right about {' and '.join(about) or 'text'}"
    title += f", step {model.run.step:,}"
    pictures: dict[str, Callable[[Path], None]] = {
        "kinds": functools.partial(draw_kinds, results["counts"], title=title)
    }
    if results["clips"]:
        pictures["strip"] = functools.partial(draw_strip, found, source, title=title)
    shown = [i for i, question in enumerate(found.asked) if question.about not in found.times]
    if shown:

        def load(i: int):
            images = source[found.asked[shown[i]].record].images
            return model.image_encoder.processor.load(images[0]) if images else None

        pictures["answers"] = functools.partial(draw_answers, [found.answers[THIS_RUN][i] for i in shown], load)
    tables = [table(results["counts"])]
    if "auto" in results:
        pictures["auto"] = functools.partial(auto_scores.draw, results["auto"], title=title)
        tables.append(auto_scores.table(results["auto"]))
        notes += [] if cast(AutoTokens, tokens).ladder else [untrained_note(model)]
    return Scored(results, "\n\n".join(tables), notes, pictures)


def draw_conversations(answers: list[conversations.ScoredAnswer], path: Path) -> None:
    """The first ones, those with longer answers grey: these are hardly ever given word by word."""
    shown, overall = answers[: conversations.SHOWN], conversations.scores(answers)[OVERALL]
    shares = f"exact match {overall['exact_match']:.1%}, token F1 {overall['token_f1']:.1%}"
    title = f"{count_of(len(answers), 'answer')}: {shares}"
    judged = [answer.kind == conversations.SHORT for answer in shown]
    draw_sheet(shown, [answer.picture for answer in shown], path, title, judged=judged)


# Sources of conversations as LLaVA has them: what one trains is asked again from another
_CONVERSATIONS = ("llava", "array_record", "tfds")


def _guesser(run: Run, kind: str) -> Guesser | None:
    """Guesses as the sources of a kind answer that the run was trained on; None where it was trained on none."""
    alike = _CONVERSATIONS if kind in _CONVERSATIONS else (kind,)
    by_name = {name: keys for name, keys in run.config.data.train.items() if keys.kind in alike}

    def known() -> Iterator[tuple[str, str]]:
        for source in _open(run, "train", by_name).values() if by_name else ():
            for i in range(len(source)):
                with contextlib.suppress(BadRecord):  # training has counted it, and turns of another form
                    for turns in source[i].conversations:
                        pairs = filter(None, (first_question(turns[n : n + 2]) for n in range(len(turns))))
                        yield from ((text_of(q), answer) for q, answer in pairs if text_of(q) and answer.strip())

    return Guesser(known()) if by_name else None


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
        help="run the model with another compressor than it was trained with: 'none' reads a voco run's images "
        "uncompressed, 'voco' compresses with an uncompressed run (the lower bound)",
    )  # fmt: skip
    parser.add_argument(
        "--max-records", type=at_least_1, metavar="N", help="only the first N pictures or clips of each test source"
    )
    parser.add_argument(
        "--baselines", action="store_true",
        help="where rows carry a kind: also ask with nothing, of clips with their frames shuffled and with one frame; "
        "and guess as the training rows answer",
    )  # fmt: skip
    add_token_arguments(parser)
    question_files.add_arguments(parser)
    args = parser.parse_args()
    check_confidence(args)
    others = question_files.OPTIONS if args.questions is None else ("compressor", "max_records", "baselines")
    for name in others:
        if getattr(args, name) != parser.get_default(name):
            with_what = "expected --questions with it" if args.questions is None else "does not go with --questions"
            raise UserError(f"--{name.replace('_', '-')}: {with_what}")
    if args.questions is not None:
        question_files.run_command(args)
        return
    tokens = args.tokens
    if tokens == AUTO:
        tokens = AutoTokens() if args.confidence is None else AutoTokens(args.confidence)
    run = load_run(args.run, step=args.step, compressor=args.compressor, attention=args.attention)
    suffix = f".{args.compressor}" if args.compressor else ""
    suffix += f".step{run.step}" if args.step else ""
    suffix += f".first{args.max_records}" if args.max_records else ""
    suffix += f".tokens{args.tokens}" if args.tokens else ""
    kinds = {name: keys.kind for name, keys in sources_to_score(run.config.data).items()}
    several, one_easyvqa = len(kinds) > 1, [*kinds.values()].count("easyvqa") == 1
    for name, scored in score_sources(run, args.max_records, args.baselines, tokens):
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
