"""Rows of a teacher whose prompts have another form: the same conversations, places that predict the same tokens."""

import contextlib
import dataclasses

import numpy as np
import pytest

from tests.helpers.record_lists import ListSource, data_config, greys, make_batches, plain_picture, turns
from voco_jax.chat_templates import CHAT_TEMPLATES
from voco_jax.data.conversations import Encoder
from voco_jax.data.records import Record
from voco_jax.data.teaching import NO_ROOM, OTHER_ANSWER, TeacherFormat
from voco_jax.errors import UserError

PATCHES = 5
ANSWERS = ["red", "a cat", "it is a red cat"]


@pytest.fixture(scope="module")
def student(small_tokenizer):
    return Encoder(small_tokenizer, CHAT_TEMPLATES["bare"], num_voco_tokens=2, num_visual_tokens=2, compressed=True)


@pytest.fixture(scope="module")
def llava(small_tokenizer):
    """Plain LLaVA: the image inside the prompt, its newline too, another system text."""
    return Encoder(small_tokenizer, CHAT_TEMPLATES["llava_v1"], 0, PATCHES, compressed=False, verbatim=True)


def several_turns(i: int) -> list[dict]:
    return [
        *turns(f"what is {i}?", "a cat"),
        {"from": "human", "value": "red?"},
        {"from": "gpt", "value": ANSWERS[i % 3]},
    ]


@pytest.fixture(scope="module")
def source():
    """Thirty pictures with one or two conversations each; text alone; and answers of two lines."""
    records = [
        Record(
            [plain_picture(5 + i)],
            conversations=[turns(f"what is {i}?", ANSWERS[i % 3]), several_turns(i)][: 1 + i % 2],
        )
        for i in range(30)
    ]
    text = [{"from": "human", "value": "who?"}, {"from": "gpt", "value": "a cat"}]
    lines = [Record([plain_picture(90 + i)], conversations=[turns("list!", "red\ncat")]) for i in range(2)]
    return ListSource([*records, Record(conversations=[text]), *lines])


def data(**changes):
    keys = dict(batch_size=2, rows_per_pack=2, row_length=90, images_per_pack=6, conversations_per_record=0)
    return data_config(**keys | changes)


def epoch_of(source, encoder, teacher, tmp_path, **changes):
    """(batches of one epoch, their `Batches`, lines of the log)."""
    lines = []
    batches = make_batches([source], encoder, data(**changes), tmp_path, teacher=teacher, log=lines.append)
    with contextlib.closing(batches):
        count = len(batches.loader.plan.packs(0)) // 2  # whole batches
        return [next(batches) for _ in range(count)], batches, lines


def segments(array) -> list[int]:
    return [s for s in dict.fromkeys(array.tolist()) if s]


