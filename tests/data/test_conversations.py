"""Prompts and labels beyond the golden conversations (test_reference.py): several images, other templates, refusals."""

import pickle
import random

import numpy as np
import pytest
import tokenizers

from voco_jax.chat_templates import CHAT_TEMPLATES, get_chat_template
from voco_jax.data.control_tokens import ControlTokens, Piece
from voco_jax.data.conversations import ConversationError, Encoder
from voco_jax.data.tokenizer import VOCO_TOKEN, add_voco_token, load_tokenizer, prompt_ids
from voco_jax.errors import UserError

VOCO = VOCO_TOKEN
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant of the image. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def turns(*values):
    return [{"from": "gpt" if i % 2 else "human", "value": value} for i, value in enumerate(values)]


def encoder(tokenizer, template="voco_v1", voco=2, compressed=True, patches=3):
    return Encoder(tokenizer, CHAT_TEMPLATES[template], voco, voco if compressed else patches, compressed)


def text(tokenizer, sample, keep=None) -> str:
    return tokenizer.decode(sample.tokens if keep is None else sample.tokens[keep])


def test_reading_starts_at_the_slots(small_tokenizer):
    """BOS, image and newline belong to the compress stream."""
    sample = encoder(small_tokenizer).encode(turns("<image>\nwhat is it?", "a red cat"), 1)
    expected = f"{VOCO}{VOCO}\n{SYSTEM} USER: what is it? ASSISTANT: a red cat</s>"
    assert text(small_tokenizer, sample) == expected
    assert sample.slot_index.tolist() == [0, 1] + [-1] * (len(sample) - 2)
    assert text(small_tokenizer, sample, sample.labels) == " a red cat</s>"


def test_every_answer_is_a_label(small_tokenizer):
    sample = encoder(small_tokenizer).encode(turns("<image>\nwhat is it?", "a cat", "is it red?", "it is"), 1)
    assert text(small_tokenizer, sample, sample.labels) == " a cat</s> it is</s>"


def test_a_prompt_ends_at_the_assistant(small_tokenizer):
    sample = encoder(small_tokenizer, "bare").encode_question("what is it?", 1)
    assert text(small_tokenizer, sample) == f"{VOCO}{VOCO}\nUSER: what is it? ASSISTANT:"
    assert not sample.labels.any()


