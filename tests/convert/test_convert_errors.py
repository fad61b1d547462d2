"""Bad checkpoints: one clear line, exit status 2, nothing left behind. And conversions that do not come to an end."""

import json
import os
from pathlib import Path
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.conftest import DATA
from tests.convert.test_convert import TOKENIZER, convert, golden_run  # noqa: F401 (fixtures)
from tests.helpers import reference
from voco_jax.checkpoint.run import load_run
from voco_jax.config import typed
from voco_jax.convert.to_jax import check_space
from voco_jax.errors import UserError
from voco_jax.models import presets

TOOL = Path(__file__).parents[2] / "tools" / "convert_weights.py"


def change_tensors(source: Path, change) -> None:
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors")


def change_config(source: Path, **values) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | values))


def truncated(source):
    file = source / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1000)
    return "model.safetensors: truncated: "


def truncated_header(source):
    os.truncate(source / "model.safetensors", 500)
    return "model.safetensors: not a safetensors file, or truncated"


def empty(source):
    os.truncate(source / "model.safetensors", 0)
    return "model.safetensors: not a safetensors file, or truncated"


def no_header(source):
    file = source / "model.safetensors"
    file.write_bytes((64).to_bytes(8, "little") + b"x" * 64)
    return "model.safetensors: damaged safetensors header"


def impossible_offsets(source):
    header = json.dumps({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}}).encode()
    (source / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    return "x: 12 bytes do not make F32 [4]"


def quantized(source):
    change_tensors(source, lambda t: t.update({"model.norm.weight": np.zeros(32, np.int8)}))
    return "model.norm.weight: expected dtype F32, F16, BF16; found I8"


def no_weights(source):
    (source / "model.safetensors").unlink()
    return "expected model.safetensors or pytorch_model.bin, or an index of shards; found none"


def extra_tensor(source):
    change_tensors(source, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(32, np.float16)}))
    return "1 tensors do not fit: model.layers.0.self_attn.q_proj.bias unknown (model.safetensors)"


