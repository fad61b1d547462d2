"""tools/make_video_questions.py: what it writes is an mp4 like anyone's, and answers are of what the clips show."""

from collections import Counter, defaultdict
import itertools
import json
from pathlib import Path
import re
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

from configs import video_demo
from voco_jax.data import make_video_questions as made
from voco_jax.data.records import Clip
from voco_jax.data.sources.llava import LlavaSource, VideoQuestionSource
from voco_jax.data.tokenizer import load_tokenizer
from voco_jax.data.video import FrameSampling, probe, read_frames, sample_times

TOOL = Path(__file__).parents[2] / "tools" / "make_video_questions.py"
AMOUNT = ("--train", "12", "--test", "8", "--pictures", "30")


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Twelve training clips and eight test clips."""
    out = tmp_path_factory.mktemp("clips") / "shape_clips"
    subprocess.run([sys.executable, TOOL, out, *AMOUNT], check=True, capture_output=True)
    return out


@pytest.fixture(scope="module")
def shapes() -> list[made.Shape]:
    return made.load_shapes("test")


def color_of(frame) -> str | None:
    """The colour of the known eight that is nearest to what is not background; None where all is background."""
    pixels = np.asarray(frame, np.int32).reshape(-1, 3)
    background = np.median(pixels, axis=0)
    found = pixels[np.abs(pixels - background).sum(axis=1) > 120]
    if not len(found):
        return None
    inside = np.median(found, axis=0)
    return min(made.COLORS.items(), key=lambda item: np.abs(np.array(item[0]) - inside).sum())[1]


def place_of(frame) -> np.ndarray:
    pixels = np.asarray(frame, np.int32)
    inside = np.abs(pixels - np.median(pixels.reshape(-1, 3), axis=0)).sum(axis=2) > 120
    return np.argwhere(inside).mean(axis=0)[::-1]


def side_of(frame, names) -> str:
    return names[int(place_of(frame)[made.SIDES.index(names)] > made.SIZE / 2)]


class Seen:
    """What the frames of a clip show."""

    def __init__(self, frames):
        self.frames, self.colors = frames, [color_of(frame) for frame in frames]
        self.runs = [color for color, _ in itertools.groupby(self.colors)]
        self.there = [color is not None for color in self.colors]

    def way(self) -> np.ndarray:
        return place_of(self.frames[-1]) - place_of(self.frames[0])

    def appearances(self, color: str | None = None) -> int:
        """How many times a colour, or any, comes."""
        return sum(run == color if color else run is not None for run in self.runs)

    def same_where_colors_are(self, answers) -> bool:
        """One answer for the seconds of one colour, and for all of them one that is a shape."""
        of_color = dict(zip(self.colors, answers, strict=True))
        return [of_color[color] for color in self.colors] == answers and {*answers} <= {*made.SHAPES}

    def until(self, second: str) -> int:
        return Seen(self.frames[: int(second) + 1]).appearances()

    def sides(self, answers, *names) -> bool:
        """Where a shape is in the middle, either is right."""
        axis = made.SIDES.index(names)
        sure = [abs(place_of(frame)[axis] - made.SIZE / 2) > 2 for frame in self.frames]
        found = [side_of(frame, names) for frame in self.frames]
        return [a for a, s in zip(answers, sure, strict=True) if s] == [
            a for a, s in zip(found, sure, strict=True) if s
        ]


# By question, whether an answer is right
ANSWERS = {
    r"what color is at second (\d)\?": lambda seen, a, s: seen.colors[int(s)] == a,
    r"what color is in each second\?": lambda seen, a: seen.colors == a.split(),
    r"is it (left|top) or (right|bottom) at second (\d)\?": lambda seen, a, x, y, s: (
        side_of(seen.frames[int(s)], (x, y)) == a
    ),
    r"is it (left|top) or (right|bottom) in each second\?": lambda seen, a, x, y: seen.sides(a.split(), x, y),
    r"what shape is in each second\?": lambda seen, a: seen.same_where_colors_are(a.split()),
    r"is there a shape at second (\d)\?": lambda seen, a, s: seen.there[int(s)] == (a == "yes"),
    r"is there a shape in each second\?": lambda seen, a: [there == "yes" for there in a.split()] == seen.there,
    r"how many times does (\w+) appear\?": lambda seen, a, c: seen.appearances(c) == int(a),
    r"how many times does the \w+ appear\?": lambda seen, a: seen.appearances() == int(a),
    r"how many times does the shape appear until second (\d)\?": lambda seen, a, s: seen.until(s) == int(a),
    r"what colors come one after the other\?": lambda seen, a: seen.runs == a.split(),
    r"what color is first, (\w+) or (\w+)\?": lambda seen, a, c, d: min(c, d, key=seen.runs.index) == a,
    r"what color is last, (\w+) or (\w+)\?": lambda seen, a, c, d: max(c, d, key=seen.runs.index) == a,
    r"which way does the \w+ move\?": lambda seen, a: np.dot(seen.way(), made.DIRECTIONS[a]) > made.LEAST_WAY - 4,
    r"what color is the \w+ at the (?:start|end)\?": lambda seen, a: a in seen.colors,
    r"is there a (\w+) \w+\?": lambda seen, a, c: a == "no" or c in seen.colors,
    r"what shape is at second \d\?": lambda seen, a: a in made.SHAPES,
    r"what shape changes color\?": lambda seen, a: a in made.SHAPES,
}


def test_answers_are_of_what_is_shown(clips):
    """Every question about colours, seconds and ways is answered again, from the frames that the pipeline reads."""
    asked, kinds = set(), defaultdict(set)
    for split in ("train", "test"):
        by_clip = defaultdict(list)
        for row in json.loads((clips / f"{split}.json").read_text()):
            by_clip[row["video"]].append((row["question"], row["answer"]))
            kinds[split].add(row["kind"])
        for name, of_clip in by_clip.items():
            clip = Clip(clips / "clips" / name)
            info = probe(clip)
            assert (info.duration, info.num_frames) == (made.SECONDS, made.SECONDS * made.RATE)
            frames = read_frames(clip, sample_times(info, FrameSampling(made.SECONDS)))
            seen = Seen(frames)
            assert split == "test" or len(of_clip) == video_demo.get_config().data.rows_per_pack
            for question, answer in of_clip:
                [(pattern, match)] = [(p, m) for p in ANSWERS if (m := re.fullmatch(p, question))]
                assert ANSWERS[pattern](seen, answer, *match.groups()), (name, question, answer)
                asked.add(pattern)
    assert asked == set(ANSWERS)
    assert kinds["test"] == {*made.TEMPORAL, "ever shown", "what changes"} and kinds["train"] == {
        *kinds["test"],
        "lesson",
    }


def test_answers_are_of_what_is_where(clips):
    rows = json.loads((clips / "pictures.json").read_text())
    asked = Counter()
    for row in rows:
        picture = Image.open(clips / "pictures" / row["image"])
        texts = [turn["value"].removeprefix("<image>\n") for turn in row["conversations"]]
        for question, answer in zip(texts[::2], texts[1::2], strict=True):
            asked[question] += 1
            if found := re.fullmatch(r"is it (left|top) or (right|bottom)\?", question):
                assert side_of(picture, found.groups()) == answer, row
            elif question == "what color is the shape?":
                assert color_of(picture) == answer, row
    assert len(rows) == 30 and len(asked) == 4 and min(asked.values()) > 5


def test_a_tokenizer_of_its_words(clips):
    """Every word of a question is a token; a time stamp is five."""
    tokenizer = load_tokenizer(clips / "tokenizer")
    question = "is there a shape at second 4?"
    assert len(tokenizer(f" {question}", add_special_tokens=False).input_ids) == 8
    assert len(tokenizer(" 00:01.5", add_special_tokens=False).input_ids) == 5
    assert tokenizer.decode(tokenizer(question, add_special_tokens=False).input_ids) == question


def test_every_answer_is_as_likely_as_the_others(shapes):
    """Guessing from the question: of many clips, no answer of a temporal kind is much more frequent than another."""
    answers, at_second = defaultdict(Counter), defaultdict(Counter)
    for i in range(4000):
        for question, answer, kind in made.STORIES[i % 4](np.random.default_rng(i), shapes).questions:
            if kind == "order":
                answer = "the former" if question.split(", ")[1].startswith(answer) else "the latter"
            if kind == "at second":
                at_second[question][answer] += 1
                kind += question.split()[1]
            answers[kind][answer] += 1
    for kind, of_kind in answers.items():
        if kind in ("order", "count", "direction"):
            least, most = min(of_kind.values()), max(of_kind.values())
            assert most < 1.35 * least, (kind, of_kind)
    assert 0.45 < answers["ever shown"]["yes"] / (answers["ever shown"]["yes"] + answers["ever shown"]["no"]) < 0.55
    for question, of_question in at_second.items():
        if question.startswith("is "):  # either side, and whether there is a shape: at each second by itself
            least, most = min(of_question.values()), max(of_question.values())
            assert least > 0.39 * (least + most), (question, of_question)
        elif question.startswith("what shape"):
            assert max(of_question.values()) < 0.5 * sum(of_question.values()), (question, of_question)
    assert len(at_second) == 5 * made.SECONDS
    assert max(answers["at secondcolor"].values()) < 0.2 * sum(answers["at secondcolor"].values())


def test_a_moving_shape_is_as_often_on_either_side_in_the_middle_seconds(shapes):
    """And it goes from one side to the other, either way from any place of the one to any of the other."""
    on, starts = Counter(), defaultdict(list)
    for i in range(2000):
        story = made.motion(np.random.default_rng(i), shapes)
        word = story.questions[0][1]
        axis = int(word in ("up", "down"))
        middles = [shape.middle(axis) for shape in story.order]
        for second in (3, 4):
            on[axis, second, "after" if middles[second] > 0 else "before"] += middles[second] != 0
        assert min(abs(middles[0]), abs(middles[-1])) >= 4 and middles[0] * middles[-1] < 0, (word, middles)
        starts[word].append(abs(middles[0]))
    for axis, second in itertools.product((0, 1), (3, 4)):
        before, after = on[axis, second, "before"], on[axis, second, "after"]
        assert 0.46 < before / (before + after) < 0.54, (axis, second, before, after)
    assert all(15.4 < np.mean(of_word) < 17.4 and min(of_word) < 6 for of_word in starts.values()), starts


def test_what_is_asked_of_a_second_has_another_answer_at_another(shapes):
    asked = Counter()
    for i in range(200):
        story = made.STORIES[i % 4](np.random.default_rng(i), shapes)
        seen = Seen(story.frames)
        for question, answer, kind in story.questions:
            if kind != "at second":
                continue
            what, second = question.split(" at second ")
            if found := re.fullmatch(r"is it (left|top) or (right|bottom)", what):
                axis = made.SIDES.index(found.groups())
                places = [place_of(frame)[axis] - made.SIZE / 2 for frame in seen.frames]
                # far enough from the middle to be sure
                answers = [found[1 + int(place > 0)] if abs(place) > 2 else None for place in places]
            else:
                answers = {
                    "what color is": seen.colors,
                    "what shape is": [shape.shape for shape in story.order],
                    "is there a shape": ["yes" if there else "no" for there in seen.there],
                }[what]
            assert answers[int(second[:-1])] == answer, (i, question)
            assert set(answers) - {answer, None}, (i, question, answers)
            asked[what] += 1
    assert len(asked) == 5 and min(asked.values()) > 20, asked


def test_frames_in_any_order_do_not_tell(shapes):
    """A shape is there for as long in however many goes; what comes first in a parade comes for as long as the last."""
    rng = np.random.default_rng(0)
    counts = Counter()
    for _ in range(200):
        story = made.blinking(rng, shapes)
        assert sum(color_of(frame) is not None for frame in story.frames) == made.SHOWN
        counts[story.questions[0][1]] += 1
        assert Seen(story.frames).appearances() == int(story.questions[0][1])
    assert set(counts) == {"1", "2", "3", "4"}
    for _ in range(20):
        story = made.parade(rng, shapes)
        lengths = sorted(Counter(map(color_of, story.frames)).values())
        assert lengths == [1, 2, 2, 3]


@pytest.mark.slow
def test_the_same_with_any_number_of_processes(clips, tmp_path):
    command = [sys.executable, TOOL, tmp_path / "again", *AMOUNT, "--workers", "1"]
    subprocess.run(command, check=True, capture_output=True)
    for file in sorted(clips.rglob("*.*")):
        assert file.read_bytes() == (tmp_path / "again" / file.relative_to(clips)).read_bytes(), file
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr.endswith("again: exists already; nothing was changed\n")


def test_sources_of_it(clips):
    asked = VideoQuestionSource(str(clips / "train.json"), str(clips / "clips"))
    assert asked[0].video.file == clips / "clips" / "train_00000.mp4" and asked[0].kinds == ["order"]
    told = LlavaSource(str(clips / "pictures.json"), str(clips / "pictures"))
    assert told[0].images[0].file == clips / "pictures" / "00000.png"
    for record, marker in ((asked[0], "<video>"), (told[0], "<image>")):
        texts = [turn["value"] for turn in record.conversations[0]]
        assert texts[0].startswith(f"{marker}\n") and not any(marker in text for text in texts[1:])
