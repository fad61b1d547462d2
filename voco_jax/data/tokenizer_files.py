"""Directories of Hugging Face tokenizers: what their files say, whichever version of transformers has written them.

`tokenizer.json` alone says how text becomes ids; where there is none, `tokenizer.model` does (a sentencepiece model).
The keys of `tokenizer_config.json` that tell how a `tokenizer.json` was once made (`legacy`, `add_prefix_space`,
`tokenizer_class`) do not change it: transformers 5 reads some of them again, and then gives other ids than the
checkpoint was trained with. `tokenizer_config.json` gives the special tokens and the added tokens. No code of a
directory is run.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import json
import logging
import os
from pathlib import Path
import re
import tempfile
from typing import Any
import warnings

from voco_jax.data.sentencepiece_models import SentencePiece
from voco_jax.errors import UserError, cannot
from voco_jax.io.files import read_bytes
from voco_jax.io.json_files import read_object
from voco_jax.io.paths import check_link
from voco_jax.outages import first_line
from voco_jax.terminal import log

VOCO_TOKEN = "<voco>"
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
# What a tokenizer's class takes the special tokens for, where its files do not say
_DEFAULTS = {
    "Llama": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "GPT2": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
}
_CHAT_TEMPLATE, _GENERATION = "chat_template.jinja", "generation_config.json"
# What a run's tokenizer is read from; and any other, which transformers may read
OF_RUNS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
           _CHAT_TEMPLATE, "config.json", _GENERATION)  # fmt: skip
FILES = (*OF_RUNS, "vocab.json", "merges.txt")
_NAMING = ("auto_map", "name_or_path", "_name_or_path")  # keys of configs, beside those that end with _file
MOST = 2**26  # bytes of a file, 33 MB being the largest that is known (Gemma's)
_MOST_PARTS = 2**21  # of a tokenizer.json: as Python's objects, 2 million take 0.5 GiB
_MOST_HOLES = 2**16  # ids without a token
_HIGHEST = 10**8  # id of a token
_LFS = b"version https://git-lfs.github.com/spec/"


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a tokenizer's directory held beside the ids of texts; a saved copy has it too."""

    config: dict[str, Any] = dataclasses.field(default_factory=dict)  # tokenizer_config.json
    model: bytes | None = None  # tokenizer.model
    stop_ids: tuple[int, ...] = ()  # of generation_config.json or config.json: each of them ends an answer


NO_ORIGIN = Origin()


def find(name: str) -> Path:
    """The directory of that name; or a local copy of Hugging Face's repository of that name, from the hub or from its
    cache. Lines on standard error tell of the latter before and after."""
    directory = Path(os.path.expanduser(name))
    if directory.is_dir():
        return directory
    if os.path.lexists(directory):
        check_link(directory)
        other = "a file" if directory.is_file() else "something else"
        raise UserError(f"tokenizer {name!r}: expected a directory, found {other}")
    # A name of the hub is OWNER/NAME or NAME; where an OWNER is here, it is a path
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "/" in name and os.path.lexists(directory.parent):
        raise UserError(f"tokenizer {name!r}: not found")
    import huggingface_hub

    log(f"tokenizer {name}: not found here; Hugging Face's hub is asked for it")
    try:
        found = Path(huggingface_hub.snapshot_download(name, allow_patterns=list(FILES)))
    except Exception as error:  # those of the network, of the name and of access have no common type
        raise UserError(
            f"tokenizer {name!r}: not found here, and cannot be fetched from Hugging Face's hub: {first_line(error)}"
        ) from error
    log(f"tokenizer {name}: from Hugging Face's hub, revision {found.name}")
    return found


