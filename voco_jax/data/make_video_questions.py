#!/usr/bin/env python
"""A video question set about time: mp4 clips of easy-VQA's shapes, and questions that need the order of what is shown.

    voco make-video-questions data/shape_clips

A clip lasts 8 seconds and shows one thing a second, or nothing. Shapes are cut out of easy-VQA's pictures: those of its
train split in training clips, those of its test split in test clips. Written are

    OUT/clips          the clips of both
    OUT/train.json     questions about them, one a row: video, question, answer, kind (`video_qa` is such a source's
    OUT/test.json      kind)
    OUT/pictures       conversations about what is where in single pictures (`llava`), for the model that the video
    OUT/pictures.json  stage begins with: easy-VQA never asks where a shape is
    OUT/tokenizer      of the words of all of these and of easy-VQA

There are four stories:

    parade    four shapes, one after the other      order, at second
    blinking  one shape, there for 4 of the 8       count, at second
              seconds, in 1 to 4 goes
    motion    one shape moves                       direction, at second
    change    two shapes by turns, of which         becomes, what changes, at second
              one has another colour from some
              second on

and about each "is there a red circle?" (ever shown). The kinds ever shown and what changes can be answered from the
frames in any order, to compare; the others (TEMPORAL) cannot: for nearly every question there is another clip of the
same frames with another answer (a moving shape may be on one side at a second whichever way it goes). Whatever is asked
of a second has another answer at another second of the same clip. Every answer to a question of order, count and
direction is as likely as the others; so is, at each second, either side, and nearly so whether there is a shape. Of
colours and shapes at a second none is more than about three times as likely as another.
Training asks more than is tested (`lesson`): what is shown in each second, what comes one after the other, how many
times the shape has appeared by some second.
"""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
import functools
import json
import multiprocessing
import os
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from PIL import Image
from tqdm import tqdm

from voco_jax.chat_templates import CHAT_TEMPLATES
from voco_jax.data.images import load_image
from voco_jax.data.sources import easyvqa
from voco_jax.data.sources.llava import question_turns
from voco_jax.data.tokenizer import save_tokenizer, train_tokenizer
from voco_jax.data.video import format_time
from voco_jax.errors import one_line_errors
from voco_jax.io.atomic import new_directory
from voco_jax.options import Parser, at_least_1

TEMPORAL = ("order", "at second", "count", "direction", "becomes")
SECONDS, RATE, SIZE = 8, 5, 64  # of a clip; its frames a second; pixels of a side
SHAPES = ("circle", "rectangle", "triangle")
COLORS = {
    (0, 0, 0): "black", (0, 0, 255): "blue", (165, 42, 42): "brown", (128, 128, 128): "gray", (0, 255, 0): "green",
    (255, 0, 0): "red", (0, 128, 128): "teal", (255, 255, 0): "yellow",
}  # fmt: skip
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
LEAST_WAY = 28  # pixels that a moving shape goes at least
CLEAR = 4  # pixels from the picture's middle from which on a shape is on a side
SIDES = (("left", "right"), ("top", "bottom"))
LESSON = "lesson"  # the kind of what is not tested
ON_SIDES = {"side 0": "is it left or right", "side 1": "is it top or bottom"}  # by axis
WHATS = {"color": "what color is", "shape": "what shape is"} | ON_SIDES  # what is asked of a second
SHOWN = 4  # seconds that a blinking shape is there
PART = 50  # clips that a worker process makes in one go


class Shape(NamedTuple):
    """One of easy-VQA's pictures, cut out: `pixels` uint8 [height, width, 3] hold the shape, and were `at` a place."""

    shape: str
    color: str
    background: tuple[int, int, int]
    pixels: np.ndarray
    at: tuple[int, int]  # left, top

    def gone(self) -> "Shape":
        """Its background alone."""
        return self._replace(shape="", color="", pixels=self.pixels[:0])

    def picture(self) -> np.ndarray:
        """[SIZE, SIZE, 3]."""
        (left, top), (height, width, _) = self.at, self.pixels.shape
        picture = np.full((SIZE, SIZE, 3), self.background, np.uint8)
        picture[top : top + height, left : left + width] = self.pixels
        return picture

    def middle(self, axis: int) -> float:
        """Pixels from the picture's middle to its own, to the right (axis 0) or downwards (1)."""
        return self.at[axis] + self.pixels.shape[1 - axis] / 2 - SIZE / 2

    def tell(self, what: str) -> str:
        """One of `WHATS`: its colour, its shape, or the side of the picture on which its middle is."""
        return SIDES[int(what[-1])][self.middle(int(what[-1])) > 0] if what in ON_SIDES else getattr(self, what)

    def is_sure(self, what: str) -> bool:
        """False for the side of a shape in the middle."""
        return what not in ON_SIDES or abs(self.middle(int(what[-1]))) >= CLEAR


