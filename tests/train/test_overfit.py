"""64 real questions, each about a picture of its own, learned by heart: with all parameters, by LoRA, and with the
language model frozen. The latter two begin with a run that was trained for a minute, on other pictures."""

import json
from pathlib import Path
import re

from ml_collections import ConfigDict
import numpy as np
import pytest

from tools import convert_weights
from voco_jax.api import Model
from voco_jax.chat_templates import CHAT_TEMPLATES
from voco_jax.checkpoint.run import load_run
from voco_jax.command_line import parse_arguments
from voco_jax.config import source, sources
from voco_jax.data.sources import easyvqa, open_sources
from voco_jax.data.tokenizer import train_tokenizer
from voco_jax.eval.by_kind import THIS_RUN, score_by_kind
from voco_jax.eval.scoring import OVERALL
from voco_jax.train.loop import train

pytestmark = pytest.mark.slow

CONFIG_FILE = Path(__file__).parents[2] / "configs" / "easyvqa.py"
COMMON = {
    "model.llama.hidden_size": 64,
    "model.llama.intermediate_size": 128,
    "model.llama.head_dim": 32,
    "model.llama.num_hidden_layers": 2,
    "model.llama.initializer_range": 0.125,
    "model.vision.hidden_size": 64,
    "model.vision.intermediate_size": 128,
    "model.vision.num_hidden_layers": 1,
    "model.vision.patch_size": 16,
    "model.vision.initializer_range": 0.125,
    "model.num_voco_tokens": 4,
    "data.rows_per_pack": 1,
    "data.conversations_per_record": 1,
    "data.batch_size": 32,
    "optim.warmup_steps": 10,
}
# Changes of `COMMON`; a learning rate of Muon's is that of matrices, whose updates are Adam's size.
BASE = {
    "optim.learning_rate": 3e-3, "train.steps": 400,
    "data.batch_size": 12, "data.conversations_per_record": 4, "data.rows_per_pack": 4,
}  # fmt: skip
FULL = {"optim.learning_rate": 2e-3, "train.steps": 130}
LORA = {
    "optim.name": "adamw", "optim.learning_rate": 5e-3, "train.steps": 150, "train.freeze": "('vision_tower',)",
    "model.lora.rank": 8, "model.lora.alpha": 16.0,
}  # fmt: skip
FROZEN = {
    "optim.learning_rate": 2e-2, "optim.schedule": "wsd", "optim.decay_fraction": 0.3, "train.steps": 400,
    "train.freeze": "('vision_tower', 'llama')",
}  # fmt: skip


def write_questions(file: Path, split: str, num_pictures: int, per_picture: int) -> Path:
    """Questions of easy-VQA as a LLaVA file, one a row: some, by chance, about each of the first pictures."""
    rng = np.random.default_rng(0)
    rows = [
        {"image": Path(record.images[0].file).name, "conversations": record.conversations[i]}
        for record in easyvqa.load(split)[:num_pictures]
        for i in rng.permutation(len(record.conversations))[:per_picture]
    ]
    file.write_text(json.dumps(rows))
    return file


def config_of(workdir: Path, questions: Path, changes: dict, *, dimensions: bool = True) -> ConfigDict:
    """`dimensions`: those of `COMMON`."""
    common = {key: value for key, value in COMMON.items() if dimensions or not re.match(r"model\.(llama|vision)", key)}
    keys = common | changes | {"workdir": workdir}
    arguments = [f"--config={CONFIG_FILE}", *(f"--config.{key}={value}" for key, value in keys.items())]
    config = parse_arguments(["train", *arguments])[0]
    images = Path(easyvqa.load(questions.stem)[0].images[0].file).parent
    config.data.train = sources(questions=source("llava", file=str(questions), images=str(images)))
    config.data.test = sources()
    config.train.checkpoint_every = config.train.steps
    return config


def accuracy(run: Path, questions: Path) -> float:
    """Exact answers to all questions of a file, greedily, as `evaluate` has them."""
    (found,), _ = open_sources(config_of(run, questions, {}).data, "train")
    right, total = score_by_kind(Model(load_run(run)), found)[0]["counts"][THIS_RUN][OVERALL]
    assert total == 64
    return right / total


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    return write_questions(tmp_path_factory.mktemp("questions") / "test.json", "test", 64, 1)


@pytest.fixture(scope="module")
def base(questions, tmp_path_factory) -> Path:
    """A run that has learned the language, and to look, from 2,000 pictures of the other split."""
    directory = tmp_path_factory.mktemp("base")
    others = write_questions(directory / "train.json", "train", 2000, 8)
    run = train(config_of(directory / "run", others, BASE))
    before = accuracy(run, questions)
    print(f"before: {before:.1%}")
    assert before < 0.9
    return run


def learned(run: Path, questions: Path) -> float:
    share = accuracy(run, questions)
    print(f"after: {share:.1%}")
    return share


def test_all_parameters_from_scratch(questions, tmp_path):
    assert learned(train(config_of(tmp_path / "run", questions, FULL)), questions) >= 0.99


RELATIVES = {"Qwen3 and SigLIP": ("qwen3", "siglip_vision_model"), "Mistral and CLIP": ("mistral", "clip_vision_model")}


@pytest.mark.parametrize("models", RELATIVES)
def test_all_parameters_of_converted_relatives(models, questions, tmp_path, monkeypatch):
    """Random models of transformers' classes, converted, and trained from there."""
    import torch
    import transformers

    said = [turn["value"] for row in json.loads(questions.read_text()) for turn in row["conversations"]]
    tokenizer = train_tokenizer([CHAT_TEMPLATES["voco_v1"].exchange(*said[:2]), *said], 400)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
    language, tower = RELATIVES[models]
    text = transformers.AutoConfig.for_model(
        language, **sizes, head_dim=32, num_key_value_heads=1, initializer_range=0.125, vocab_size=len(tokenizer),
        max_position_embeddings=1024, sliding_window=None,
    )  # fmt: skip
    vision = transformers.AutoConfig.for_model(tower, **sizes, image_size=64, patch_size=16, initializer_range=0.125)
    strategy = "full" if tower.startswith("siglip") else "default"
    config = transformers.LlavaConfig(
        text_config=text, vision_config=vision, vision_feature_layer=-1, vision_feature_select_strategy=strategy,
        image_token_index=len(tokenizer) - 1,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    arguments = ["to-jax", tmp_path / "theirs", tmp_path / "converted", "--num-voco-tokens", 4]
    monkeypatch.setattr("sys.argv", list(map(str, ["tool", *arguments])))
    convert_weights.main()
    keys = FULL | {"init_from": tmp_path / "converted"}
    run = train(config_of(tmp_path / "run", questions, keys, dimensions=False))
    assert learned(run, questions) >= 0.99


def test_lora(base, questions, tmp_path):
    config = config_of(tmp_path / "run", questions, LORA | {"init_from": base})
    assert learned(train(config), questions) >= 0.99


def test_a_frozen_language_model_and_a_projector(base, questions, tmp_path):
    """Which with the VoCo token's row is 8,384 parameters of 220,736."""
    config = config_of(tmp_path / "run", questions, FROZEN | {"init_from": base})
    assert learned(train(config), questions) >= 0.99