def read(directory: Path, *, of_run: bool = False):
    """(`tokenizers.Tokenizer`, special tokens by role, Origin) of a directory. UserError: file, expected and found.

    `of_run`: only in the forms that runs have, which are read here; transformers has many others.
    """
    config = _read_config(directory)
    named = _named_tokens(directory, config)
    content, model = (_content(directory / name) for name in ("tokenizer.json", "tokenizer.model"))
    if model is not None and _is_tiktoken(model):
        model = None
    pieces = None if model is None else SentencePiece(model, str(directory / "tokenizer.model"))
    if content is not None:
        backend = _read_backend(directory / "tokenizer.json", content)
        if pieces is not None:
            prefix = config.get("add_prefix_space") is not False
            if backend.token_to_id(VOCO_TOKEN) is not None:  # a run's, which was trained with the ids of its own
                prefix = begins_with_space(backend)
            pieces.compare(backend, "tokenizer.json beside it", prefix=prefix)
    elif pieces is not None:
        backend = pieces.to_backend(**_prefix(config))
        named = {**pieces.named_tokens, **named}
        bos = named.get("bos_token")
        if config.get("add_bos_token") is not False and bos and backend.token_to_id(bos) is not None:
            backend.post_processor = _begin_with(bos, backend)
    elif of_run:
        raise UserError(f"{directory / 'tokenizer.json'}: not found")
    else:
        backend, named = _through_transformers(directory, named)
    stop_ids, stop_file = _stop_ids(directory)
    if not named.get("eos_token") and stop_ids:
        named["eos_token"] = backend.id_to_token(stop_ids[0])
    backend = _add_tokens(directory, backend, config, named)
    return backend, named, Origin(config, model, _known(stop_ids, stop_file, backend))


def stop_ids_of(directory: Path, backend) -> tuple[int, ...]:
    """The ids that end an answer by a checkpoint's `generation_config.json`, for a tokenizer from elsewhere; UserError
    for ids that it does not have."""
    ids, file = _stop_ids(directory)
    return _known(ids, file, backend) if file.name == _GENERATION else ()


def edited(backend, edit: Callable[[dict], None]):
    """A tokenizer like this one with what `edit` changes in its `tokenizer.json`."""
    import tokenizers

    state = json.loads(backend.to_str())
    edit(state)
    return tokenizers.Tokenizer.from_str(json.dumps(state))


def write(directory: Path, backend, named: dict[str, str | None], origin: Origin, chat_template) -> None:
    """The files of a tokenizer for every version of transformers, the released code's of early 2024 included.

    That one wants the sentencepiece model itself, and has other names than transformers 5 for lists of special tokens
    and for tokenizers that are `tokenizer.json` and nothing else.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(backend.to_str(pretty=True), encoding="utf-8")
    added = backend.get_added_tokens_decoder()
    left_out = ("auto_map", "backend", "extra_special_tokens", "is_local", "local_files_only", "split_special_tokens")
    config = {
        key: value for key, value in origin.config.items() if key not in (*left_out, "add_prefix_space", "legacy")
    }
    config |= {key: named.get(key) for key in NAMED}
    if isinstance(chat_template, dict):  # several, by name
        config["chat_template"] = [{"name": name, "template": text} for name, text in chat_template.items()]
    else:
        config["chat_template"] = chat_template
    config["clean_up_tokenization_spaces"] = False
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if origin.model is not None and type(backend.model).__name__ == "BPE":
        # It makes its own tokenizer of the vocabulary, which puts spaces where these keys say
        config |= {"tokenizer_class": "LlamaTokenizer", "legacy": begins_with_space(backend, after=named["eos_token"])}
        if not begins_with_space(backend):
            config["add_prefix_space"] = False
    special = [token.content for token in added.values() if token.special]
    config["additional_special_tokens"] = [token for token in special if token not in named.values()]
    config["added_tokens_decoder"] = {
        str(i): {"content": token.content} | {flag: getattr(token, flag) for flag in _FLAGS}
        for i, token in sorted(added.items())
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    if origin.stop_ids:
        (directory / _GENERATION).write_text(json.dumps({"eos_token_id": [*origin.stop_ids]}) + "\n")
    if origin.model is not None:
        (directory / "tokenizer.model").write_bytes(origin.model)
    if isinstance(chat_template, str):  # where transformers of 2025 and later look first
        (directory / _CHAT_TEMPLATE).write_text(chat_template, encoding="utf-8")


# ---- Reading -----------------------------------------------------------------------------------------------------


def _content(file: Path) -> bytes | None:
    """The bytes of a file; None where it is not there."""
    try:
        content = read_bytes(file, MOST)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise cannot(f"{file}: cannot be read", error) from None
    if content.startswith(_LFS):
        raise UserError(f"{file}: a pointer of Git LFS, not the file itself: git lfs pull")
    return content


def _is_tiktoken(content: bytes) -> bool:
    """Whether a `tokenizer.model` is Llama 3's: lines of a token in base64 and its rank."""
    return re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", content) is not None