class Story(NamedTuple):
    """What is shown in each second, and (question, answer, kind) about it; `lessons` are asked in training alone."""

    order: list[Shape]
    questions: list[tuple[str, str, str]]
    lessons: list[tuple[str, str, str]]

    @property
    def frames(self) -> list[np.ndarray]:
        return [shape.picture() for shape in self.order]


@functools.cache  # workers make many parts
def load_shapes(split: str) -> list[Shape]:
    """All pictures of a split whose questions tell their shape."""
    found = []
    for record in easyvqa.load(split):
        answers = {turns[1]["value"] for turns in record.conversations}
        shape = answers.intersection(SHAPES)
        if not shape:
            continue
        image = load_image(record.images[0], transparency="drop")
        picture = np.asarray(image)
        counted = cast("list[tuple[int, tuple[int, int, int]]]", image.getcolors(image.width * image.height))  # of RGB
        (_, background), (_, color) = sorted(counted, reverse=True)[:2]
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
    chosen = []
    for color in rng.choice(list(COLORS.values()), 4, replace=False):
        same = [shape for shape in shapes if shape.color == color]
        chosen.append(same[rng.integers(len(same))])
    order = [shape for shape, length in zip(chosen, rng.permutation([1, 2, 2, 3]), strict=True) for _ in range(length)]
    questions = []
    for word in ("first", "last", "first", "last"):
        first, second = sorted(rng.choice(4, 2, replace=False))
        answer = chosen[first if word == "first" else second].color
        a, b = rng.permutation([chosen[first].color, chosen[second].color])
        questions.append((f"what color is {word}, {a} or {b}?", answer, "order"))
    questions += at_second(rng, order, 2) + ever_shown(rng, order, shapes)
    return Story(order, questions, [in_each_second(order, "shape"), one_after_the_other(order)])


def blinking(rng: np.random.Generator, shapes: Sequence[Shape]) -> Story:
    """One shape that comes and goes."""
    shape = shapes[int(rng.integers(len(shapes)))]
    goes = int(rng.integers(1, SHOWN + 1))
    there, begun = np.zeros(SECONDS, bool), np.zeros(SECONDS, int)
    while begun[-1] != goes:  # all ways to be there in so many goes are as likely: nearly so is every second
        there = rng.permutation(np.arange(SECONDS) < SHOWN)
        begun = np.cumsum(np.diff(there, prepend=False) & there)
    order = [shape if yes else shape.gone() for yes in there]
    names = ("the shape", f"the {shape.shape}", shape.color)
    questions = [(f"how many times does {name} appear?", str(goes), "count") for name in names]
    questions += [
        (f"is there a shape at second {rng.choice(np.flatnonzero(there == yes))}?", answer, "at second")
        for yes, answer in ((True, "yes"), (False, "no"))
    ]
    questions += ever_shown(rng, [shape], shapes)
    in_each = " ".join("yes" if yes else "no" for yes in there)
    lessons = [("is there a shape in each second?", in_each, LESSON)] + [
        (f"how many times does the shape appear until second {second}?", str(begun[second]), LESSON)
        for second in rng.choice(SECONDS, 2, replace=False)
    ]
    return Story(order, questions, lessons)


