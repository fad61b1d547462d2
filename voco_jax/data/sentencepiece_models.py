"""Sentencepiece's `tokenizer.model` as a tokenizer with character offsets, and compared with one."""

import functools

from voco_jax.chat_templates import CHAT_TEMPLATES
from voco_jax.errors import UserError

# What prompts hold, and what tokenizers differ in. No text begins with a space: where transformers marks the beginning
# of a text with a space, it adds no second one, and sentencepiece does.
TEXTS = (
    CHAT_TEMPLATES["llava_v1"].exchange("What is this?", "It's red."),
    "a  b   c    d\ne\n\nf\tg ",
    "0 12 345 6,789.01 (2024-05-06) x!=y",
    "Où est le café? naïve über straße ﬁn ①",
    "你好，世界。これは何ですか？ Что это? 😀👍🏽",
)


_LONGEST = 1000  # characters of a piece; a hundred is much


class SentencePiece:
    """A sentencepiece model: the library's processor, and its protocol buffer for what the processor does not tell.

    `name` is its file's, for errors. UserError for bytes that are not a sentencepiece model.
    """

    def __init__(self, content: bytes, name: str):
        from sentencepiece import SentencePieceProcessor

        self.name, self._content = name, content
        try:
            self.processor = SentencePieceProcessor(model_proto=content)
            self._pieces = self.processor.id_to_piece(list(range(len(self.processor))))
        except (OSError, RuntimeError, ValueError) as error:  # the last where pieces are not UTF-8
            raise UserError(f"{name}: not a sentencepiece model: {error}") from None
        longest = max(map(len, self._pieces), default=0)
        if self.processor.unk_id() < 0 or longest > _LONGEST:
            found = f"found one of {longest}" if longest > _LONGEST else "found no piece for what is unknown"
            raise UserError(f"{name}: expected pieces of at most {_LONGEST} characters, {found}")

    @functools.cached_property
    def proto(self):
        from sentencepiece import sentencepiece_model_pb2

        return sentencepiece_model_pb2.ModelProto.FromString(self._content)

    @property
    def named_tokens(self) -> dict[str, str]:
        """The model's own special tokens, by role."""
        ids = {key: getattr(self.proto.trainer_spec, f"{key}_id") for key in ("bos", "eos", "unk")}
        return {f"{key}_token": self.processor.id_to_piece(i) for key, i in ids.items() if i >= 0}

    def of_type(self, *names: str) -> dict[str, int]:
        """Pieces of these types (NORMAL, CONTROL, …) and their ids."""
        types = {getattr(self.proto.SentencePiece, name) for name in names}
        return {piece.piece: i for i, piece in enumerate(self.proto.pieces) if piece.type in types}

    def to_backend(self, *, prefix_after_special: bool, prefix: bool = True):
        """A `tokenizers.Tokenizer` with the same ids. UserError where that is not possible.

        `prefix_after_special`: whether text after a special token begins with a space too, as the first text does;
        `prefix` False: no text does. Both say nothing about a model that was trained to add no space.
        """
        import tokenizers
        from tokenizers import Regex, decoders, normalizers, pre_tokenizers

        spec = self.proto.normalizer_spec
        prefix = prefix and spec.add_dummy_prefix
        is_unigram = self.proto.trainer_spec.model_type == self.proto.trainer_spec.UNIGRAM
        backend = tokenizers.Tokenizer(self._unigram() if is_unigram else self._byte_pairs())
        steps: list[normalizers.Normalizer] = []
        if spec.precompiled_charsmap:
            steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
        if spec.remove_extra_whitespaces:
            steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
        if prefix and prefix_after_special:
            steps.append(normalizers.Prepend("▁"))
        backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
        if prefix and not prefix_after_special:
            backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
        start = [decoders.Strip(" ", 1, 0)] if prefix else []
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *start]
        )
        symbols = self.of_type("USER_DEFINED")
        backend.add_tokens([tokenizers.AddedToken(symbol, normalized=False) for symbol in symbols])
        self.compare(backend, "the tokenizers library", prefix=prefix, also="".join(f"a{symbol}" for symbol in symbols))
        return backend

    def compare(self, backend, other: str, *, prefix: bool = True, also: str = "") -> None:
        """UserError unless the `other` tokenizer has the same pieces, and the same ids for some texts and `also` this
        one; `prefix` as for `to_backend`."""
        processor = self.processor if prefix else self._without_prefix()
        own = self.of_type("NORMAL", "BYTE")  # pieces that no tokenizer gives another use
        for i, piece in enumerate(self._pieces):
            token = backend.id_to_token(i)
            if token != piece and piece in own:
                raise UserError(
                    f"{self.name}: {other} expected to have the same tokens: {i} is {piece!r}, found {token!r}"
                )
        for text in (*TEXTS, also):
            expected, found = processor.encode(text), backend.encode(text, add_special_tokens=False).ids
            if expected != found:
                at = next((i for i, pair in enumerate(zip(expected, found, strict=False)) if pair[0] != pair[1]), 0)
                raise UserError(
                    f"{self.name}: {other} expected to give the same ids: {text[:24]!r}… has "
                    f"{processor.id_to_piece(expected[at : at + 3])} here and "
                    f"{[backend.id_to_token(i) for i in found[at : at + 3]]} there"
                )

    def _without_prefix(self):
        """A processor that puts no space before a text."""
        from sentencepiece import SentencePieceProcessor

        proto = type(self.proto).FromString(self._content)
        proto.normalizer_spec.add_dummy_prefix = False
        return SentencePieceProcessor(model_proto=proto.SerializeToString())

    def _byte_pairs(self):
        """The merges are those of the pieces' scores, not of their order: runs of spaces come first and score least."""
        from tokenizers.models import BPE

        pieces, normal = self.proto.pieces, self.of_type("NORMAL")
        vocabulary = {piece.piece: i for i, piece in enumerate(pieces)}
        merges = [
            (-pieces[i].score, (piece[:cut], piece[cut:]))
            for piece, i in normal.items()
            for cut in range(1, len(piece))
            if piece[:cut] in normal and piece[cut:] in normal
        ]
        return BPE(
            vocab=vocabulary,
            merges=[pair for _, pair in sorted(merges, key=lambda merge: merge[0])],
            unk_token=self.processor.id_to_piece(self.processor.unk_id()),
            fuse_unk=True,
            byte_fallback=bool(self.of_type("BYTE")),
        )

    def _unigram(self):
        from tokenizers.models import Unigram

        pieces = [(piece.piece, piece.score) for piece in self.proto.pieces]
        return Unigram(pieces, unk_id=self.processor.unk_id(), byte_fallback=bool(self.of_type("BYTE")))
