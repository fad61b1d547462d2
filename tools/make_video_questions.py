#!/usr/bin/env python
"""A video question set about time: mp4 clips of easy-VQA's shapes, and questions that need the order of what is shown.

    python tools/make_video_questions.py data/shape_clips

Writes OUT/train.json and OUT/test.json (video, question, answer, kind: `--config.data.train.NAME.kind=video_qa` reads
them) and the clips beside them. A clip lasts 8 seconds and shows one thing a second. Shapes are cut out of easy-VQA's
pictures: those of its train split in training clips, those of its test split in test clips. There are four stories:

    parade    four shapes, one after the other      order, at second
    counting  one shape for 4 of the 8 seconds,     count, at second
              in 1 to 4 goes
    motion    one shape moves                       direction
    change    two shapes by turns, of which         becomes, what changes
              one has another colour from some
              second on

and about each "is there a red circle?" (ever shown). The kinds ever shown and what changes can be answered from the
frames in any order, to compare; the others (TEMPORAL) cannot: for every clip there is another of the same frames with
another answer, and every answer to a question is as likely as the others.
"""

import argparse
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
import json
import multiprocessing
import os
from pathlib import Path
import shutil
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from voco_jax.data.sources import easyvqa
from voco_jax.errors import UserError, one_line_errors

TEMPORAL = ("order", "at second", "count", "direction", "becomes")
SECONDS, RATE, SIZE = 8, 5, 64  # of a clip; its frames a second; pixels of a side
SHAPES = ("circle", "rectangle", "triangle")
COLORS = {
    (0, 0, 0): "black", (0, 0, 255): "blue", (165, 42, 42): "brown", (128, 128, 128): "gray", (0, 255, 0): "green",
    (255, 0, 0): "red", (0, 128, 128): "teal", (255, 255, 0): "yellow",
}  # fmt: skip
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
LEAST_WAY = 24  # pixels that a moving shape goes at least


class Shape(NamedTuple):
    """One of easy-VQA's pictures, cut out: `pixels` uint8 [height, width, 3] hold the shape, and were `at` a place."""

    shape: str
    color: str
    background: tuple[int, int, int]
    pixels: np.ndarray
    at: tuple[int, int]  # left, top

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    def picture(self, at: tuple[int, int] | None = None, background: tuple[int, int, int] | None = None) -> np.ndarray:
        """The shape at another place, [SIZE, SIZE, 3]."""
        (left, top), (height, width, _) = at or self.at, self.pixels.shape
        picture = np.full((SIZE, SIZE, 3), background or self.background, np.uint8)
        picture[top : top + height, left : left + width] = self.pixels
        return picture


class Story(NamedTuple):
    """What is shown in each second, and (question, answer, kind) about it."""

    frames: list[np.ndarray]
    questions: list[tuple[str, str, str]]


def load_shapes(split: str) -> list[Shape]:
    """All pictures of a split whose questions tell their shape."""
    found = []
    for record in easyvqa.load(split):
        answers = {turns[1]["value"] for turns in record.conversations}
        shape = answers.intersection(SHAPES)
        if not shape:
            continue
        image = Image.open(record.images[0].file).convert("RGB")
        picture = np.asarray(image)
        (_, background), (_, color) = sorted(image.getcolors(SIZE * SIZE), reverse=True)[:2]
        if color not in COLORS:  # so small that its edges are more than itself
            continue
        rows, columns = (np.flatnonzero((picture != background).any(axis=(2, axis))) for axis in (1, 0))
        top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
        pixels = picture[top:bottom, left:right]
        found.append(Shape(shape.pop(), COLORS[color], background, pixels, (int(left), int(top))))
    return found


# ---- Stories ---------------------------------------------------------------------------------------------------


