"""LoRA adapters, as LLaVA's training and PEFT leave them, added to their base; checked by the formula in float64."""

import json
from pathlib import Path
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.convert.test_convert import TOKENIZER, convert  # noqa: F401 (a fixture)
from tests.helpers import reference
from voco_jax.convert.sources import open_source
from voco_jax.errors import UserError

TOWER = reference.DIRECTORY / "vision_tower"
CONFIG = json.loads((reference.DIRECTORY / "config.json").read_text())
RANK, MODULES = 4, {"q_proj": ("self_attn", 32, 32), "up_proj": ("mlp", 32, 64)}  # inputs, outputs


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """The language model of the golden checkpoint alone."""
    directory = tmp_path_factory.mktemp("adapters") / "base"
    directory.mkdir()
    tensors = load_file(reference.DIRECTORY / "model.safetensors")
    language = {name: x for name, x in tensors.items() if "mm_projector" not in name and "vision" not in name}
    save_file(language, directory / "model.safetensors")
    fields = {key: value for key, value in CONFIG.items() if "mm_" not in key and "image" not in key}
    (directory / "config.json").write_text(json.dumps(fields | {"model_type": "llama"}))
    return directory


def matrices(rank: int = RANK) -> dict[str, np.ndarray]:
    """A and B of both layers' projections, under PEFT's names."""
    rng = np.random.default_rng(0)
    made = {}
    for layer in range(2):
        for module, (block, inputs, outputs) in MODULES.items():
            name = f"base_model.model.model.layers.{layer}.{block}.{module}.lora"
            made[f"{name}_A.weight"] = rng.normal(size=(rank, inputs)).astype(np.float32) * 0.1
            made[f"{name}_B.weight"] = rng.normal(size=(outputs, rank)).astype(np.float32) * 0.1
    return made


def make_adapter(directory: Path, tensors: dict | None = None, llava: bool = True, **config) -> Path:
    """As LLaVA's training leaves it: a projector trained whole beside the adapter."""
    directory.mkdir()
    fields = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": 8, "bias": "none", "target_modules": list(MODULES),
        "base_model_name_or_path": "lmsys/vicuna-7b-v1.5", "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": True, "layers_to_transform": None, "lora_dropout": 0.05, "modules_to_save": None,
        "task_type": "CAUSAL_LM", "revision": None, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False,
    }  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(fields | config))
    save_file(matrices() if tensors is None else tensors, directory / "adapter_model.safetensors")
    if llava:
        import torch

        quantized = {"quantization_config": {"load_in_4bit": True}}  # as QLoRA leaves it: the base given is not
        (directory / "config.json").write_text(json.dumps(CONFIG | quantized))
        all_tensors = load_file(reference.DIRECTORY / "model.safetensors")
        projector = {n: torch.tensor(x) for n, x in all_tensors.items() if "mm_projector" in n}
        projector["model.mm_projector.0.bias"] = projector["model.mm_projector.0.bias"] + 1
        prefixed = {f"base_model.model.{name}": x for name, x in projector.items()}
        torch.save(prefixed, directory / "non_lora_trainables.bin")
    return directory


def expected(base: Path, made: dict, scale, layer: int, module: str) -> np.ndarray:
    block = MODULES[module][0]
    weight = load_file(base / "model.safetensors")[f"model.layers.{layer}.{block}.{module}.weight"]
    name = f"base_model.model.model.layers.{layer}.{block}.{module}.lora"
    low = made[f"{name}_B.weight"].astype(np.float64) @ made[f"{name}_A.weight"]
    return weight.astype(np.float64) + scale * low


@pytest.mark.peer
def test_llavas_training(base, tmp_path, convert):  # noqa: F811
    """Merged and rounded once; the projector is the one trained beside; what is not named stays as it was."""
    adapter = make_adapter(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"give the checkpoint .* --base DIR .*'lmsys/vicuna-7b-v1.5', which is never"):
        open_source(adapter, TOWER)
    source = open_source(adapter, TOWER, base)
    assert source.format == "voco" and source.missing_parts() == [] and source.problems == []
    for layer in range(2):
        for module in MODULES:
            merged = source.tensors[f"llama.layers.{module}.kernel", layer].read()
            assert merged.dtype == np.float16
            true = expected(base, matrices(), 2.0, layer, module)
            np.testing.assert_allclose(merged, true, rtol=2**-11, atol=1e-7)  # half a unit in the last place
    original = load_file(reference.DIRECTORY / "model.safetensors")
    values = source.tensors["llama.layers.v_proj.kernel", 1].read()
    np.testing.assert_array_equal(values, original["model.layers.1.self_attn.v_proj.weight"])
    bias = source.tensors["projector.linear_1.bias", None].read()
    np.testing.assert_array_equal(bias, original["model.mm_projector.0.bias"] + 1)

    options = ["--vision-tower", TOWER, "--base", base]
    status, _, err = convert("to-jax", adapter, tmp_path / "run", *options, *TOKENIZER)
    assert status == 0, err
    status, out, _ = convert("verify", adapter, tmp_path / "run", *options)
    assert status == 0 and "96 of 96 tensors are identical" in out


@pytest.mark.peer
def test_projector_trained_alone(base, tmp_path):
    """LLaVA's first stage leaves config.json and mm_projector.bin."""
    stage = make_adapter(tmp_path / "stage")
    (stage / "adapter_config.json").unlink()
    (stage / "non_lora_trainables.bin").rename(stage / "mm_projector.bin")
    source = open_source(stage, TOWER, base)
    assert source.missing_parts() == [] and source.problems == []
    assert source.tensors["projector.linear_1.bias", None].file.name == "mm_projector.bin"
    with pytest.raises(UserError, match="--base: expected a LoRA adapter or mm_projector.bin in it, found neither"):
        open_source(base, None, base)