def _optional(directory: Path, name: str) -> dict:
    return read_object(directory / name) if (directory / name).exists() else {}


def _read_config(directory: Path) -> dict:
    config = _optional(directory, "tokenizer_config.json")
    if (template := _content(directory / _CHAT_TEMPLATE)) is not None:
        config["chat_template"] = template.decode("utf-8", "replace")
    for key in ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"):
        value, kinds = config.get(key), dict if key == "added_tokens_decoder" else (list, dict)
        if value is not None and not isinstance(value, kinds):
            raise UserError(f"{directory / 'tokenizer_config.json'}: {key}: unexpected {type(value).__name__}")
    template = config.get("chat_template")
    several = isinstance(template, list) and all(
        isinstance(item, dict) and isinstance(item.get("name"), str) and isinstance(item.get("template"), str)
        for item in template
    )
    if not (template is None or isinstance(template, str) or several):
        raise UserError(f"{directory / 'tokenizer_config.json'}: chat_template: expected text, or several by name")
    return config


def _named_tokens(directory: Path, config: dict) -> dict[str, str]:
    """The special tokens by role. Files without `added_tokens_decoder` are of earlier versions, for which
    `special_tokens_map.json` goes before `tokenizer_config.json`."""
    family = str(config.get("tokenizer_class") or "").replace("LLaMA", "Llama").removeprefix("Code")
    default = next((tokens for name, tokens in _DEFAULTS.items() if family.startswith(name)), {})
    map_file = _optional(directory, "special_tokens_map.json")
    known = map_file | config if "added_tokens_decoder" in config else config | map_file
    named = {}
    for key in NAMED:
        value = known.get(key, default.get(key))
        text = _text(value) if value is not None else None
        if text == "" or (value is not None and text is None):
            raise UserError(f"{directory}: {key}: expected a token's text, found {value!r}")
        if text is not None:
            named[key] = text
    return named