def parade(rng: np.random.Generator, shapes: Sequence[Shape]) -> Story:
    """Four shapes of different colours; for 1, 2, 2 and 3 seconds in any order, so that no length tells a place."""
    chosen = distinct_colors(rng, shapes, 4)
    order = [shape for shape, length in zip(chosen, rng.permutation([1, 2, 2, 3]), strict=True) for _ in range(length)]
    questions = []
    for word in ("first", "last"):
        first, second = sorted(rng.choice(4, 2, replace=False))
        answer = chosen[first if word == "first" else second].color
        a, b = rng.permutation([chosen[first].color, chosen[second].color])
        questions.append((f"what color is {word}, {a} or {b}?", answer, "order"))
    return Story([s.picture() for s in order], questions + at_second(rng, order, 3) + ever_shown(rng, order, shapes))


def counting(rng: np.random.Generator, shapes: Sequence[Shape]) -> Story:
    """One shape for four seconds, in 1 to 4 goes; between them three others, which come once or twice."""
    chosen, *others = distinct_colors(rng, shapes, 4)
    goes = int(rng.integers(1, 5))
    order = [others[i] for i in rng.permutation([0, 1, 2, rng.integers(3)])]
    gaps = rng.choice(5, goes, replace=False)  # before which of the others, or after the last
    lengths = np.diff([0, *sorted(rng.choice(np.arange(1, 4), goes - 1, replace=False)), 4])
    for gap, length in sorted(zip(gaps, lengths, strict=True), reverse=True):
        order[gap:gap] = [chosen] * length
    questions = [(f"how many times does {chosen.color} appear?", str(goes), "count")] * 2
    questions[1] = (f"how many times does the {chosen.shape} appear?", str(goes), "count")
    if any(other.shape == chosen.shape for other in others):
        questions.pop()
    return Story([s.picture() for s in order], questions + at_second(rng, order, 3) + ever_shown(rng, order, shapes))


def motion(rng: np.random.Generator, shapes: Sequence[Shape]) -> Story:
    """One shape goes from side to side, or up or down."""
    small = [shape for shape in shapes if max(shape.pixels.shape[:2]) <= SIZE - LEAST_WAY]
    shape = small[rng.integers(len(small))]
    word = str(rng.choice(list(DIRECTIONS)))
    free = np.array([SIZE - shape.pixels.shape[1], SIZE - shape.pixels.shape[0]])  # of left, and of top
    axis, sign = (0, DIRECTIONS[word][0]) if DIRECTIONS[word][0] else (1, DIRECTIONS[word][1])
    start = rng.integers(0, free[axis] - LEAST_WAY + 1)
    end = rng.integers(start + LEAST_WAY, free[axis] + 1)
    places = np.tile(rng.integers(0, free + 1), (SECONDS, 1))
    places[:, axis] = np.linspace(start, end, SECONDS).round()[::sign]
    frames = [shape.picture(tuple(map(int, place))) for place in places]
    questions = [
        ("which way does the shape move?", word, "direction"),
        (f"which way does the {shape.shape} move?", word, "direction"),
        ("what shape is in the video?", shape.shape, "ever shown"),
    ]
    return Story(frames, questions + ever_shown(rng, [shape] * SECONDS, shapes))


def change(rng: np.random.Generator, shapes: Sequence[Shape]) -> Story:
    """Two shapes by turns, one of which has another colour from some second on."""
    before, after, other = distinct_colors(rng, shapes, 3)
    same = [s for s in shapes if s.shape == before.shape and s.color == after.color]
    after = same[rng.integers(len(same))]
    others = [s for s in shapes if s.shape != before.shape and s.color == other.color]
    other = others[rng.integers(len(others))]
    turns = rng.permutation([True] * 4 + [False] * 4)  # seconds in which the changing one is shown
    changes = int(rng.choice(np.flatnonzero(turns)[1:]))
    order = [(before if i < changes else after) if turn else other for i, turn in enumerate(turns)]
    questions = [
        (f"what color is the {before.shape} at the start?", before.color, "becomes"),
        (f"what color is the {before.shape} at the end?", after.color, "becomes"),
        ("what shape changes color?", before.shape, "what changes"),
    ]
    return Story([s.picture() for s in order], questions + ever_shown(rng, order, shapes))


STORIES = (parade, counting, motion, change)


