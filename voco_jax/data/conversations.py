"""Conversations to token ids and labels: the prompt and label rules of the released VoCo-LLaMA.

A conversation is LLaVA's list of turns, `[{"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", …}]`.
One image in the first human turn, wherever it stands there, gives the released format:

    <s> image \\n <voco>×K \\n A chat between … USER: What is this? ASSISTANT: A bus.</s>USER: …

What stands before the first `<voco>` belongs to the compress stream (see `models/voco.py`), the rest to the read
stream. With more images, or one in a later turn, every image stays where it stands, with a newline after its VoCo
tokens. All other newlines of a conversation with images are dropped, as they are in the released code.
"""

from collections.abc import Sequence
import dataclasses

import numpy as np

from voco_jax.data.records import IMAGE_COUNT, NO_ANSWER, NOT_UTF8, SPECIAL_TOKEN, WRONG_FORM, BadRecord, shown
from voco_jax.data.tokenizer import VOCO_TOKEN, prompt_ids
from voco_jax.errors import UserError

IMAGE = "<image>"
VIDEO = "<video>"


class ConversationError(BadRecord):
    """A conversation that cannot be used; the message says why. Training counts such samples and goes on."""

    def __init__(self, message: str, kind: str = WRONG_FORM):
        super().__init__(kind, message)

    def __reduce__(self):
        return ConversationError, (self.message, self.kind)


@dataclasses.dataclass(frozen=True)
class Template:
    """What surrounds the turns. `plain` is captions alone: `<image>caption\\n`, no roles, every token a label."""

    system: str = ""
    user: str = "USER"
    assistant: str = "ASSISTANT"
    plain: bool = False


_HELPFUL = "The assistant gives helpful, detailed, and polite answers to the user's questions."
_WATCH = (
    "The assistant carefully watch the video and pay attention to the cause and sequence of events, the detail and "
    "movement of objects, and the action and pose of persons. Based on {} observations, give the answer that best "
    "addresses the question."
)
_CHAT = "A chat between a curious user and an artificial intelligence assistant"

# Wording exactly as in the released code, slips included: checkpoints were trained on it.
TEMPLATES = {
    "voco_v1": Template(f"{_CHAT} of the image. {_HELPFUL}"),
    "voco_video": Template(f"{_CHAT} of the video. {_HELPFUL}"),
    "voco_video_events": Template(f"{_CHAT} of the video. {_WATCH.format('his')}\n"),
    "voco_video_helpful_events": Template(f"{_CHAT} of the video. {_HELPFUL} {_WATCH.format('the')}"),
    "llava_v1": Template(f"{_CHAT}. {_HELPFUL}"),
    "bare": Template(),
    "plain": Template(plain=True),
}


def get_template(name: str) -> Template:
    if name not in TEMPLATES:
        raise UserError(f"template: expected one of {', '.join(TEMPLATES)}; found {name!r}")
    return TEMPLATES[name]