def _text(token) -> str | None:
    """The text of a token as files have it: itself, or `{"content": …}`; None for anything else, and for halves of
    characters, which no tokenizer takes."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) and not re.search("[\ud800-\udfff]", text) else None


def _read_backend(file: Path, content: bytes):
    import tokenizers

    if (parts := sum(content.count(sign) for sign in (b"[", b"{", b":"))) > _MOST_PARTS:
        raise UserError(f"{file}: expected {_MOST_PARTS} tokens and merges at most, found {parts}")
    try:
        backend = tokenizers.Tokenizer.from_buffer(content)
        declared = json.loads(content).get("added_tokens") or []
    except Exception as error:  # the tokenizers library raises bare ones, of a file that was cut off for example
        raise UserError(f"{file}: cannot be loaded: {first_line(error)}") from error
    for token in declared:
        found = backend.token_to_id(token["content"])
        if found != token["id"]:
            raise UserError(
                f"{file}: added token {token['content']!r}: expected id {token['id']}, found {found}: the vocabulary "
                "has no tokens for some ids before it"
            )
    backend.no_truncation()
    backend.no_padding()
    return backend


def _prefix(config: dict) -> dict[str, bool]:
    """How a `tokenizer.model` is to be read. Llama's config without `legacy` means True: text after a special token
    begins with a space too."""
    legacy = config.get("legacy")
    if legacy is None:
        legacy = str(config.get("tokenizer_class") or "Llama").startswith(("Llama", "LLaMA"))
    return {"prefix_after_special": bool(legacy), "prefix": bool(legacy) or config.get("add_prefix_space") is not False}


def _begin_with(bos: str, backend):
    from tokenizers.processors import TemplateProcessing

    if (i := backend.token_to_id(bos)) is None:
        raise UserError(f"bos_token {bos!r:.100}: not in the vocabulary of tokenizer.model")
    special = [(bos, i)]
    return TemplateProcessing(single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=special)


def _through_transformers(directory: Path, named: dict[str, str]):
    """Formats that only transformers knows, such as `vocab.json` with `merges.txt`.

    It sees a copy of the directory's own files, in which nothing names code, other files or the hub's repositories.
    """
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary)
        for path in directory.iterdir():
            if path.suffix in (".json", ".txt", ".model") and (content := _content(path)) is not None:
                (copy / path.name).write_bytes(content)
        for name in ("config.json", "tokenizer_config.json"):
            if fields := _optional(copy, name):
                kept = {key: fields[key] for key in fields if key not in _NAMING and not key.endswith("_file")}
                (copy / name).write_text(json.dumps(kept))
        try:
            with _without_logs():
                tokenizer = AutoTokenizer.from_pretrained(copy, trust_remote_code=False, local_files_only=True)
        except Exception as error:
            reason = first_line(error).replace(temporary, str(directory))
            raise UserError(f"tokenizer {str(directory)!r}: cannot be loaded: {reason}") from error
    names = [name for name in getattr(tokenizer, "vocab_files_names", {}).values() if name is not None]
    if not any((directory / name).is_file() for name in names):  # some classes are content with none
        raise UserError(
            f"tokenizer {str(directory)!r}: expected tokenizer.json, tokenizer.model or {names}, found none"
        )
    if not tokenizer.is_fast:
        raise UserError(f"tokenizer {str(directory)!r}: a tokenizer with character offsets (fast) is required")
    theirs = {key: str(getattr(tokenizer, key)) for key in NAMED if getattr(tokenizer, key) is not None}
    return tokenizer.backend_tokenizer, theirs | named


@contextlib.contextmanager
def _without_logs() -> Iterator[None]:
    """Transformers logs what stands in the files as it is, control characters too; what matters is an error."""
    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _stop_ids(directory: Path) -> tuple[tuple[int, ...], Path]:
    """(the ids that end what the checkpoint generates, beside the tokenizer's own; the file that has them)."""
    for name in (_GENERATION, "config.json"):
        fields = _optional(directory, name)
        text = fields.get("text_config")
        ids = fields.get("eos_token_id")
        if ids is None and isinstance(text, dict):
            ids = text.get("eos_token_id")
        ids = ids if isinstance(ids, list) else [ids]
        if all(type(i) is int and 0 <= i <= _HIGHEST for i in ids):
            return tuple(ids), directory / name
    return (), directory


def _known(ids: tuple[int, ...], file: Path, backend) -> tuple[int, ...]:
    """Those that are special tokens: a config may have the default of its class, which is some word to this tokenizer.
    UserError for one of `generation_config.json` that is no token."""
    unknown = next((i for i in ids if file.name == _GENERATION and backend.id_to_token(i) is None), None)
    if unknown is not None:
        raise UserError(f"{file}: eos_token_id: expected ids of the tokenizer's tokens, found {unknown}")
    special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    return tuple(i for i in ids if i in special)


def _add_tokens(directory: Path, backend, config: dict, named: dict[str, str]):
    """The tokenizer with the tokens that its config adds, under the ids that it gives, and with special tokens that are
    found wherever they stand in a text."""
    from tokenizers import AddedToken

    file = directory / "tokenizer_config.json"
    declared = {}
    for i, token in (config.get("added_tokens_decoder") or {}).items():
        if not re.fullmatch(r"[0-9]{1,8}", i) or not isinstance(token, dict) or not _text(token):
            raise UserError(f"{file}: added_tokens_decoder: expected ids and tokens, found {i!r}: {token!r:.100}")
        declared[int(i)] = AddedToken(token["content"], **{flag: bool(token.get(flag)) for flag in _FLAGS})
    if not config.get("added_tokens_decoder"):
        file = directory / "added_tokens.json"
        for content, i in _optional(directory, file.name).items():
            if type(i) is not int or not 0 <= i <= _HIGHEST or not _text(content):
                raise UserError(f"{file}: expected tokens and their ids, found {content!r}: {i!r:.100}")
            is_special = content in named.values()
            declared[i] = AddedToken(content, normalized=not is_special, special=is_special)
    backend = _without_holes(directory, backend, {i: token.content for i, token in declared.items()})
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    for i, token in sorted(declared.items()):
        if token.content not in added:
            backend.add_tokens([token])
            added.add(token.content)
        if backend.token_to_id(token.content) != i:
            found = backend.token_to_id(token.content)
            raise UserError(f"{file}: {token.content!r}: expected id {i}, found {found} in the vocabulary")
    for key in ("bos_token", "eos_token"):
        if named.get(key) and backend.token_to_id(named[key]) is None:
            raise UserError(f"{directory}: {key} {named[key]!r}: not in the vocabulary")
    extra = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    extra = [_text(token) for token in (extra.values() if isinstance(extra, dict) else extra)]
    new = [token for token in (*named.values(), *extra) if token and token not in added]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in dict.fromkeys(new)])
    return _with_whole(backend, (*(token for key, token in named.items() if key != "unk_token"), VOCO_TOKEN))


