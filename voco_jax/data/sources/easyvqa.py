"""easy-VQA (https://github.com/vzhou842/easy-VQA, MIT): 5,000 pictures of one coloured shape, 48,248 questions.

The pictures and questions come with the PyPI package `easy-vqa`; nothing is downloaded.
"""

from collections import defaultdict
import functools
import importlib.util
import json
from pathlib import Path
import re

from voco_jax.data.records import Picture, Record
from voco_jax.errors import UserError
from voco_jax.io.files import read_text
from voco_jax.outages import first_line

SPLITS = ("train", "test")


def load(split: str) -> list[Record]:
    """One record a picture, with all its questions (each a conversation of its own)."""
    if split not in SPLITS:
        raise UserError(f"easyvqa: expected a split of {', '.join(SPLITS)}; found {split!r}")
    root = _package_data() / split
    by_picture, kinds = defaultdict(list), defaultdict(list)
    file = root / "questions.json"
    try:
        for question, answer, picture in json.loads(read_text(file)):
            turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
            by_picture[int(picture)].append(turns)
            kinds[int(picture)].append(question_kind(question))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{file}: not as the package easy-vqa has it ({first_line(error)}); install it anew") from None
    return [
        Record(
            [Picture(root / "images" / f"{i}.png")], conversations=by_picture[i], name=f"easyvqa/{split}[{n}]",
            kinds=kinds[i],
        )
        for n, i in enumerate(sorted(by_picture))
    ]  # fmt: skip


class EasyVqaSource:
    """`load` as a source."""

    def __init__(self, split: str = "train"):
        self._records = load(split)
        self._split = split

    def __len__(self):
        return len(self._records)

    def __getitem__(self, i: int) -> Record:
        return self._records[i]

    def where(self, i: int) -> str:
        return self._records[i].name

    def fingerprint(self) -> str:
        return f"easyvqa {self._split} {len(self)} {_package_data()}"


def question_kind(question: str) -> str:
    """'color', 'shape' or 'yes/no', by the question's words."""
    if re.match(r"what (color|is the color)\b", question):
        return "color"
    return "shape" if question.startswith("what ") else "yes/no"


@functools.cache
def _package_data() -> Path:
    # Found without importing: the package's own __init__ reads every file.
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise UserError("easyvqa: the package easy-vqa is not installed; pip install -e '.[demo]' brings it")
    return Path(spec.origin).parent / "data"