@dataclasses.dataclass
class Sample:
    """A conversation's read stream, all [n]: ids; whether a token is a label (to be predicted); index of the visual
    token that stands there among the sample's num_images·M visual tokens, or -1 for text."""

    tokens: np.ndarray
    labels: np.ndarray
    visual: np.ndarray
    num_images: int

    def __len__(self):
        return len(self.tokens)


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Turns conversations into samples for one tokenizer and one kind of visual tokens.

    num_voco_tokens: K, VoCo tokens an image in the text. num_visual_tokens: M, places an image takes in the read
    stream. compressed: whether those places are the VoCo tokens themselves (M = K; two streams) or stand before them
    (LLaVA and external compressors, where everything is in the read stream).
    """

    tokenizer: object
    template: Template
    num_voco_tokens: int
    num_visual_tokens: int
    compressed: bool

    def __post_init__(self):
        if self.compressed and self.num_visual_tokens != self.num_voco_tokens:
            raise ValueError("compressed images take as many places as they have VoCo tokens")
        object.__setattr__(self, "ids", prompt_ids(self.tokenizer))

    def encode(self, turns: Sequence[dict], num_images: int) -> Sample:
        """Ids, labels and visual indices of a conversation.

        A last human turn without answer makes a prompt, which ends in `ASSISTANT:`. Raises ConversationError.
        """
        turns = check_turns(turns, num_images, (VOCO_TOKEN, *self.tokenizer.all_special_tokens))
        pieces = self._plain(turns) if self.template.plain else self._dialogue(turns)
        if num_images and not (self.template.plain and not self.num_voco_tokens):
            pieces = [(text.replace("\n", ""), is_label) for text, is_label in pieces]
        return self._tokenize(pieces, num_images)

    def encode_question(self, question: str, num_images: int = 1) -> Sample:
        """The prompt that asks a question about images which stand before it."""
        return self.encode([{"from": "human", "value": IMAGE * num_images + "\n" + question}], num_images)

    def _dialogue(self, turns) -> list[tuple[str, bool]]:
        """Text pieces and whether they are labels; `<image>` still stands in the text."""
        t, eos = self.template, self.tokenizer.eos_token
        values = [turn["value"] for turn in turns]
        for i, value in enumerate(values):
            if not value.replace(IMAGE, "").strip():
                reason = f"turn {i} ({turns[i]['from']}): expected text beside {IMAGE}, found none"
                raise ConversationError(reason, NO_ANSWER if i % 2 else WRONG_FORM)
        head = ""
        if values[0].count(IMAGE) == sum(value.count(IMAGE) for value in values) == 1:
            values[0] = values[0].replace(IMAGE, "").strip()
            head = IMAGE
        text = head + (t.system + " " if t.system else "")
        pieces = []
        for i, value in enumerate(values):
            if i % 2 == 0:
                pieces.append((f"{text}{t.user}: {value} {t.assistant}:", False))
            else:
                pieces.append((f" {value}{eos}", True))
            text = ""
        return pieces

    def _plain(self, turns) -> list[tuple[str, bool]]:
        images = turns[0]["value"].count(IMAGE)
        if len(turns) != 2 or not images:
            raise ConversationError("the plain template expects one turn with <image> and one caption")
        return [(IMAGE * images, False), (turns[1]["value"] + "\n", True)]

    def _tokenize(self, pieces: list[tuple[str, bool]], num_images: int) -> Sample:
        """Split at the images, put each one's VoCo tokens there, tokenize chunk by chunk as the released code does."""
        chunks: list[list[tuple[str, bool]]] = [[]]
        for text, is_label in pieces:
            before, *after = text.split(IMAGE)
            chunks[-1].append((before, is_label))
            chunks.extend([(part, is_label)] for part in after)
        around = "\n" + VOCO_TOKEN * self.num_voco_tokens + "\n" if self.num_voco_tokens else "\n"
        if self.template.plain and not self.num_voco_tokens:
            around = ""

        tokens, labels, visual = [], [], []
        for i, chunk in enumerate(chunks):
            text = "".join(part for part, _ in chunk)
            if i == 0:
                # Compressed, an image at the very front has its own BOS in the compress stream: text sees no other.
                if text or num_images == 0 or not self.compressed:
                    ids, is_label = self._encode_chunk(chunk)
                    tokens += [*self.ids.prefix_ids, *ids]
                    labels += [False] * len(self.ids.prefix_ids) + is_label
                    visual += [-1] * (len(tokens) - len(visual))
                continue
            ids, is_label = self._encode_chunk([(around, False), *chunk])
            indices = range((i - 1) * self.num_visual_tokens, i * self.num_visual_tokens)
            if self.compressed:
                first = ids.index(self.ids.voco_token_id)
                ids, is_label = ids[first:], is_label[first:]
                visual += [*indices] + [-1] * (len(ids) - self.num_visual_tokens)
            else:
                ids = [self.ids.pad_token_id] * self.num_visual_tokens + ids
                is_label = [False] * self.num_visual_tokens + is_label
                visual += [*indices] + [-1] * (len(ids) - self.num_visual_tokens)
            tokens += ids
            labels += is_label
        return Sample(np.array(tokens, np.int32), np.array(labels, bool), np.array(visual, np.int32), num_images)

    def _encode_chunk(self, chunk: list[tuple[str, bool]]) -> tuple[list[int], list[bool]]:
        """Ids of the joined text, and which tokens begin inside a label piece."""
        text = "".join(part for part, _ in chunk)
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        is_label_char = np.repeat([is_label for _, is_label in chunk], [len(part) for part, _ in chunk])
        return list(encoding.input_ids), [bool(is_label_char[start]) for start, _ in encoding.offset_mapping]


