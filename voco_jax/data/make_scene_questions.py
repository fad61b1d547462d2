#!/usr/bin/env python
"""A picture question set about places, relations and numbers: scenes of a few objects.

    voco make-scene-questions data/scenes

Each object of a scene (`scenes.py`) is in one of nine places. Written are

    OUT/pictures         PNG files of all splits
    OUT/train.json       questions about them (`llava`), a row each: id, image, conversations, kind
    OUT/test.json
    OUT/lists.json       two rows about each training picture, with all its objects: where what is, and what where is.
                         A model from scratch learns by these to see shapes, and to find a place, or an object
    OUT/lessons.json     a conversation about each training picture: its questions, and then one of its lists. A model
                         that reads images whole learns sooner by these: it reads each image once
    OUT/few_places.json  a row for each question `at place` and `where` about training pictures of three objects or
                         fewer. From these first a model learns to keep in a token what is where
    OUT/places.json      the same about the other training pictures
    OUT/held_out.json    about pictures with pairs that training never shows together: a colour and a shape (or two
                         sprites)
    OUT/tokenizer        of the words of all these

Kinds of questions:

    at place      what color (or shape) is the object at the top left?
    where         where is the red circle?
    count         how many times does red (or circle) appear?                     1 to 4
    relation      is the red circle left, right, above or below the blue star?    they are in one row or column
    same color    what shape has the same color as the circle?                    not with sprites
    largest       what color (or shape) is the largest object?
    twice         what color (or shape) appears twice?
    there         is there a red circle?                                          both words are there, also for no

With --sprites DIR objects are that directory's PNG files, named as these are.

No answer to a kind is much more likely than the others. Printed, and written to OUT/baselines.json, is how many test
questions are answered right, by kind, without the picture (`question alone`: the most frequent answer of training to a
question of these words) and with the set of words that are true of some object in it, but not of how many, of which, or
where (`set of attributes`).
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
import json
import multiprocessing
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from voco_jax.chat_templates import CHAT_TEMPLATES
from voco_jax.data.scenes import BACKGROUNDS, PLACES, SIDE, SIZES, Thing, World, draw, draw_things, photographs
from voco_jax.data.sources.llava import question_turns
from voco_jax.data.tokenizer import save_tokenizer, train_tokenizer
from voco_jax.errors import UserError, one_line_errors
from voco_jax.io.atomic import new_directory
from voco_jax.options import Parser, at_least_1

LIST, LESSON = "list", "lesson"
TOLD = ("lists", "lessons", "few_places", "places")  # files about training pictures, beside the split's own
FEW = 3  # objects
SPLITS = ("train", "test", "held_out")
DIRECTIONS = ("left", "right", "above", "below")
MOST_COUNTED = 4
COUNTED = {"1": 1.0, "2": 1.3, "3": 4.0, "4": 14.0}  # how much more often rarer counts are asked for
PART = 100  # pictures that a worker process makes in one go


class Question(NamedTuple):
    text: str
    answer: str
    kind: str


class Made(NamedTuple):
    """A file's row, its question, and the words that are true of some object in its picture."""

    file: str
    row: dict
    question: Question
    true: frozenset[str]


class Task(NamedTuple):
    """What is made: everything that a picture follows from, beside its split and number."""

    world: World
    seed: int
    size: int
    objects: tuple[int, int]  # least and most
    questions: int  # a picture
    backgrounds: tuple[str, ...]


# ---- Questions -------------------------------------------------------------------------------------------------


def aspects(world: World) -> dict[str, Callable[[Thing], str]]:
    """What can be asked of an object, by the words of the question."""
    if not world.colors:
        return {"what": lambda thing: thing.name}
    return {"what color": lambda thing: thing.color, "what shape": lambda thing: thing.name}


def article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def at_place(rng: np.random.Generator, world: World, things: Sequence[Thing]) -> list[Question]:
    return [
        Question(f"{what} is the object at the {PLACES[thing.place]}?", tell(thing), "at place")
        for thing in things
        for what, tell in aspects(world).items()
    ]


def _single(things: Sequence[Thing]) -> list[Thing]:
    """Those that their words mean alone."""
    counts = Counter(thing.words for thing in things)
    return [thing for thing in things if counts[thing.words] == 1]