def distinct_colors(rng: np.random.Generator, shapes: Sequence[Shape], count: int) -> list[Shape]:
    chosen = []
    for color in rng.choice(list(COLORS.values()), count, replace=False):
        same = [shape for shape in shapes if shape.color == color]
        chosen.append(same[rng.integers(len(same))])
    return chosen


def at_second(rng: np.random.Generator, order: Sequence[Shape], count: int) -> list[tuple[str, str, str]]:
    """Questions about different seconds, of colour and of shape."""
    asked = []
    for second in rng.choice(SECONDS, count, replace=False):
        what = ("color", "shape")[rng.integers(2)]
        asked.append((f"what {what} is at second {second}?", getattr(order[second], what), "at second"))
    return asked


def ever_shown(rng: np.random.Generator, order: Sequence[Shape], shapes: Sequence[Shape]) -> list[tuple[str, str, str]]:
    """A question with yes and one with no; for no, where it can be, a colour and a shape that are there apart."""
    there = {(s.color, s.shape) for s in order}
    every = sorted({(s.color, s.shape) for s in shapes})
    near = [x for x in every if x[0] in {c for c, _ in there} and x[1] in {s for _, s in there}]
    missing = [x for x in near if x not in there] or [x for x in every if x not in there]
    yes, no = (sorted(some)[rng.integers(len(some))] for some in (there, missing))
    return [(f"is there a {' '.join(one)}?", answer, "ever shown") for one, answer in ((yes, "yes"), (no, "no"))]


# ---- Files -----------------------------------------------------------------------------------------------------


def write_clip(file: Path, frames: Sequence[np.ndarray]) -> None:
    """An mp4 (H.264) in which each frame lasts a second."""
    import av

    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"crf": "16"})
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv420p"
        stream.codec_context.time_base = Fraction(1, RATE)
        stream.codec_context.thread_count = 1
        for i in range(SECONDS * RATE):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frames[i // RATE])))
        container.mux(stream.encode())


def make_part(root: Path, split: str, clips: range, seed: int) -> list[dict]:
    """Write some of a split's clips; returns their questions. What a clip shows follows from its number alone."""
    shapes = load_shapes(split)
    rows = []
    for i in clips:
        rng = np.random.default_rng([seed, easyvqa.SPLITS.index(split), i])
        story = STORIES[i % len(STORIES)](rng, shapes)
        name = f"{split}_{i:05d}.mp4"
        write_clip(root / "clips" / name, story.frames)
        rows += [dict(video=name, question=q, answer=str(a), kind=kind) for q, a, kind in story.questions]
    return rows


@one_line_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="directory to make")
    parser.add_argument("--train", type=int, default=4000, metavar="N", help="training clips (default 4000)")
    parser.add_argument("--test", type=int, default=400, metavar="N", help="test clips (default 400)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N", help="processes (default: CPUs)")
    args = parser.parse_args()
    for name in ("train", "test", "workers"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name}: expected at least 1, found {getattr(args, name)}")
    if args.out.exists():
        raise UserError(f"{args.out}: expected a directory that is not there yet")
    temporary = args.out.with_name(f".{args.out.name}.new")  # a directory that is there is whole
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "clips").mkdir(parents=True)
    make(temporary, {"train": args.train, "test": args.test}, args.seed, args.workers)
    temporary.rename(args.out)
    print(f"written: {args.out}: {args.train} training clips, {args.test} test clips")


def make(root: Path, counts: dict[str, int], seed: int, workers: int, part: int = 50) -> None:
    parts = [
        (split, range(start, min(start + part, count)))
        for split, count in counts.items()
        for start in range(0, count, part)
    ]
    rows: dict[str, list] = {split: [] for split in counts}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool, tqdm(total=sum(counts.values()), unit="clip") as bar:
        made = [(split, clips, pool.submit(make_part, root, split, clips, seed)) for split, clips in parts]
        for split, clips, part_rows in made:
            rows[split] += part_rows.result()
            bar.update(len(clips))
    for split, questions in rows.items():
        (root / f"{split}.json").write_text(json.dumps(questions, indent=0) + "\n")


if __name__ == "__main__":
    main()
