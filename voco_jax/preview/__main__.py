"""voco preview --config=FILE --out=preview.html [--config.KEY=VALUE …]

Shows a training batch as a web page, to look at before a pod spends hours on it.

The page has the pictures of each pack under their numbers, the text of its rows, which tokens are trained on, where one
packed conversation ends and the next begins, and how much is padding. All of it comes from the batch's arrays, as the
model gets them. No model is made. The page is one file and loads nothing.
"""

import argparse
from collections.abc import Mapping
import json
from pathlib import Path
import sys

import numpy as np

from voco_jax.checkpoint.init_from import begin_with_run, inherited_prompt
from voco_jax.command_line import parse_arguments
from voco_jax.data.packing import PADDING_SEGMENT
from voco_jax.data.reports import Report
from voco_jax.data.training_data import TrainingData, open_training_data
from voco_jax.errors import UserError, one_line_errors
from voco_jax.options import at_least_1, check_out
from voco_jax.preview.page import render
from voco_jax.preview.text import count_conversations, make_decoder, pack_arrays, used_images
from voco_jax.terminal import count_of


def describe(batch: Mapping[str, np.ndarray], data: TrainingData, report: Report) -> list[str]:
    """Lines that tell what is in a batch, and how much of its budgets is used."""
    tokens, used = batch["tokens"], batch["segment_ids"] != PADDING_SEGMENT
    packs, slots = batch["pixel_values"].shape[:2]
    slot_index = [pack_arrays(batch, i)["slot_index"] for i in range(packs)]
    images = sum(len(used_images(of_pack, data.model_config.num_visual_tokens)) for of_pack in slot_index)
    trained_on = (batch["weights"] > 0).sum() / max(1, used.sum())
    here, epoch = f"{used.mean():.1%} of {tokens.size:,} tokens", data.batches.loader.plan.use()
    there = f"{epoch.tokens:.1%} of the tokens"
    if slots:
        here += f" and {images:,} of {packs * slots:,} image slots"
        there += f" and {epoch.images:.1%} of the slots"
    conversations = count_of(count_conversations(batch["segment_ids"]), "conversation")
    lines = [
        f"{count_of(packs, 'pack')} × {count_of(len(tokens) // packs, 'row')} × {tokens.shape[1]:,} tokens; "
        f"{conversations}; longest in the data: {data.longest:,} tokens",
        f"used: {here}; in a whole epoch {there}",
        f"trained on: {trained_on:.1%} of the used tokens, weighted by {data.batches.loader.weighting}",
    ]
    return lines + ([line.strip() for line in report.lines("conversation")] if report.skipped or report.warned else [])


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", default="preview.html", metavar="FILE", help="the page to write (default preview.html)"
    )
    parser.add_argument(
        "--batch", type=int, default=0, metavar="N", help="which batch (default 0: that of the first step)"
    )
    parser.add_argument(
        "--packs", type=at_least_1, default=4, metavar="N", help="how many of its packs at most (default 4)"
    )
    parser.add_argument(  # its old name
        "--bins", dest="packs", type=at_least_1, default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )


@one_line_errors
def main() -> None:
    config, args = parse_arguments(sys.argv, _add_arguments, __doc__)
    out, number = Path(args.out), args.batch
    if not 0 <= number < config.train.steps:
        raise UserError(f"--batch: expected 0 to {config.train.steps - 1} (config.train.steps), found {number}")
    check_out(out, ".html")
    asked, config = config, begin_with_run(config)
    if note := inherited_prompt(asked, config):
        print(note)
    data = open_training_data(config)
    batch, report = data.batches.dataset()[number], Report()
    for said in batch.pop("report"):
        report.merge(Report.from_dict(json.loads(said)))
    header = [f"{args.config}, batch {number}: step {number + 1} of {config.train.steps}"]
    header += [" ".join(f"--config.{key}={value}" for key, value in args.changes.items())] if args.changes else []
    header += describe(batch, data, report)
    decode = make_decoder(data.tokenizer)
    page = render(batch, data.model_config.num_visual_tokens, decode, header, args.packs)
    out.write_text(page, encoding="utf-8")
    total = len(batch["pixel_values"])
    for line in report.lines("conversation") if report.skipped or report.warned else ():
        print(f"batch {number}: {line.strip()}")
    print(f"written: {out} ({min(args.packs, total)} of {count_of(total, 'pack')} of batch {number})")


if __name__ == "__main__":
    main()
