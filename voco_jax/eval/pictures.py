"""A sheet of pictures with question, answer and truth, for people to look at."""

from collections.abc import Callable, Sequence
from pathlib import Path
import textwrap
from typing import Any
import warnings

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from voco_jax.eval.scoring import Answer
from voco_jax.terminal import count_of, one_line

SHEET_COLUMNS, SHEET_ROWS = 4, 3
RIGHT, WRONG, UNJUDGED = "#1a7f37", "#cf222e", "#57606a"
WIDTH = 40  # letters of a line of text
_CELL, _SIDE, _LINE, _TITLE, _GAP = 3.1, 2.2, 0.18, 0.42, 0.22  # inches: of a column, a picture, a line, …


def draw_answers(answers: Sequence[Answer], load: Callable[[int], Any], path: Path) -> None:
    """Rows of randomly chosen answers, right ones green and wrong ones red; the last row is of mistakes, if any.

    `load` gives the picture that answer i is about, or None.
    """
    rng = np.random.default_rng(0)
    mistakes = [i for i, answer in enumerate(answers) if not answer.correct]
    shown_mistakes = rng.permutation(mistakes)[:SHEET_COLUMNS].astype(int)
    others = np.setdiff1d(np.arange(len(answers)), shown_mistakes)
    chosen = [*rng.permutation(others)[: SHEET_COLUMNS * SHEET_ROWS - len(shown_mistakes)], *shown_mistakes]
    shown = [answers[i] for i in chosen]
    title = f"{len(answers) - len(mistakes):,} of {count_of(len(answers), 'answer')} right"
    draw_sheet(shown, [load(i) for i in chosen], path, title)


def draw_sheet(
    answers: Sequence[Answer], pictures: Sequence, path: Path, title: str, judged: Sequence[bool] | None = None
) -> None:
    """Answers in their order, four in a row, each under its picture (None: there is none).

    Those that are not `judged` are grey, neither right nor wrong.
    """
    rows = -(-len(answers) // SHEET_COLUMNS)
    texts = [(_wrapped(answer.question, 3), _below(answer)) for answer in answers]
    by_row = [texts[r * SHEET_COLUMNS : (r + 1) * SHEET_COLUMNS] for r in range(rows)]
    # Lines above and below the pictures of a row: each has the room that its texts need
    lines = [[max((text[i].count("\n") + 1 for text in row), default=1) for i in (0, 1)] for row in by_row]
    height = _TITLE + sum((above + below) * _LINE + _SIDE + _GAP for above, below in lines)
    width = _CELL * SHEET_COLUMNS
    figure = plt.figure(figsize=(width, height))
    top = _TITLE
    for r, (above, below) in enumerate(lines):
        top += above * _LINE
        for column, i in enumerate(range(r * SHEET_COLUMNS, min((r + 1) * SHEET_COLUMNS, len(answers)))):
            left = (column + 0.5) * _CELL - _SIDE / 2
            axis = figure.add_axes((left / width, 1 - (top + _SIDE) / height, _SIDE / width, _SIDE / height))
            axis.axis("off")
            colour = UNJUDGED if judged is not None and not judged[i] else RIGHT if answers[i].correct else WRONG
            if pictures[i] is not None:
                axis.imshow(pictures[i], interpolation="nearest")
            for text, y, align, ink in (texts[i][0], 1.02, "bottom", "black"), (texts[i][1], -0.02, "top", colour):
                figure.text(
                    (column + 0.5) / SHEET_COLUMNS, 1 - (top + (1 - y) * _SIDE) / height, text, ha="center", va=align,
                    fontsize=10, color=ink, parse_math=False, linespacing=1.2,
                )  # fmt: skip
        top += _SIDE + below * _LINE + _GAP
    figure.suptitle(title, fontsize=12, y=1 - 0.1 / height, parse_math=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that the font has not are drawn as boxes
        figure.savefig(path, dpi=110)
    plt.close(figure)


def _below(answer: Answer) -> str:
    given, truth = (one_line(text) or "(nothing)" for text in (answer.given, answer.truth))
    line = f"answer: {given}    truth: {truth}"
    return line if len(line) <= WIDTH else f"{_wrapped(f'answer: {given}', 2)}\n{_wrapped(f'truth: {truth}', 2)}"


def _wrapped(text: str, lines: int) -> str:
    return "\n".join(textwrap.wrap(one_line(text), WIDTH, max_lines=lines, placeholder=" …"))
