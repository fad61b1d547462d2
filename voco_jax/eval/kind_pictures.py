"""What a question set shows of a model, for people to look at: accuracy by kind, and a strip of clips."""

from collections.abc import Mapping
import dataclasses
import itertools
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from voco_jax.data.records import Clip, Source
from voco_jax.data.video import format_time, read_frames
from voco_jax.eval.by_kind import THIS_RUN, Asked, SourceAnswers
from voco_jax.eval.pictures import RIGHT, WRONG
from voco_jax.eval.scoring import Answer, by_kind
from voco_jax.terminal import one_line

BARS = ("#2563eb", "#93c5fd", "#57606a", "#9ca3af", "#d0d7de", "#eac54f")  # this run, frames shuffled, one frame, …
CLIPS, FRAMES, QUESTIONS = 4, 8, 12  # of a strip, at most: clips, of each frames, evenly, and the first questions
WIDTH = 60  # letters of a question with its answer on half of a strip; longer ones have all of it
_FRAME, _LINE = 1.15, 0.2  # inches of a side, and of a line of text


def draw_kinds(counts: Mapping[str, Mapping[str, tuple[int, int]]], path: Path, title: str) -> None:
    """A group of bars for each kind of question, a bar for each column of the table: per cent right."""
    kinds = by_kind(next(iter(counts.values())))
    width = 0.84 / len(counts)
    figure, axis = plt.subplots(figsize=(max(6.0, 1 + len(kinds) * max(1.0, 0.3 + 0.2 * len(counts))), 3.6))
    for i, (column, of_kind) in enumerate(counts.items()):
        shares = [100 * of_kind[kind][0] / of_kind[kind][1] for kind in kinds]
        places = np.arange(len(kinds)) + (i - (len(counts) - 1) / 2) * width
        bars = axis.bar(places, shares, 0.92 * width, color=BARS[i % len(BARS)], label=column)
        axis.bar_label(bars, [f"{share:.0f}" for share in shares], padding=1, fontsize=7)
    number = next(iter(counts.values()))
    axis.set_xticks(range(len(kinds)), [f"{one_line(kind, 24)}\n{number[kind][1]:,}" for kind in kinds], fontsize=9)
    for label in axis.get_xticklabels():
        label.set_parse_math(False)
    axis.margins(x=0.02)
    axis.set_ylim(0, 108)
    axis.set_yticks(range(0, 101, 20))
    axis.set_ylabel("questions right, %")
    axis.set_title(title, fontsize=11, parse_math=False, pad=26 if len(counts) > 1 else 8)
    axis.spines[["top", "right"]].set_visible(False)
    if len(counts) > 1:
        axis.legend(
            loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(counts), frameon=False, fontsize=9,
            columnspacing=1.4, handlelength=1.2,
        )  # fmt: skip
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_strip(found: SourceAnswers, source: Source, path: Path, title: str) -> None:
    """Some clips, a row of frames each with their times, and below it the questions: right answers green, wrong ones
    red with the truth. BadRecord for a clip that can no longer be read."""
    rows = []
    for question, answers in choose_clips(found):
        all_times = found.times[question.about]
        count = min(len(all_times), FRAMES)
        times = [all_times[i * len(all_times) // count] for i in range(count)]
        video = source[question.record].video
        assert video is not None, question
        video = dataclasses.replace(video, incomplete=True) if isinstance(video, Clip) else video
        frames = read_frames(video, times)  # as they were asked about
        tall = _FRAME * min(1.0, frames[0].height / frames[0].width)
        answers = answers[:QUESTIONS]
        columns = 1 if any(len(_told(a)) + len(a.question) > WIDTH for a in answers) else 2
        lines = -(-len(answers) // columns)
        rows.append((times, frames, tall, answers, columns, lines))
    width = _FRAME * FRAMES + 0.3
    height = 0.45 + sum(tall + _LINE * (lines + 2.2) for _, _, tall, _, _, lines in rows)
    figure = plt.figure(figsize=(width, height))
    figure.suptitle(title, fontsize=11, y=1 - 0.12 / height, va="top", parse_math=False)
    top = height - 0.45
    for times, frames, tall, answers, columns, lines in rows:
        top -= _LINE + tall
        for i, (time, frame) in enumerate(zip(times, frames, strict=True)):
            left = 0.15 + _FRAME * i
            axis = figure.add_axes((left / width, top / height, 0.96 * _FRAME / width, 0.96 * tall / height))
            axis.axis("off")
            axis.imshow(frame, interpolation="nearest")
            axis.set_title(format_time(time), fontsize=8, pad=3)
        for i, answer in enumerate(answers):
            column, line = divmod(i, lines)
            x, y = 0.15 + column * (width - 0.3) / columns, top - _LINE * (line + 0.75)
            _write(figure, x / width, y / height, answer, 2 * WIDTH // columns)
        top -= _LINE * (lines + 1.2)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def choose_clips(found: SourceAnswers) -> list[tuple[Asked, list[Answer]]]:
    """Up to four, each with its first question: the first one, then those whose questions have a kind that none before
    had, then others."""
    rows = zip(found.asked, found.answers[THIS_RUN], strict=True)
    grouped = [list(of_clip) for about, of_clip in itertools.groupby(rows, lambda row: row[0].about)]
    clips = [of_clip for of_clip in grouped if of_clip[0][0].about in found.times]
    known: set[str] = set()
    new: list[int] = []
    others: list[int] = []
    for i, of_clip in enumerate(clips):
        kinds = {question.kind for question, _ in of_clip}
        (others if kinds <= known else new).append(i)
        known |= kinds
    chosen = sorted((new + others)[:CLIPS])
    return [(clips[i][0][0], [answer for _, answer in clips[i]]) for i in chosen]


def _write(figure, x: float, y: float, answer: Answer, width: int) -> None:
    """A question of so many letters with its answer, which is beside it, in its colour."""
    given = _told(answer)
    question = figure.text(x, y, one_line(answer.question, width - len(given)), fontsize=9, parse_math=False)
    figure.axes[0].annotate(
        given, xy=(1, 0), xycoords=question, xytext=(6, 0), textcoords="offset points", va="bottom", fontsize=9,
        color=RIGHT if answer.correct else WRONG, fontweight="bold", parse_math=False, annotation_clip=False,
    )  # fmt: skip


def _told(answer: Answer) -> str:
    given = one_line(answer.given, WIDTH // 2) or "(nothing)"
    return given if answer.correct else f"{given}   truth: {one_line(answer.truth, WIDTH // 2)}"
