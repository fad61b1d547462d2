"""Tokenizers: any Hugging Face tokenizer, with one `<voco>` token; or a small one trained on the spot."""

from collections.abc import Iterable
import dataclasses
import json
import os
from pathlib import Path
import shutil

from voco_jax.errors import UserError
from voco_jax.json_files import read_object
from voco_jax.storage import as_path, in_bucket, local_copy

VOCO_TOKEN = "<voco>"

# transformers is here for its tokenizers; it need not say at every start that there is no PyTorch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


@dataclasses.dataclass(frozen=True)
class PromptIds:
    """Token ids that the model needs to know: what stands around an image, and where an answer ends."""

    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    voco_token_id: int
    eos_token_id: int
    pad_token_id: int


def load_tokenizer(name_or_dir: str | os.PathLike, *, add_voco: bool = True):
    """A tokenizer from a directory or, by name, from Hugging Face's hub; `<voco>` is added if it is not there yet.

    Raises UserError for what cannot be read, and for tokenizers without an end-of-sequence token or without character
    offsets (label masks are derived from those).
    """
    if in_bucket(name_or_dir):
        with local_copy(as_path(name_or_dir)) as directory:
            return load_tokenizer(directory, add_voco=add_voco)
    name = os.path.expanduser(name_or_dir)
    if name.startswith((".", "/")) and not os.path.isdir(name):
        raise UserError(f"tokenizer {name!r}: directory not found")
    from transformers import AutoTokenizer  # seconds to import, so only where it is needed

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **_legacy(Path(name)))
    except UserError:
        raise
    except Exception as error:  # the tokenizers library raises bare ones, of a file that was cut off for example
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"tokenizer {str(name_or_dir)!r}: cannot be loaded: {reason}") from error
    if not tokenizer.is_fast:
        raise UserError(f"tokenizer {str(name_or_dir)!r}: a tokenizer with character offsets (fast) is required")
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {str(name_or_dir)!r}: has no end-of-sequence token, which ends every answer")
    _merge_by_score(tokenizer)
    if add_voco:
        add_voco_token(tokenizer)
    return tokenizer


def _legacy(directory: Path) -> dict[str, bool]:
    """What a Llama tokenizer's config that does not say `legacy` means: True, though transformers 5 takes it for False.

    It decides whether text after a special token begins with a space.
    """
    file = directory / "tokenizer_config.json"
    if not (directory / "tokenizer.model").exists() or (directory / "tokenizer.json").exists() or not file.exists():
        return {}
    config = read_object(file)
    is_llama = str(config.get("tokenizer_class")).startswith("Llama")
    return {"legacy": True} if is_llama and config.get("legacy") is None else {}


def _merge_by_score(tokenizer) -> None:
    """Give a tokenizer made from a sentencepiece `tokenizer.model` the merges of that model.

    transformers 5 takes the pieces' order for that of their scores. They differ for runs of spaces, which come first
    and score least: "a  b" would be `▁a ▁▁ b`, and is `▁a ▁ ▁b` to sentencepiece (and all earlier versions).
    """
    from sentencepiece import SentencePieceProcessor
    from tokenizers.models import BPE

    file = Path(getattr(tokenizer, "vocab_file", None) or "")
    backend = tokenizer.backend_tokenizer
    if (
        file.name != "tokenizer.model"
        or file.with_name("tokenizer.json").exists()
        or not isinstance(backend.model, BPE)
    ):
        return
    try:
        pieces = SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{file}: not a sentencepiece model: {error}") from None
    scores = [pieces.get_score(i) for i in range(len(pieces))]
    if any(score % 1 for score in scores):
        raise UserError(f"{file}: expected byte pairs, whose scores are whole numbers; found a unigram model")
    vocabulary = {pieces.id_to_piece(i): i for i in range(len(pieces))}
    if vocabulary != backend.get_vocab(with_added_tokens=False):
        raise UserError(f"{file}: its pieces are not those of the tokenizer; save it as tokenizer.json")
    merges = [
        (-scores[i], (piece[:cut], piece[cut:]))
        for piece, i in vocabulary.items()
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    merges = [pair for _, pair in sorted(merges, key=lambda merge: merge[0])]
    backend.model = BPE(
        vocab=vocabulary,
        merges=merges,
        unk_token=pieces.id_to_piece(pieces.unk_id()),
        fuse_unk=True,
        byte_fallback=any(pieces.is_byte(i) for i in range(len(pieces))),
    )


def add_voco_token(tokenizer) -> int:
    """The id of `<voco>`, added as one special token where it is missing (Llama's 32,000 pieces: id 32000)."""
    if VOCO_TOKEN not in tokenizer.get_added_vocab():
        tokenizer.add_tokens([VOCO_TOKEN], special_tokens=True)
    return tokenizer.convert_tokens_to_ids(VOCO_TOKEN)


def save_tokenizer(tokenizer, directory: Path) -> None:
    """Write a tokenizer for every version of transformers, the released code's of early 2024 included.

    That one wants the sentencepiece model itself, which transformers 5 leaves behind, and has other names for lists of
    special tokens and for tokenizers that are `tokenizer.json` and nothing else.
    """
    try:
        tokenizer.save_pretrained(directory)
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise OSError(f"{directory}: {error}") from None  # tokenizers has no other type for a full disk
    source = tokenizer.name_or_path
    vocabulary = getattr(tokenizer, "vocab_file", None) or (source and os.path.join(source, "tokenizer.model"))
    if vocabulary and vocabulary.endswith("tokenizer.model") and os.path.exists(vocabulary):
        shutil.copyfile(vocabulary, directory / "tokenizer.model")
    file = directory / "tokenizer_config.json"
    config = json.loads(file.read_text())
    if source and os.path.exists(os.path.join(source, file.name)):
        config = json.loads(Path(source, file.name).read_text()) | config  # what transformers 5 leaves out
    if hasattr(tokenizer, "legacy"):
        config["legacy"] = tokenizer.legacy
    for key in ("auto_map", "backend", "extra_special_tokens", "is_local", "local_files_only"):
        config.pop(key, None)
    if config["tokenizer_class"] == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    named = {str(config.get(key)) for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    config["additional_special_tokens"] = [token for token in special if token not in named]
    names = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    config["added_tokens_decoder"] = {
        str(i): {name: getattr(token, name) for name in names} for i, token in tokenizer.added_tokens_decoder.items()
    }
    file.write_text(json.dumps(config, indent=2) + "\n")


def prompt_ids(tokenizer) -> PromptIds:
    """What this tokenizer makes of `<s> image \\n <voco>`, around the image."""
    voco = tokenizer.convert_tokens_to_ids(VOCO_TOKEN)
    suffix = tokenizer("\n" + VOCO_TOKEN, add_special_tokens=False).input_ids
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    return PromptIds(
        prefix_ids=() if bos is None else (bos,),
        suffix_ids=tuple(suffix[: suffix.index(voco)]),
        voco_token_id=voco,
        eos_token_id=eos,
        pad_token_id=eos if pad is None else pad,
    )


def train_tokenizer(texts: Iterable[str], vocab_size: int):
    """A byte-pair tokenizer of the texts, `<s>`, `</s>` and `<voco>` included; any text can be encoded.

    For models trained from scratch. The same texts give the same tokenizer.
    """
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>", VOCO_TOKEN],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=[VOCO_TOKEN],
        clean_up_tokenization_spaces=False,
    )