def motion(rng: np.random.Generator, shapes: Sequence[Shape]) -> Story:
    """One shape goes from one side to the other, or up or down."""
    small = [shape for shape in shapes if max(shape.pixels.shape[:2]) <= SIZE - LEAST_WAY]
    shape = small[rng.integers(len(small))]
    word = str(rng.choice(list(DIRECTIONS)))
    free = np.array([SIZE - shape.pixels.shape[1], SIZE - shape.pixels.shape[0]])  # of left, and of top
    axis, sign = (0, DIRECTIONS[word][0]) if DIRECTIONS[word][0] else (1, DIRECTIONS[word][1])
    most, middle = int(free[axis]), free[axis] / 2
    # From one side to the other, so that each second may show either; a way is as likely as its mirror image
    ways = [
        (start, end)
        for start in range(int(middle - CLEAR) + 1)
        for end in range(max(start + LEAST_WAY, int(np.ceil(middle + CLEAR))), most + 1)
    ]
    start, end = ways[rng.integers(len(ways))]
    places = np.tile(rng.integers(0, free + 1), (SECONDS, 1))
    places[:, axis] = np.linspace(start, end, SECONDS).round()[::sign]
    order = [shape._replace(at=(int(left), int(top))) for left, top in places]
    questions = [
        ("which way does the shape move?", word, "direction"),
        (f"which way does the {shape.shape} move?", word, "direction"),
    ]
    questions += at_second(rng, order, 4, [f"side {axis}"]) + ever_shown(rng, order, shapes)
    return Story(order, questions, [in_each_second(order, "side 0"), in_each_second(order, "side 1")])


def change(rng: np.random.Generator, shapes: Sequence[Shape]) -> Story:
    """Two shapes by turns, one of which has another colour from some second on."""
    before = shapes[int(rng.integers(len(shapes)))]
    others = [s for s in shapes if s.shape != before.shape and s.color != before.color]
    other = others[rng.integers(len(others))]
    same = [s for s in shapes if s.shape == before.shape and s.color not in (before.color, other.color)]
    after = same[rng.integers(len(same))]
    turns = rng.permutation([True] * 4 + [False] * 4)  # seconds in which the changing one is shown
    changes = int(rng.choice(np.flatnonzero(turns)[1:]))
    order = [(before if i < changes else after) if turn else other for i, turn in enumerate(turns)]
    questions = [
        (f"what color is the {before.shape} at the start?", before.color, "becomes"),
        (f"what color is the {before.shape} at the end?", after.color, "becomes"),
        ("what shape changes color?", before.shape, "what changes"),
    ]
    questions += at_second(rng, order, 2) + ever_shown(rng, order, shapes)
    lessons = [in_each_second(order, "shape"), one_after_the_other(order), in_each_second(order, "color")]
    return Story(order, questions, lessons)


STORIES = (parade, blinking, motion, change)


def at_second(
    rng: np.random.Generator, order: Sequence[Shape], count: int, whats: Sequence[str] = tuple(WHATS)
) -> list[tuple[str, str, str]]:
    """Questions about different seconds, of which each has another answer at another second."""
    asked: list[tuple[str, str, str]] = []
    answers = {what: {shape.tell(what) for shape in order if shape.is_sure(what)} for what in whats}
    for second in rng.permutation(SECONDS):
        shape = order[second]
        telling = [what for what in whats if shape.is_sure(what) and len(answers[what]) > 1]
        if telling and len(asked) < count:
            what = str(rng.choice(telling))
            asked.append((f"{WHATS[what]} at second {second}?", shape.tell(what), "at second"))
    return asked


def in_each_second(order: Sequence[Shape], what: str) -> tuple[str, str, str]:
    """All seconds' answers in one."""
    return f"{WHATS[what]} in each second?", " ".join(shape.tell(what) for shape in order), LESSON


def one_after_the_other(order: Sequence[Shape]) -> tuple[str, str, str]:
    colors = [shape.color for shape, before in zip(order, [None, *order], strict=False) if shape is not before]
    return "what colors come one after the other?", " ".join(colors), LESSON


def ever_shown(rng: np.random.Generator, order: Sequence[Shape], shapes: Sequence[Shape]) -> list[tuple[str, str, str]]:
    """A question, with yes or no; for no, where it can be, about a colour and a shape that are there apart."""
    there = {(s.color, s.shape) for s in order}
    every = sorted({(s.color, s.shape) for s in shapes})
    near = [x for x in every if x[0] in {c for c, _ in there} and x[1] in {s for _, s in there}]
    missing = [x for x in near if x not in there] or [x for x in every if x not in there]
    answer = ("yes", "no")[rng.integers(2)]
    among = sorted(there) if answer == "yes" else missing
    return [(f"is there a {' '.join(among[rng.integers(len(among))])}?", answer, "ever shown")]


# ---- Files -----------------------------------------------------------------------------------------------------


