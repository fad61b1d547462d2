"""Which prompt, and which stop tokens, a converted run has; what `to-hf` makes of them."""

import copy
import json
import shutil

import numpy as np
import pytest

from tests.conftest import DATA
from tests.convert.test_convert import convert  # noqa: F401 (a fixture)
from tests.data.test_chat_families import chosen
from tests.helpers import reference
from tests.helpers.chat_families import SMOLLM2, tokenizer_files, tokenizer_of
from voco_jax.chat_templates import CHAT_TEMPLATES, TOKENIZER
from voco_jax.checkpoint.init_from import begin_with_run
from voco_jax.config import default_config, load_config
from voco_jax.convert.chat_templates import write_chat_template
from voco_jax.convert.sources import Source
from voco_jax.convert.to_hf import set_chat_template
from voco_jax.convert.to_jax import Options, choose_template, load_source_tokenizer
from voco_jax.data.conversations import Encoder
from voco_jax.data.from_config import template_of
from voco_jax.data.template_reader import read_chat_template, takes_parts
from voco_jax.data.tokenizer import load_tokenizer, prompt_ids, save_tokenizer
from voco_jax.errors import UserError
from voco_jax.models.llama import LlamaConfig

OWN = "the run's prompt follows the checkpoint's chat template (--template voco_v1: the released code's)"


def choice(family: str, directory, **options) -> tuple[str, list[str], object]:
    """(name of the template, what is told and warned of, the template) of a run made of a family's language model."""
    config = default_config()
    source = Source("llama", directory, LlamaConfig())
    told: list[str] = []
    warnings = choose_template(config.data, source, tokenizer_of(family), Options(**options), told.append)
    return config.data.template, told + warnings, template_of(config)


def test_the_default_is_what_the_model_knows(tmp_path):
    """Its own chat template, where turns begin with control tokens; else the prompt of the released code."""
    today = "tokenizer_config.json: the chat template prints today's date; the run keeps the date of today"
    for family, warnings in (("qwen2.5", [OWN]), ("mistral-v0.3", [OWN]), ("llama3.2", [OWN, today])):
        assert choice(family, tmp_path) == (TOKENIZER, warnings, chosen(family)[1]), family
    for family in ("vicuna", "mistral-v0.1"):
        assert choice(family, tmp_path) == ("voco_v1", [], CHAT_TEMPLATES["voco_v1"]), family
        assert choice(family, tmp_path, template=TOKENIZER) == (TOKENIZER, [], chosen(family)[1]), family
    name, (line,), _ = choice("qwen3", tmp_path)
    assert name == "qwen3" and line.startswith("tokenizer_config.json: a chat template that cannot be followed (a conv")
    assert line.endswith(": the prompt is qwen3's, which asks a first question alike; --template chooses another")
    assert choice("llava_qwen", tmp_path, compressor="none")[0] == "llava_qwen"
    assert choice("qwen3", tmp_path, template="chatml") == ("chatml", [], CHAT_TEMPLATES["chatml"])


def test_the_one_that_is_asked_for_or_none(tmp_path):
    with pytest.raises(
        UserError, match="^--template tokenizer: tokenizer_config.json: .*; choose another with --template: qwen3$"
    ):
        choice("qwen3", tmp_path, template=TOKENIZER)
    source, tokenizer = (
        Source("llama", tmp_path, LlamaConfig()),
        load_tokenizer(tokenizer_files(tmp_path / "t", "vicuna")),
    )
    tokenizer.chat_template = "{{ 'none' }}"  # those that this tokenizer has the tokens of
    with pytest.raises(UserError, match="; choose another with --template: voco_v1, .*, bare, plain, mistral$"):
        choose_template(default_config().data, source, tokenizer, Options(template=TOKENIZER))
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="^--template tokenizer: .*: no chat template$"):
        choose_template(default_config().data, source, tokenizer, Options(template=TOKENIZER))


def test_stop_tokens_go_along(tmp_path):
    """Those of generation_config.json, of the model too whose tokenizer is given; ids of no token are refused."""
    given, model = tokenizer_files(tmp_path / "given", "llama3.1"), tmp_path / "model"
    (given / "generation_config.json").unlink()
    tokenizer = load_tokenizer(given)
    eot, others = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eom_id|>"])
    assert prompt_ids(tokenizer).stop_ids == (eot,)
    model.mkdir()
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [*others, eot]}))
    tokenizer, _ = load_source_tokenizer(Source("llama", model, LlamaConfig()), given)
    assert prompt_ids(tokenizer).stop_ids == (eot, *others)
    save_tokenizer(tokenizer, tmp_path / "run")
    assert prompt_ids(load_tokenizer(tmp_path / "run")).stop_ids == (eot, *others)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [eot, 99_999]}))
    shutil.copy(model / "generation_config.json", given)
    for load in (
        lambda: load_tokenizer(given),
        lambda: load_source_tokenizer(Source("llama", model, LlamaConfig()), given),
    ):
        with pytest.raises(
            UserError, match=r"generation_config.json: eos_token_id: expected ids of the .*, found 99999$"
        ):
            load()