def spread_video(turns: Sequence[dict], frames: Sequence[str]) -> list[dict]:
    """The turns with an image marker a frame in place of `<video>`, each after its text of `frames` (or none).

    >>> spread_video([{"from": "human", "value": "<video>\\nWho wins?"}], ["00:00.5 ", "00:01.5 "])
    [{'from': 'human', 'value': '00:00.5 <image>00:01.5 <image>\\nWho wins?'}]
    """
    texts = [turn.get("value") if isinstance(turn, dict) else None for turn in turns]
    texts = [text if isinstance(text, str) else "" for text in texts]  # for check_turns to find
    found = sum(text.count(VIDEO) for text in texts)
    if found != 1:
        raise ConversationError(f"conversation: expected 1 {VIDEO} marker, found {found}", IMAGE_COUNT)
    images = "".join(text + IMAGE for text in frames)
    return [
        turn | {"value": text.replace(VIDEO, images)} if VIDEO in text else turn
        for turn, text in zip(turns, texts, strict=True)
    ]


def check_turns(turns: Sequence[dict], num_images: int, special: Sequence[str]) -> list[dict]:
    """The turns from the first human one on; ConversationError where they are not a conversation."""
    if not isinstance(turns, Sequence) or not turns:
        raise ConversationError("conversation: expected at least one turn, found none")
    for i, turn in enumerate(turns):
        role = turn.get("from") if isinstance(turn, dict) else None
        if role not in ("human", "gpt") or not isinstance(turn.get("value"), str):
            raise ConversationError(f"turn {i}: expected 'from' (human or gpt) and 'value' (text), found {shown(turn)}")
    turns = list(turns[1:] if turns[0]["from"] == "gpt" else turns)
    if not turns:
        raise ConversationError("conversation: expected a human turn, found none")
    for i, turn in enumerate(turns):
        expected = "gpt" if i % 2 else "human"
        if turn["from"] != expected:
            raise ConversationError(f"turn {i}: expected from {expected}, found from {turn['from']}")
        if not turn["value"].strip():
            kind = NO_ANSWER if i % 2 else WRONG_FORM
            raise ConversationError(f"turn {i} ({turn['from']}): expected text, found none", kind)
        if not turn["value"].isascii() and any("\ud800" <= letter <= "\udfff" for letter in turn["value"]):
            raise ConversationError(f"turn {i} ({turn['from']}): half of a surrogate pair, which is no text", NOT_UTF8)
        # What the text becomes without its markers and newlines is looked at too: "<vo<image>co>" has a token inside.
        without = turn["value"].replace("\n", "").replace(IMAGE, "")
        for token in special:
            if token in turn["value"] or token in without:
                reason = f"turn {i} ({turn['from']}): contains the special token {token!r}"
                raise ConversationError(reason, SPECIAL_TOKEN)
        if IMAGE in without or turn["value"].replace("\n", "").count(IMAGE) != turn["value"].count(IMAGE):
            reason = f"turn {i} ({turn['from']}): an {IMAGE} marker around another or around a newline"
            raise ConversationError(reason, IMAGE_COUNT)
    found = sum(turn["value"].count(IMAGE) for turn in turns)
    if found != num_images:
        reason = f"conversation: expected {num_images} {IMAGE} markers, one an image; found {found}"
        raise ConversationError(reason, IMAGE_COUNT)
    return turns
