"""Directories as checkpoints have them: ids of tokenizer.json and of sentencepiece, or one line that says why not."""

import json
import random
import re

import huggingface_hub
import pytest
from sentencepiece import SentencePieceProcessor
import tokenizers
from transformers import AutoTokenizer

from tests.helpers.tokenizer_kinds import PREPEND, TEXTS, byte_level, directory, sentencepiece_model
from voco_jax.chat_templates import get_chat_template
from voco_jax.data.conversations import Encoder
from voco_jax.data.tokenizer import (
    VOCO_TOKEN,
    add_voco_token,
    load_tokenizer,
    prompt_ids,
    save_tokenizer,
    train_tokenizer,
)
from voco_jax.errors import UserError

LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
BYTES = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
WORDS = ["the", "  ", " ", "\n", "    ", "def ", "x=", "cat's", "ß", "é", "你", "USER:", "1984", "\t", "😀", "<", "ﬁ"]
TURNS = [
    {"from": "human", "value": "<image>\nWhat is this?"},
    {"from": "gpt", "value": "a bus"},
    {"from": "human", "value": "Red?"},
    {"from": "gpt", "value": "yes"},
]


@pytest.fixture(scope="module")
def pieces():
    return sentencepiece_model()


@pytest.fixture(scope="module")
def llama_json(pieces, tmp_path_factory):
    """tokenizer.json as Llama 2's: the pieces, and a normalizer that puts a space before every text."""
    path = directory(tmp_path_factory.mktemp("json") / "t", tokenizer_model=pieces, tokenizer_config_json=LLAMA)
    state = json.loads(load_tokenizer(path, add_voco=False).backend_tokenizer.to_str())
    assert state["normalizer"] == PREPEND and state["pre_tokenizer"] is None
    return state


@pytest.fixture(scope="module")
def byte_json():
    return json.loads(byte_level().to_str())


def texts(seed: int, number: int = 200) -> list[str]:
    rng = random.Random(seed)
    return ["x" + "".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(number)] + TEXTS


def raw(state: dict) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps(state))


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def changed(state: dict, **fields) -> dict:
    return json.loads(json.dumps(state)) | fields


