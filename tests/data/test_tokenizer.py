"""A sentencepiece tokenizer through transformers, against sentencepiece itself; and saved for others to read."""

import json
import os
import random
import shutil

import pytest
from sentencepiece import SentencePieceProcessor

from tests.conftest import DATA
from voco_jax.data.tokenizer import load_tokenizer, save_tokenizer
from voco_jax.errors import UserError

MODEL = DATA / "llama_tokenizer" / "tokenizer.model"


@pytest.fixture(scope="module")
def saved(llama_tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(llama_tokenizer, directory)
    return directory


def test_sentencepiece(llama_tokenizer, saved):
    """Runs of spaces above all. (A text that begins with a space differs: transformers adds no second one there.)"""
    pieces = SentencePieceProcessor(model_file=str(MODEL))
    words = ["the", "  ", " ", "\n", "    ", "def ", "x=", "cat's", "ing", "ß", "é", "你", "USER:", "1984"]
    rng = random.Random(0)
    texts = ["a" + " " * n + "b" for n in range(20)]
    texts += ["x" + "".join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(500)]
    again = load_tokenizer(saved)
    for text in texts:
        expected = [pieces.bos_id(), *pieces.encode(text)]
        assert llama_tokenizer(text).input_ids == again(text).input_ids == expected, text


def test_saved_for_earlier_versions(saved):
    """What transformers 4 needs and transformers 5 leaves out (seen: its slow tokenizer gives the same ids)."""
    assert (saved / "tokenizer.model").read_bytes() == MODEL.read_bytes()
    config = json.loads((saved / "tokenizer_config.json").read_text())
    assert config["legacy"] is False and config["add_bos_token"] is True and "extra_special_tokens" not in config
    assert config["added_tokens_decoder"]["32000"]["content"] == "<voco>"


def test_special_tokens_of_earlier_versions(saved):
    config = json.loads((saved / "tokenizer_config.json").read_text())
    assert config["additional_special_tokens"] == ["<voco>"] and config["tokenizer_class"] == "LlamaTokenizer"


def test_a_config_that_does_not_say_legacy(tmp_path, llama_tokenizer):
    """Its text goes on with a space after a special token, as in the versions that it is from."""
    shutil.copy(MODEL, tmp_path)
    config = json.loads((MODEL.parent / "tokenizer_config.json").read_text())
    del config["legacy"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    old = load_tokenizer(tmp_path)
    tokens = old.convert_ids_to_tokens(old("x<voco>USER").input_ids)
    assert tokens[:3] == ["<s>", "▁x", "<voco>"] and tokens[3].startswith("▁")
    assert not llama_tokenizer.convert_ids_to_tokens(llama_tokenizer("x<voco>USER").input_ids)[3].startswith("▁")
    (tmp_path / "saved").mkdir()
    save_tokenizer(old, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())["legacy"] is True
    assert load_tokenizer(tmp_path / "saved")("x<voco>USER").input_ids == old("x<voco>USER").input_ids


def test_files_of_the_current_directory_are_not_its_own(small_tokenizer, tmp_path, monkeypatch):
    """A tokenizer made on the spot has no directory, which is not this one."""
    monkeypatch.chdir(MODEL.parent)
    save_tokenizer(small_tokenizer, tmp_path)
    assert not (tmp_path / "tokenizer.model").exists()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert "legacy" not in config and config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert load_tokenizer(tmp_path)("a red cat").input_ids == small_tokenizer("a red cat").input_ids


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_files_that_were_cut_off(small_tokenizer, tmp_path, file):
    save_tokenizer(small_tokenizer, tmp_path)
    os.truncate(tmp_path / file, 10)
    with pytest.raises(UserError, match=f"{file}: (cannot be loaded: |not readable as JSON)") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)
