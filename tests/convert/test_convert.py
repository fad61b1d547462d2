"""Weights in and out through the command line: the golden checkpoint, round trips, and what is on the way."""

import dataclasses
import json
import os
from pathlib import Path
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.conftest import DATA
from tests.helpers import reference
from tests.helpers.commands import run_main
from tests.helpers.shared import make_once
from tests.models.test_two_streams import CONFIG
from voco_jax.checkpoint.run import load_run
from voco_jax.command_line import parse_arguments
from voco_jax.convert.families import RULES
from voco_jax.convert.golden import check
from voco_jax.convert.to_jax import layers_of
from voco_jax.errors import UserError
from voco_jax.models.build import abstract_model
from voco_jax.train.loop import train

sys.path.insert(0, str(Path(__file__).parents[2]))
from tools import convert_weights  # noqa: E402
from voco_jax.convert import check_logits  # noqa: E402

CONFIGS = Path(__file__).parents[2] / "configs"
TOKENIZER = ["--tokenizer", DATA / "llama_tokenizer"]


@pytest.fixture
def convert(monkeypatch, capsys):
    return lambda *arguments: run_main(convert_weights, monkeypatch, capsys, *arguments)


@pytest.fixture(scope="session")
def golden_run(tmp_path_factory):
    """The golden checkpoint, converted. Tests must not write into it."""

    def make(run: Path) -> None:
        arguments = ["tool", "to-jax", reference.DIRECTORY, run, "--num-voco-tokens", 2, *TOKENIZER]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", list(map(str, arguments)))
            convert_weights.main()

    return make_once(tmp_path_factory, "golden_run", make)


def tensors_of(directory: Path) -> dict[str, np.ndarray]:
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def test_every_parameter_has_one_rule():
    """With all switches that add parameters."""
    llama = dataclasses.replace(CONFIG.llama, qkv_bias=True, qk_norm=True)
    vision = dataclasses.replace(CONFIG.vision, patch_bias=True)
    _, params = abstract_model(dataclasses.replace(CONFIG, llama=llama, vision=vision, projector_layers=3))
    covered = {path for path, *_ in layers_of(params)}
    assert covered == {rule.ours for rule in RULES} and len(RULES) == len(covered)
    assert len({(rule.part, rule.theirs) for rule in RULES}) == len(RULES)


def test_every_transform_has_its_inverse():
    _, params = abstract_model(CONFIG)
    rng = np.random.default_rng(0)
    for _, rule, layer, shape in layers_of(params):
        theirs = rng.normal(size=rule.transform.their_shape(shape)).astype(np.float16)
        ours = rule.transform.to_ours(theirs, shape)
        assert ours.shape == tuple(shape) and layer in (None, 0, 1, 2)
        np.testing.assert_array_equal(rule.transform.to_theirs(ours), theirs)


def test_the_golden_checkpoint_gives_its_golden_logits(golden_run, monkeypatch, capsys):
    arguments = ["--checkpoint", golden_run, "--golden", reference.DIRECTORY / "golden.npz"]
    status, out, err = run_main(check_logits, monkeypatch, capsys, *arguments)
    assert status == 0 and err == ""
    assert out.count("12 of 12 greedy tokens agree") == 2 and out.endswith("passed\n")
    status, out, _ = run_main(check_logits, monkeypatch, capsys, *arguments, "--tolerance", "1e-12")
    assert status == 1 and out.endswith("FAILED\n")


