"""`voco make-scene-questions`: answers are of what is shown, no kind can be guessed, and held-out pairs are new."""

from collections import Counter, defaultdict
import importlib.util
import json
from pathlib import Path
import re
import subprocess
import sys

import numpy as np
from PIL import Image, ImageDraw
import pytest

from configs import scenes as scenes_config
from configs import scenes_few, scenes_places
from tests.helpers.commands import run_main
from voco_jax.data import make_scene_questions as made
from voco_jax.data.scenes import BACKGROUNDS, COLORS, PLACES, SHAPES, SIZES, World, draw, draw_things, photographs
from voco_jax.data.sources.llava import LlavaSource
from voco_jax.data.tokenizer import load_tokenizer
from voco_jax.data.training_data import open_training_data

TOOL = Path(__file__).parents[2] / "tools" / "make_scene_questions.py"
AMOUNT = ("--train", "120", "--test", "12", "--held-out", "6", "--seed", "3")
TASK = made.Task(World.make(0), 0, 96, (2, 9), 10, BACKGROUNDS)
SPLITS = ("train", "test", "held_out")


def run_tool(out: Path, *arguments: str) -> str:
    return subprocess.run([sys.executable, TOOL, out, *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("scenes") / "scenes"
    assert "set of attributes" in run_tool(out, *AMOUNT, "--workers", "1")
    return out


@pytest.fixture(scope="module")
def sprites(tmp_path_factory) -> Path:
    """Six pictures with names, on a transparent ground."""
    directory = tmp_path_factory.mktemp("sprites")
    for i, name in enumerate(("red_apple", "bus", "cat", "dog", "Tall-Tree", "umbrella")):
        sprite = Image.new("RGBA", (40, 30))
        ImageDraw.Draw(sprite).rectangle((5, 5, 34, 24), fill=(40 * i, 255 - 40 * i, 128, 255))
        sprite.save(directory / f"{name}.png")
    return directory


def told(root: Path, name: str) -> list[tuple[str, str, str, str]]:
    """(picture, question, answer, kind) of a file's rows; of conversations the last question."""
    rows = json.loads((root / name).read_text())
    return [
        (row["image"], row["conversations"][-2]["value"].removeprefix("<image>\n"), row["conversations"][-1]["value"],
         row["kind"])
        for row in rows
    ]  # fmt: skip


def what_is_where(root: Path) -> dict[str, str]:
    """Of each training picture, the list in the order of places."""
    lists = told(root, "lists.json")
    return {picture: answer for picture, question, answer, _ in lists if question == "what is where?"}


def numbers(kind: str, count: int):
    """Scenes of a split with their questions, not drawn."""
    return [made.make_scene(TASK, kind, i)[1:] for i in range(count)]


# ---- What is asked, again, from the list's words ---------------------------------------------------------------


class Seen:
    """A picture as its list tells it: place → (size, color, shape)."""

    def __init__(self, in_order: str):
        told = [words.rsplit(" ", 3) for words in in_order.split(", ")]
        self.things = {place: tuple(words) for place, *words in told}
        assert list(self.things) == [place for place in PLACES if place in self.things]

    def words(self, i: int) -> list[str]:
        return [thing[i] for thing in self.things.values()]

    def place_of(self, color: str, shape: str) -> str:
        [place] = [place for place, thing in self.things.items() if thing[1:] == (color, shape)]
        return place

    def direction(self, *words: str) -> str:
        (row, column), (other_row, other_column) = (
            divmod(PLACES.index(self.place_of(*pair)), 3) for pair in (words[:2], words[2:])
        )
        if row == other_row:
            return "left" if column < other_column else "right"
        assert column == other_column
        return "above" if row < other_row else "below"

    def same_color(self, shape: str) -> str:
        [color] = [color for _, color, name in self.things.values() if name == shape]
        [other] = [name for _, found, name in self.things.values() if found == color and name != shape]
        return other

    def largest(self, i: int) -> str:
        order = sorted(self.things.values(), key=lambda thing: list(SIZES).index(thing[0]))
        assert order[-1][0] != order[-2][0]
        return order[-1][i]

    def twice(self, i: int) -> str:
        [word] = [word for word, number in Counter(self.words(i)).items() if number == 2]
        return word


INDEX = {"color": 1, "shape": 2}
ANSWERS = {
    r"what (color|shape) is the object at the ([\w ]+)\?": lambda seen, what, place: seen.things[place][INDEX[what]],
    r"where is the (\w+) (\w+)\?": Seen.place_of,
    r"how many times does (\w+) appear\?": lambda seen, word: str((seen.words(1) + seen.words(2)).count(word)),
    r"is the (\w+) (\w+) left, right, above or below the (\w+) (\w+)\?": Seen.direction,
    r"what shape has the same color as the (\w+)\?": Seen.same_color,
    r"what (color|shape) is the largest object\?": lambda seen, what: seen.largest(INDEX[what]),
    r"what (color|shape) appears twice\?": lambda seen, what: seen.twice(INDEX[what]),
    r"is there an? (\w+) (\w+)\?": lambda seen, color, shape: (
        "yes" if (color, shape) in {thing[1:] for thing in seen.things.values()} else "no"
    ),
}


def test_answers_follow_from_what_is_in_each_place(scenes):
    lists = {picture: Seen(answer) for picture, answer in what_is_where(scenes).items()}
    assert len(lists) == 120
    asked, kinds = set(), set()
    for picture, question, answer, kind in told(scenes, "train.json"):
        [(pattern, match)] = [(p, m) for p in ANSWERS if (m := re.fullmatch(p, question))]
        assert ANSWERS[pattern](lists[picture], *match.groups()) == answer, (picture, question, answer)
        asked.add(pattern)
        kinds.add(kind)
    assert asked == set(ANSWERS) and kinds == set(made.KINDS)


def test_a_lesson_is_all_that_is_asked_of_its_picture_and_one_of_its_lists(scenes):
    asked, told_of, last = defaultdict(list), defaultdict(list), Counter()
    for picture, question, answer, _ in told(scenes, "lists.json"):
        told_of[picture].append((question, answer))
    for picture, question, answer, _ in told(scenes, "train.json"):
        asked[picture] += [question, answer]
    for row in json.loads((scenes / "lessons.json").read_text()):
        said = [turn["value"] for turn in row["conversations"]]
        assert said[0].startswith("<image>\n") and "<image>" not in "".join(said[1:])
        assert [said[0].removeprefix("<image>\n"), *said[1:-2]] == asked[row["image"]]
        assert said[-2] in ("what is where?", "where is what?") and tuple(said[-2:]) in told_of[row["image"]]
        last[said[-2]] += 1
    assert last["what is where?"] == last["where is what?"] == 60


def test_lists_tell_what_is_where_and_where_what_is(scenes):
    """From the place to the object in the order of places, and from the object to the place in any."""
    by_picture = defaultdict(dict)
    for picture, question, answer, kind in told(scenes, "lists.json"):
        assert kind == "list"
        by_picture[picture][question] = answer.split(", ")
    assert len(by_picture) == 120
    orders = []
    for lists in by_picture.values():
        by_place, by_object = lists["what is where?"], lists["where is what?"]
        turned = [re.sub(r"(\w+) (\w+) (\w+) ([\w ]+)", r"\4 \1 \3 \2", told) for told in by_object]
        assert sorted(turned) == sorted(by_place)
        orders.append(turned == by_place)
    assert sum(orders) < 40


def test_all_places_of_all_pictures_are_asked_for_those_of_few_objects_in_a_file_of_their_own(scenes):
    """What is there, and each object's place where no other has the same words."""
    lists = {picture: Seen(answer) for picture, answer in what_is_where(scenes).items()}
    for few, name in ((True, "few_places.json"), (False, "places.json")):
        asked = Counter()
        for picture, question, answer, kind in told(scenes, name):
            assert kind == ("where" if question.startswith("where") else "at place")
            [(pattern, match)] = [(p, m) for p in ANSWERS if (m := re.fullmatch(p, question))]
            assert ANSWERS[pattern](lists[picture], *match.groups()) == answer, (picture, question, answer)
            asked[picture, question.split()[0]] += 1
        of_these = {picture: seen for picture, seen in lists.items() if (len(seen.things) <= 3) == few}
        assert of_these and {picture for picture, _ in asked} == of_these.keys()
        for picture, seen in of_these.items():
            words = Counter(thing[1:] for thing in seen.things.values())
            alone = sum(number == 1 for number in words.values())
            assert (asked[picture, "what"], asked[picture, "where"]) == (2 * len(seen.things), alone)


def test_what_is_in_each_place_is_what_the_picture_shows(scenes):
    """In a place's middle and around it the told color is there, and those of no other place's object are not."""
    shown = 0
    for picture, answer in what_is_where(scenes).items():
        pixels = np.asarray(Image.open(scenes / "pictures" / picture), np.int32)
        assert pixels.shape == (96, 96, 3)
        seen = Seen(answer)
        for i, place in enumerate(PLACES):
            row, column = divmod(i, 3)
            cell = pixels[32 * row : 32 * row + 32, 32 * column : 32 * column + 32].reshape(-1, 3)
            found = {color for color, rgb in COLORS.items() if (np.abs(cell - rgb).sum(axis=1) < 6).sum() >= 8}
            expected = {seen.things[place][1]} if place in seen.things else set()
            assert found == expected, (picture, place)
            shown += bool(expected)
    assert shown > 400


def test_every_shape_looks_like_itself_alone():
    """Drawn at one place and size, filled and outlined, no two of the 16 are alike."""
    drawn = []
    for name in SHAPES:
        for filled in (True, False):
            thing = draw_things(np.random.default_rng(0), TASK.world, 1, False)[0]
            thing = made.Thing(name, "red", "large", filled, thing.place)
            drawn.append(np.asarray(draw(np.random.default_rng(1), TASK.world, [thing], 96, ["plain"]), np.int32))
    for i, a in enumerate(drawn):
        for b in drawn[:i]:
            assert (np.abs(a - b).sum(axis=2) > 100).sum() > 40


# ---- Balance -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def split_scenes() -> dict[str, list]:
    return {"train": numbers("train", 4000), "test": numbers("test", 800), "held_out": numbers("held_out", 300)}


def test_no_kind_is_guessed(split_scenes):
    """Neither from the question alone, nor from which attributes occur; no answer is much likelier than another."""
    rows = {
        split: [
            made.Made(split, {}, question, frozenset(word for thing in things for word in (thing.name, thing.color)))
            for things, questions in of_split
            for question in questions
        ]
        for split, of_split in split_scenes.items()
    }
    found = made.baselines(TASK.world, rows["train"], rows["test"])
    for kind in made.KINDS:
        most = {"count": 38, "relation": 30, "there": 56}.get(kind, 18)
        assert found["question alone"][kind] < most, kind
        assert found["set of attributes"][kind] < max(most, 48), kind
    assert found["question alone"]["overall"] < 24 and found["set of attributes"]["overall"] < 37

    answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for one in rows["train"]:
        answers[one.question.kind][one.question.answer] += 1
    total = sum(sum(counts.values()) for counts in answers.values())
    for kind, counts in answers.items():
        assert max(counts.values()) <= (2.3 if kind == "count" else 1.7) * min(counts.values()), (kind, counts)
        assert sum(counts.values()) > 0.05 * total, kind


def has_held_out(world: World, things) -> bool:
    """Whether a picture of these has a pair that training never shows."""
    pairs = {(a.name, b.name) for a in things for b in things}
    return bool(world.held_out & ({(thing.color, thing.name) for thing in things} if world.colors else pairs))


def test_what_is_held_out_is_never_seen_together(split_scenes):
    pairs = TASK.world.held_out
    assert len(pairs) == len({color for color, _ in pairs}) == len({name for _, name in pairs}) == 8
    asked = {f"{color} {name}" for color, name in pairs}
    for split, of_split in split_scenes.items():
        for things, questions in of_split:
            assert has_held_out(TASK.world, things) == (split == "held_out")
            assert 2 <= len(things) <= 9 and len({thing.place for thing in things}) == len(things)
            texts = [question.text for question in questions]
            assert len(texts) == len(set(texts)) <= 10
            if split != "held_out":
                assert not any(words in text for text in texts for words in asked)
    about = [q.text for _, questions in split_scenes["held_out"] for q in questions]
    assert sum(any(words in text for words in asked) for text in about) > 100


# ---- Files -------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_files(scenes, tmp_path):
    """With any number of processes; another seed gives others."""
    run_tool(tmp_path / "again", *AMOUNT, "--workers", "2")
    files = sorted(path.relative_to(scenes) for path in scenes.rglob("*") if path.is_file())
    assert len(files) == 138 + 8 + len(("tokenizer.json", "tokenizer_config.json"))
    assert files == sorted(p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*") if p.is_file())
    for file in files:
        assert (scenes / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file
    other = made.make_scene(TASK._replace(seed=1), "train", 0)[1]
    assert other != made.make_scene(TASK, "train", 0)[1]


def test_rows_are_llavas(scenes):
    """And the tokenizer has a token for each of their words."""
    images = {"images": str(scenes / "pictures")}
    assert all(len(LlavaSource(str(scenes / f"{name}.json"), **images)) for name in (*SPLITS, *made.TOLD))
    tokenizer = load_tokenizer(scenes / "tokenizer")
    vocabulary = tokenizer.get_vocab()
    for words in (*SHAPES, *COLORS, "yes", "no", "left", "below"):
        assert f"Ġ{words}" in vocabulary, words


def test_a_pack_is_a_picture_with_some_of_its_questions(scenes, tmp_path):
    """Whatever the compressor: the rows of `benchmarks/table2.py` train on the same batches."""

    def packs(stage, compressor: str) -> list:
        config = stage.get_config()
        config.init_from, config.model.compressor = "", compressor
        config.tokenizer.source, config.data.cache_dir = str(scenes / "tokenizer"), str(tmp_path)
        for source in config.data.train.values():
            source.update(file=str(scenes / Path(source.file).name), images=str(scenes / "pictures"))
        plan = open_training_data(config, log=lambda line: None).batches.loader.plan
        return [plan[i] for i in plan.packs(0)]

    few, many = (
        Counter(picture for picture, *_ in told(scenes, name)).values() for name in ("few_places.json", "places.json")
    )
    rows = scenes_few.get_config().data.rows_per_pack
    numbers = [len(few), len(few) + sum(-(-number // rows) for number in many), 120 * 2]
    for stage, number in zip((scenes_few, scenes_places, scenes_config), numbers, strict=True):
        found = [packs(stage, compressor) for compressor in ("voco", "none", "qformer")]
        assert len(found[0]) == number and found[0] == found[1] == found[2]


def test_sprites(sprites, tmp_path):
    out = tmp_path / "out"
    printed = run_tool(out, "--sprites", str(sprites), "--train", "60", "--test", "20", "--held-out", "20")
    assert "same color" not in printed and "largest" in printed
    world = World.make(0, sprites)
    assert world.names == ("tall tree", "bus", "cat", "dog", "red apple", "umbrella") and len(world.held_out) == 3
    questions = told(out, "train.json") + told(out, "test.json")
    assert {kind for *_, kind in questions} == set(made.KINDS) - {"same color"}
    assert {answer for _, _, answer, kind in questions if kind == "at place"} == set(world.names)
    by_picture = {picture: answer.split(", ") for picture, answer in what_is_where(out).items()}
    for shown in by_picture.values():
        held = [pair for pair in world.held_out if all(any(w.endswith(f" {n}") for w in shown) for n in pair)]
        assert shown and not held
    task = TASK._replace(world=world)
    assert all(has_held_out(world, made.make_scene(task, "held_out", i)[1]) for i in range(50))


# ---- What cannot be ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--least", "5", "--most", "3"], "--least 5 --most 3: expected 1 to 9, the fewest first"),
        (["--most", "10"], "--least 2 --most 10: expected 1 to 9, the fewest first"),
        (["--size", "23"], "--size: expected at least 24, found 23"),
        (["--seed", "-1"], "--seed: expected at least 0, found -1"),
        (["--sprites", "{}/none"], "--sprites {}/none: expected a directory of PNG files, found none"),
        (["--sprites", "{}"], "--sprites {}: expected at least 4 PNG files, found 1"),
        (["--backgrounds", "sky"], "--backgrounds: invalid choice: 'sky'"),
    ],
)
def test_options_that_cannot_be(arguments, expected, tmp_path, monkeypatch, capsys):
    Image.new("RGBA", (4, 4)).save(tmp_path / "empty.png")
    arguments = [argument.format(tmp_path) for argument in arguments]
    status, _, error = run_main(made, monkeypatch, capsys, tmp_path / "out", *arguments)
    assert status == 2 and len(error.splitlines()) == 1 and expected.format(tmp_path) in error
    assert not (tmp_path / "out").exists()


def test_without_scikit_image(tmp_path, monkeypatch, capsys):
    photographs.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    status, _, error = run_main(made, monkeypatch, capsys, tmp_path / "out")
    assert status == 2 and "pip install -e '.[scenes]' brings it, or give --backgrounds plain graded" in error
    assert not (tmp_path / "out").exists()
    photographs.cache_clear()