def where(rng: np.random.Generator, world: World, things: Sequence[Thing]) -> list[Question]:
    return [Question(f"where is the {thing.words}?", PLACES[thing.place], "where") for thing in _single(things)]


def count(rng: np.random.Generator, world: World, things: Sequence[Thing]) -> list[Question]:
    """One of a picture, because most others would be answered with 1."""
    counts = Counter(tell(thing) for thing in things for tell in aspects(world).values())
    asked: defaultdict[str, list[Question]] = defaultdict(list)
    for word, number in sorted(counts.items()):
        if number <= MOST_COUNTED:
            asked[str(number)].append(Question(f"how many times does {word} appear?", str(number), "count"))
    numbers = sorted(asked)
    if not numbers:
        return []
    weights = np.array([COUNTED[number] for number in numbers])
    number = rng.choice(numbers, p=weights / weights.sum())
    return [asked[number][rng.integers(len(asked[number]))]]


def direction(thing: Thing, other: Thing) -> str:
    """Of `DIRECTIONS`, the way from another in its row or column; '' for others."""
    (row, column), (other_row, other_column) = divmod(thing.place, SIDE), divmod(other.place, SIDE)
    if row == other_row:
        return DIRECTIONS[int(column > other_column)]
    return DIRECTIONS[2 + int(row > other_row)] if column == other_column else ""


def relation(rng: np.random.Generator, world: World, things: Sequence[Thing]) -> list[Question]:
    single = _single(things)
    return [
        Question(f"is the {thing.words} left, right, above or below the {other.words}?", found, "relation")
        for thing in single
        for other in single
        if thing is not other and (found := direction(thing, other))
    ]


def same_color(rng: np.random.Generator, world: World, things: Sequence[Thing]) -> list[Question]:
    names = Counter(thing.name for thing in things)
    found = []
    for thing in things if world.colors else ():
        others = [other for other in things if other.color == thing.color and other is not thing]
        if names[thing.name] == 1 and len(others) == 1:
            text = f"what shape has the same color as the {thing.name}?"
            found.append(Question(text, others[0].name, "same color"))
    return found


def largest(rng: np.random.Generator, world: World, things: Sequence[Thing]) -> list[Question]:
    order = list(SIZES)
    sizes = sorted((order.index(thing.size), i) for i, thing in enumerate(things))
    if len(things) > 1 and sizes[-2][0] == sizes[-1][0]:
        return []
    thing = things[sizes[-1][1]]
    return [Question(f"{what} is the largest object?", tell(thing), "largest") for what, tell in aspects(world).items()]


def twice(rng: np.random.Generator, world: World, things: Sequence[Thing]) -> list[Question]:
    found = []
    for what, tell in aspects(world).items():
        words = [word for word, number in Counter(map(tell, things)).items() if number == 2]
        if len(words) == 1:
            found.append(Question(f"{what} appears twice?", words[0], "twice"))
    return found


def there(rng: np.random.Generator, world: World, things: Sequence[Thing], *, known: bool = True) -> list[Question]:
    """Yes and no are as likely, and asked about the same words: no, where they are not of one object.

    `known`: not about a colour and a shape that are held out.
    """
    pairs = sorted({(thing.adjective, thing.name) for thing in things})
    missing = [(a, name) for a in sorted({a for a, _ in pairs}) for name in sorted({n for _, n in pairs})]
    missing = [pair for pair in missing if pair not in pairs]
    if known and world.colors:
        missing = [pair for pair in missing if pair not in world.held_out]
    if not missing:  # then yes would be certain
        return []
    among, answer = ((missing, "no"), (pairs, "yes"))[rng.integers(2)]
    adjective, name = among[rng.integers(len(among))]
    return [Question(f"is there {article(f'{adjective} {name}')}?", answer, "there")]


KINDS = {
    "at place": at_place, "where": where, "count": count, "relation": relation,
    "same color": same_color, "largest": largest, "twice": twice, "there": there,
}  # fmt: skip


def ask(rng: np.random.Generator, world: World, things: Sequence[Thing], number: int, held_out: bool) -> list[Question]:
    """So many different questions, of all kinds in turn; fewer where there are no more."""
    asked: dict[str, list[Question]] = {}
    for kind, make in KINDS.items():
        found = there(rng, world, things, known=not held_out) if kind == "there" else make(rng, world, things)
        asked[kind] = [found[i] for i in rng.permutation(len(found))]
    chosen: list[Question] = []
    while len(chosen) < number and any(asked.values()):
        for kind in rng.permutation([kind for kind, left in asked.items() if left]).tolist():
            chosen.append(asked[kind].pop(0))
    return [chosen[i] for i in range(min(number, len(chosen)))]


