"""Runs with a tokenizer's own chat template: trained from a config, continued, and asked from memories."""

import json
import shutil

import numpy as np
import pytest

from tests.data.test_chat_families import BRIEF, BRIEFLY, CHATML, SAID, turns
from tests.helpers import tiny
from tests.helpers.chat_families import tokenizer_files
import voco_jax
from voco_jax.config import load_config
from voco_jax.data.packing import pack_row
from voco_jax.data.tokenizer import load_run_tokenizer
from voco_jax.infer.prompts import Prompt, score
from voco_jax.models.voco import Read
from voco_jax.train.loop import train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def qwen_run(tmp_path_factory):
    """Of a tokenizer without BOS, trained for three steps, and for a fourth when the tokenizer's template is another."""
    directory = tmp_path_factory.mktemp("qwen")
    tokenizer = tokenizer_files(directory / "tokenizer", "qwen2.5")
    changes = {
        "tokenizer__source": tokenizer, "data__template": "tokenizer", "data__system": BRIEF,
        "model__num_voco_tokens": 2, "train__checkpoint_every": 2, "optim__schedule": "constant",
    }  # fmt: skip
    train(tiny.config(directory / "run", **changes, train__steps=3))
    stored = load_config(directory / "run" / "config.json")
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "{{ 'none' }}"}))
    train(tiny.config(directory / "run", **changes, train__steps=4))
    shutil.rmtree(tokenizer)
    return directory / "run", stored


def test_the_template_is_the_runs_own(qwen_run):
    run, stored = qwen_run
    kept = load_config(run / "config.json")
    assert kept.data.custom_template == stored.data.custom_template and kept.data.template == "tokenizer"
    assert kept.data.custom_template.user == "<|im_start|>user\n" and kept.train.steps == 4
    model = voco_jax.load(run)
    assert model.run.model.config.prefix_ids == ()
    encoder = model.run.encoder
    assert encoder.tokenizer.convert_ids_to_tokens(encoder.stop_ids) == ["<|im_end|>", "<|endoftext|>"]
    asked = encoder.encode_question(SAID[0])
    assert encoder.tokenizer.decode(asked.tokens) == f"<voco><voco>\n{BRIEFLY}{CHATML[0]}"
    assert load_run_tokenizer(run).chat_template is not None


def test_a_memory_is_good_for_every_conversation(qwen_run, picture, tmp_path):
    """No text is in it: compressed once, it gives the same bits in each, before and after others and from its file;
    and the numbers of the whole sequence, where the picture stands in its text too."""
    model = voco_jax.load(qwen_run[0])
    engine, encoder = model.engine, model.run.encoder
    memory = model.compress([picture])
    conversations = [
        encoder.encode(turns(f"<image>\n{SAID[0]}", *SAID[1:]), 1),
        encoder.encode(turns("Why <image> so?", "Because.", system="You know birds."), 1),
        encoder.encode(turns("Hi", "Hello", f"<image>\n{SAID[0]}", SAID[1], system="Speak."), 1),
    ]

    def scores(images, order=(0, 1, 2)) -> dict[int, float]:
        with engine.on_mesh():
            return {i: score(engine, [Prompt(conversations[i], images)])[0].log_probability for i in order}

    first = scores(memory)
    assert first == scores(memory, (2, 1, 0)) == scores(model.compress([picture]))
    model.save(memory, tmp_path / "one.voco")
    assert first == scores(model.open(tmp_path / "one.voco")) and len(set(first.values())) == 3

    pixels = model.run.processor(model.run.processor.load(picture))[None, None]
    for i, sample in enumerate(conversations):
        row = pack_row([sample], len(sample))
        logits = np.asarray(model.run.model(Read(*(getattr(row, name)[None] for name in Read._fields)), pixels))[0]
        logits = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        labels = np.flatnonzero(sample.labels)
        assert abs(logits[labels - 1, sample.tokens[labels]].sum() - first[i]) < 1e-4