def missing_tensor(source):
    change_tensors(source, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    return "1 tensors do not fit: llama.layers.up_proj.kernel (layer 1) missing (expected [64, 32])"


def transposed_tensor(source):
    name = "model.layers.1.mlp.up_proj.weight"
    change_tensors(source, lambda t: t.update({name: np.ascontiguousarray(t[name].T)}))
    return f"1 tensors do not fit: {name}: expected shape [64, 32], found [32, 64]"


def several_problems(source):
    missing_tensor(source), transposed_tensor_of_vision(source), extra_tensor(source)
    return "3 tensors do not fit: "


def transposed_tensor_of_vision(source):
    name = "model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
    change_tensors(source, lambda t: t.update({name: np.ascontiguousarray(t[name].T)}))


def mixed_dtypes(source):
    name = "model.layers.1.mlp.up_proj.weight"
    change_tensors(source, lambda t: t.update({name: t[name].astype(np.float32)}))
    return f"{name}: expected float16 as layer 0, found float32"


def not_a_number(source):
    def change(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
        tensors["model.mm_projector.0.bias"][7] = np.inf

    change_tensors(source, change)
    return "values that are not finite in model.layers.1.mlp.up_proj.weight; model.mm_projector.0.bias"


def other_model(source):
    change_config(source, model_type="mixtral")
    (source / "config.json").write_text((source / "config.json").read_text().replace("mm_vision_tower", "x"))
    known = "'llava_llama', 'llava', 'llava_next', 'llava_onevision', 'llama', 'mistral', 'qwen2', 'qwen3'"
    return f"config.json: model_type: expected one of {known}; found 'mixtral'"


def other_vision_model(source):
    (source / "vision_tower").unlink()
    (source / "vision_tower").mkdir()
    (source / "vision_tower" / "config.json").write_text('{"model_type": "dinov2"}')
    return "model_type: expected 'clip_vision_model' or 'clip' or 'siglip_vision_model' or 'siglip', found 'dinov2'"


def no_projector(source):
    change_tensors(source, lambda t: [t.pop(name) for name in list(t) if "mm_projector" in name])
    return "no projector; --init-missing draws it at random"


def no_language_model(source):
    change_tensors(source, lambda t: [t.pop(n) for n in list(t) if "vision" not in n and "mm_projector" not in n])
    return "source: no llama"


def doubled_in_the_header(source):
    entry = '"x":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}'
    header = f"{{{entry},{entry}}}".encode()
    (source / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    return "model.safetensors: damaged safetensors header: x doubled"


def overlapping_tensors(source):
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    header = json.dumps({"x": entry, "y": entry}).encode()
    (source / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    return "y: overlaps another tensor"


def no_config(source):
    (source / "config.json").unlink()
    return "config.json: not found"


def broken_config(source):
    (source / "config.json").write_text("{")
    return "config.json: not readable as JSON"


def shards(source: Path, weight_map: dict[str, str]) -> None:
    """The tensors in two files and an index of them, in which `weight_map` is put right or wrong."""
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in (0, 1)}
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, source / file)
    whole = {name: file for file, held in files.items() for name in held} | weight_map
    whole = {name: file for name, file in whole.items() if file}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": whole}))


def shard_not_there(source):
    shards(source, {})
    (source / "model-00002-of-00002.safetensors").unlink()
    return "model.safetensors.index.json: the shard model-00002-of-00002.safetensors is not there"


def shard_missing_from_index(source):
    shards(source, {})
    shutil.copy(source / "model-00002-of-00002.safetensors", source / "model-00003-of-00002.safetensors")
    return "model.safetensors.index.json: the shard model-00003-of-00002.safetensors is missing from the index"


def tensor_in_another_shard(source):
    shards(source, {"lm_head.weight": "model-00002-of-00002.safetensors"})
    return "lm_head.weight: expected in model-00002-of-00002.safetensors, found in model-00001-of-00002.safetensors"


def tensor_doubled(source):
    shards(source, {})
    file = source / "model-00002-of-00002.safetensors"
    save_file(load_file(file) | load_file(source / "model-00001-of-00002.safetensors"), file)
    return "expected in model-00001-of-00002.safetensors, found in model-00002-of-00002.safetensors"


def path_out_of_the_directory(source):
    shards(source, {"lm_head.weight": "../model.safetensors"})
    return "'../model.safetensors' is named, which is outside of the directory"


def broken_index(source):
    (source / "model.safetensors.index.json").write_text('{"metadata": {}}')
    return "model.safetensors.index.json: expected an object with 'weight_map'"


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/voco_jax_test_was_here",)


def write_pickle(source: Path, content: bytes) -> None:
    (source / "model.safetensors").unlink()
    with zipfile.ZipFile(source / "pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", content)


def pickle_that_runs_code(source):
    write_pickle(source, pickle.dumps({"model.norm.weight": Evil()}))
    return "pytorch_model.bin: not a PyTorch checkpoint that can be read safely: posix.system is not among the things"


def pickle_that_changes_what_it_is_given(source):
    """Protocol 2: torch.BFloat16Storage, then BUILD with a state, as an object's `__setstate__` would take it."""
    write_pickle(source, b"\x80\x02ctorch\nBFloat16Storage\n(K\x03X\x01\x00\x00\x00>NNNK\x02K\x02K\x00tb}.")
    return "pytorch_model.bin: not a PyTorch checkpoint that can be read safely"


def pickle_of_something_else(source):
    write_pickle(source, pickle.dumps([1, 2]))
    return "pytorch_model.bin: expected a dictionary of tensors, found list"


def truncated_pickle(source):
    write_pickle(source, pickle.dumps({"a": 1}))
    os.truncate(source / "pytorch_model.bin", 60)
    return "pytorch_model.bin: not a PyTorch checkpoint that can be read safely"


# One key of config.json, its value, and what is said.
CONFIG_FAULTS = {
    "more_layers": ("num_hidden_layers", 3, "9 tensors do not fit: llama.layers.down_proj.kernel (layer 2) missing"),
    "fewer_layers": ("num_hidden_layers", 1, "9 tensors do not fit: model.layers.1.input_layernorm.weight unknown"),
    "other_heads": (
        "num_key_value_heads",
        2,
        "4 tensors do not fit: model.layers.0.self_attn.k_proj.weight: expected shape [16, 32], found [32, 32]",
    ),
    "tied": ("tie_word_embeddings", True, "lm_head.weight differs from the embedding, but tie_word_embeddings is set"),
    "other_activation": ("hidden_act", "gelu", "config.json: hidden_act: expected 'silu', found 'gelu'"),
    "other_projector": (
        "mm_projector_type",
        "cabstractor",
        "config.json: mm_projector_type: expected mlp2x_gelu, mlp3x_gelu, linear, mlp1x_gelu; found 'cabstractor'",
    ),
    "projector_of_one_layer": (
        "mm_projector_type",
        "linear",
        "2 tensors do not fit: model.mm_projector.2.weight unknown (model.safetensors); model.mm_projector.2.bias",
    ),
    "other_squares": (
        "image_aspect_ratio",
        "anyres",
        "config.json: image_aspect_ratio: expected 'pad' or 'square' or None, found 'anyres'",
    ),
    "other_rope": (
        "rope_scaling",
        {"type": "longrope", "factor": 2.0},
        "config.json: rope_scaling.rope_type: expected default, linear, dynamic, yarn, llama3; found 'longrope'",
    ),
    "sliding_window": ("sliding_window", 4, "config.json: sliding_window: expected None, found 4"),
    "dimension_as_text": (
        "num_hidden_layers",
        "2",
        "config.json: llama.num_hidden_layers: expected a whole number above 0, found '2'",
    ),
    "dimension_of_nothing": (
        "num_key_value_heads",
        0,
        "config.json: llama.num_key_value_heads: expected a whole number above 0, found 0",
    ),
    "number_as_text": (
        "rms_norm_eps",
        "1e-5",
        "config.json: llama.rms_norm_eps: expected a number above 0, found '1e-5'",
    ),
    "rope_as_text": ("rope_scaling", "linear", "config.json: rope_scaling: expected an object, found 'linear'"),
    "tower_as_list": ("mm_vision_tower", ["a"], "config.json: mm_vision_tower: expected a name, found ['a']"),
    "tower_of_nowhere": (
        "mm_vision_tower",
        "/nowhere/clip",
        "config.json: mm_vision_tower '/nowhere/clip' is not known; give it with --vision-tower DIR",
    ),
}

FAULTS = [
    truncated, truncated_header, empty, no_header, impossible_offsets, quantized, no_weights, extra_tensor,
    missing_tensor, transposed_tensor, several_problems, mixed_dtypes, not_a_number, other_model, no_config,
    broken_config, other_vision_model, no_projector, no_language_model, doubled_in_the_header, overlapping_tensors,
    pickle_that_changes_what_it_is_given, shard_not_there, shard_missing_from_index, tensor_in_another_shard,
    tensor_doubled, path_out_of_the_directory, broken_index, pickle_that_runs_code, pickle_of_something_else,
    truncated_pickle,
]  # fmt: skip


@pytest.fixture
def source(tmp_path) -> Path:
    """The golden checkpoint, to be damaged."""
    return reference.copy_checkpoint(tmp_path / "source")


def assert_one_line(status: int, err: str, message: str) -> None:
    lines = [line for line in err.replace("\r", "\n").splitlines() if line and "B/s" not in line]  # progress bars
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: "), err
    assert message in lines[0]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_bad_checkpoint(fault, source, tmp_path, convert):  # noqa: F811
    message = fault(source)
    status, _, err = convert("to-jax", source, tmp_path / "run", *TOKENIZER)
    assert_one_line(status, err, message)
    assert os.listdir(tmp_path) == ["source"]
    assert not Path("/tmp/voco_jax_test_was_here").exists()


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_config_that_contradicts(fault, source, tmp_path, convert):  # noqa: F811
    key, value, message = CONFIG_FAULTS[fault]
    change_config(source, **{key: value})
    status, _, err = convert("to-jax", source, tmp_path / "run", *TOKENIZER)
    assert_one_line(status, err, message)
    assert os.listdir(tmp_path) == ["source"]


def test_inspect_tells_what_does_not_fit(source, convert):  # noqa: F811
    missing_tensor(source), extra_tensor(source)
    status, out, _ = convert("inspect", source)
    assert status == 2
    what = out.split("what does not fit\n")[1].splitlines()
    assert len(what) == 2 and "q_proj.bias unknown" in what[1] and "(layer 1) missing" in what[0]


def test_an_existing_destination_stays(source, tmp_path, convert, golden_run):  # noqa: F811
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "notes").write_text("mine")
    for arguments in (
        ("to-jax", source, tmp_path / "old", *TOKENIZER),
        ("to-hf", golden_run, tmp_path / "old", "--format", "voco"),
    ):
        status, _, err = convert(*arguments)
        assert_one_line(status, err, "old: exists already; nothing was changed")
        assert (tmp_path / "old" / "notes").read_text() == "mine" and len(os.listdir(tmp_path / "old")) == 1


def test_bad_runs(golden_run, tmp_path, convert):  # noqa: F811
    """to-hf of what is no run, and of one whose checkpoint is damaged."""
    status, _, err = convert("to-hf", tmp_path, tmp_path / "out", "--format", "voco")
    assert_one_line(status, err, "config.json: not found")
    run = tmp_path / "run"
    shutil.copytree(golden_run, run)
    largest = max(run.rglob("d/*"), key=lambda file: file.stat().st_size)
    os.truncate(largest, 1000)
    status, _, err = convert("to-hf", run, tmp_path / "out", "--format", "voco")
    assert_one_line(status, err, "the checkpoint is damaged")
    assert os.listdir(tmp_path) == ["run"]


def test_bad_arguments(source, tmp_path, convert, golden_run):  # noqa: F811
    bad = {
        "not found": ("to-jax", tmp_path / "nowhere", tmp_path / "run"),
        "download it first: hf download llava-hf/a-7b --local-dir a-7b": ("to-jax", "llava-hf/a-7b", tmp_path / "run"),
        "no tokenizer inside; give one with --tokenizer DIR": ("to-jax", source, tmp_path / "run"),
        "expected one SRC, or --llm; found 0": ("to-jax", tmp_path / "run"),
        "--max-shard-size: expected a size such as 5GB, found '5 parsecs'": (
            "to-hf", golden_run, tmp_path / "run", "--format", "voco", "--max-shard-size", "5 parsecs",
        ),
        "--num-voco-tokens: expected at least 1": ("to-jax", source, tmp_path / "run", "--num-voco-tokens", 0),
        "--vocab-multiple: expected at least 1, found 0": ("to-jax", source, tmp_path / "run", "--vocab-multiple", 0),
        "expected a directory or a .gguf file": ("to-jax", source / "config.json", tmp_path / "run", *TOKENIZER),
    }  # fmt: skip
    for message, arguments in bad.items():
        status, _, err = convert(*arguments)
        assert_one_line(status, err, message)
    assert os.listdir(tmp_path) == ["source"]


def test_room_on_the_disk(tmp_path):
    with pytest.raises(UserError, match=r"run: 1000000000\.0 GB are needed on the disk, \d+\.\d GB are free"):
        check_space(tmp_path / "run", 10**18)


@pytest.mark.parametrize("command", ["to-jax", "to-hf"])
def test_writing_fails(command, source, golden_run, tmp_path, convert):  # noqa: F811
    """A disk that fills up on the way, here by a limit on the size of files."""
    arguments = {
        "to-jax": [source, tmp_path / "run", *TOKENIZER],
        "to-hf": [golden_run, tmp_path / "run", "--format", "voco"],
    }[command]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500 * 1024, limits[1]))
    try:
        status, _, err = convert(command, *arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_one_line(status, err, "File too large")
    assert os.listdir(tmp_path) == ["source"]


def test_names_of_the_model_and_of_its_tower(source, tmp_path, convert):  # noqa: F811
    """The first releases' model type; and a tower that is named by a path of the machine it was trained on."""
    change_config(source, model_type="llava", mm_vision_tower="/data/clip-vit-large")
    tower = reference.DIRECTORY / "vision_tower"
    assert convert("to-jax", source, tmp_path / "run", "--vision-tower", tower, *TOKENIZER)[0] == 0
    assert convert("verify", tmp_path / "run", source, "--vision-tower", tower)[0] == 0


@pytest.mark.parametrize("model_type", ["mixtral", "granite"])
def test_models_with_the_tensors_of_llama(model_type, source, tmp_path, convert):  # noqa: F811
    """They compute something else."""
    change_config(source, model_type=model_type)
    status, _, err = convert("to-jax", tmp_path / "run", "--llm", source, "--init-missing", *TOKENIZER)
    assert_one_line(status, err, f"model_type: expected llama, mistral, qwen2, qwen3; found '{model_type}'")


def test_a_language_model_alone(source, tmp_path, convert):  # noqa: F811
    change_config(source, model_type="llama")
    change_tensors(source, lambda t: [t.pop(n) for n in list(t) if "vision" in n or "mm_projector" in n])
    status, _, err = convert("to-jax", tmp_path / "run", "--llm", source, *TOKENIZER)
    assert_one_line(status, err, "source: no projector and no vision_tower; --init-missing draws them at random")


def test_inspect_tells_of_missing_parts(source, convert):  # noqa: F811
    no_projector(source)
    status, out, _ = convert("inspect", source)
    assert status == 2 and out.endswith("what does not fit\n  projector missing\n")


@pytest.mark.multiprocess
def test_killed_on_the_way(tmp_path, convert):  # noqa: F811
    """No destination after SIGTERM (nothing at all is left) or SIGKILL, and the next attempt succeeds."""
    source, run = tmp_path / "source", tmp_path / "run"
    source.mkdir()
    rng = np.random.default_rng(0)
    tensors = load_file(reference.DIRECTORY / "model.safetensors")
    config = json.loads((reference.DIRECTORY / "config.json").read_text()) | {"num_hidden_layers": 300}
    for name, tensor in list(tensors.items()):
        if name.startswith("model.layers.0"):
            for i in range(300):
                tensors[name.replace("layers.0", f"layers.{i}")] = rng.normal(size=tensor.shape).astype(np.float16)
    save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(config))
    (source / "vision_tower").symlink_to(reference.DIRECTORY / "vision_tower")
    command = [sys.executable, TOOL, "to-jax", source, run, "--tokenizer", DATA / "llama_tokenizer"]
    for sent in signal.SIGTERM, signal.SIGKILL:
        process = subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL)
        while not list(tmp_path.glob(".run.*/checkpoints")):
            assert process.poll() is None, "over before it could be killed"
            time.sleep(0.01)
        process.send_signal(sent)
        assert process.wait() == {signal.SIGTERM: 143, signal.SIGKILL: -9}[sent]
        assert not run.exists()
        if sent == signal.SIGTERM:
            assert os.listdir(tmp_path) == ["source"]
    assert convert(*command[2:])[0] == 0
    assert convert("verify", source, run)[0] == 0


def test_the_vision_tower_that_is_drawn(source, tmp_path, convert):  # noqa: F811
    """`--vision` says its dimensions, where there is one to draw."""
    status, _, err = convert("to-jax", source, tmp_path / "run", "--vision", "demo", "--init-missing", *TOKENIZER)
    assert_one_line(status, err, f"--vision demo: expected a vision tower to draw, found {source} with its own")
    change_tensors(source, lambda t: [t.pop(name) for name in list(t) if "mm_projector" in name or "vision" in name])
    change_config(source, model_type="llama")
    llm = tmp_path / "run", "--llm", source, "--vision", "demo", *TOKENIZER
    status, _, err = convert("to-jax", *llm)
    assert_one_line(status, err, "--vision demo: expected a vision tower to draw, found no --init-missing")
    assert not (tmp_path / "run").exists()
    assert convert("to-jax", *llm, "--init-missing")[0] == 0
    run = load_run(tmp_path / "run")
    assert typed(run.config).model.vision == presets.VIT["demo"]
    assert run.model.vision_tower.position_embedding.shape == (65, 128)