def write_clip(file: Path, frames: Sequence[np.ndarray]) -> None:
    """An mp4 (H.264) in which each frame lasts a second."""
    import av

    with av.open(str(file), "w") as container:
        # While it looks ahead, x264 reads memory that nobody has written: the same clip would have other bytes at times
        options = {"crf": "16", "x264-params": "rc-lookahead=0:sync-lookahead=0"}
        stream = container.add_stream("libx264", rate=RATE, options=options)
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
        asked = story.questions + (story.lessons if split == "train" else [])
        rows += [dict(video=name, question=q, answer=a, kind=kind) for q, a, kind in asked]
    return rows


def make_pictures(root: Path, count: int, seed: int) -> None:
    """Single shapes at any place, with what, which colour and where they are asked in one conversation a picture."""
    shapes = load_shapes("train")
    (root / "pictures").mkdir()
    rows = []
    for i in range(count):
        rng = np.random.default_rng([seed, len(easyvqa.SPLITS), i])
        shape = shapes[int(rng.integers(len(shapes)))]
        height, width, _ = shape.pixels.shape
        shape = shape._replace(at=(int(rng.integers(SIZE - width + 1)), int(rng.integers(SIZE - height + 1))))
        asked = [("what color is the shape?", shape.color), ("what shape is in the image?", shape.shape)]
        asked = [asked[rng.integers(2)]]
        asked += [(f"{question}?", shape.tell(what)) for what, question in ON_SIDES.items() if shape.is_sure(what)]
        name = f"{i:05d}.png"
        Image.fromarray(shape.picture()).save(root / "pictures" / name)
        shuffled = (asked[k] for k in rng.permutation(len(asked)))
        turns = [turn for question, answer in shuffled for turn in question_turns(question, answer, "<image>")]
        for turn in turns[2::2]:
            turn["value"] = turn["value"].removeprefix("<image>\n")
        rows.append(dict(image=name, conversations=turns))
    write_rows(root / "pictures.json", rows)


def make_tokenizer(root: Path) -> None:
    """Of what is asked and answered in training, easy-VQA's questions and time stamps."""
    train, pictures = (json.loads((root / name).read_text()) for name in ("train.json", "pictures.json"))
    said = {row[key] for row in train for key in ("question", "answer")}
    conversations = [row["conversations"] for row in pictures]
    conversations += [turns for record in easyvqa.load("train") for turns in record.conversations]
    said |= {turn["value"].rpartition("\n")[2] for turns in conversations for turn in turns}
    said |= {format_time(tenths / 10) for tenths in range(10 * SECONDS)}
    prompts = (CHAT_TEMPLATES["bare"].exchange(text, text) for text in sorted(said))
    save_tokenizer(train_tokenizer(prompts, vocab_size=768), root / "tokenizer")


def write_rows(file: Path, rows: list[dict]) -> None:
    file.write_text(json.dumps(rows, indent=0) + "\n")


@one_line_errors
def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="directory to make")
    parser.add_argument("--train", type=at_least_1, default=4000, metavar="N", help="training clips (default 4000)")
    parser.add_argument("--test", type=at_least_1, default=400, metavar="N", help="test clips (default 400)")
    parser.add_argument("--pictures", type=at_least_1, default=4000, metavar="N", help="single pictures (default 4000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--workers", type=at_least_1, default=os.cpu_count(), metavar="N", help="processes (default: CPUs)"
    )
    args = parser.parse_args()
    with new_directory(args.out) as temporary:
        (temporary / "clips").mkdir()
        make(temporary, {"train": args.train, "test": args.test}, args.seed, args.workers)
        make_pictures(temporary, args.pictures, args.seed)
        make_tokenizer(temporary)
    print(f"written: {args.out}: {args.train} training clips, {args.test} test clips, {args.pictures} pictures")


def make(root: Path, counts: dict[str, int], seed: int, workers: int) -> None:
    parts = [(split, range(i, min(i + PART, count))) for split, count in counts.items() for i in range(0, count, PART)]
    rows: dict[str, list] = {split: [] for split in counts}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool, tqdm(total=sum(counts.values()), unit="clip") as bar:
        for (split, clips), made in [(part, pool.submit(make_part, root, *part, seed)) for part in parts]:
            rows[split] += made.result()
            bar.update(len(clips))
    for split, of_split in rows.items():
        write_rows(root / f"{split}.json", of_split)


if __name__ == "__main__":
    main()