def test_by_name_from_the_hub(byte_json, tmp_path, monkeypatch):
    """From its cache on this machine, as nothing else can be reached."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    directory(
        tmp_path / "models--some--model" / "snapshots" / "abc", tokenizer_json=byte_json, tokenizer_config_json=BYTES
    )
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("abc")
    assert_ends_whole(load_tokenizer("some/model"))
    for name in ("some/other", "no name"):
        with pytest.raises(UserError, match=f"^tokenizer '{name}': not found here, and cannot be fetched") as error:
            load_tokenizer(name)
        assert "\n" not in str(error.value)


# ---- tokenizer.json --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {"tokenizer_class": "LlamaTokenizer"},
        {"tokenizer_class": "LlamaTokenizerFast", "legacy": False, "add_prefix_space": True},
        {"tokenizer_class": "Nobody'sTokenizer", "auto_map": {"AutoTokenizer": ["x.Y", None]}},
        {"clean_up_tokenization_spaces": True, "add_bos_token": True, "add_eos_token": True, "padding_side": "left"},
        {"tokenizer_class": None, "split_special_tokens": True},
    ],
    ids=str,
)
def test_byte_level_tokenizer_json(byte_json, tmp_path, config):
    """Whatever the config says of its class."""
    path = directory(tmp_path / "t", tokenizer_json=byte_json, tokenizer_config_json=BYTES | config)
    tokenizer, expected = load_tokenizer(path), raw(byte_json)
    for text in [*texts(1), " x", "a </s> b", "do n't . yes !"]:
        assert ids(tokenizer, text) == expected.encode(text, add_special_tokens=False).ids, text
        assert tokenizer.decode(ids(tokenizer, text)) == text
    assert_ends_whole(tokenizer)


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}


@pytest.mark.parametrize("legacy", [None, True, False])
@pytest.mark.parametrize("with_model", [False, True])
@pytest.mark.parametrize("kind", [{}, {"normalizer": None, "pre_tokenizer": METASPACE}], ids=["prepend", "metaspace"])
def test_llama_tokenizer_json(llama_json, pieces, tmp_path, legacy, with_model, kind):
    """`legacy` tells how one was made of a sentencepiece model, and changes none that is there."""
    state = changed(llama_json, **kind)
    config = LLAMA | ({} if legacy is None else {"legacy": legacy})
    files = {"tokenizer_model": pieces} if with_model else {}
    tokenizer = load_tokenizer(directory(tmp_path / "t", tokenizer_json=state, tokenizer_config_json=config, **files))
    expected, processor = raw(state), SentencePieceProcessor(model_proto=pieces)
    for text in texts(2):
        assert ids(tokenizer, text) == expected.encode(text, add_special_tokens=False).ids == processor.encode(text)
    for text in ["a</s>b", "</s> b</s>", " leading", "", "\n"]:
        assert ids(tokenizer, text) == expected.encode(text, add_special_tokens=False).ids, text
    assert_ends_whole(tokenizer)


# ---- tokenizer.model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_dummy_prefix": False},
        {"byte_fallback": False},
        {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
        {"model_type": "unigram"},
        {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
        {"model_type": "unigram", "byte_fallback": False, "vocab_size": 120},
        {"add_dummy_prefix": False, "user_defined_symbols": ["<image>", "<mask>"]},
    ],
    ids=str,
)
def test_tokenizer_model(tmp_path, options):
    """Each text between special tokens is as sentencepiece reads it, as with transformers 4's LlamaTokenizer."""
    model = sentencepiece_model(**options)
    path = directory(tmp_path / "t", tokenizer_model=model, tokenizer_config_json=LLAMA)
    tokenizer, processor = load_tokenizer(path), SentencePieceProcessor(model_proto=model)
    for text in [*texts(3), " leading", "a<image>b<mask>"]:
        assert ids(tokenizer, text) == processor.encode(text), text
        assert ids(tokenizer, f"{text}</s>b c") == [*processor.encode(text), 2, *processor.encode("b c")]
    assert tokenizer("a").input_ids == [1, *processor.encode("a")]
    save_tokenizer(tokenizer, tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert all(ids(again, text + "</s>b") == ids(tokenizer, text + "</s>b") for text in texts(4))


def test_tokenizer_model_without_legacy(pieces, tmp_path):
    config = LLAMA | {"legacy": False}
    tokenizer = load_tokenizer(directory(tmp_path / "a", tokenizer_model=pieces, tokenizer_config_json=config))
    processor = SentencePieceProcessor(model_proto=pieces)
    assert all(ids(tokenizer, text) == processor.encode(text) for text in texts(5))
    assert ids(tokenizer, "a</s>b c")[-3:] != ids(tokenizer, "b c")[-3:]  # no space before b
    config |= {"add_prefix_space": False}
    without = load_tokenizer(directory(tmp_path / "b", tokenizer_model=pieces, tokenizer_config_json=config))
    assert without.convert_ids_to_tokens(ids(without, "b c"))[0][0] == "b"


def test_tokenizer_model_alone(pieces, tmp_path):
    """It knows its own special tokens."""
    tokenizer = load_tokenizer(directory(tmp_path / "t", tokenizer_model=pieces))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")
    assert_ends_whole(tokenizer)


# ---- Special and added tokens ----------------------------------------------------------------------------------


def test_a_run_from_before_files_were_compared(llama_json, pieces, tmp_path):
    """Of a tokenizer.model alone such runs have put no space before a text, and were trained so."""
    backend = raw(changed(llama_json, normalizer=PREPEND["normalizers"][1]))
    backend.add_special_tokens([VOCO_TOKEN])
    files = {"tokenizer_json": json.loads(backend.to_str()), "tokenizer_config_json": BYTES, "tokenizer_model": pieces}
    tokenizer = load_tokenizer(directory(tmp_path / "t", **files))
    assert all(ids(tokenizer, text) == backend.encode(text, add_special_tokens=False).ids for text in TEXTS)


def assert_ends_whole(tokenizer):
    encoder = Encoder(tokenizer, get_chat_template("voco_v1"), 2, 2, True)
    sample = encoder.encode(TURNS, 1)
    assert ((sample.tokens == tokenizer.eos_token_id) & sample.labels).sum() == 2
    assert (sample.tokens == tokenizer.convert_tokens_to_ids(VOCO_TOKEN)).sum() == 2


@pytest.mark.parametrize("flags", [{"normalized": True}, {"single_word": True}, {"special": False}, {"rstrip": True}])
def test_flags_of_special_tokens(llama_json, tmp_path, flags):
    state = changed(llama_json)
    state["added_tokens"] = [token | flags for token in state["added_tokens"]]
    state["model"]["vocab"][VOCO_TOKEN] = size = len(state["model"]["vocab"])
    state["added_tokens"].append(state["added_tokens"][0] | {"id": size, "content": VOCO_TOKEN})
    decoder = {str(token["id"]): token for token in state["added_tokens"]}
    config = LLAMA | {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": decoder}
    assert_ends_whole(load_tokenizer(directory(tmp_path / "t", tokenizer_json=state, tokenizer_config_json=config)))


def test_special_tokens_that_are_no_added_tokens(llama_json, tmp_path):
    state = changed(llama_json, added_tokens=[])
    tokenizer = load_tokenizer(directory(tmp_path / "t", tokenizer_json=state, special_tokens_map_json=LLAMA))
    assert tokenizer.eos_token_id == 2
    assert_ends_whole(tokenizer)


def test_special_tokens_map_of_earlier_versions(byte_json, tmp_path):
    """It goes before tokenizer_config.json, unless that has `added_tokens_decoder`."""
    files = {"tokenizer_json": byte_json, "special_tokens_map_json": {"eos_token": {"content": "b", "lstrip": False}}}
    decoder = {"added_tokens_decoder": {"0": {"content": "<s>", "special": True}}}
    old = load_tokenizer(directory(tmp_path / "a", tokenizer_config_json=BYTES, **files))
    new = load_tokenizer(directory(tmp_path / "b", tokenizer_config_json=BYTES | decoder, **files))
    assert (old.eos_token, new.eos_token) == ("b", "</s>")


@pytest.mark.parametrize("kind", ["tokenizer_json", "tokenizer_model"])
def test_added_tokens_beyond_the_vocabulary(pieces, byte_json, tmp_path, kind):
    """Their ids are those that the files say, with a gap before them too; `<voco>` comes last."""
    vocabulary = {kind: byte_json if kind == "tokenizer_json" else pieces, "tokenizer_config_json": BYTES}
    size = len(load_tokenizer(directory(tmp_path / "t", **vocabulary), add_voco=False))
    added = {"[PAD]": size, "<extra>": size + 3}
    tokenizer = load_tokenizer(directory(tmp_path / "u", added_tokens_json=added, **vocabulary))
    assert tokenizer.get_added_vocab().items() >= (added | {VOCO_TOKEN: size + 4}).items()
    assert len(tokenizer) == size + 5 and ids(tokenizer, "<extra>")[-1] == size + 3


def test_a_vocabulary_with_holes(byte_json, tmp_path):
    """`<voco>` gets an id that no token has."""
    state = changed(byte_json)
    vocabulary = state["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.get)
    vocabulary[last] += 1
    tokenizer = load_tokenizer(directory(tmp_path / "t", tokenizer_json=state, tokenizer_config_json=BYTES))
    assert tokenizer.convert_tokens_to_ids(VOCO_TOKEN) == vocabulary[last] + 1 == len(tokenizer) - 1
    assert all(ids(tokenizer, text) == raw(state).encode(text).ids for text in TEXTS)


def test_voco_is_there_as_a_word(byte_json, tmp_path):
    state = changed(byte_json)
    state["model"]["vocab"][VOCO_TOKEN] = size = len(state["model"]["vocab"])
    tokenizer = load_tokenizer(directory(tmp_path / "t", tokenizer_json=state, tokenizer_config_json=BYTES))
    assert len(tokenizer) == size + 1 and ids(tokenizer, f"a{VOCO_TOKEN}b")[1] == size
    assert_ends_whole(tokenizer)


def test_all_ids_that_end_an_answer(byte_json, tmp_path):
    """Llama 3 has two; the default of a config, a word of this tokenizer, is none."""
    files = {"tokenizer_json": byte_json, "tokenizer_config_json": BYTES}
    several = {"eos_token_id": [0, 7]}
    tokenizer = load_tokenizer(directory(tmp_path / "a", generation_config_json=several, **files))
    assert prompt_ids(tokenizer).stop_ids == (1, 0)
    save_tokenizer(tokenizer, tmp_path / "saved")
    assert prompt_ids(load_tokenizer(tmp_path / "saved")).stop_ids == (1, 0)
    nested = {"eos_token_id": None, "text_config": {"eos_token_id": 0}}
    assert prompt_ids(load_tokenizer(directory(tmp_path / "b", config_json=nested, **files))).stop_ids == (1, 0)
    assert prompt_ids(load_tokenizer(directory(tmp_path / "c", **files))).stop_ids == (1,)


def test_the_end_is_known_from_the_model_alone(byte_json, tmp_path):
    tokenizer = load_tokenizer(directory(tmp_path / "t", tokenizer_json=byte_json, config_json={"eos_token_id": 1}))
    assert tokenizer.eos_token == "</s>" and tokenizer.bos_token is None
    assert prompt_ids(tokenizer).prefix_ids == ()


# ---- Saved, and read by others ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["prepend", "metaspace", "model", "model, legacy false", "bytes", "trained"])
def test_saved_and_read_by_transformers(llama_json, byte_json, pieces, tmp_path, kind):
    """Whichever class it takes. (It puts no second space before a text that begins with one.)"""
    files = {
        "prepend": {"tokenizer_json": llama_json, "tokenizer_model": pieces},
        "metaspace": {"tokenizer_json": changed(llama_json, normalizer=None, pre_tokenizer=METASPACE)},
        "model": {"tokenizer_model": pieces},
        "model, legacy false": {"tokenizer_model": pieces},
        "bytes": {"tokenizer_json": byte_json},
    }
    if kind == "trained":
        tokenizer = train_tokenizer(TEXTS, 400)
    else:
        config = LLAMA | ({"legacy": False} if kind == "model, legacy false" else {})
        path = directory(tmp_path / "t", tokenizer_config_json=config | {"auto_map": {}, "x": 1}, **files[kind])
        tokenizer = load_tokenizer(path)
    save_tokenizer(tokenizer, tmp_path / "saved")
    theirs, again = AutoTokenizer.from_pretrained(tmp_path / "saved"), load_tokenizer(tmp_path / "saved")
    assert len(theirs) == len(again) == len(tokenizer)
    for text in [*texts(6), "a</s>b", "<voco>\nA chat</s>USER", "do n't . yes !"]:
        expected = ids(tokenizer, text)
        assert ids(theirs, text) == ids(again, text) == expected, text
        assert theirs.decode(expected) == tokenizer.decode(expected)
    for key in ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id"):
        assert getattr(theirs, key) == getattr(again, key) == getattr(tokenizer, key)


@pytest.mark.parametrize("where", ["tokenizer_config.json", "chat_template.jinja"])
def test_a_chat_template_goes_along(byte_json, tmp_path, where):
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}é{% endfor %}"
    config = BYTES | ({"chat_template": template} if where == "tokenizer_config.json" else {})
    path = directory(tmp_path / "t", tokenizer_json=byte_json, tokenizer_config_json=config)
    if where == "chat_template.jinja":
        (path / where).write_text(template, encoding="utf-8")
    tokenizer = load_tokenizer(path)
    save_tokenizer(tokenizer, tmp_path / "saved")
    for each in (tokenizer, load_tokenizer(tmp_path / "saved"), AutoTokenizer.from_pretrained(tmp_path / "saved")):
        assert each.chat_template == template
        assert each.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<s>hié"


def test_saved_after_its_source_is_gone(pieces, tmp_path):
    path = directory(tmp_path / "t", tokenizer_model=pieces, tokenizer_config_json=LLAMA | {"model_max_length": 2048})
    tokenizer = load_tokenizer(path)
    (path / "tokenizer.model").unlink()
    (path / "tokenizer_config.json").unlink()
    save_tokenizer(tokenizer, tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.model").read_bytes() == pieces
    assert json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())["model_max_length"] == 2048


# ---- Refused ---------------------------------------------------------------------------------------------------


def without(state: dict, piece: str) -> dict:
    """The tokenizer with another word in place of a piece."""
    state = changed(state)
    state["model"]["vocab"]["another"] = state["model"]["vocab"].pop(piece)
    state["model"]["merges"] = [pair for pair in state["model"]["merges"] if piece not in (*pair, "".join(pair))]
    return state


def special(**tokens) -> dict:
    return {"special_tokens_map_json": tokens}


REFUSED = {
    "tokenizer.model: tokenizer.json .* same tokens: .*'▁A', found 'another'": lambda j, m: {
        "tokenizer_json": without(j, "▁A"),
        "tokenizer_model": m,
    },
    "tokenizer.model: tokenizer.json .* same ids: 'A chat": lambda j, m: {
        "tokenizer_json": changed(j, normalizer=PREPEND["normalizers"][1]),
        "tokenizer_model": m,
    },
    "tokenizer.model: not a sentencepiece model": lambda j, m: {"tokenizer_model": m[: len(m) // 2]},
    "tokenizer.model: .*git lfs": lambda j, m: {"tokenizer_model": b"version https://git-lfs.github.com/spec/v1\noid"},
    "tokenizer.json: cannot be loaded": lambda j, m: {"tokenizer_json": [1]},
    "expected tokenizer.json, tokenizer.model or .*, found none": lambda j, m: {},
    "tokenizer.json: added token '<a>': expected id 999, found": lambda j, m: {
        "tokenizer_json": changed(j, added_tokens=[j["added_tokens"][0] | {"id": 999, "content": "<a>"}])
    },
    "added_tokens.json: '<unk>': expected id 5, found 0": lambda j, m: {
        "tokenizer_json": j,
        "added_tokens_json": {"<unk>": 5},
    },
    "eos_token '<none>': not in": lambda j, m: {"tokenizer_json": j} | special(eos_token="<none>"),
    "eos_token: expected .*, found ''": lambda j, m: {"tokenizer_json": j} | special(eos_token=""),
    "no end-of-sequence token": lambda j, m: {"tokenizer_json": j} | special(eos_token=None),
    "tokenizer_config.json: added_tokens_decoder": lambda j, m: {
        "tokenizer_json": j,
        "tokenizer_config_json": {"added_tokens_decoder": ["<s>"]},
    },
}


@pytest.mark.parametrize("line", REFUSED)
def test_refused(llama_json, pieces, tmp_path, line):
    files = {"tokenizer_config_json": LLAMA} | REFUSED[line](llama_json, pieces)
    with pytest.raises(UserError) as error:
        load_tokenizer(directory(tmp_path / "t", **files))
    assert re.search(line, str(error.value)) and "\n" not in str(error.value)


def test_two_tokens_with_one_id(byte_json, tmp_path):
    state = changed(byte_json)
    state["model"]["vocab"]["zzz"] = 7
    with pytest.raises(UserError, match="one token an id, found .*'zzz'.* with id 7"):
        load_tokenizer(directory(tmp_path / "t", tokenizer_json=state, tokenizer_config_json=BYTES))


def test_an_end_that_is_not_found_whole():
    tokenizer = train_tokenizer(TEXTS, 400)
    prompt_ids(tokenizer)
    tokenizer.add_tokens([tokenizers.AddedToken("a</s>", normalized=False)])
    with pytest.raises(UserError, match="'</s>' in a text: expected one token"):
        prompt_ids(tokenizer)


def test_vocabulary_and_merges(byte_json, tmp_path):
    """GPT-2's files, which transformers makes a tokenizer of."""
    merges = "\n".join(["#version: 0.2", *map(" ".join, byte_json["model"]["merges"])])
    config = BYTES | {"tokenizer_class": "GPT2Tokenizer"}
    path = directory(tmp_path / "t", vocab_json=byte_json["model"]["vocab"], tokenizer_config_json=config)
    (path / "merges.txt").write_text(merges)
    tokenizer, expected = load_tokenizer(path), raw(byte_json)
    assert all(ids(tokenizer, text) == expected.encode(text, add_special_tokens=False).ids for text in texts(7))
    assert_ends_whole(tokenizer)


def test_tiktoken_file_beside(byte_json, tmp_path):
    """Llama 3 has one under sentencepiece's name."""
    files = {"tokenizer_json": byte_json, "tokenizer_config_json": BYTES, "tokenizer_model": b"IQ== 0\nIg== 1\n"}
    assert_ends_whole(load_tokenizer(directory(tmp_path / "t", **files)))


def test_add_voco_once(byte_json, tmp_path):
    path = directory(tmp_path / "t", tokenizer_json=byte_json, tokenizer_config_json=BYTES)
    tokenizer = load_tokenizer(path, add_voco=False)
    assert VOCO_TOKEN not in tokenizer.get_vocab()
    assert add_voco_token(tokenizer) == add_voco_token(tokenizer) == len(tokenizer) - 1
