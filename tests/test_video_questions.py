"""tools/make_video_questions.py: what it writes is an mp4 like anyone's, and answers are of what the clips show."""

from collections import Counter, defaultdict
import json
from pathlib import Path
import re
import subprocess
import sys

import numpy as np
import pytest

from tools import make_video_questions as made
from voco_jax.data.records import Clip
from voco_jax.data.sources.llava import VideoQuestionSource
from voco_jax.data.video import FrameSampling, probe, read_frames, sample_times

TOOL = Path(made.__file__)


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Twelve training clips and eight test clips."""
    out = tmp_path_factory.mktemp("clips") / "shape_clips"
    subprocess.run([sys.executable, TOOL, out, "--train", "12", "--test", "8"], check=True, capture_output=True)
    return out


@pytest.fixture(scope="module")
def shapes() -> list[made.Shape]:
    return made.load_shapes("test")


def color_of(frame) -> str:
    """The colour of the known eight that is nearest to what is not background."""
    pixels = np.asarray(frame, np.int32).reshape(-1, 3)
    background = np.median(pixels, axis=0)
    inside = np.median(pixels[np.abs(pixels - background).sum(axis=1) > 120], axis=0)
    return min(made.COLORS.items(), key=lambda item: np.abs(np.array(item[0]) - inside).sum())[1]


def place_of(frame) -> np.ndarray:
    pixels = np.asarray(frame, np.int32)
    inside = np.abs(pixels - np.median(pixels.reshape(-1, 3), axis=0)).sum(axis=2) > 120
    return np.argwhere(inside).mean(axis=0)[::-1]


def test_answers_are_of_what_is_shown(clips):
    """Every question about colours, seconds and ways is answered again, from the frames that the pipeline reads."""
    asked = Counter()
    for split in ("train", "test"):
        by_clip = defaultdict(list)
        for row in json.loads((clips / f"{split}.json").read_text()):
            by_clip[row["video"]].append(row)
        for name, rows in by_clip.items():
            clip = Clip(clips / "clips" / name)
            info = probe(clip)
            assert (info.duration, info.num_frames) == (made.SECONDS, made.SECONDS * made.RATE)
            frames = read_frames(clip, sample_times(info, FrameSampling(made.SECONDS)))
            colors = [color_of(frame) for frame in frames]
            for row in rows:
                question, answer = row["question"], row["answer"]
                asked[row["kind"]] += 1
                if found := re.fullmatch(r"what color is at second (\d)\?", question):
                    assert colors[int(found[1])] == answer, (name, question)
                elif found := re.fullmatch(r"is it (left|top) or (right|bottom) at second (\d)\?", question):
                    axis = int(found[1] == "top")
                    assert found[1 + (place_of(frames[int(found[3])])[axis] > made.SIZE / 2)] == answer, (
                        name,
                        question,
                    )
                elif found := re.fullmatch(r"what color is (first|last), (\w+) or (\w+)\?", question):
                    shown = [color for color in colors if color in found.groups()]
                    assert shown[0 if found[1] == "first" else -1] == answer, (name, question)
                elif found := re.fullmatch(r"how many times does (\w+) appear\?", question):
                    begins = [a == found[1] != b for a, b in zip(colors, [None, *colors], strict=False)]
                    assert sum(begins) == int(answer), (name, question)
                elif row["kind"] == "direction":
                    way = place_of(frames[-1]) - place_of(frames[0])
                    assert np.dot(way, made.DIRECTIONS[answer]) > made.LEAST_WAY - 4, (name, question)
                elif found := re.fullmatch(r"what color is the (\w+) at the (start|end)\?", question):
                    assert answer in colors
                elif found := re.fullmatch(r"is there a (\w+) (\w+)\?", question):
                    assert answer == "no" or found[1] in colors
    assert set(asked) == {*made.TEMPORAL, "ever shown", "what changes"}


def test_every_answer_is_as_likely_as_the_others(shapes):
    """Guessing from the question: of many clips, no answer of a temporal kind is much more frequent than another."""
    answers = defaultdict(Counter)
    for i in range(2000):
        for question, answer, kind in made.STORIES[i % 4](np.random.default_rng(i), shapes).questions:
            if kind == "order":
                answer = "the former" if question.split(", ")[1].startswith(answer) else "the latter"
            if kind == "at second":
                kind += question.split()[1]
            answers[kind][answer] += 1
    for kind, of_kind in answers.items():
        if kind.startswith(("order", "count", "direction", "ever")) and kind != "ever shown":
            least, most = min(of_kind.values()), max(of_kind.values())
            assert most < 1.35 * least, (kind, of_kind)
    assert 0.45 < answers["ever shown"]["yes"] / (answers["ever shown"]["yes"] + answers["ever shown"]["no"]) < 0.55
    assert max(answers["at secondcolor"].values()) < 0.2 * sum(answers["at secondcolor"].values())


def test_frames_in_any_order_do_not_tell(shapes):
    """Every count of goes is had with four seconds; what comes first in a parade comes for as long as what is last."""
    rng = np.random.default_rng(0)
    seconds = set()
    for _ in range(200):
        story = made.counting(rng, shapes)
        color = story.questions[0][0].split()[4]
        seconds.add(sum(color_of(frame) == color for frame in story.frames))
    assert seconds == {4}
    for _ in range(20):
        story = made.parade(rng, shapes)
        lengths = sorted(Counter(map(color_of, story.frames)).values())
        assert lengths == [1, 2, 2, 3]


def test_the_same_with_any_number_of_processes(clips, tmp_path):
    command = [sys.executable, TOOL, tmp_path / "again", "--train", "12", "--test", "8", "--workers", "1"]
    subprocess.run(command, check=True, capture_output=True)
    for file in sorted(clips.rglob("*.*")):
        assert file.read_bytes() == (tmp_path / "again" / file.relative_to(clips)).read_bytes(), file
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr.endswith("again: expected a directory that is not there yet\n")


def test_a_source_of_it(clips):
    source = VideoQuestionSource(str(clips / "train.json"), str(clips / "clips"))
    record = source[0]
    assert record.video.file == clips / "clips" / "train_00000.mp4"
    assert record.conversations[0][0]["value"].startswith("<video>\nwhat color is first, ")
