"""Turns of a conversation as parts: text, and the places of its images. Markers are structure, text is only text.

LLaVA's rows write an image's place into the text, `"<image>\\nWhat is this?"`. It is read once, here; what a turn says
beside that, `<image>`, `<s>` or `<voco>` among it, is characters like any others (`control_tokens.py` keeps it so).
"""

from collections.abc import Sequence
import enum
import re

from voco_jax.data.records import IMAGE_COUNT, NO_ANSWER, NOT_UTF8, WRONG_FORM, BadRecord
from voco_jax.terminal import shortened


class Marker(enum.Enum):
    """Where an image, or all frames of a video, stand. The value is how LLaVA's rows write it."""

    IMAGE = "<image>"
    VIDEO = "<video>"

    def __repr__(self):
        return self.value


IMAGE, VIDEO = Marker.IMAGE, Marker.VIDEO
Part = str | Marker
Parts = tuple[Part, ...]  # what a turn says; no JSON is one


class ConversationError(BadRecord):
    """A conversation that cannot be used; the message says why. Training counts such samples and goes on."""

    def __init__(self, message: str, kind: str = WRONG_FORM):
        super().__init__(kind, message)

    def __reduce__(self):
        return ConversationError, (self.message, self.kind)


def parse(text: str, *markers: Marker) -> Parts:
    """The text in parts, cut at what stands for one of the markers.

    >>> parse("is <image> red?", IMAGE)
    ('is ', <image>, ' red?')
    """
    parts: list[Part] = [text]
    for marker in markers:
        split: list[Part] = []
        for part in parts:
            first, *rest = part.split(marker.value) if isinstance(part, str) else [part]
            split += [first, *(p for text in rest for p in (marker, text))]
        parts = split
    return tuple(part for part in parts if part != "")


def text_of(value: str | Parts) -> str:
    """What a turn's value says, without its markers (`<image>` and `<video>` of a row's text)."""
    parts = parse(value, IMAGE, VIDEO) if isinstance(value, str) else value
    return "".join(part for part in parts if isinstance(part, str)).strip()


def first_question(turns: Sequence[dict]) -> tuple[str, str] | None:
    """The first question of a row's conversation, as it stands there, and its answer; None for what is of another form.

    >>> first_question([{"from": "human", "value": "<image>\\nWho wins?"}, {"from": "gpt", "value": "Nobody."}])
    ('<image>\\nWho wins?', 'Nobody.')
    """
    try:
        human = next(i for i, turn in enumerate(turns) if turn["from"] == "human")
        return turns[human]["value"] + "", turns[human + 1]["value"] + ""
    except (StopIteration, IndexError, KeyError, TypeError, AttributeError):
        return None


def spread_video(turns: Sequence[dict], frames: Sequence[str]) -> list[dict]:
    """The turns with an image a frame in place of `<video>`, each after its text of `frames` (or none).

    >>> spread_video([{"from": "human", "value": "<video>\\nWho wins?"}], ["00:00.5 ", "00:01.5 "])
    [{'from': 'human', 'value': ('00:00.5 ', <image>, '00:01.5 ', <image>, '\\nWho wins?')}]
    """
    images = [part for text in frames for part in ((text, IMAGE) if text else (IMAGE,))]
    spread, found = [], 0
    for turn in turns:
        value = turn.get("value") if isinstance(turn, dict) else None
        parts = parse(value, VIDEO, IMAGE) if isinstance(value, str) else value
        if isinstance(parts, tuple) and VIDEO in parts:  # another value is for check_turns to find
            found += parts.count(VIDEO)
            turn = turn | {"value": tuple(p for part in parts for p in (images if part is VIDEO else (part,)))}
        spread.append(turn)
    if found != 1:
        raise ConversationError(f"conversation: expected 1 {VIDEO.value} marker, found {found}", IMAGE_COUNT)
    return spread


def split_system(turns: Sequence[dict]) -> tuple[str | None, Sequence[dict]]:
    """(system text of a conversation that begins with one, the turns after it); ConversationError for one that is none.

    >>> split_system([{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Why?"}])
    ('Be brief.', [{'from': 'human', 'value': 'Why?'}])
    """
    if not isinstance(turns, Sequence) or not turns or not isinstance(turns[0], dict):
        return None, turns
    if turns[0].get("from") != "system":
        return None, turns
    text = turns[0].get("value")
    if not isinstance(text, str) or not text.strip():
        raise ConversationError(f"turn 0 (system): expected text, found {shortened(text) if text else 'none'}")
    check_utf8(text, "turn 0 (system)")
    if len(turns) == 1:
        raise ConversationError("conversation: expected a human turn, found none")
    return text, turns[1:]


def check_utf8(text: str, where: str) -> None:
    """ConversationError for half of a character."""
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ConversationError(f"{where}: half of a surrogate pair, which is no text", NOT_UTF8)


def check_turns(turns: Sequence[dict], num_images: int) -> list[Parts]:
    """What each turn says, from the first human one on, one by a human and one by the model in alternation.

    A turn's 'value' is a row's text, whose markers are read here, or parts. ConversationError where the turns are not a
    conversation about so many images.
    """
    if not isinstance(turns, Sequence) or not turns:
        raise ConversationError("conversation: expected at least one turn, found none")
    for i, turn in enumerate(turns):
        role = turn.get("from") if isinstance(turn, dict) else None
        if role not in ("human", "gpt") or not isinstance(turn.get("value"), str | tuple):
            raise ConversationError(
                f"turn {i}: expected 'from' (human or gpt) and 'value' (text), found {shortened(turn)}"
            )
    turns = list(turns[1:] if turns[0]["from"] == "gpt" else turns)
    if not turns:
        raise ConversationError("conversation: expected a human turn, found none")
    values = []
    for i, turn in enumerate(turns):
        expected = "gpt" if i % 2 else "human"
        if turn["from"] != expected:
            raise ConversationError(f"turn {i}: expected from {expected}, found from {turn['from']}")
        value = turn["value"]
        parts = _parse_row(value, num_images, is_human=not i % 2) if isinstance(value, str) else value
        text = "".join(part for part in parts if isinstance(part, str))
        if not parts or (not text.strip() and IMAGE not in parts):
            kind = NO_ANSWER if i % 2 else WRONG_FORM
            raise ConversationError(f"turn {i} ({turn['from']}): expected text, found none", kind)
        check_utf8(text, f"turn {i} ({turn['from']})")
        values.append(parts)
    found = sum(parts.count(IMAGE) for parts in values)
    if found != num_images:
        reason = f"conversation: expected {num_images} {IMAGE.value} markers, one an image; found {found}"
        raise ConversationError(reason, IMAGE_COUNT)
    return values


def _parse_row(text: str, num_images: int, *, is_human: bool) -> Parts:
    """Parts of a row's turn. Without images, `<image>` is a word like any other, as in LLaVA; but at a question's start
    or in a last line of its own, where LLaVA's rows have their markers, it tells of an image that the row has lost."""
    return parse(text, IMAGE) if num_images or (is_human and _AT_AN_END.search(text)) else (text,)


_AT_AN_END = re.compile(rf"^(\s*{IMAGE.value})+|(\n\s*{IMAGE.value})+\s*$")


def without_markers(question: str) -> str:
    """A question's text without the `<image>` markers at its start and in last lines of their own.

    >>> without_markers("<image>\\nWhat does <image> mean?")
    'What does <image> mean?'
    """
    return _AT_AN_END.sub("", question).strip()
