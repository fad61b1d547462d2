"""Prompts to token ids, where only what the prompt's own text says is a control token.

A tokenizer takes `</s>` for the end-of-sequence token wherever it stands in a text, in a user's question too. Here a
text comes in pieces, each of the prompt or of a user. Nearly always the tokenizer's ids of the joined text are right,
which their places tell. Where a user's text spells a control token, a copy of the tokenizer is asked in which control
tokens have names that nobody can guess: the user's text is then characters, and all else is as it was.
"""

from collections.abc import Iterator, Sequence
import functools
import json
import re
import secrets
from typing import NamedTuple

import numpy as np
import tokenizers

from voco_jax.data.records import SPECIAL_TOKEN
from voco_jax.data.turns import IMAGE, ConversationError
from voco_jax.errors import UserError


class Piece(NamedTuple):
    """Some text of a conversation: whether its tokens are labels, and whether it is the prompt's own text, in which
    control tokens are meant."""

    text: str
    is_label: bool = False
    is_prompt: bool = False


class ControlTokens:
    """A tokenizer's control tokens: all special ones, `<image>`, and what else it has added of that look (`<…>`, `[…]`)
    if the prompt's `texts` hold it. Other added tokens are words."""

    def __init__(self, tokenizer, texts: Sequence[str] = ()):
        self._tokenizer = tokenizer
        added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        special |= {*tokenizer.all_special_tokens, IMAGE.value} & added.keys()
        marks = (content for content in added if content[0] + content[-1] in ("<>", "[]"))
        special |= {content for content in marks if any(content in text for text in texts)}
        self.ids = {content: added[content] for content in special}
        # A token for letters that the tokenizer does not know stands anywhere
        self._unknown = tokenizer.unk_token if tokenizer.unk_token in special else None
        self._found = frozenset(i for content, i in self.ids.items() if content != self._unknown)
        longest_first = sorted(special, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._places_in = functools.cache(self._look_for)
        self._hidden: tuple[tokenizers.Tokenizer, dict[str, str]] | None = None

    def __getstate__(self):
        return {"_tokenizer": self._tokenizer, "texts": list(self.ids)}

    def __setstate__(self, state):
        self.__init__(state["_tokenizer"], state["texts"])

    def first(self, text: str) -> tuple[str, int] | None:
        """A text of the prompt up to its first control token, with it, and that token's id; None where it has none."""
        found = self._pattern.search(text)
        return found and (text[: found.end()], self.ids[found[0]])

    def encode(self, pieces: Sequence[Piece]) -> tuple[list[int], list[bool]]:
        """Ids of the joined text, and which tokens begin inside a label piece.

        ConversationError for a user's text that the tokenizer has no characters for.
        """
        text = "".join(piece.text for piece in pieces)
        encoding = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = list(encoding.input_ids), encoding.offset_mapping
        said = "" if self._unknown is None else "".join(piece.text for piece in pieces if not piece.is_prompt)
        if not self._as_meant(pieces, ids, offsets) or (self._unknown and self._unknown in said):
            pieces, ids, offsets = self._encode_hidden(pieces)
            text = "".join(piece.text for piece in pieces)
        is_label = np.repeat([piece.is_label for piece in pieces], [len(piece.text) for piece in pieces])
        return ids, is_label[[start for start, _ in offsets]].tolist() if ids else []

    def _as_meant(self, pieces: Sequence[Piece], ids: Sequence[int], offsets) -> bool:
        """Whether the control tokens among the ids are those of the prompt's own text."""
        found = [offsets[i] for i, token in enumerate(ids) if token in self._found]
        meant = list(self._meant(pieces))
        return len(found) == len(meant) and all(
            start <= place < end for (start, end), place in zip(found, meant, strict=True)
        )

    def _meant(self, pieces: Sequence[Piece]) -> Iterator[int]:
        start = 0
        for piece in pieces:
            if piece.is_prompt:
                yield from (start + place for place in self._places_in(piece.text))
            start += len(piece.text)

    def _look_for(self, text: str) -> list[int]:
        return [found.start() for found in self._pattern.finditer(text) if found[0] != self._unknown]

    def _encode_hidden(self, pieces: Sequence[Piece]):
        """The pieces under hidden names, their ids and offsets."""
        if self._hidden is None:
            self._hidden = hide(self._tokenizer.backend_tokenizer, self.ids)
        backend, names = self._hidden
        hidden = [
            piece._replace(text=self._pattern.sub(lambda found: names[found[0]], piece.text))
            if piece.is_prompt else piece
            for piece in pieces
        ]  # fmt: skip
        encoding = backend.encode("".join(piece.text for piece in hidden), add_special_tokens=False)
        found = [i for i in encoding.ids if i in self._found]
        meant = [self.ids[token] for p in pieces if p.is_prompt for token in self._pattern.findall(p.text)]
        if found != [i for i in meant if i in self._found]:
            spelled = next(filter(None, (self._pattern.search(p.text) for p in pieces if not p.is_prompt)), None)
            name = repr(spelled[0]) if spelled else "a text"
            raise ConversationError(f"{name}: this tokenizer makes a special token of it, not text", SPECIAL_TOKEN)
        return hidden, list(encoding.ids), encoding.offsets


def hide(backend: tokenizers.Tokenizer, ids: dict[str, int]) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """A copy of a tokenizer in which the tokens of `ids` have names that stand in no text; and which names.

    The names are of code points that Unicode keeps out of text (U+FDD0 …), in an order drawn anew by each process.
    """
    drawn = "".join(chr(0xFDD0 + int(digit, 16)) for digit in secrets.token_hex(12))
    digits = "".join(map(chr, range(0xFDE0, 0xFDF0)))
    names = {
        content: drawn + "".join(digits[int(digit, 16)] for digit in f"{n:04x}") for n, content in enumerate(ids)
    }  # fmt: skip
    state = json.loads(backend.to_str())
    model = state["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(piece, piece): i for piece, i in vocabulary.items()}
    else:  # of a unigram model, with scores
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    if "merges" in model:
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [[a, b] for a, b in pairs if not names.keys() & {a, b, a + b}]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    for token in state["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    state |= {"truncation": None, "padding": None}
    copy = tokenizers.Tokenizer.from_str(json.dumps(state))
    moved = next((content for content, i in ids.items() if copy.token_to_id(names[content]) != i), None)
    if moved is not None:
        raise UserError(f"tokenizer: {moved!r}: expected id {ids[moved]} after the tokens before it, found another")
    return copy, names
