"""A sheet of pictures with question, answer and truth, for people to look at."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from voco_jax.data.images import load_image
from voco_jax.eval.scoring import Answer

COLUMNS, ROWS = 4, 3
RIGHT, WRONG = "#1a7f37", "#cf222e"


def draw_answers(answers: Sequence[Answer], path: Path, *, seed: int = 0) -> None:
    """Rows of randomly chosen answers, right ones green and wrong ones red; the last row is of mistakes, if any."""
    rng = np.random.default_rng(seed)
    mistakes = [i for i, answer in enumerate(answers) if not answer.correct]
    shown_mistakes = rng.permutation(mistakes)[:COLUMNS].astype(int)
    others = np.setdiff1d(np.arange(len(answers)), shown_mistakes)
    chosen = [*rng.permutation(others)[: COLUMNS * ROWS - len(shown_mistakes)], *shown_mistakes]

    figure, axes = plt.subplots(ROWS, COLUMNS, figsize=(3.1 * COLUMNS, 3.5 * ROWS), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, i in zip(axes.flat, chosen, strict=False):
        answer = answers[i]
        given = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in answer.given) or "(nothing)"
        axis.imshow(load_image(answer.image), interpolation="nearest")
        axis.set_title(answer.question, fontsize=10)
        axis.text(
            0.5, -0.03, f"answer: {given}    truth: {answer.truth}",
            transform=axis.transAxes, ha="center", va="top", fontsize=10, color=RIGHT if answer.correct else WRONG,
        )  # fmt: skip
    figure.suptitle(f"{len(answers) - len(mistakes):,} of {len(answers):,} answers right", fontsize=12)
    figure.tight_layout(h_pad=2.5)
    figure.savefig(path, dpi=110)
    plt.close(figure)
