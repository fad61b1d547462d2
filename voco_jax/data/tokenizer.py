"""Tokenizers: any Hugging Face tokenizer, with one `<voco>` token; or a small one trained on the spot."""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import hashlib
import json
import os
from pathlib import Path

from voco_jax.data import tokenizer_files
from voco_jax.data.tokenizer_files import NO_ORIGIN, VOCO_TOKEN, Origin
from voco_jax.errors import UserError
from voco_jax.io.paths import AnyPath, as_path, bucket_errors, in_bucket, local_copy

# transformers is here for its tokenizers; it need not say at every start that there is no PyTorch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


@dataclasses.dataclass(frozen=True)
class PromptIds:
    """Token ids that the model needs to know: what stands around an image, and where an answer ends.

    `eos_token_id` ends every answer of training; each of `stop_ids`, itself among them, ends what the model says.
    """

    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    voco_token_id: int
    eos_token_id: int
    pad_token_id: int
    stop_ids: tuple[int, ...]


def load_tokenizer(name_or_dir: str | os.PathLike, *, add_voco: bool = True):
    """A tokenizer that a user names: a directory, or a repository on Hugging Face's hub (a line tells so).

    `<voco>` is added if it is not there yet. Its ids are those of `tokenizer.json`, or of `tokenizer.model` where that
    stands alone, and of both where both do. Raises UserError for what cannot be read, for files that contradict each
    other, and for tokenizers without an end-of-sequence token.
    """
    if in_bucket(name_or_dir):
        with local_copy(as_path(name_or_dir)) as directory:
            return _load(directory, name_or_dir, add_voco)
    return _load(tokenizer_files.find(os.fspath(name_or_dir)), name_or_dir, add_voco)


def load_run_tokenizer(run: str | AnyPath):
    """The tokenizer in a run's directory; UserError where it is not there, for nothing else can stand for it."""
    directory = as_path(run) / "tokenizer"
    with bucket_errors(directory):
        if not directory.is_dir():
            raise UserError(f"{directory}: not found; a run directory holds config.json, tokenizer/ and checkpoints/")
    with local_copy(directory) as copy:
        return _load(copy, directory, add_voco=True, of_run=True)


def _load(directory: Path, name: str | os.PathLike, add_voco: bool, *, of_run: bool = False):
    backend, named, origin = tokenizer_files.read(directory, of_run=of_run)
    if not named.get("eos_token"):
        raise UserError(f"tokenizer {str(name)!r}: has no end-of-sequence token, which ends every answer")
    tokenizer = make_tokenizer(backend, named, origin)
    tokenizer.name_or_path = str(directory)
    if origin.model is not None:
        tokenizer.legacy = tokenizer_files.begins_with_space(backend, after=named["eos_token"])
    if add_voco:
        add_voco_token(tokenizer)
    return tokenizer


def vocabulary_sum(tokenizer) -> str:
    """SHA-256 of its tokens and their ids, the same for every version of the libraries."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def make_tokenizer(backend, named: Mapping[str, str | None], origin: Origin = NO_ORIGIN):
    """A `tokenizers.Tokenizer` as a tokenizer of transformers; `named` are special tokens: 'eos_token' and others."""
    from transformers import PreTrainedTokenizerFast  # seconds to import, so only where it is needed

    special = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        additional_special_tokens=[token for token in special if token not in named.values()],
        clean_up_tokenization_spaces=False,
        chat_template=origin.config.get("chat_template"),
        **named,
    )
    tokenizer.origin = origin
    return tokenizer


def add_voco_token(tokenizer) -> int:
    """The id of `<voco>`, added as one special token where it is missing (Llama's 32,000 pieces: id 32000)."""
    if VOCO_TOKEN not in tokenizer.get_added_vocab():
        tokenizer.add_tokens([VOCO_TOKEN], special_tokens=True)
    return tokenizer.convert_tokens_to_ids(VOCO_TOKEN)


def set_stop_ids(tokenizer, stop_ids: tuple[int, ...]) -> None:
    """What ends an answer beside the end-of-sequence token, for `prompt_ids` and for copies that are saved."""
    tokenizer.origin = dataclasses.replace(getattr(tokenizer, "origin", NO_ORIGIN), stop_ids=stop_ids)


def save_tokenizer(tokenizer, directory: Path) -> None:
    """Write a tokenizer for every version of transformers, the released code's of early 2024 included."""
    named = {key: getattr(tokenizer, key) for key in tokenizer_files.NAMED}
    origin = getattr(tokenizer, "origin", NO_ORIGIN)
    tokenizer_files.write(directory, tokenizer.backend_tokenizer, named, origin, tokenizer.chat_template)


def prompt_ids(tokenizer) -> PromptIds:
    """What this tokenizer makes of `<s> image \\n <voco>`, around the image.

    UserError where the end-of-sequence token or `<voco>` are not found whole in a text.
    """
    voco = tokenizer.convert_tokens_to_ids(VOCO_TOKEN)
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    for token, i in ((tokenizer.eos_token, eos), (VOCO_TOKEN, voco)):
        found = tokenizer(f"a{token}a", add_special_tokens=False).input_ids
        if found.count(i) != 1:
            name, pieces = tokenizer.name_or_path, tokenizer.convert_ids_to_tokens(found)
            raise UserError(f"tokenizer {name!r}: {token!r} in a text: expected one token with id {i}, found {pieces}")
    suffix = tokenizer("\n" + VOCO_TOKEN, add_special_tokens=False).input_ids
    origin = getattr(tokenizer, "origin", NO_ORIGIN)
    return PromptIds(
        prefix_ids=() if bos is None else (bos,),
        suffix_ids=tuple(suffix[: suffix.index(voco)]),
        voco_token_id=voco,
        eos_token_id=eos,
        pad_token_id=eos if pad is None else pad,
        stop_ids=tuple(dict.fromkeys((eos, *origin.stop_ids))),
    )


def train_tokenizer(texts: Iterable[str], vocab_size: int, control_tokens: Sequence[str] = ()):
    """A byte-pair tokenizer of the texts, `<s>`, `</s>`, `<voco>` and a template's `control_tokens` included; any text
    can be encoded.

    For models trained from scratch. The same texts give the same tokenizer.
    """
    import tokenizers

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>", VOCO_TOKEN, *control_tokens],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return make_tokenizer(bpe, {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"})
