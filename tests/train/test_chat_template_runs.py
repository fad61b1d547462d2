"""Runs with a tokenizer's own chat template: trained from a config, continued, and asked from memories."""

import json

import numpy as np
import pytest

from tests.data.test_chat_families import BRIEF, BRIEFLY, CHATML, SAID, turns
from tests.helpers import tiny
from tests.helpers.chat_families import tokenizer_files
import voco_jax
from voco_jax.checkpoint.resume import continued
from voco_jax.checkpoint.run import load_run
from voco_jax.checkpoint.workdir import check_workdir
from voco_jax.config import load_config
from voco_jax.data.packing import pack_row
from voco_jax.infer.prompts import Prompt, score
from voco_jax.models.voco import Read
from voco_jax.train.loop import train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """(run, its config by the arguments): of a tokenizer without BOS, whose chat template is another since then."""
    directory = tmp_path_factory.mktemp("qwen")
    tokenizer = tokenizer_files(directory / "tokenizer", "qwen2.5")
    config = tiny.config(
        directory / "run", tokenizer__source=tokenizer, data__template="tokenizer", data__system=BRIEF,
        model__num_voco_tokens=2, train__checkpoint_every=3, train__steps=3,
    )  # fmt: skip
    train(config)
    fields = json.loads((tokenizer / "tokenizer_config.json").read_text())
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(fields | {"chat_template": "{{ 'none' }}"}))
    return directory / "run", config


def test_the_template_is_the_runs_own(qwen):
    run, config = qwen
    stored = load_config(run / "config.json").data
    assert stored.template == "tokenizer" and stored.custom_template.user == "<|im_start|>user\n"
    assert config.data.custom_template != stored.custom_template == continued(config, run).data.custom_template
    assert check_workdir(run, continued(config, run))  # it may go on
    model = load_run(run)
    assert model.model.config.prefix_ids == ()
    encoder = model.encoder
    assert encoder.tokenizer.convert_ids_to_tokens(encoder.stop_ids) == ["<|im_end|>", "<|endoftext|>"]
    assert encoder.tokenizer.decode(encoder.encode_question(SAID[0]).tokens) == f"<voco><voco>\n{BRIEFLY}{CHATML[0]}"


def test_a_memory_is_good_for_every_conversation(qwen, picture, tmp_path):
    """No text is in it: compressed once, it gives the same bits in each, before and after others and from its file;
    and the numbers of the whole sequence, where the picture stands in its text too."""
    model = voco_jax.load(qwen[0])
    engine, encoder = model.engine, model.run.encoder
    memory = model.compress([picture])
    conversations = [
        encoder.encode(turns(f"<image>\n{SAID[0]}", *SAID[1:]), 1),
        encoder.encode(turns("Why <image> so?", "Because.", system="You know birds."), 1),
        encoder.encode(turns("Hi", "Hello", f"<image>\n{SAID[0]}", SAID[1]), 1),
    ]

    def scores(images, order=(0, 1, 2)) -> dict[int, float]:
        with engine.on_mesh():
            return {i: score(engine, [Prompt(conversations[i], images)])[0].log_probability for i in order}

    first = scores(memory)
    assert first == scores(memory, (2, 1, 0)) == scores(model.compress([picture]))
    model.save(memory, tmp_path / "one.voco")
    assert first == scores(model.open(tmp_path / "one.voco")) and len(set(first.values())) == 3

    row = pack_row(conversations, sum(map(len, conversations)))
    pixels = model.run.processor(model.run.processor.load(picture))[None].repeat(3, axis=0)[None]
    logits = np.asarray(model.run.model(Read(*(getattr(row, name)[None] for name in Read._fields)), pixels))[0]
    logits = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    for i, sample in enumerate(conversations):
        labels = sum(map(len, conversations[:i])) + np.flatnonzero(sample.labels)
        assert abs(logits[labels - 1, sample.tokens[sample.labels]].sum() - first[i]) < 1e-4
