"""Conversations to token ids and labels: the prompt and label rules of the released VoCo-LLaMA, and of LLaVA.

A conversation is LLaVA's list of turns, `[{"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", …}]`.
One image in the first human turn, wherever it stands there, gives the released format:

    <s> image \\n <voco>×K \\n {system}{user}What is this?{assistant} A bus.</s>{user}…

What stands before the first `<voco>` belongs to the compress stream (see `models/voco.py`), the rest to the read
stream. With more images, or one in a later turn, or with `image_position` 'text', every image stays where it stands,
with a newline after its VoCo tokens. All other newlines of a conversation with images are dropped, as they are in the
released code; a template of control tokens keeps them. BOS, where the tokenizer has one, is the first token of all.

Plain LLaVA (compressor 'none' without VoCo tokens) has every image and newline where the text has them:

    <s> {system}{user}image \\n What is this?{assistant} A bus.</s>{user}…
"""

from collections.abc import Sequence
import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from voco_jax.chat_templates import EOS, SYSTEM, ChatTemplate
from voco_jax.data.control_tokens import ControlTokens, Piece
from voco_jax.data.records import NO_ANSWER, WRONG_FORM
from voco_jax.data.tokenizer import VOCO_TOKEN, PromptIds, prompt_ids
from voco_jax.data.turns import IMAGE, ConversationError, Marker, Parts, check_turns, parse, split_system, text_of

if TYPE_CHECKING:  # seconds to import
    from transformers import PreTrainedTokenizerFast


