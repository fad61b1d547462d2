"""`python -m voco_jax.evaluate --run runs/easyvqa`: every test question, a table, and a sheet of answers to look at.

With --questions FILE.jsonl --images DIR --answers OUT.jsonl: the answers to LLaVA's question files, as its own scripts
write them. Started again, it goes on where it stopped.
"""

import argparse
import json

from voco_jax.data.records import Record
from voco_jax.data.sources import easyvqa
from voco_jax.errors import UserError, one_line_errors
from voco_jax.eval import question_files
from voco_jax.eval.answering import answer_all, question_of
from voco_jax.eval.pictures import draw_answers
from voco_jax.eval.scoring import accuracy_by_kind, table
from voco_jax.infer.arguments import add_model_arguments
from voco_jax.models.voco import COMPRESSORS
from voco_jax.run import Run, load_run
from voco_jax.storage import files_for


def evaluate(run: Run, max_records: int | None = None) -> dict:
    """Score a run on its test set; returns what `results.json` says, with the answers under 'answers'."""
    answers = answer_all(run, _easyvqa(run, "test")[:max_records])
    guesser = easyvqa.Guesser(
        [(question_of(turns), turns[1]["value"]) for record in _easyvqa(run, "train") for turns in record.conversations]
    )
    columns = {
        "this run": accuracy_by_kind(answers, easyvqa.question_kind),
        "guess from the question": accuracy_by_kind(
            answers, easyvqa.question_kind, (guesser(a.question) for a in answers)
        ),
        "most frequent answer": accuracy_by_kind(answers, easyvqa.question_kind, (guesser.majority for _ in answers)),
    }
    right, total = columns["this run"]["overall"]
    return {
        "step": run.step,
        "compressor": run.config.model.compressor,
        "accuracy": right / total,
        "counts": columns,
        "answers": answers,
    }


def _easyvqa(run: Run, key: str) -> list[Record]:
    found = list(run.config.data[key].values())
    if [source.kind for source in found] != ["easyvqa"]:
        kinds = ", ".join(source.kind for source in found) or "none"
        raise UserError(f"{run.directory}: config.data.{key}: only easyvqa can be scored; found {kinds}")
    return easyvqa.load(found[0].split)


@one_line_errors
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m voco_jax.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--compressor",
        choices=COMPRESSORS,
        help="run the model as another kind than it was trained as ('voco': lower bound)",
    )
    parser.add_argument("--max-records", type=int, help="only the first so many pictures of the test split")
    question_files.add_arguments(parser)
    args = parser.parse_args()
    others = question_files.OPTIONS if args.questions is None else ("compressor", "max_records")
    for name in others:
        if getattr(args, name) != parser.get_default(name):
            with_what = "expected --questions with it" if args.questions is None else "does not go with --questions"
            raise UserError(f"--{name.replace('_', '-')}: {with_what}")
    if args.questions is not None:
        question_files.run_command(args)
        return
    if args.max_records is not None and args.max_records < 1:
        raise UserError(f"--max-records: expected at least 1, found {args.max_records}")
    run = load_run(args.run, step=args.step, compressor=args.compressor, attention=args.attention)
    results = evaluate(run, args.max_records)
    answers = results.pop("answers")
    suffix = f".{args.compressor}" if args.compressor else ""
    suffix += f".step{run.step}" if args.step else ""
    suffix += f".first{args.max_records}" if args.max_records else ""
    print(table(results["counts"]))  # first, whatever becomes of the files
    with files_for(args.run) as directory:
        temporary = directory / f"results{suffix}.json.new"
        temporary.write_text(json.dumps(results, indent=2) + "\n")
        temporary.rename(directory / f"results{suffix}.json")
        draw_answers(answers, directory / f"answers{suffix}.png")
    print(f"written: {args.run}/results{suffix}.json, {args.run}/answers{suffix}.png")


if __name__ == "__main__":
    main()