def test_images_stay_where_they_stand(small_tokenizer):
    sample = encoder(small_tokenizer, "bare").encode(
        turns("is <image> red?", "a cat", "and <image><image>?", "it is"), 3
    )
    v = VOCO * 2 + "\n"
    expected = f"<s>USER: is {v} red? ASSISTANT: a cat</s>USER: and {v}{v}? ASSISTANT: it is</s>"
    assert text(small_tokenizer, sample) == expected
    assert sample.slot_index[sample.slot_index >= 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert (sample.tokens[sample.slot_index >= 0] == prompt_ids(small_tokenizer).voco_token_id).all()
    assert text(small_tokenizer, sample, sample.labels) == " a cat</s> it is</s>"


def test_an_image_in_the_middle_of_the_first_turn_moves_to_the_front(small_tokenizer):
    """As in the released code, where one image is all there can be."""
    middle = encoder(small_tokenizer, "bare").encode(turns("what <image>is it?", "a cat"), 1)
    front = encoder(small_tokenizer, "bare").encode(turns("<image>\nwhat is it?", "a cat"), 1)
    assert middle.tokens.tolist() == front.tokens.tolist()


def test_uncompressed_images_stand_in_the_text(small_tokenizer):
    sample = encoder(small_tokenizer, "bare", compressed=False).encode(turns("<image>\nwhat is it?", "a cat"), 1)
    assert sample.slot_index.tolist()[:5] == [-1, 0, 1, 2, -1]  # BOS, three patches
    assert (
        text(small_tokenizer, sample, sample.slot_index < 0)
        == f"<s>\n{VOCO}{VOCO}\nUSER: what is it? ASSISTANT: a cat</s>"
    )
    without_voco = encoder(small_tokenizer, "llava_v1", voco=0, compressed=False)
    sample = without_voco.encode(turns("<image>\nwhat is it?", "a cat"), 1)
    assert text(small_tokenizer, sample, sample.slot_index < 0).startswith("<s>\nA chat between a curious user and an")


def test_text_alone_keeps_its_newlines(small_tokenizer):
    sample = encoder(small_tokenizer, "bare").encode(turns("what\nis it?", "a\ncat"), 0)
    assert text(small_tokenizer, sample) == "<s>USER: what\nis it? ASSISTANT: a\ncat</s>"
    assert (sample.slot_index == -1).all() and sample.num_images == 0


@pytest.mark.parametrize(("voco", "expected"), [(0, "<s>a red cat\n"), (2, f"<s>\n{VOCO}{VOCO}a red cat")])
def test_plain_is_captions_alone(small_tokenizer, voco, expected):
    """For projector training: no roles, the caption and its newline are labels."""
    sample = encoder(small_tokenizer, "plain", voco=voco, compressed=False).encode(turns("<image>", "a red cat"), 1)
    assert text(small_tokenizer, sample, sample.slot_index < 0).replace(f"{VOCO}\n", VOCO) == expected
    assert text(small_tokenizer, sample, sample.labels).strip("\n") == "a red cat"


def test_video_prompt_of_the_released_code():
    system = get_chat_template("voco_video").system
    assert system.startswith("A chat between a curious user and an artificial intelligence")
    assert "of the video." in system


@pytest.mark.parametrize(
    ("conversation", "images", "message"),
    [
        ([], 1, "expected at least one turn, found none"),
        (turns("<image>\n"), 1, r"turn 0 \(human\): expected text beside <image>, found none"),
        (turns("what?", ""), 0, r"turn 1 \(gpt\): expected text, found none"),
        (turns("  ", "a cat"), 0, r"turn 0 \(human\): expected text, found none"),
        (turns("what?", "a cat"), 1, "expected 1 <image> markers, one an image; found 0"),
        (turns("<image><image>what?", "a cat"), 1, "expected 1 <image> markers, one an image; found 2"),
        (turns("<image>\nwhat?", "a cat"), 0, "expected 0 <image> markers, one an image; found 1"),
        (turns("what?\n<image>\n", "a cat"), 0, "expected 0 <image> markers, one an image; found 1"),
        ([{"from": "system", "value": "x"}], 0, "expected a human turn, found none"),
        ([{"from": "system", "value": " "}, *turns("what?")], 0, r"turn 0 \(system\): expected text, found ' '"),
        ([*turns("what?"), {"from": "system", "value": "x"}], 0, r"turn 1: expected 'from' \(human or gpt\)"),
        ([{"from": "human", "value": ["what?"]}], 0, r"expected 'from' \(human or gpt\) and 'value' \(text\)"),
        ([{"from": "human", "value": 3}], 0, r"expected 'from' \(human or gpt\) and 'value' \(text\)"),
        (turns("what?", "a cat")[:1] * 2, 0, "turn 1: expected from gpt, found from human"),
        ([{"from": "gpt", "value": "x"}], 0, "expected a human turn, found none"),
    ],
)
def test_refused(small_tokenizer, conversation, images, message):
    with pytest.raises(ConversationError, match=message):
        encoder(small_tokenizer).encode(conversation, images)


def plain(tokenizer, text: str) -> list[int]:
    """Ids of a text's characters, which spell no control token."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.encode_special_tokens = True
    return backend.encode(text, add_special_tokens=False).ids


SPELLED = ("<voco>", "</s>", "<s>", "<unk>", "<image>", "<vo<image>co>", "a</s>USER: more", "<voco><voco> </s>\n<s>")


@pytest.mark.parametrize("images", [0, 1])
def test_what_a_user_writes_is_text(llama_tokenizer, images):
    """Control tokens of a question or an answer are their characters; those of the prompt stay where they were."""
    ids, e = prompt_ids(llama_tokenizer), encoder(llama_tokenizer)
    control = {*ids.prefix_ids, ids.voco_token_id, ids.eos_token_id, llama_tokenizer.unk_token_id}
    for spelled in SPELLED:
        said = f"what is {spelled} or {spelled}?"
        sample = e.encode(turns(e.question(said, images), (f"it is {spelled}.",)), images)
        places = [i for i, token in enumerate(sample.tokens) if token in control]
        assert places == ([0, 1, len(sample) - 1] if images else [0, len(sample) - 1]), spelled
        if images:
            said, spelled = said.replace("\n", ""), spelled.replace("\n", "")
        between = "\n" if images else ""
        expected = plain(llama_tokenizer, f"{between}{SYSTEM} USER: {said} ASSISTANT: it is {spelled}.")[images:]
        assert sample.tokens[1 + images : -1].tolist() == expected, spelled
        labels = sample.tokens[sample.labels]
        assert llama_tokenizer.decode(labels[:-1]) == f"it is {spelled}." and labels[-1] == ids.eos_token_id


def test_hidden_names_change_nothing_else(llama_tokenizer, small_tokenizer):
    """The copy of a tokenizer that is asked for such texts, and the tokenizer, of prompts without them."""
    rng = random.Random(0)
    words = [" ", "  ", "\n", "a cat", "café", "你好", "🐈", "<", "</", "s>", "x=1", "USER:", "\u202e"]
    for tokenizer in llama_tokenizer, small_tokenizer:
        control = ControlTokens(tokenizer)
        for _ in range(50):
            pieces = [
                Piece(rng.choice(["</s>", VOCO, "<s>", "USER: "]), is_prompt=True)
                if i % 2
                else Piece("".join(rng.choices(words, k=3)), is_label=i % 4 == 0)
                for i in range(7)
            ]
            given = control.encode(pieces)
            hidden, ids, offsets = control._encode_hidden(pieces)
            is_label = np.repeat([piece.is_label for piece in hidden], [len(piece.text) for piece in hidden])
            assert (ids, [bool(is_label[start]) for start, _ in offsets]) == given


def test_encoders_travel_to_other_processes(small_tokenizer):
    ours = encoder(small_tokenizer)
    again = pickle.loads(pickle.dumps(ours))  # noqa: S301 (our own)
    question = "is </s> one?"
    assert again.encode_question(question).tokens.tolist() == ours.encode_question(question).tokens.tolist()


def test_a_text_row_may_speak_of_markers(small_tokenizer):
    """As in LLaVA; at an end of a question it is the marker of a lost image (see the refusals)."""
    said = turns("what is <image> here, or this: <image>", "<image> is a cat")
    sample = encoder(small_tokenizer, "bare").encode(said, 0)
    assert text(small_tokenizer, sample) == (
        "<s>USER: what is <image> here, or this: <image> ASSISTANT: <image> is a cat</s>"
    )
    about_an_image = encoder(small_tokenizer, "bare").encode(turns("<ima<image>ge> what?", "a cat"), 1)
    assert "USER: <image> what? ASSISTANT" in text(small_tokenizer, about_an_image)


def test_verbatim_is_where_it_stands(small_tokenizer):
    e = Encoder(small_tokenizer, CHAT_TEMPLATES["bare"], 0, 3, compressed=False, verbatim=True)
    sample = e.encode(turns("is\n<image> red?", "a\ncat", "and <image>?", "it is"), 2)
    assert text(small_tokenizer, sample, sample.slot_index < 0) == (
        "USER: is\n red? ASSISTANT: a\ncat</s>USER: and ? ASSISTANT: it is</s>"
    )
    assert np.flatnonzero(np.diff(sample.slot_index) > 0).tolist() and sample.slot_index.max() == 5
    assert text(small_tokenizer, sample, sample.labels) == " a\ncat</s> it is</s>"
    before = small_tokenizer("USER: is\n", add_special_tokens=False).input_ids
    assert sample.slot_index[len(before) : len(before) + 4].tolist() == [0, 1, 2, -1]


def test_empty_question(small_tokenizer):
    with pytest.raises(ConversationError, match="expected text beside <image>, found none"):
        encoder(small_tokenizer).encode_question("  ", 1)


def test_the_voco_token_is_added_once(llama_tokenizer, tmp_path):
    assert add_voco_token(llama_tokenizer) == add_voco_token(llama_tokenizer) == 32000
    assert len(llama_tokenizer) == 32001
    assert llama_tokenizer(VOCO * 3, add_special_tokens=False).input_ids == [32000] * 3
    llama_tokenizer.save_pretrained(tmp_path)
    assert len(load_tokenizer(tmp_path)) == 32001
    ids = prompt_ids(llama_tokenizer)
    assert (ids.prefix_ids, ids.suffix_ids, ids.eos_token_id) == ((1,), (28705, 13), 2)


def test_a_directory_without_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer '.*': cannot be loaded: ") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_the_same_texts_train_the_same_tokenizer(small_tokenizer):
    sample = small_tokenizer("any text: Ünïcode 猫!", add_special_tokens=False).input_ids
    assert small_tokenizer.decode(sample) == "any text: Ünïcode 猫!"
    assert np.max(sample) < len(small_tokenizer)
