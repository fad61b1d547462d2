"""easy-VQA through the Grain pipeline: what is in a batch, what is counted, and that it resumes where it stood."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from voco_jax.config import default_config
from voco_jax.data import easyvqa
from voco_jax.data.conversations import TEMPLATES, Encoder
from voco_jax.data.images import ImageProcessor
from voco_jax.data.pipeline import encode_records, make_dataset, report_line
from voco_jax.data.sources import Record, load_records
from voco_jax.errors import UserError


def turns(question, answer):
    return [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]


@pytest.fixture(scope="module")
def encoder(small_tokenizer):
    return Encoder(small_tokenizer, TEMPLATES["bare"], num_voco_tokens=1, num_visual_tokens=1, compressed=True)


@pytest.fixture
def data():
    config = default_config().data
    with config.unlocked():
        config.update(batch_size=3, conversations_per_record=3, rows_per_record=1, row_length=64)
    return config


@pytest.fixture(scope="module")
def records(encoder):
    encoded, _ = encode_records(load_records("easyvqa", "train")[:10], encoder, 64)
    return encoded


def test_easyvqa_is_whole():
    train, test = (load_records("easyvqa", split) for split in easyvqa.SPLITS)
    assert (len(train), sum(len(r.conversations) for r in train)) == (4000, 38575)
    assert (len(test), sum(len(r.conversations) for r in test)) == (1000, 9673)
    assert all(record.images[0].is_file() for record in train + test)
    answers = {conversation[1]["value"] for record in train for conversation in record.conversations}
    assert len(answers) == 13
    with pytest.raises(UserError, match="easyvqa: expected a split of train, test; found 'validation'"):
        load_records("easyvqa", "validation")
    with pytest.raises(UserError, match="data.source: expected one of easyvqa; found 'coco'"):
        load_records("coco", "train")


def test_what_can_be_had_without_looking():
    pairs = {
        split: [
            (turns[0]["value"].removeprefix("<image>\n"), turns[1]["value"])
            for record in load_records("easyvqa", split)
            for turns in record.conversations
        ]
        for split in easyvqa.SPLITS
    }
    guesser = easyvqa.Guesser(pairs["train"])
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


def test_what_became_of_the_conversations(encoder):
    long = "is it " + "very " * 60 + "red?"
    record = Record(
        ["a.png"], [turns("what is it?", "cat"), turns("what is it?", ""), turns("why?", "so " * 60), turns(long, "no")]
    )
    encoded, counts = encode_records([record], encoder, 40)
    assert [len(sample) <= 40 for sample in encoded[0].samples] == [True, True]
    whole, cut = encoded[0].samples
    assert (cut.visual >= 0).sum() == 1 and len(cut) == 40
    lost = len(encoder.encode(record.conversations[2], 1)) - 40
    assert report_line(counts) == (
        f"4 conversations: 1 whole, 1 cut ({lost} tokens), 2 left out "
        "(1× turn 1 (gpt): expected text, found none; 1× an image or every label beyond data.row_length = 40 tokens)"
    )


def test_a_batch(records, data, small_tokenizer):
    batch = next(iter(make_dataset(records, data, ImageProcessor(64), seed=0)))
    assert batch["pixel_values"].shape == (3, 1, 64, 64, 3)
    assert batch["tokens"].shape == (3, 64)
    assert batch["num_conversations"].tolist() == [batch["segment_ids"].max(1)[i] for i in range(3)]
    labels = batch["targets"][batch["weights"] > 0]
    answers = small_tokenizer.decode(labels).replace("</s>", " ").split()
    possible = {turns[1]["value"] for record in load_records("easyvqa", "train") for turns in record.conversations}
    assert answers and set(answers) <= possible


def test_a_pictures_conversations_over_rows(records, data):
    with data.unlocked():
        data.rows_per_record = 3
        data.row_length = 30
    batch = next(iter(make_dataset(records, data, ImageProcessor(64), seed=0)))
    assert batch["tokens"].shape == (9, 30) and batch["pixel_values"].shape[0] == 3
    assert (batch["segment_ids"].max(1) <= 1).all()  # some 25 tokens each with this tokenizer


def test_rows_are_as_long_as_the_longest_conversation(records, data):
    with data.unlocked():
        data.rows_per_record = 3
        data.row_length = 0
    batch = next(iter(make_dataset(records, data, ImageProcessor(64), seed=0)))
    longest = max(len(sample) for record in records for sample in record.samples)
    assert batch["tokens"].shape == (9, longest) and batch["num_conversations"].tolist() == [3, 3, 3]


def test_an_epoch_has_every_record_once(records, data):
    with data.unlocked():
        data.batch_size = 5
    batches = itertools.islice(make_dataset(records, data, ImageProcessor(64), seed=3), 2)
    pictures = np.concatenate([batch["pixel_values"] for batch in batches]).reshape(10, -1)
    assert len(np.unique(pictures, axis=0)) == 10


def test_resumes_where_it_stood(records, data):
    dataset = make_dataset(records, data, ImageProcessor(64), seed=1)
    batches = iter(dataset)
    next(batches), next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    expected = next(batches)
    again = iter(dataset)
    again.set_state(state)
    found = next(again)
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])
    other = next(iter(make_dataset(records, data, ImageProcessor(64), seed=2)))
    assert (other["tokens"] != next(iter(dataset))["tokens"]).any()


def test_too_few_records(records, data):
    with data.unlocked():
        data.batch_size = 11
    with pytest.raises(UserError, match="data.batch_size: expected at most 10, the number of records; found 11"):
        make_dataset(records, data, ImageProcessor(64), seed=0)


def test_a_picture_that_is_missing(records, data, tmp_path):
    """Found in the middle of training, in Grain's own thread: still one line that names the file."""
    missing = [dataclasses.replace(record, images=[tmp_path / "gone.png"]) for record in records]
    with pytest.raises(UserError, match=r"gone.png: picture not found") as error:
        next(iter(make_dataset(missing, data, ImageProcessor(64), seed=0)))
    assert "\n" not in str(error.value)