@pytest.mark.parametrize("format_name", ["voco", "llava-hf"])
def test_round_trip(golden_run, tmp_path, convert, format_name, monkeypatch, capsys):
    """There, back and there again: the same bytes, in several shards or one."""
    there, back, again = tmp_path / "there", tmp_path / "back", tmp_path / "again"
    status, _, _ = convert("to-hf", golden_run, there, "--format", format_name, "--max-shard-size", "1MB")
    assert status == 0
    index = json.loads((there / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(list(there.glob("*.safetensors"))) > 2
    assert convert("to-jax", there, back, "--num-voco-tokens", 2)[0] == 0
    assert convert("to-hf", back, again, "--format", format_name)[0] == 0
    first, second = tensors_of(there), tensors_of(again)
    assert first.keys() == second.keys() == index["weight_map"].keys()
    for name in first:
        assert first[name].dtype == second[name].dtype and first[name].tobytes() == second[name].tobytes(), name
    more = ["--allow-more-rows"]
    for a, b, *options in (reference.DIRECTORY, there), (there, back), (golden_run, again), (golden_run, there, *more):
        status, out, _ = convert("verify", a, b, *options)
        assert status == 0 and "96 of 96 tensors are identical" in out
        # Hugging Face's has a row for <image>, which makes no other model
        one_has_more = format_name == "llava-hf" and (a, b) != (there, back)
        assert ("32001 and 32002 rows, the first 32001 compared; the others are of <image>" in out) == one_has_more
    golden = ["--checkpoint", back, "--golden", reference.DIRECTORY / "golden.npz"]
    assert run_main(check_logits, monkeypatch, capsys, *golden)[0] == 0
    if format_name == "voco":
        original = load_file(reference.DIRECTORY / "model.safetensors")
        assert original.keys() == first.keys()
        assert all(first[name].tobytes() == tensor.tobytes() for name, tensor in original.items())
        assert (
            load_file(there / "vision_tower" / "model.safetensors").keys()
            == load_file(reference.DIRECTORY / "vision_tower" / "model.safetensors").keys()
        )


@pytest.mark.slow
def test_a_padded_vocabulary(golden_run, tmp_path, convert, monkeypatch, capsys):
    """Zeros in our checkpoint, nothing of them in what is written: values and shapes are the original's, to the bit."""
    unpadded, run, voco, hf = (tmp_path / name for name in ("unpadded", "run", "voco", "hf"))
    for multiple, rows, made in (1, 32001, unpadded), (8, 32008, run), (128, 32128, golden_run):
        if made != golden_run:
            arguments = ["--num-voco-tokens", 2, "--vocab-multiple", multiple, *TOKENIZER]
            assert convert("to-jax", reference.DIRECTORY, made, *arguments)[0] == 0
        llama = load_run(made).model.llama
        embedding, head = np.asarray(llama.embed_tokens.embedding[...]), np.asarray(llama.lm_head.kernel[...])
        assert embedding.shape == head.shape[::-1] == (rows, 32)
        assert embedding[:32001].any(axis=1).all() and not embedding[32001:].any() and not head[:, 32001:].any()
        config = json.loads((made / "config.json").read_text())["model"]["llama"]
        assert (config["vocab_size"], config["vocab_multiple"]) == (32001, multiple)

    assert convert("to-hf", run, voco, "--format", "voco")[0] == 0
    assert convert("to-hf", run, hf, "--format", "llava-hf")[0] == 0
    original = load_file(reference.DIRECTORY / "model.safetensors")
    written, theirs = tensors_of(voco), tensors_of(hf)
    assert written.keys() == original.keys()
    for name, tensor in original.items():
        assert written[name].shape == tensor.shape and written[name].tobytes() == tensor.tobytes(), name
    fields = json.loads((voco / "config.json").read_text())
    assert fields["vocab_size"] == 32001 and "vocab_multiple" not in fields
    known = original["lm_head.weight"]  # <image> is one row more: the mean of those that are there
    assert theirs["language_model.lm_head.weight"].shape == (32002, 32)
    np.testing.assert_allclose(theirs["language_model.lm_head.weight"][-1], known.mean(0, np.float32), atol=1e-4)
    for other in voco, golden_run:
        status, out, _ = convert("verify", run, other)
        assert status == 0 and "96 of 96 tensors are identical" in out
    golden = ["--checkpoint", run, "--golden", reference.DIRECTORY / "golden.npz"]
    assert run_main(check_logits, monkeypatch, capsys, *golden)[0] == 0


def test_a_chat_template_that_is_left_behind_is_told(golden_run, tmp_path, convert):
    run = shutil.copytree(golden_run, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["data"]["template"] = "bare"
    (run / "config.json").write_text(json.dumps(config))
    status, _, err = convert("to-hf", run, tmp_path / "voco", "--format", "voco")
    line = "chat template 'bare': the format cannot store it; to-jax sets it again with --template bare"
    assert status == 0 and f"warning: {line}\n" in err
    assert "chat template" not in convert("to-hf", golden_run, tmp_path / "same", "--format", "voco")[2]


def test_verify_finds_one_changed_value(golden_run, tmp_path, convert):
    from safetensors.numpy import save_file

    other = tmp_path / "other"
    assert convert("to-hf", golden_run, other, "--format", "voco")[0] == 0
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] += 0.25
    save_file(tensors, other / "model.safetensors")
    status, out, _ = convert("verify", golden_run, other)
    assert status == 1 and "95 of 96 tensors are identical" in out
    assert "worst difference: 0.25 in llama.layers.up_proj.kernel (layer 1)" in out


def test_verify_compares_more_than_bytes(tmp_path, convert):
    """Rows that one lacks, configurations of other functions, parts that both lack, and values that are no numbers."""
    from safetensors.numpy import save_file

    tensors = load_file(reference.DIRECTORY / "model.safetensors")
    config = json.loads((reference.DIRECTORY / "config.json").read_text())
    cut = {n: x[:10] if n in ("model.embed_tokens.weight", "lm_head.weight") else x for n, x in tensors.items()}
    no_number = {n: x.copy() for n, x in tensors.items()}
    no_number["model.norm.weight"][3] = np.nan
    no_number["model.layers.0.mlp.up_proj.weight"] += 1
    cases = {
        "cut": (cut, {"vocab_size": 10}, 1, "rows, the first 10 compared"),
        "rope": (tensors, {"rope_theta": 5e5}, 1, "llama.rope_theta: 10000.0 and 500000.0"),
        "nan": (no_number, {}, 1, "worst difference: nan in llama.norm.scale"),
        "no projector": ({n: x for n, x in tensors.items() if "projector" not in n}, {}, 2, "projector missing"),
    }
    for name, (changed, values, expected, message) in cases.items():
        other = tmp_path / name
        other.mkdir()
        save_file(changed, other / "model.safetensors")
        (other / "config.json").write_text(json.dumps(config | values))
        (other / "vision_tower").symlink_to(reference.DIRECTORY / "vision_tower")
        status, out, err = convert("verify", other, other if name == "no projector" else reference.DIRECTORY)
        assert status == expected and message in (out.replace("500000.0 and 10000.0", "10000.0 and 500000.0") + err)


def test_dtypes(tmp_path, convert):
    """Cast only when asked; a value that does not fit is told."""
    from safetensors.numpy import save_file

    source = tmp_path / "source"
    source.mkdir()
    tensors = {name: x.astype(np.float32) for name, x in load_file(reference.DIRECTORY / "model.safetensors").items()}
    tensors["model.norm.weight"][:3] = 1e5, -1e6, 7
    save_file(tensors, source / "model.safetensors")
    for name in "config.json", "vision_tower":
        (source / name).symlink_to(reference.DIRECTORY / name)
    status, _, err = convert("to-jax", source, tmp_path / "half", "--dtype", "float16", *TOKENIZER)
    assert status == 0 and "warning: model.norm.weight: 2 values became infinite" in err
    assert {str(x.dtype) for x in leaves(tmp_path / "half")} == {"float16"}
    status, _, err = convert("to-jax", source, tmp_path / "stored", *TOKENIZER)
    assert status == 0 and "warning" not in err
    assert {str(x.dtype) for x in leaves(tmp_path / "stored")} == {"float32"}


def leaves(run):
    from flax import nnx
    import jax

    return jax.tree.leaves(nnx.to_pure_dict(nnx.state(load_run(run).model)))


def test_inspect(convert, golden_run):
    status, out, _ = convert("inspect", reference.DIRECTORY)
    assert status == 0
    assert "format: voco" in out and "2,176,112 parameters" in out and "llama.num_hidden_layers = 2" in out
    assert "model.layers.0.self_attn.q_proj.weight " in out and "everything fits" in out
    status, out, _ = convert("inspect", golden_run)
    assert status == 0 and "format: voco_jax run, step 0" in out and "llama.vocab_multiple = 128" in out
    assert "2,176,112 parameters and 8,128 of padding" in out
    assert "llama.layers.q_proj.kernel " in out and "[2, 32, 4, 8]" in out


def test_layers_of_several_dtypes(tmp_path, convert):
    """An error, as one array has one dtype; unless a dtype is asked for."""
    from safetensors.numpy import save_file

    source = tmp_path / "source"
    source.mkdir()
    tensors = load_file(reference.DIRECTORY / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].astype(np.float32)
    save_file(tensors, source / "model.safetensors")
    for name in "config.json", "vision_tower":
        (source / name).symlink_to(reference.DIRECTORY / name)
    status, _, err = convert("to-jax", source, tmp_path / "run", *TOKENIZER)
    assert status == 2 and "layers.1.mlp.up_proj.weight: expected float16 as layer 0, found float32" in err
    assert convert("to-jax", source, tmp_path / "run", "--dtype", "float32", *TOKENIZER)[0] == 0


def test_golden_files_that_are_not_as_described(golden_run, tmp_path, monkeypatch, capsys):
    """One line and exit status 2; 1 is for values that differ."""
    golden = dict(np.load(reference.DIRECTORY / "golden.npz"))
    bad = {
        "key 'images' is missing": {"images": None},
        "rows0: expected a list of token ids, found [17] of float32": {"rows0": golden["rows0"].astype(np.float32)},
        "rows1: expected the tokens up to the last VoCo token": {
            "rows1": np.where(golden["rows1"] == 1, 5, golden["rows1"])
        },
        "rows0: expected one image (-200), then VoCo tokens (32000) side by side": {"rows0": golden["rows0"] * 0 + 7},
        "rows0: expected text after the VoCo tokens, ids below 32001": {
            "rows0": np.where(golden["rows0"] == 1, 32001, golden["rows0"])
        },
        "features: expected [2, 9, 32] of kind 'f', found [1, 9, 32]": {"features": golden["features"][:1]},
        "gen: expected [2] of kind 'iu', found [24]": {"gen": golden["gen"].reshape(-1)},
        "logits1: expected": {"logits1": golden["logits1"][:-1]},
        "images: expected [2, 3, 42, 42]": {"images": golden["images"].astype(str)},
    }
    run, file = load_run(golden_run), tmp_path / "golden.npz"
    for message, changes in bad.items():
        values = {key: value for key, value in (golden | changes).items() if value is not None}
        with pytest.raises(UserError, match=re.escape(message)):
            list(check(run, values, "golden.npz"))
    np.savez(file, **values)
    arguments = ["--checkpoint", golden_run, "--golden", file]
    status, _, err = run_main(check_logits, monkeypatch, capsys, *arguments)
    assert status == 2 and message in err and len(err.splitlines()) == 1, err
    for content in (b"PK", b"a text"):
        file.write_bytes(content)
        status, _, err = run_main(check_logits, monkeypatch, capsys, *arguments)
        assert (status, err) == (2, f"error: {file}: expected an npz file of arrays, found another, or a damaged one\n")


@pytest.mark.parametrize("init", ["normal", "mean"])
def test_rows_of_new_tokens(golden_run, tmp_path, convert, init, small_tokenizer):
    """A tokenizer of more tokens than the model has rows; the rows that are there stay."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DATA / "llama_tokenizer")
    tokenizer.add_tokens(["<one>", "<two>", "<three>"], special_tokens=True)  # <voco> comes fourth: id 32003
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    run = tmp_path / "run"
    arguments = ["to-jax", reference.DIRECTORY, run, "--tokenizer", tmp_path / "tokenizer", "--voco-init", init]
    assert convert(*arguments)[0] == 0
    params = load_run(run).model
    embedding = np.asarray(params.llama.embed_tokens.embedding[...], np.float32)
    known = load_file(reference.DIRECTORY / "model.safetensors")["model.embed_tokens.weight"].astype(np.float32)
    assert params.config.voco_token_id == 32003 and embedding.shape == (32128, 32)
    np.testing.assert_array_equal(embedding[:32001], known)
    np.testing.assert_array_equal(embedding[32004:], 0)
    new = embedding[32001:32004]
    if init == "mean":
        np.testing.assert_allclose(new, np.tile(known.mean(0), (3, 1)), atol=1e-3)
    else:
        assert 0.015 < new.std() < 0.025
        head = np.asarray(params.llama.lm_head.kernel[...], np.float32).T
        assert abs(np.corrcoef(new.ravel(), head[32001:32004].ravel())[0, 1]) < 0.5  # drawn apart


@pytest.mark.multiprocess
def test_restored_straight_onto_a_mesh(golden_run):
    """Every parameter in shards over eight devices, as it is read."""
    script = """
import sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from pathlib import Path
from voco_jax.convert.jax_checkpoint import of_newest
from voco_jax.checkpoint.run import load_run
from voco_jax.data.from_config import make_model_config
from voco_jax.models.build import abstract_model
from voco_jax.checkpoint.checkpointer import Checkpointer

run = Path(sys.argv[1])
_, params = abstract_model(load_run(run).model.config)
mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"))
def shard(x):
    sizes = {"fsdp": 2, "tensor": 4}
    axes = [name if size % sizes[name] == 0 else None for size, name in zip(x.shape[-2:], sizes)]
    spec = P(*[None] * (len(x.shape) - len(axes)), *axes)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
abstract = jax.tree.map(shard, params)
_, restored = Checkpointer(run).restore_params(abstract)[:2]
stored = of_newest(run, lambda stored: stored)
for path, x in jax.tree_util.tree_leaves_with_path(restored):
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    np.testing.assert_array_equal(np.asarray(x), stored.read(name))
kernel = restored["llama"]["layers"]["gate_proj"]["kernel"]
assert {s.data.shape for s in kernel.addressable_shards} == {(2, 16, 16)} and len(kernel.sharding.device_set) == 8
embedding = restored["llama"]["embed_tokens"]["embedding"]  # 32,001 rows would not shard
assert {s.data.shape for s in embedding.addressable_shards} == {(32128 // 2, 32 // 4)}
"""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags}
    result = subprocess.run([sys.executable, "-c", script, golden_run], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_training_goes_on_from_a_converted_checkpoint(golden_run, tmp_path):
    """The first loss is that of the converted weights; they change, in float32; and the run can be asked."""
    arguments = [
        f"--config={CONFIGS / 'voco_finetune.py'}", f"--config.init_from={golden_run}",
        f"--config.workdir={tmp_path / 'run'}", "--config.train.steps=2", "--config.train.log_every=1",
        "--config.data.batch_size=2", "--config.data.conversations_per_record=1", "--config.data.rows_per_pack=1",
        "--config.optim.warmup_steps=1",
    ]  # fmt: skip
    config = parse_arguments(["train", *arguments])[0]
    run = load_run(train(config))
    first = json.loads((run.directory / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 1 and abs(first["loss"] - np.log(32001)) < 1
    before = load_run(golden_run).model.llama.embed_tokens.embedding[...]
    after = run.model.llama.embed_tokens.embedding[...]
    assert str(before.dtype) == "float16" and str(after.dtype) == "float32"
    difference = np.abs(np.asarray(after) - np.asarray(before, np.float32))
    assert 0 < difference.max() < 3 * config.optim.learning_rate
    assert run.config.model.llama.vocab_multiple == 128 and not np.asarray(after)[32001:].any()
    assert run.encoder.tokenizer.get_vocab() == load_run(golden_run).encoder.tokenizer.get_vocab()
    with pytest.raises(UserError, match=r"llama.hidden_size: .*run has 32, found 64; with init_from it need not"):
        train(parse_arguments(["train", *arguments, "--config.model.llama.hidden_size=64"])[0])