def by_place(things: Sequence[Thing]) -> Question:
    """All objects in one answer, in the order of `PLACES`."""
    in_order = sorted(things, key=lambda thing: thing.place)
    answer = ", ".join(f"{PLACES[thing.place]} {thing.size} {thing.words}" for thing in in_order)
    return Question("what is where?", answer, LIST)


def by_object(rng: np.random.Generator, things: Sequence[Thing]) -> Question:
    """All objects in one answer, in any order: a place does not follow from the one before, but from the object.

    The colour stands beside the place, which it is the easiest way to.
    """
    in_any = [things[i] for i in rng.permutation(len(things))]
    told = [" ".join(filter(None, (one.size, one.name, one.color, PLACES[one.place]))) for one in in_any]
    return Question("where is what?", ", ".join(told), LIST)


def turns_about(questions: Sequence[Question]) -> list[dict]:
    """A conversation of them in LLaVA's form, the picture before the first."""
    first, *others = questions
    turns = question_turns(first.text, first.answer, "<image>")
    for text, answer, _ in others:
        turns += [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    return turns


# ---- What can be had without seeing who is where ---------------------------------------------------------------


class Guess:
    """The most frequent answer of training to a question of these words, among those that can be."""

    def __init__(self, questions: Sequence[Question]):
        self._by_text: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._by_kind: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for text, answer, kind in questions:
            self._by_text[text][answer] += 1
            self._by_kind[kind][answer] += 1

    def __call__(self, question: Question, excluded: frozenset[str] = frozenset()) -> str:
        for counts in (self._by_text.get(question.text), self._by_kind.get(question.kind)):
            possible = Counter({a: n for a, n in (counts or {}).items() if a not in excluded})
            if possible:
                return possible.most_common(1)[0][0]
        return ""


def baselines(world: World, train: Sequence[Made], tested: Sequence[Made]) -> dict[str, dict[str, float]]:
    """Per cent right by kind, and 'overall', of test questions."""
    guess, words = Guess([one.question for one in train]), {*world.names, *world.colors}
    right: dict[str, Counter[str]] = {"question alone": Counter(), "set of attributes": Counter()}
    total: Counter[str] = Counter()
    for _, _, question, true in tested:
        for kind in (question.kind, "overall"):
            total[kind] += 1
            right["question alone"][kind] += guess(question) == question.answer
            right["set of attributes"][kind] += guess(question, frozenset(words - true)) == question.answer
    return {name: {kind: 100 * r[kind] / total[kind] for kind in total} for name, r in right.items()}


# ---- Files -----------------------------------------------------------------------------------------------------


def make_scene(task: Task, split: str, i: int) -> tuple[np.random.Generator, list[Thing], list[Question]]:
    """Scene i of a split, its questions, and what its picture is drawn with. It follows from these numbers alone."""
    rng = np.random.default_rng([task.seed, SPLITS.index(split), i])
    held_out = split == "held_out"
    number = int(rng.integers(task.objects[0], task.objects[1] + 1))
    if held_out and task.world.sprites is not None:
        number = max(number, 2)  # a pair
    things = draw_things(rng, task.world, number, held_out)
    return rng, things, ask(rng, task.world, things, task.questions, held_out)


def make_part(root: Path, task: Task, split: str, numbers: range) -> list[Made]:
    """Draw some of a split's pictures, and ask about them. Rows of `TOLD` come after a training picture's others."""
    made = []
    for i in numbers:
        rng, things, questions = make_scene(task, split, i)
        name = f"{split}_{i:06d}.png"
        draw(rng, task.world, things, task.size, task.backgrounds).save(root / "pictures" / name)
        true = frozenset(word for thing in things for word in (thing.name, thing.color))
        conversations = [(split, [question]) for question in questions]
        if split == "train":
            lists = [by_place(things), by_object(rng, things)]
            conversations += [("lists", [one]) for one in lists]
            conversations += [("lessons", [*questions, lists[i % 2]._replace(kind=LESSON)])]
            file = "few_places" if len(things) <= FEW else "places"
            both = at_place(rng, task.world, things) + where(rng, task.world, things)
            conversations += [(file, [one]) for one in both]
        for j, (file, asked) in enumerate(conversations):
            row = {"id": f"{split}_{i:06d}_{j}", "image": name, "conversations": turns_about(asked)}
            made.append(Made(file, row | {"kind": asked[-1].kind}, asked[-1], true))
    return made


def make(root: Path, task: Task, counts: dict[str, int], workers: int) -> dict[str, dict[str, float]]:
    """All files; returns the `baselines` of the test split."""
    (root / "pictures").mkdir()
    parts = [(s, range(i, min(i + PART, number))) for s, number in counts.items() for i in range(0, number, PART)]
    made: dict[str, list[Made]] = {file: [] for file in (*counts, *TOLD)}
    context = multiprocessing.get_context("spawn")
    total = sum(counts.values())
    with ProcessPoolExecutor(workers, mp_context=context) as pool, tqdm(total=total, unit="picture") as bar:
        for (_, numbers), part in [(part, pool.submit(make_part, root, task, *part)) for part in parts]:
            for one in part.result():
                made[one.file].append(one)
            bar.update(len(numbers))
    said = {
        CHAT_TEMPLATES["bare"].exchange(one.question.text, one.question.answer)
        for of_file in made.values()
        for one in of_file
    }
    for file, of_file in made.items():
        (root / f"{file}.json").write_text(json.dumps([one.row for one in of_file], indent=0) + "\n")
    found = baselines(task.world, made["train"], made["test"])
    (root / "baselines.json").write_text(json.dumps(found, indent=2) + "\n")
    save_tokenizer(train_tokenizer(sorted(said), vocab_size=512), root / "tokenizer")
    return found


@one_line_errors
def main() -> None:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="directory to make")
    add("--train", type=at_least_1, default=20000, metavar="N", help="training pictures (default 20000)")
    add("--test", type=at_least_1, default=1000, metavar="N", help="test pictures (default 1000)")
    add("--held-out", type=at_least_1, default=500, metavar="N", help="pictures with held-out pairs (default 500)")
    add("--questions", type=at_least_1, default=10, metavar="N", help="at most, a picture (default 10)")
    add("--least", type=at_least_1, default=2, metavar="N", help="fewest objects of a picture (default 2)")
    add("--most", type=at_least_1, default=len(PLACES), metavar="N", help="most objects (default 9)")
    add("--size", type=at_least_1, default=96, metavar="N", help="pixels of a picture's side (default 96)")
    add("--backgrounds", nargs="+", choices=BACKGROUNDS, default=BACKGROUNDS, help="default: all")
    add("--sprites", type=Path, metavar="DIR", help="PNG files, named as what they show, in place of shapes")
    add("--seed", type=int, default=0)
    add("--workers", type=at_least_1, default=os.cpu_count(), metavar="N", help="processes (default: CPUs)")
    args = parser.parse_args()
    if not args.least <= args.most <= len(PLACES):
        expected = f"expected 1 to {len(PLACES)}, the fewest first"
        raise UserError(f"--least {args.least} --most {args.most}: {expected}")
    if args.size < 8 * SIDE:
        raise UserError(f"--size: expected at least {8 * SIDE}, found {args.size}")
    if args.seed < 0:
        raise UserError(f"--seed: expected at least 0, found {args.seed}")
    if "photo" in args.backgrounds:
        photographs()  # what is missing shows itself before anything is written
    world = World.make(args.seed, args.sprites)
    task = Task(world, args.seed, args.size, (args.least, args.most), args.questions, tuple(args.backgrounds))
    with new_directory(args.out) as temporary:
        counts = {"train": args.train, "test": args.test, "held_out": args.held_out}
        found = make(temporary, task, counts, args.workers)
    print(table(found))
    print(f"written: {args.out}: {args.train} training pictures, {args.test} of the test, {args.held_out} held out")


def table(found: dict[str, dict[str, float]]) -> str:
    kinds = [kind for kind in (*KINDS, "overall") if kind in found["question alone"]]
    lines = [f"{'test questions right, %':<24}" + "".join(f"{kind:>12}" for kind in kinds)]
    return "\n".join(lines + [f"{name:<24}" + "".join(f"{row[k]:12.1f}" for k in kinds) for name, row in found.items()])


if __name__ == "__main__":
    main()
