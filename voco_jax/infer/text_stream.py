"""The text of an answer, and how much of it is sure while more tokens come."""

from collections.abc import Sequence
import json
import re

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# Decoders by which the text of some tokens begins the text of these and more: token by token, or on all text joined by
# `Fuse`. ByteLevel's last letter, and ByteFallback's last bytes, may still change.
_BY_TOKEN = ("ByteFallback", "ByteLevel", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece")
_ON_ALL_TEXT = ("Fuse", "Strip")


class Detokenizer:
    """Token ids to the text of an answer, without special tokens and without spaces around it."""

    def __init__(self, tokenizer):
        self._backend = tokenizer.backend_tokenizer
        self._special = {i for i, token in self._backend.get_added_tokens_decoder().items() if token.special}
        steps = _steps(self._backend.decoder)
        self._is_known = all(
            step in (_ON_ALL_TEXT if "Fuse" in steps[:n] else _BY_TOKEN) for n, step in enumerate(steps)
        )
        self._has_bytes = "ByteFallback" in steps

    def text(self, ids: Sequence[int]) -> str:
        """The text of a whole answer."""
        return self._decode(ids).strip()

    def sure(self, ids: Sequence[int]) -> str:
        """What `text` begins with whatever tokens follow these: as much as can be known.

        Left out are spaces at the end, which may be the answer's last; half of a letter; and of a tokenizer with tokens
        for bytes the last run of those, which is letters or not as a whole.
        """
        if not self._is_known:
            return ""
        if self._has_bytes:
            kept = list(ids)
            while kept and self._is_skipped_or_byte(kept[-1]):
                kept.pop()
            ids = kept
        return self._decode(ids).removesuffix("\N{REPLACEMENT CHARACTER}").strip()

    def token(self, i: int) -> tuple[str, bytes | None]:
        """A token by itself, with the space before it; and its bytes, None where it is some of a letter's."""
        if (piece := self._backend.id_to_token(int(i))) is None:
            return "", None
        if _BYTE.fullmatch(piece):
            byte = bytes([int(piece[3:5], 16)])
            return (byte.decode(), byte) if byte.isascii() else (f"bytes:\\x{byte[0]:02x}", byte)
        if i in self._special:
            return piece, piece.encode()
        text = self._backend.decode([int(i)], skip_special_tokens=False)
        if piece.startswith(("\N{LOWER ONE EIGHTH BLOCK}", "Ġ")) and not text.startswith(" "):
            text = f" {text}"
        return text, None if "\N{REPLACEMENT CHARACTER}" in text else text.encode()

    def _decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def _is_skipped_or_byte(self, i: int) -> bool:
        token = self._backend.id_to_token(int(i))
        return token is None or i in self._special or _BYTE.fullmatch(token) is not None


def _steps(decoder) -> list[str]:
    """The names of what a decoder does, one after the other."""
    if decoder is None:
        return []  # tokens with a space between them
    state = json.loads(decoder.__getstate__())
    return [step["type"] for step in state.get("decoders", [state])]
