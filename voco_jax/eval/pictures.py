"""A sheet of pictures with question, answer and truth, for people to look at."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from voco_jax.data.images import load_image
from voco_jax.eval.scoring import Answer


def draw_answers(answers: Sequence[Answer], path: Path, *, columns: int = 4, rows: int = 3, seed: int = 0) -> None:
    """A random sheet of the answers: right ones green, wrong ones red with the truth beside them."""
    chosen = np.random.default_rng(seed).choice(len(answers), size=min(columns * rows, len(answers)), replace=False)
    figure, axes = plt.subplots(rows, columns, figsize=(3.1 * columns, 3.3 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, i in zip(axes.flat, chosen, strict=False):
        answer = answers[i]
        axis.imshow(load_image(answer.image), interpolation="nearest")
        axis.set_title(answer.question, fontsize=9)
        verdict = answer.given if answer.correct else f"{answer.given or '(nothing)'}  (truth: {answer.truth})"
        colour = "#1a7f37" if answer.correct else "#cf222e"
        axis.text(0.5, -0.04, verdict, transform=axis.transAxes, ha="center", va="top", fontsize=12, color=colour)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
