"""The demo's set: what is in it, and what can be had without looking at a picture."""

import numpy as np
import pytest

from voco_jax.data.sources import easyvqa
from voco_jax.errors import UserError
from voco_jax.eval.scoring import Guesser


def test_easyvqa_is_whole():
    train, test = (easyvqa.load(split) for split in easyvqa.SPLITS)
    assert (len(train), sum(len(r.conversations) for r in train)) == (4000, 38575)
    assert (len(test), sum(len(r.conversations) for r in test)) == (1000, 9673)
    assert all(record.images[0].file.is_file() for record in train + test)
    answers = {conversation[1]["value"] for record in train for conversation in record.conversations}
    assert len(answers) == 13
    with pytest.raises(UserError, match="easyvqa: expected a split of train, test; found 'validation'"):
        easyvqa.load("validation")


def test_what_can_be_had_without_looking():
    pairs = {
        split: [
            (turns[0]["value"].removeprefix("<image>\n"), turns[1]["value"])
            for record in easyvqa.load(split)
            for turns in record.conversations
        ]
        for split in easyvqa.SPLITS
    }
    guesser = Guesser(pairs["train"])
    right = np.mean([guesser(question) == answer for question, answer in pairs["test"]])
    majority = np.mean([guesser.majority == answer for _, answer in pairs["test"]])
    assert (round(100 * right, 1), round(100 * majority, 1)) == (67.0, 37.3)


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("what color is the shape?", "color"),
        ("what is the color of the circle?", "color"),
        ("what is the blue shape?", "shape"),
        ("what shape does the image contain?", "shape"),
        ("is there not a circle?", "yes/no"),
    ],
)
def test_kinds_of_questions(question, kind):
    assert easyvqa.question_kind(question) == kind