def test_the_same_conversations_as_the_teacher_reads_them(source, student, llava, small_tokenizer, tmp_path):
    batches, opened, lines = epoch_of(source, student, TeacherFormat(llava), tmp_path)
    rows = opened.loader.teaching
    checked = images_seen = 0
    for batch in batches:
        shapes = {name: (x.shape, str(x.dtype)) for name, x in batch.items() if name.startswith("teacher_")}
        in_rows = [f"teacher_{name}" for name in ("tokens", "positions", "segment_ids", "slot_index")]
        expected = dict.fromkeys(in_rows, ((4, rows.row_length), "int32"))
        assert shapes == expected | {"teacher_places": ((4, 90), "int32")}
        grey = greys(batch)
        for r in range(4):
            ours = {name: x[r] for name, x in batch.items() if name != "pixel_values"}
            places = ours["teacher_places"]
            assert (places[ours["weights"] == 0] == -1).all()
            taught = np.flatnonzero(places >= 0)
            # What both places predict is the same token
            np.testing.assert_array_equal(ours["teacher_tokens"][places[taught] + 1], ours["targets"][taught])
            order = [int(ours["teacher_segment_ids"][places[t]]) for t in taught]
            assert order == sorted(order) and set(order) == set(segments(ours["teacher_segment_ids"]))
            for segment in segments(ours["teacher_segment_ids"]):
                here = ours["teacher_segment_ids"] == segment
                (its,) = {int(s) for s in ours["segment_ids"][taught][np.array(order) == segment]}
                mine = ours["segment_ids"] == its
                # Every label of the conversation is taught, from the conversation's own segment
                assert (places[mine & (ours["weights"] > 0)] >= 0).all()
                np.testing.assert_array_equal(ours["teacher_positions"][here], np.arange(here.sum()))
                slots = ours["slot_index"][mine]
                images = np.unique(slots[slots >= 0] // 2)
                own_slots = ours["teacher_slot_index"][here]
                np.testing.assert_array_equal(np.unique(own_slots[own_slots >= 0] // PATCHES), images)
                assert (own_slots >= 0).sum() == PATCHES * len(images)
                text = small_tokenizer.decode(ours["tokens"][mine]).split("USER: ", 1)[1]
                own = small_tokenizer.decode(ours["teacher_tokens"][here])
                assert own.replace("<pad>", "").replace("\n", "") == (
                    CHAT_TEMPLATES["llava_v1"].system + "USER: " + text
                )
                if len(images):
                    asked = text.split(" is ")[1].split("?")[0]
                    assert grey[r // 2][images[0]] == 5 + int(asked)
                    images_seen += 1
                checked += 1
    assert checked > 35 and images_seen > 30
    # Answers with a newline are others in VoCo's prompts, which drop it
    assert lines[0].startswith("teacher: 2 of 48 conversations have other tokens in the teacher's answers, and are not")
    assert "list[31]: expected an answer that goes on with 'cat</s>', found" in lines[0]
    assert opened.report.warned.keys() <= {OTHER_ANSWER} and opened.report.warned[OTHER_ANSWER] <= 2


def test_the_first_epoch_says_how_long_rows_are(source, student, llava, tmp_path):
    batches, opened, lines = epoch_of(source, student, TeacherFormat(llava), tmp_path, batch_size=1)
    rows = opened.loader.teaching
    used = max(int((batch["teacher_segment_ids"] > 0).sum(axis=1).max()) for batch in batches)
    slots = max(int((batch["teacher_slot_index"] >= 0).sum(axis=1).max()) for batch in batches)
    assert rows.row_length == used and rows.images_per_row * PATCHES == slots
    assert lines[1] == f"teacher: rows of {used} tokens, about {slots // PATCHES} images at most"
    assert NO_ROOM not in opened.report.warned


@pytest.mark.parametrize("limit", [dict(images_per_row=1), dict(row_length=130)])
def test_without_room_a_conversation_is_not_taught(source, student, llava, tmp_path, limit):
    batches, opened, _ = epoch_of(source, student, TeacherFormat(llava, **limit), tmp_path)
    whole, _, _ = epoch_of(source, student, TeacherFormat(llava), tmp_path)
    rows, untaught = opened.loader.teaching, 0
    for batch, other in zip(batches, whole, strict=True):
        assert batch["teacher_tokens"].shape == (4, rows.row_length)
        if "images_per_row" in limit:
            assert (batch["teacher_slot_index"] >= 0).sum(axis=1).max() == PATCHES
        for r in range(4):
            for segment in segments(batch["segment_ids"][r]):
                mine = (batch["segment_ids"][r] == segment) & (other["teacher_places"][r] >= 0)
                taught = batch["teacher_places"][r][mine] >= 0
                assert taught.all() or not taught.any()  # the whole conversation
                untaught += mine.any() and not taught.any()
    assert opened.report.warned[NO_ROOM] == untaught > 5
    if "row_length" in limit:
        assert rows.row_length == 130


def test_what_the_student_does_not_read_need_not_be_read(student, llava, tmp_path):
    """A conversation that is cut: the teacher's ends with the same label."""
    long = turns("what is it?", "so red " * 40)
    short = turns("what?", "red")
    source = ListSource([Record([plain_picture(9)], conversations=[c]) for c in (long, short)])
    (batch,), opened, _ = epoch_of(source, student, TeacherFormat(llava), tmp_path, rows_per_pack=1, row_length=40)
    assert opened.report.warned == {}
    for tokens, weights, targets, places, theirs in zip(
        *(batch[name] for name in ("tokens", "weights", "targets", "teacher_places", "teacher_tokens")), strict=True
    ):
        assert ((places >= 0) == (weights > 0)).all() and len(tokens) == 40
        np.testing.assert_array_equal(theirs[places[places >= 0] + 1], targets[places >= 0])
    assert opened.loader.teaching.row_length == (batch["teacher_segment_ids"] > 0).sum(axis=1).max() < 200


def test_answers_of_another_template_teach_nothing(source, student, llava, tmp_path):
    other = dataclasses.replace(CHAT_TEMPLATES["bare"], answer=" so, ")
    teacher = TeacherFormat(dataclasses.replace(llava, template=other))
    message = (
        r"^config.train.distill.teacher: 48 of 48 conversations have other tokens in the teacher's answers; list\[0\]: "
        "expected an answer that goes on with ' red</s>', found ' so, "
    )
    with pytest.raises(UserError, match=message):
        epoch_of(source, student, teacher, tmp_path)
