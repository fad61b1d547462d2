"""`python -m voco_jax.ask --run DIR --image FILE "question"`: look at pictures once, answer one or more questions."""

import argparse
from pathlib import Path

from voco_jax.data.images import load_image
from voco_jax.data.pipeline import stack_images
from voco_jax.errors import UserError, one_line_errors
from voco_jax.infer.answerer import Answerer
from voco_jax.run import add_run_arguments, load_run


@one_line_errors
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m voco_jax.ask", description=__doc__)
    add_run_arguments(parser)
    parser.add_argument("--image", type=Path, action="append", default=[], help="a picture; again for more than one")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest answer, in tokens (default 64)")
    parser.add_argument("question", nargs="+", help="each question is asked on its own")
    args = parser.parse_args()
    if any(not question.strip() for question in args.question):
        raise UserError("question: expected text, found none")
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens: expected at least 1, found {args.max_new_tokens}")
    images = [load_image(image) for image in args.image]  # first: what is wrong with one shows itself at once

    run = load_run(args.run, step=args.step, attention=args.attention)
    if len(images) > run.config.data.images_per_bin:
        raise UserError(
            f"--image: {args.run} was trained with at most {run.config.data.images_per_bin} pictures at a time, "
            f"found {len(images)}"
        )
    answerer = Answerer(run.model, run.encoder)
    visual = answerer.see(stack_images(images, len(images), run.processor)[None]) if images else None
    rows = [0] * len(args.question)
    for question, answer in zip(
        args.question, answerer.answer(args.question, visual, rows, args.max_new_tokens), strict=True
    ):
        print(f"{question}\n  {answer}")


if __name__ == "__main__":
    main()