@dataclasses.dataclass
class Sample:
    """A conversation's read stream, all [n]: ids; whether a token is a label (to be predicted); index of the visual
    token that stands there among the sample's num_images·M visual tokens, or -1 for text."""

    tokens: np.ndarray
    labels: np.ndarray
    slot_index: np.ndarray
    num_images: int

    def __len__(self):
        return len(self.tokens)

    def __add__(self, text: "Sample") -> "Sample":
        """With text after it."""
        return Sample(
            np.concatenate([self.tokens, text.tokens]), np.concatenate([self.labels, text.labels]),
            np.concatenate([self.slot_index, text.slot_index]), self.num_images,
        )  # fmt: skip

    def first_tokens(self, there: int, count: int) -> "Sample":
        """With the first `count` of the `there` visual tokens that each image has."""
        image, token = np.divmod(self.slot_index, there)
        kept = (self.slot_index < 0) | (token < count)
        slot_index = np.where(self.slot_index < 0, -1, image * count + token)
        return Sample(self.tokens[kept], self.labels[kept], slot_index[kept].astype(np.int32), self.num_images)


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Turns conversations into samples for one tokenizer and one kind of visual tokens.

    num_voco_tokens: K, VoCo tokens an image in the text. num_visual_tokens: M, places an image takes in the read
    stream. compressed: whether those places are the VoCo tokens themselves (M = K; two streams) or stand before them
    (LLaVA and external compressors, where everything is in the read stream). verbatim: text, newlines and images stay
    as and where they are: plain LLaVA. system: the system text of conversations without their own (None: the
    template's). image_position: where the only image of a conversation stands, in its first question: before all text
    ('front'), or where its 'text' has it.
    """

    tokenizer: "PreTrainedTokenizerFast"
    template: ChatTemplate
    num_voco_tokens: int
    num_visual_tokens: int
    compressed: bool
    verbatim: bool = False
    system: str | None = None
    image_position: str = "front"
    ids: PromptIds = dataclasses.field(init=False, repr=False, compare=False)
    _texts: ChatTemplate = dataclasses.field(init=False, repr=False, compare=False)  # with the tokenizer's tokens
    _control_tokens: ControlTokens = dataclasses.field(init=False, repr=False, compare=False)
    _stop: tuple[str, int] | None = dataclasses.field(
        init=False, repr=False, compare=False
    )  # ends an answer; its token
    _image_id: int | None = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.compressed and self.num_visual_tokens != self.num_voco_tokens:
            raise ValueError("compressed images take as many places as they have VoCo tokens")
        if self.verbatim and (self.compressed or self.num_voco_tokens):
            raise ValueError("verbatim text has no VoCo tokens")
        if self.system is not None and not self.template.with_system:
            raise ValueError("the template has no place for a system text")
        eos = self.tokenizer.eos_token
        texts: dict[str, Any] = {
            name: text.replace(EOS, eos)
            for name, text in dataclasses.asdict(self.template).items()
            if isinstance(text, str)
        }
        template = dataclasses.replace(self.template, **texts)
        bos = self.tokenizer.bos_token
        if not self.verbatim and bos and template.system.startswith(bos) and bos not in template.user:
            # It is no turn's: the first token of all, which may stand before an image
            first = {name: getattr(template, name).removeprefix(bos) for name in ("system", "with_system")}
            template = dataclasses.replace(template, **first)
        control_tokens = ControlTokens(self.tokenizer, template.texts)
        object.__setattr__(self, "ids", prompt_ids(self.tokenizer))
        object.__setattr__(self, "_texts", template)
        object.__setattr__(self, "_control_tokens", control_tokens)
        object.__setattr__(self, "_stop", control_tokens.first(template.end))
        image_id = control_tokens.ids.get(IMAGE.value)
        found = self.tokenizer(f"x{IMAGE.value}\nx{IMAGE.value}x").input_ids  # some find one after a space alone
        object.__setattr__(self, "_image_id", image_id if found.count(image_id) == 2 else None)

    @property
    def stop_id(self) -> int | None:
        """The token that ends an answer in the conversation that goes on; None where the template has none there."""
        return self._stop and self._stop[1]

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens after which an answer of the model has ended."""
        return tuple(dict.fromkeys([*self.ids.stop_ids, *([] if self.stop_id is None else [self.stop_id])]))

    def encode(self, turns: Sequence[dict], num_images: int) -> Sample:
        """Ids, labels and slot indices of a conversation; a turn's 'value' is a row's text, or parts (`turns.py`).

        A last human turn without answer makes a prompt, which ends in the template's `assistant`.
        Every other answer ends in the token that ends it, a label too. Raises ConversationError.
        """
        system, turns = split_system(turns)
        values = check_turns(turns, num_images)
        if self.template.plain:
            pieces = self._plain(values, system)
        else:
            pieces = self.dialogue(values, system)
            if self.verbatim:
                return self._tokenize_verbatim(pieces, num_images)
        if self.template.keeps_newlines:
            pieces = _without_newline_after_images(pieces)
        elif num_images and not (self.template.plain and not self.num_voco_tokens):
            pieces = [p if isinstance(p, Marker) else p._replace(text=p.text.replace("\n", "")) for p in pieces]
        return self._tokenize(pieces, num_images)

    def question(self, text: str, num_images: int = 1) -> Parts:
        """What the human turn says that asks about images which stand before the question."""
        if not num_images:
            return (text,)
        if not self.verbatim:
            return (*[IMAGE] * num_images, f"\n{text}")
        return (*parse(self._texts.image, IMAGE) * num_images, self._texts.after_images + text)

    def encode_question(self, question: str, num_images: int = 1) -> Sample:
        """The prompt that asks a question about images which stand before it."""
        return self.encode([{"from": "human", "value": self.question(question, num_images)}], num_images)

    def dialogue(self, values: list[Parts], system: str | None = None) -> list[Piece | Marker]:
        """The turns with the template's text around them; `system`: the conversation's own system text."""
        for i, parts in enumerate(values):
            if not text_of(parts):
                reason = f"turn {i} ({'gpt' if i % 2 else 'human'}): expected text beside {IMAGE.value}, found none"
                raise ConversationError(reason, NO_ANSWER if i % 2 else WRONG_FORM)
        t = self._texts
        pieces: list[Piece | Marker] = []
        only = values[0].count(IMAGE) == sum(parts.count(IMAGE) for parts in values) == 1
        if only and self.image_position == "front" and not self.verbatim:
            values = [(text_of(values[0]),), *values[1:]]
            pieces.append(IMAGE)
        pieces += self._before_first(self.system if system is None else system)
        asks = len(values) % 2 == 1
        stop = self._stop[0] if self._stop else "" if asks else self.tokenizer.eos_token
        for i, parts in enumerate(values):
            if i % 2 == 0:
                before = (t.user if i else "") + ("" if parts[0] is IMAGE else t.without_images)
                pieces += [Piece(before, is_prompt=True), *_said(parts), Piece(t.assistant, is_prompt=True)]
                continue
            pieces += [Piece(t.answer, True, True), *_said(parts, True), Piece(stop, True, True)]
            if i < len(values) - 1:
                pieces.append(Piece(t.end.removeprefix(self._stop[0] if self._stop else ""), is_prompt=True))
        return [piece for piece in pieces if isinstance(piece, Marker) or piece.text]

    def _before_first(self, system: str | None) -> list[Piece | Marker]:
        """The system text, the template's own or another, and what stands before a question."""
        t = self._texts
        if system is None:
            return [Piece(t.system + t.user, is_prompt=True)]
        if not t.with_system:
            raise ConversationError("a system turn: the chat template has no place for one")
        before, _, after = t.with_system.partition(SYSTEM)
        return [Piece(before, is_prompt=True), Piece(system), Piece(after, is_prompt=True)]

    def _plain(self, values: list[Parts], system: str | None) -> list[Piece | Marker]:
        images = values[0].count(IMAGE)
        if system is not None:
            raise ConversationError("a system turn: the plain template has no place for one")
        if len(values) != 2 or not images:
            raise ConversationError("the plain template expects one turn with <image> and one caption")
        return [*[IMAGE] * images, *_said(values[1], True), Piece("\n", True, True)]

    def _tokenize(self, pieces: list[Piece | Marker], num_images: int) -> Sample:
        """Split at the images, put each one's VoCo tokens there, tokenize chunk by chunk as the released code does."""
        around = "\n" + VOCO_TOKEN * self.num_voco_tokens + "\n" if self.num_voco_tokens else "\n"
        if self.template.plain and not self.num_voco_tokens:
            around = ""
        chunks: list[list[Piece]] = [[]]
        for piece in pieces:
            if isinstance(piece, Marker):
                chunks.append([Piece(around, is_prompt=True)])
            else:
                chunks[-1].append(piece)

        tokens: list[int] = []
        labels: list[bool] = []
        slot_index: list[int] = []
        for i, chunk in enumerate(chunks):
            # Compressed, an image at the very front has its own BOS in the compress stream: text sees no other.
            if i == 0 and self.compressed and num_images and not any(piece.text for piece in chunk):
                continue
            ids, is_label = self._control_tokens.encode(chunk)
            before = [*self.ids.prefix_ids]
            if before and ids[:1] == before and chunk[0].is_prompt:  # the template's first turn begins with this token
                before = []
            if i > 0:
                before = [] if self.compressed else [self.ids.pad_token_id] * self.num_visual_tokens
                slot_index += range((i - 1) * self.num_visual_tokens, i * self.num_visual_tokens)
            if i > 0 and self.compressed:
                first = ids.index(self.ids.voco_token_id)
                ids, is_label = ids[first:], is_label[first:]
            tokens += before + ids
            labels += [False] * len(before) + is_label
            slot_index += [-1] * (len(tokens) - len(slot_index))
        return Sample(np.array(tokens, np.int32), np.array(labels, bool), np.array(slot_index, np.int32), num_images)

    def _tokenize_verbatim(self, pieces: list[Piece | Marker], num_images: int) -> Sample:
        """Ids as transformers' LLaVA makes them where the tokenizer has a token for an image: of all text at once. Else
        as LLaVA's own code does, which tokenizes what stands between images by itself."""
        image_id = self._image_id
        chunks: list[list[Piece]] = [[]]
        for piece in pieces:
            if isinstance(piece, Piece):
                chunks[-1].append(piece)
            elif image_id is not None:
                chunks[-1].append(Piece(IMAGE.value, is_prompt=True))
            else:
                chunks.append([])
        prefix = self._prefix_of_text(pieces[0])
        tokens, labels, image = [*prefix], [False] * len(prefix), -1
        for i, chunk in enumerate(chunks):
            ids, is_label = self._control_tokens.encode(chunk) if chunk else ([], [])
            between = [image] if i else []
            tokens += [*between, *(image if token == image_id else token for token in ids)]
            labels += [*[False] * len(between), *is_label]
        is_image = np.array(tokens) == image
        counts = np.where(is_image, self.num_visual_tokens, 1)
        slot_index = np.full(counts.sum(), -1, np.int32)
        slot_index[np.repeat(is_image, counts)] = np.arange(num_images * self.num_visual_tokens)
        ids_of_text = np.where(is_image, self.ids.pad_token_id, tokens).astype(np.int32)
        return Sample(np.repeat(ids_of_text, counts), np.repeat(np.array(labels, bool), counts), slot_index, num_images)

    def _prefix_of_text(self, first: Piece | Marker) -> tuple[int, ...]:
        """BOS where the tokenizer puts it before a text; not a second one where the text begins with it."""
        own = self.tokenizer("x").input_ids[:1] == [self.tokenizer.bos_token_id]
        text = first.text if isinstance(first, Piece) and first.is_prompt else ""
        has_bos = own and text.startswith(self.tokenizer.bos_token)
        return self.ids.prefix_ids if own and not has_bos else ()


def _without_newline_after_images(pieces: list[Piece | Marker]) -> list[Piece | Marker]:
    """An image's VoCo tokens have a newline after them already."""
    return [
        piece._replace(text=piece.text.removeprefix("\n"))
        if isinstance(piece, Piece) and not piece.is_prompt and i and isinstance(pieces[i - 1], Marker)
        else piece
        for i, piece in enumerate(pieces)
    ]


def _said(parts: Parts, is_label: bool = False) -> list[Piece | Marker]:
    return [part if isinstance(part, Marker) else Piece(part, is_label) for part in parts]