@pytest.mark.parametrize("case", ["rslora", "patterns", "dora", "whole"])
def test_forms_of_lora(case, base, tmp_path):
    made, scale, config = matrices(), {"q_proj": 2.0, "up_proj": 2.0}, {}
    if case == "rslora":
        config, scale = {"use_rslora": True}, {"q_proj": 4.0, "up_proj": 4.0}  # 8 / sqrt(4)
    if case == "patterns":
        made = {name: x[:2] if "q_proj.lora_A" in name else x for name, x in made.items()}
        made = {name: x[:, :2].copy() if "q_proj.lora_B" in name else x for name, x in made.items()}
        config = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.\d+\.mlp.up_proj": 6}}
        scale = {"q_proj": 4.0, "up_proj": 1.5}
    if case == "dora":
        config = {"use_dora": True}
        for name in [name for name in made if "lora_B" in name]:
            made[name.replace("lora_B.weight", "lora_magnitude_vector")] = np.ones(len(made[name]), np.float32)
    if case == "whole":  # tokens were added: embedding and head were trained whole, in both of PEFT's spellings
        config = {"modules_to_save": ["lm_head", "embed_tokens"]}
        made["base_model.model.model.embed_tokens.modules_to_save.default.weight"] = np.full((32003, 32), 2, np.float32)
        made["base_model.model.lm_head.weight"] = np.full((32003, 32), 3, np.float32)
    source = open_source(make_adapter(tmp_path / "adapter", made, llava=False, **config), None, base)
    for module in MODULES:
        merged = source.tensors[f"llama.layers.{module}.kernel", 1].read()
        true = expected(base, made, scale[module], 1, module)
        if case == "dora":
            true /= np.linalg.norm(true, axis=1, keepdims=True)
        np.testing.assert_allclose(merged, true, rtol=2**-11 + 1e-6, atol=1e-7)
    if case == "whole":
        assert source.llama.vocab_size == 32003
        assert source.tensors["llama.lm_head.kernel", None].read()[7, 7] == 3


@pytest.mark.peer
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": "all"}, "adapter_config.json: bias: expected 'none', found 'all'"),
        ({"peft_type": "IA3"}, "adapter_config.json: peft_type: expected 'LORA', found 'IA3'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: expected True or False"),
        (
            {"lora_tricks": 3},
            "adapter_config.json: lora_tricks: unknown, and may change what the model computes; found 3",
        ),
        ({"r": 8}, "4 layers of the adapter do not fit the base: model.layers.0.mlp.up_proj: expected A \\[8, 32\\]"),
        ({"use_dora": True}, "expected lora_A, lora_B, lora_magnitude_vector; found A, B"),
        ({"lora_alpha": "8"}, "lora_alpha: expected a number above 0, found '8'"),
    ],
)
def test_what_is_not_computed_is_refused(change, message, base, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        open_source(make_adapter(tmp_path / "adapter", **change), TOWER, base)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("how", ["lora", "modules_to_save", "resized"])
def test_adapters_of_tied_embeddings(how, base, tmp_path):
    """PEFT leaves the head as it was, and a merged embedding would change it; rows that it has only stored may come."""
    tied, made, config = tmp_path / "tied", matrices(), {}
    tied.mkdir()
    tensors = load_file(base / "model.safetensors")
    save_file({name: x for name, x in tensors.items() if name != "lm_head.weight"}, tied / "model.safetensors")
    fields = json.loads((base / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps(fields | {"tie_word_embeddings": True}))
    rows = tensors["model.embed_tokens.weight"].shape[0]
    if how == "lora":
        made["base_model.model.model.embed_tokens.lora_embedding_A"] = np.zeros((RANK, rows), np.float32)
        made["base_model.model.model.embed_tokens.lora_embedding_B"] = np.zeros((32, RANK), np.float32)
    else:
        config = {"modules_to_save": ["embed_tokens"]} if how == "modules_to_save" else {}
        made["base_model.model.model.embed_tokens.weight"] = np.full((rows + 2, 32), 2, np.float32)
    adapter = make_adapter(tmp_path / "adapter", made, llava=False, **config)
    if how == "resized":
        assert open_source(adapter, None, tied).llama.vocab_size == rows + 2
        return
    with pytest.raises(UserError, match=r"embed_tokens: adapters of tied embeddings are not read \(tie_word") as error:
        open_source(adapter, None, tied)
    assert "\n" not in str(error.value)


@pytest.mark.peer
def test_another_base(base, tmp_path):
    """Of other shapes, without the layers, or of another function by its config."""
    adapter = make_adapter(tmp_path / "adapter")
    other = tmp_path / "other"
    shutil.copytree(base, other)
    fields = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(fields | {"rope_theta": 5e5}))
    with pytest.raises(UserError, match=r"rope_theta: expected 10000.0, as .* has it, found 500000.0: another base\?"):
        open_source(adapter, TOWER, other)
    deeper = {name.replace("layers.1", "layers.7"): x for name, x in matrices().items()}
    with pytest.raises(UserError, match=r"2 layers of the adapter .*model.layers.7.self_attn.q_proj: the base has no"):
        open_source(make_adapter(tmp_path / "deeper", deeper), TOWER, base)
    wider = {name: np.concatenate([x, x], axis=-1) if "lora_A" in name else x for name, x in matrices().items()}
    with pytest.raises(UserError, match=r"expected A \[4, 32\] and B \[64, 4\], found \[4, 64\] and \[64, 4\]"):
        open_source(make_adapter(tmp_path / "wider", wider, llava=False), None, base)