def _with_whole(backend, contents: tuple[str, ...]):
    """The tokenizer, in which these added tokens are special and found wherever they stand in a text: not only as words
    of their own, nor only where a normalizer has put the space before them that it puts before all text."""

    def is_wrong(token: dict) -> bool:
        return token["content"] in contents and (token["normalized"] or token["single_word"] or not token["special"])

    def correct(state: dict) -> None:
        for token in filter(is_wrong, state["added_tokens"]):
            token.update(normalized=False, single_word=False, special=True)

    flags = [
        {"content": token.content} | {flag: getattr(token, flag) for flag in _FLAGS}
        for token in backend.get_added_tokens_decoder().values()
    ]
    return edited(backend, correct) if any(map(is_wrong, flags)) else backend


def _without_holes(directory: Path, backend, declared: dict[int, str]):
    """The tokenizer, in which every id up to the last of its own and of the declared tokens has a token: `tokenizers`
    takes the number of tokens for the next free id. Those that are made up stand in no text.

    UserError where two tokens have one id.
    """
    vocabulary = backend.get_vocab(with_added_tokens=True)
    names = {i: token for token, i in vocabulary.items()}
    if len(names) < len(vocabulary):
        token, i = next((token, i) for token, i in vocabulary.items() if names[i] != token)
        raise UserError(f"{directory}: expected one token an id, found {token!r} and {names[i]!r} with id {i}")
    last = max({**names, **declared}, default=-1)
    if last >= len(names) + len(declared) + _MOST_HOLES:
        raise UserError(f"{directory}: a token has the id {last}, of {len(names.keys() | declared.keys())} tokens")
    missing = set(range(last + 1)) - names.keys()
    if not missing or min(missing) > max(names) and missing <= declared.keys():
        return backend  # they follow each other, and are added
    fill = {declared.get(i, f"<missing_{i}>"): i for i in missing}
    return edited(backend, lambda state: state["model"]["vocab"].update(fill))


# ---- Writing -----------------------------------------------------------------------------------------------------


def begins_with_space(backend, *, after: str | None = None) -> bool:
    """Whether the tokenizer puts a space before a text; or before one after this special token, which is what
    LlamaTokenizer's key `legacy` says."""
    ids = backend.encode((after or "") + "a", add_special_tokens=False).ids
    return backend.id_to_token(ids[1 if after else 0]).startswith("▁")
