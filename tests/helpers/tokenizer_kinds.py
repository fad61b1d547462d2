"""Small tokenizers of the kinds that checkpoints have, and directories of them."""

from collections.abc import Sequence
import io
import json
from pathlib import Path

from sentencepiece import SentencePieceTrainer
import tokenizers

TEXTS = [
    "A chat between a curious user and an artificial intelligence assistant. USER: What is this? ASSISTANT: A red bus.",
    "the word 'social' is here , and there . do n't ! 0 1 2 3 4 5 6 7 8 9",
    "Qu'est-ce que c'est? Où est le café? naïve über straße def f(x):  return x",
]
PREPEND = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
}


def sentencepiece_model(model_type: str = "bpe", **options) -> bytes:
    """A `tokenizer.model` as Llama's (or, with the trainer's own normalizer, as T5's)."""
    written = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 4), model_writer=written, minloglevel=2,
        **{"vocab_size": 380, "model_type": model_type, "hard_vocab_limit": False, "byte_fallback": True,
           "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "split_digits": True,
           "allow_whitespace_only_pieces": True} | options,
    )  # fmt: skip
    return written.getvalue()


def byte_level(special: Sequence[str] = ("<s>", "</s>")) -> tokenizers.Tokenizer:
    """Byte pairs as Llama 3's, with special tokens."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(TEXTS, trainer)
    return bpe


def directory(path: Path, **files) -> Path:
    """A directory with these files: bytes, or what JSON files hold; `tokenizer_json` is tokenizer.json and so on."""
    path.mkdir(parents=True)
    for name, content in files.items():
        if isinstance(content, bytes):
            (path / name.replace("_model", ".model")).write_bytes(content)
        else:
            (path / f"{name.removesuffix('_json')}.json").write_text(json.dumps(content))
    return path
