"""What is streamed of an answer is the beginning of the whole answer, at every cut, for any tokens."""

import random

import pytest
import tokenizers
from tokenizers import decoders

from tests.helpers.tokenizer_kinds import byte_level, directory, sentencepiece_model
from voco_jax.data.tokenizer import load_tokenizer, make_tokenizer
from voco_jax.infer.text_stream import Detokenizer

TEXTS = ["yes 😀😀 no", " do n't . 'x' ! ", "e\u0301 und ß", "👍🏽👨‍👩‍👧 a", "你好\ufffd", "a\n\n  b ", "\xa0x\u2003"]


def word_pieces():
    words = ["[UNK]", "a", "##b", "do", "n", "'", "t", ".", "!", "##'", "##😀", "</s>"]
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece({word: i for i, word in enumerate(words)}))
    backend.decoder = decoders.WordPiece(cleanup=True)
    return make_tokenizer(backend, {"eos_token": "</s>"})


def with_decoder(decoder):
    backend = byte_level()
    backend.decoder = decoder
    return make_tokenizer(backend, {"eos_token": "</s>"})


def sentencepiece(path):
    return load_tokenizer(directory(path / "t", tokenizer_model=sentencepiece_model()))


KINDS = {
    "byte level": lambda path: with_decoder(decoders.ByteLevel()),
    "sentencepiece": sentencepiece,
    "Metaspace": lambda path: with_decoder(decoders.Metaspace()),
    "no decoder": lambda path: with_decoder(None),
    "word pieces": lambda path: word_pieces(),
    "unknown": lambda path: with_decoder(
        decoders.Sequence([decoders.ByteLevel(), decoders.Fuse(), decoders.Replace("é a", "c")])
    ),
}


@pytest.fixture(scope="module", params=KINDS, ids=str)
def tokenizer(request, tmp_path_factory):
    return KINDS[request.param](tmp_path_factory.mktemp("stream"))


def answers(tokenizer):
    """Answers' tokens: of texts, whole and cut; of bytes alone; and any."""
    rng = random.Random(0)
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        yield ids
        yield [j for i in ids for j in (i, tokenizer.eos_token_id)]  # which is no text
    tokens = tokenizer.get_vocab()
    few = [i for token, i in tokens.items() if len(token) == 1 or token.startswith(("<", "##"))]
    letters = tokenizer("😀é a", add_special_tokens=False).input_ids
    for choice in [few, letters, [*tokens.values(), len(tokens), len(tokens) + 7]]:
        for _ in range(60):
            yield rng.choices(choice, k=rng.randint(1, 16))


def test_what_is_sure_begins_the_whole(tokenizer):
    decoder = Detokenizer(tokenizer)
    for ids in answers(tokenizer):
        sure = [decoder.sure(ids[:n]) for n in range(len(ids) + 1)]
        for n, text in enumerate(sure):  # of each answer that goes on from there, and of one that ends
            assert decoder.text(ids[:n]).startswith(text), (ids[:n], text)
            assert all(later.startswith(text) for later in sure[n:]), (ids, text)
            assert decoder.text(ids).startswith(text), (ids, text)


def test_a_whole_is_the_tokenizers(tokenizer):
    decoder = Detokenizer(tokenizer)
    for ids in answers(tokenizer):
        assert decoder.text(ids) == tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_a_piece_comes_as_early_as_it_is_sure(tmp_path):
    for tokenizer in (sentencepiece(tmp_path), with_decoder(decoders.ByteLevel())):
        decoder = Detokenizer(tokenizer)
        ids = tokenizer("a red bus", add_special_tokens=False).input_ids
        assert [decoder.sure(ids[:n]) for n in range(len(ids) + 1)] == [
            decoder.text(ids[:n]) for n in range(len(ids) + 1)
        ]
        ids = tokenizer("no 😀", add_special_tokens=False).input_ids
        assert decoder.sure(ids[:-1]) == "no" and decoder.text(ids[:-1]) != "no"
        after = ids + tokenizer("a", add_special_tokens=False).input_ids
        assert decoder.sure(after).startswith("no 😀")
    assert decoder.sure(ids) == "no 😀"  # of a byte-level tokenizer: nothing can change it