@pytest.mark.slow
def test_there_and_back(tmp_path, convert):  # noqa: F811
    """A language model with control tokens: its stop tokens are in the export, which makes a run with its prompt."""
    tokenizer = load_tokenizer(DATA / "llama_tokenizer")
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = SMOLLM2
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    template, end = read_chat_template(SMOLLM2, tokenizer), tokenizer.convert_tokens_to_ids("<|im_end|>")
    status, out, err = convert("to-jax", reference.DIRECTORY, tmp_path / "run", "--tokenizer", tmp_path / "tokenizer")
    assert status == 0 and OWN in out.splitlines() and OWN not in err
    file = tmp_path / "run" / "config.json"
    assert template_of(load_config(file)) == template
    changed = json.loads(file.read_text())
    changed["data"]["system"] = "Be brief."
    file.write_text(json.dumps(changed))
    status, _, err = convert("to-hf", tmp_path / "run", tmp_path / "theirs", "--format", "llava-hf")
    line = "config.data.system = 'Be brief.': the format cannot store it"
    assert status == 0 and f"warning: {line}\n" in err and "chat template" not in err
    ends = json.loads((tmp_path / "theirs" / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [tokenizer.eos_token_id, end]
    assert convert("to-jax", tmp_path / "theirs", tmp_path / "back")[0] == 0
    assert template_of(load_config(tmp_path / "back" / "config.json")) == template
    # Training that begins with it has its prompt, where the config names no other
    more = default_config()
    more.init_from, more.model.num_voco_tokens = str(tmp_path / "back"), 2
    assert template_of(begin_with_run(more)) == template
    more.data.template = "bare"
    assert begin_with_run(more).data.template == "bare"


def test_a_processors_template_takes_parts():
    """A language model's takes text alone, and would lose the images that come in parts: an export has another."""
    for family, has_parts in (("qwen2.5", False), ("qwen3", False), ("llama3.1", False), ("llava_qwen", True)):
        tokenizer, template = copy.deepcopy(tokenizer_of(family)), chosen(family)[1]
        own = tokenizer.chat_template
        encoder = Encoder(tokenizer, template, 0, 1, compressed=False, verbatim=True)
        set_chat_template(tokenizer, encoder)
        assert (tokenizer.chat_template == own) == takes_parts(own, tokenizer) == has_parts, family
        assert takes_parts(tokenizer.chat_template, tokenizer)
        sample = encoder.encode_question("Why?")
        text = tokenizer.decode(sample.tokens[sample.slot_index < 0])
        image = [{"type": "image"}, {"type": "text", "text": "Why?"}]
        for content in (image, "<image>\nWhy?")[: 1 if has_parts else 2]:
            asked = [{"role": "user", "content": content}]
            rendered = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
            assert rendered.replace("<image>", "") == text, (family, content)


def test_a_prompt_as_a_chat_template():
    """Written for transformers and read again: with a system text of its own, and text in place of images."""
    for family, system in (("llava_qwen", None), ("llama3.1", "Be brief.")):
        tokenizer, template = tokenizer_of(family), chosen(family)[1]
        encoder = Encoder(tokenizer, template, 0, 1, compressed=False, verbatim=True, system=system)
        again = read_chat_template(write_chat_template(encoder), tokenizer)
        turns = [{"from": "gpt" if i % 2 else "human", "value": text} for i, text in enumerate(("Why?", "So.", "Or?"))]
        both = encoder, Encoder(tokenizer, again, 0, 1, compressed=False, verbatim=True)
        for said in (
            turns,
            [{"from": "human", "value": "<image>\nWhy?"}, *turns[1:]],
            [{"from": "system", "value": "x"}, *turns],
        ):
            count = "<image>" in said[0]["value"]
            ours, theirs = (one.encode(said, int(count)) for one in both)
            assert np.array_equal(ours.tokens, theirs.tokens) and np.array_equal(ours.labels, theirs.labels), family
