"""Tokenizers: any Hugging Face tokenizer, with one `<voco>` token; or a small one trained on the spot."""

from collections.abc import Iterable
import dataclasses
import os

from voco_jax.errors import UserError

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


def load_tokenizer(name_or_dir: str | os.PathLike):
    """A tokenizer from a directory or, by name, from Hugging Face's hub; `<voco>` is added if it is not there yet.

    Raises UserError for what cannot be read, and for tokenizers without an end-of-sequence token or without character
    offsets (label masks are derived from those).
    """
    name = os.path.expanduser(name_or_dir)
    if name.startswith((".", "/")) and not os.path.isdir(name):
        raise UserError(f"tokenizer {name!r}: directory not found")
    from transformers import AutoTokenizer  # seconds to import, so only where it is needed

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"tokenizer {str(name_or_dir)!r}: cannot be loaded: {reason}") from error
    if not tokenizer.is_fast:
        raise UserError(f"tokenizer {str(name_or_dir)!r}: a tokenizer with character offsets (fast) is required")
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {str(name_or_dir)!r}: has no end-of-sequence token, which ends every answer")
    add_voco_token(tokenizer)
    return tokenizer


def add_voco_token(tokenizer) -> int:
    """The id of `<voco>`, added as one special token where it is missing (Llama's 32,000 pieces: id 32000)."""
    if VOCO_TOKEN not in tokenizer.get_added_vocab():
        tokenizer.add_tokens([VOCO_TOKEN], special_tokens=True)
    return tokenizer.convert_tokens_to_ids(VOCO_TOKEN)


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
