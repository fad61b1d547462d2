"""What belongs to a run is read from that run, and is what was written: tokenizer, config and every parameter, for
whoever reads it."""

import json
import logging
import os
from pathlib import Path
import shutil
import socket
import tarfile

import huggingface_hub
import jax
import numpy as np
import pytest
import tensorstore as ts

from tests.conftest import DATA
from tests.fuzz.runs import OPT_STATE, make_run
from tests.helpers import tiny
import voco_jax
from voco_jax import terminal
from voco_jax.checkpoint import errors, run_files
from voco_jax.checkpoint.checkpointer import Checkpointer
from voco_jax.checkpoint.checksums import as_earlier
from voco_jax.checkpoint.errors import Damaged
from voco_jax.checkpoint.init_from import begin_with_run
from voco_jax.checkpoint.run import load_run
from voco_jax.config import load_config, save_config
from voco_jax.convert.inspect import describe_run
from voco_jax.convert.merge import merge
from voco_jax.convert.sources import open_source
from voco_jax.convert.to_hf import to_hf
from voco_jax.convert.to_jax import Options, to_jax
from voco_jax.convert.verify import open_side
from voco_jax.data.from_config import make_model_config
from voco_jax.data.tokenizer import load_tokenizer
from voco_jax.data.training_data import make_tokenizer
from voco_jax.errors import UserError
from voco_jax.models.build import abstract_model


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A run as training leaves it, of steps 1 and 2."""
    return make_run(tmp_path_factory.mktemp("made") / "run", 0)


@pytest.fixture(scope="module")
def made_with_lora(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("made") / "lora", 0, model__lora__rank=2)


@pytest.fixture(scope="module")
def made_converted(made, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("converted")
    to_hf(made, directory / "hf", "llava-hf", None, 10**9)
    to_jax(open_source(directory / "hf"), directory / "run", None, Options())
    return directory / "run"


@pytest.fixture(autouse=True)
def said_anew():
    terminal.log_once.cache_clear()


@pytest.fixture
def run(made, tmp_path) -> Path:
    return shutil.copytree(made, tmp_path / "run")


def change(file: Path, **values) -> None:
    """Other values in a JSON file, by dotted key with __ for the dot."""
    content = json.loads(file.read_text())
    for key, value in values.items():
        *groups, last = key.split("__")
        inner = content
        for group in groups:
            inner = inner[group]
        inner[last] = value
    file.write_text(json.dumps(content))


def other_numbers(step: Path, path: str = "llama.norm.scale") -> None:
    """Write a parameter anew, whole and sound for any library: only a checksum can tell."""
    kvstore = {"driver": "ocdbt", "base": f"file://{step}/params", "path": f"{path}/"}
    array = ts.open({"driver": "zarr", "kvstore": kvstore}, open=True).result()
    array.write(array.read().result() + 1).result()


READERS = {
    "load": load_run,
    "init_from": lambda run: begin_with_run(tiny.config(run.with_name("new"), init_from=run)),
    "to-hf": lambda run: to_hf(run, run.with_name("out"), "voco", None, 10**9),
    "merge": lambda run: merge(run, run.with_name("out")),
    "inspect": describe_run,
    "verify": open_side,
}


# ---- The tokenizer ----------------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch):
    """Whoever asks the network for anything is noticed."""

    def asked(*arguments, **_):
        raise AssertionError(f"the network was asked: {arguments}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", asked)
    monkeypatch.setattr(socket.socket, "connect", asked)
    monkeypatch.setattr(socket, "getaddrinfo", asked)


@pytest.mark.parametrize("reader", [*READERS, "resume", "data"])
def test_a_run_without_its_tokenizer(made, made_with_lora, tmp_path, reader, offline, monkeypatch):
    """`mini/tokenizer` is a name that anybody may register on the hub."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made_with_lora if reader == "merge" else made, "mini")
    shutil.rmtree("mini/tokenizer")
    config = load_config("mini/config.json")
    config.init_from = "mini"
    others = {"resume": lambda run: make_tokenizer(config, [], run), "data": lambda _: make_tokenizer(config, [], None)}
    not_there = (
        "mini/tokenizer(: not found; a run directory holds|/tokenizer.json: expected the file that .* found none$)"
    )
    with pytest.raises(UserError, match=not_there):
        (READERS | others)[reader](Path("mini"))
    (Path("mini") / "tokenizer").mkdir()  # whose forms are ours alone, not those that transformers knows
    with pytest.raises(UserError, match="mini/tokenizer/tokenizer.json: (not found|expected the file that .*none)$"):
        (READERS | others)[reader](Path("mini"))
    assert not Path("out").exists()


def test_a_name_of_the_hub_is_said(made, tmp_path, offline, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    for name in "runs/tokenizer", "./tokenizer", "runs/mini/tokenizer":
        with pytest.raises(UserError, match=f"^tokenizer '{name}': not found$"):
            load_tokenizer(name)
    fetched = tmp_path / "snapshots" / "0123abcd"
    shutil.copytree(made / "tokenizer", fetched)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(fetched))
    load_tokenizer("someone/tokenizer")
    assert capsys.readouterr().err.splitlines() == [
        "tokenizer someone/tokenizer: not found here; Hugging Face's hub is asked for it",
        "tokenizer someone/tokenizer: from Hugging Face's hub, revision 0123abcd",
    ]


def test_what_is_on_this_machine_is_no_name_of_the_hub(tmp_path, offline, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("{}")
    os.mkfifo("pipe")
    Path("link").symlink_to("nowhere")
    for name, found in (("file", "a file"), ("pipe", "something else")):
        with pytest.raises(UserError, match=f"^tokenizer '{name}': expected a directory, found {found}$"):
            load_tokenizer(name)
    with pytest.raises(UserError, match="^link: a link to nowhere, which is not there"):
        load_tokenizer("link")
    with pytest.raises(UserError, match="^tokenizer 'file/tokenizer': not found$"):
        load_tokenizer("file/tokenizer")
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="the network was asked"):
        load_tokenizer("someone/tokenizer")
    assert "Hugging Face's hub is asked" in capsys.readouterr().err  # before it was


def test_what_a_tokenizers_files_name_is_not_fetched(tmp_path, offline):
    """Of the forms that transformers reads: code, other files and repositories."""
    (tmp_path / "secret.json").write_text(json.dumps({"a": 0, "b": 1, "</s>": 2}))
    directory = tmp_path / "tokenizer"
    directory.mkdir()
    (directory / "vocab.json").write_text(json.dumps({"x": 0, "y": 1, "</s>": 2}))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    fields = {
        "tokenizer_class": "GPT2Tokenizer", "vocab_file": str(tmp_path / "secret.json"), "eos_token": "</s>",
        "auto_map": {"AutoTokenizer": ["someone/code--code.Tokenizer", None]}, "name_or_path": "someone/code",
    }  # fmt: skip
    (directory / "tokenizer_config.json").write_text(json.dumps(fields))
    (directory / "config.json").write_text(json.dumps({"model_type": "gpt2", "_name_or_path": "someone/code"}))
    vocabulary = load_tokenizer(directory).get_vocab()
    assert "x" in vocabulary and "a" not in vocabulary


def test_what_transformers_says_of_a_tokenizers_files(tmp_path, offline, capfd):
    """It logs text of theirs as it is: a terminal would obey it."""
    (tmp_path / "vocab.json").write_text(json.dumps({"x": 0, "y": 1, "</s>": 2}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>"})
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "\x1b[31mEVIL"}))
    level = logging.getLogger("transformers").level
    load_tokenizer(tmp_path)
    assert capfd.readouterr() == ("", "") and logging.getLogger("transformers").level == level


def another_tokenizer(run: Path) -> str:
    tokenizer = json.loads((run / "tokenizer" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = "a", "b"
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (run / "tokenizer" / "tokenizer.json").write_text(json.dumps(tokenizer))
    return "tokenizer.json: expected the file that {}/checkpoints/{} was written with, found another"


def one_more_file(run: Path) -> str:
    (run / "tokenizer" / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    return "generation_config.json: expected none, found one"


@pytest.mark.parametrize("change_it", [another_tokenizer, one_more_file])
@pytest.mark.parametrize("kind", ["trained", "converted"])
def test_another_tokenizer_in_a_run(made, made_converted, tmp_path, change_it, kind):
    run = shutil.copytree(made if kind == "trained" else made_converted, tmp_path / "run")
    message = change_it(run)
    if change_it is one_more_file and kind == "converted":  # it has one of that name
        (run / "tokenizer" / "generation_config.json").unlink()
        message = "generation_config.json: expected the file that {}/checkpoints/{} was written with, found none"
    message = message.format(run.resolve(), 2 if kind == "trained" else 0)
    for name in "load", "to-hf", "inspect", "verify":
        with pytest.raises(UserError) as error:
            READERS[name](run)
        assert str(error.value) == f"{run}/tokenizer/{message}"
    assert not (tmp_path / "out").exists()


def test_files_of_a_tokenizer_that_say_the_same(made, tmp_path):
    """Through Git on Windows, or an editor; and what lies beside them and is read by nobody."""
    run = shutil.copytree(made, tmp_path / "run")
    directory = run / "tokenizer"
    for file in directory.iterdir():
        if file.suffix in (".json", ".jinja"):
            file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps(json.loads((directory / "tokenizer_config.json").read_text()))
    )
    for name in ("tokenizer-backup.json", "chat_template.jinja.old", "tokenizer_config (1).json", "vocab.json"):
        (directory / name).write_text("other")
    assert load_run(run).step == resume(run)[0].step == 2
    change(directory / "tokenizer_config.json", clean_up_tokenization_spaces=True)
    with pytest.raises(UserError, match=r"tokenizer_config.json: expected the file that .* found another$"):
        load_run(run)


def test_fingerprints_have_the_tokenizer(made, tmp_path):
    """Of a run whose checkpoint knows its tokenizer; others keep the fingerprints that their memories have."""
    run = shutil.copytree(made, tmp_path / "other")
    another_tokenizer(run)
    for step in "12":
        about = run / "checkpoints" / step / "run" / "metadata"
        content = json.loads(about.read_text()) | {"tokenizer": run_files.tokenizer_sums(run)}
        content["checksums"]["run"] = run_files._checksum(content)
        about.write_text(json.dumps(content))
    models = [voco_jax.load(each) for each in (made, run)]
    assert models[0].run.checksums == models[1].run.checksums
    assert models[0].config == models[1].config and models[0].fingerprint != models[1].fingerprint


# ---- The config --------------------------------------------------------------------------------------------------


def test_another_models_config(run, capsys):
    before = load_config(run / "config.json")
    for key, value in {"model__llama__rope_theta": 5e5, "model__llama__rms_norm_eps": 1e-3}.items():
        change(run / "config.json", **{key: value})
        for name in "load", "to-hf", "inspect", "verify":
            with pytest.raises(UserError) as error:
                READERS[name](run)
            start = f"{run}/config.json: {key.replace('__', '.')}: {run}/checkpoints/2 was written with "
            assert str(error.value).startswith(start) and str(error.value).endswith(f", found {value!r}")
        save_config(before, run / "config.json")
    assert capsys.readouterr().err == ""


def test_what_a_user_may_change_in_a_config(run, capsys):
    change(
        run / "config.json", workdir="elsewhere", model__attention="splash", model__dtype="float32",
        data__train={}, train__steps=7,
    )  # fmt: skip
    load_run(run, attention="xla")
    assert capsys.readouterr().err == ""
    change(run / "config.json", data__template="plain", data__aspect_ratio="crop")
    for _ in range(2):  # and said once
        load_run(run, attention="xla")
    assert capsys.readouterr().err.splitlines() == [
        f"{run}/config.json: data.aspect_ratio: {run}/checkpoints/2 was written with 'pad', 'crop' is taken",
        f"{run}/config.json: data.template: {run}/checkpoints/2 was written with 'bare', 'plain' is taken",
    ]


def resume(run: Path, config=None):
    config = load_config(run / "config.json") if config is None else config
    abstract = abstract_model(make_model_config(config, load_tokenizer(run / "tokenizer")))[1]
    said = []
    checkpointer = Checkpointer(run, create=True, config=config)
    found = checkpointer.resume(abstract, jax.eval_shape(lambda: OPT_STATE), said.append)
    checkpointer.wait()
    checkpointer.close()
    return found, said


def test_resuming_another_models_config(run):
    assert resume(run)[0].step == 2
    change(run / "config.json", model__llama__rope_theta=5e5)
    with pytest.raises(UserError, match=r"model.llama.rope_theta: .*/2 was written with 10000.0, found 500000.0$"):
        resume(run)
    assert sorted(os.listdir(run / "checkpoints")) == ["1", "2"]


@pytest.mark.parametrize("file", ["_CHECKPOINT_METADATA", "metrics/metrics"])
@pytest.mark.parametrize("content", ["[]", "\udcff", '{"eval_loss": "x", "init_timestamp_nsecs": NaN}', "[" * 10**5])
def test_resuming_where_orbax_cannot_begin(run, file, content, caplog):
    """Its manager reads these of every step, older ones too, before anything else."""
    for step, taken in ("1", 2), ("2", 1):
        again = shutil.copytree(run, run.with_name(f"damaged {step}"))
        (again / "checkpoints" / step / "metrics").mkdir()
        (again / "checkpoints" / step / file).write_text(content, errors="surrogateescape")
        found, (line,) = resume(again)
        assert found.step == taken and line.endswith(f"it is kept as {step}.damaged, and step {taken} taken")
        assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


# ---- Parameters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", [name for name in READERS if name != "init_from"])
def test_other_numbers_in_a_checkpoint(made, made_with_lora, tmp_path, reader, capsys):
    """The newest that is whole is taken by all, and nothing of a damaged one comes to the destination."""
    run = shutil.copytree(made_with_lora if reader == "merge" else made, tmp_path / "run")
    whole = shutil.copytree(run, tmp_path / "whole")
    shutil.rmtree(whole / "checkpoints" / "2")
    other_numbers(run / "checkpoints" / "2")
    READERS[reader](run)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "checksum" in line]
    damaged = f"{run}/checkpoints/2: the checkpoint is damaged: params.llama.norm.scale: its checksum"
    assert line.endswith(f"{damaged}; step 1 is taken")
    if reader in ("to-hf", "merge"):
        (tmp_path / "out").rename(tmp_path / "of the older")
        READERS[reader](whole)
        for file in sorted((tmp_path / "out").rglob("*.safetensors")):
            there = tmp_path / "of the older" / file.relative_to(tmp_path / "out")
            assert there.read_bytes() == file.read_bytes()
        shutil.rmtree(tmp_path / "out")
        shutil.rmtree(tmp_path / "of the older")
    shutil.rmtree(run / "checkpoints" / "1")
    with pytest.raises(Damaged, match=f"^{damaged}$"):
        READERS[reader](run)
    assert sorted(os.listdir(tmp_path)) == ["run", "whole"]


def test_converted_runs_have_checksums(made_converted, made_with_lora, tmp_path, capsys):
    merge(made_with_lora, tmp_path / "merged")
    for run in made_converted, tmp_path / "merged":
        sums = load_run(run).checksums
        about = json.loads((run / "checkpoints" / "0" / "run" / "metadata").read_text())
        assert about["checksums"]["params"] == sums and len(sums) > 20
        assert about["tokenizer"].keys() >= {"tokenizer.json", "tokenizer_config.json"}
        with pytest.raises(UserError, match="holds parameters alone, as converted runs do; begin with it"):
            resume(run)
        other = shutil.copytree(run, tmp_path / f"other {run.name}")
        other_numbers(other / "checkpoints" / "0")
        for name in "load", "to-hf", "inspect", "verify":
            with pytest.raises(Damaged, match=r"checkpoints/0: the checkpoint is damaged: params.*: its checksum$"):
                READERS[name](other)
    assert "checksums" not in capsys.readouterr().err and not (tmp_path / "out").exists()


# ---- Runs of earlier versions ------------------------------------------------------------------------------------


def test_a_run_and_its_memories_of_an_earlier_version(tmp_path, capsys):
    """`earlier_run.tar.xz`: a training of one step and the memory of a picture, before tokenizers had checksums."""
    with tarfile.open(DATA / "earlier_run.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    for _ in range(2):
        model = voco_jax.load(tmp_path / "run")
    line = "written by an earlier version, without a checksum of the tokenizer"
    assert capsys.readouterr().err == f"{tmp_path}/run/checkpoints/1: {line}\n"
    bank = model.open(tmp_path / "picture.voco")
    assert bank.model == model.fingerprint == "3226f83070435ccbcd736f00f9e3eaea"
    again = model.compress(DATA / "reference" / "chelsea.png")
    np.testing.assert_allclose(again.keys, bank.keys, rtol=1e-4, atol=1e-6)
    other_numbers(tmp_path / "run" / "checkpoints" / "1")
    with pytest.raises(Damaged, match="its checksum$"):
        voco_jax.load(tmp_path / "run")


def test_a_converted_run_of_an_earlier_version(made_converted, tmp_path, capsys):
    run = shutil.copytree(made_converted, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "0" / "run")
    with pytest.raises(UserError, match="holds parameters alone, as converted runs do; begin with it"):
        resume(run)
    assert capsys.readouterr().err == ""
    earlier, now = voco_jax.load(run), voco_jax.load(made_converted)
    describe_run(run)
    line = "written by an earlier version, without checksums: damage may not be noticed"
    assert capsys.readouterr().err == f"{run}/checkpoints/0: {line}\n"
    # What its memories are known by
    assert earlier.run.checksums == {name: as_earlier(sum_) for name, sum_ in now.run.checksums.items()}
    assert earlier.run.vocabulary == ""


# ---- Files that are no files, and absurd ones --------------------------------------------------------------------


def replaced(file: Path, kind: str) -> None:
    file.unlink()
    {"a pipe": os.mkfifo, "a device": lambda f: os.symlink("/dev/zero", f)}[kind](file)


@pytest.mark.parametrize("kind", ["a pipe", "a device"])
@pytest.mark.parametrize(
    "file", ["config.json", "tokenizer/tokenizer.json", "checkpoints/2/params/_METADATA", "checkpoints/2/run/metadata"]
)
def test_no_files(run, kind, file):
    replaced(run / file, kind)
    with pytest.raises(UserError) as error:
        load_run(run)
    assert str(error.value) == f"{run}/{file}: expected a file, found {kind}"


def test_checkpoints_that_lead_everywhere(run, tmp_path, monkeypatch):
    """A link is followed, but not to the end of the world; and into a circle no more than once."""
    (run / "checkpoints" / "2" / "again").symlink_to(run)
    linked = tmp_path / "linked"
    linked.mkdir()
    for entry in run.iterdir():
        (linked / entry.name).symlink_to(entry)
    assert load_run(linked).step == 2
    monkeypatch.setattr(errors, "_MOST_FILES", 50)
    with pytest.raises(UserError, match="checkpoints/2: expected 50 files at most, found more"):
        load_run(linked)


def test_large_json(run):
    (run / "checkpoints" / "2" / "params" / "_sharding").write_bytes(b"[" + b"[]," * 6_000_000 + b"[]]")
    with pytest.raises(UserError, match="_sharding: expected 16777216 bytes at most, found 18000004$"):
        load_run(run)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"shape": [10**12], "chunks": [8]},
            r"llama.norm.scale: expected shape \(8,\), found shape \(1000000000000,\)$",
        ),
        ({"chunks": [10**12]}, r"the checkpoint is damaged: .*shape \(8,\) in chunks of \(1000000000000,\)$"),
    ],
)
@pytest.mark.parametrize("reader", ["load", "inspect"])
def test_absurd_arrays(run, fields, message, reader):
    """Arrays of terabytes that are in no file: what is missing of an array reads as zeros."""
    shutil.rmtree(run / "checkpoints" / "1")
    database = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{run}/checkpoints/2/params"}).result()
    key = "llama.norm.scale/.zarray"
    database.write(key, json.dumps(json.loads(database[key]) | fields)).result()
    with pytest.raises(UserError, match=message):
        READERS[reader](run)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model__llama__hidden_size", 10**9),
        ("model__llama__num_hidden_layers", 10**6),
        ("model__vision__image_size", 10**9),
        ("model__projector_layers", 10**4),
        ("model__llama__vocab_size", 10**30),
        ("model__num_voco_tokens", float("inf")),
        ("data__train", {"a.b": {"kind": "easyvqa"}}),
        ("data__train", {"a": []}),
        ("data__train", {f"s{i}": {"kind": "easyvqa"} for i in range(5000)}),
        ("optim__rate_scale", {"llama": {"a.b": 1}}),
        ("seed", 10**400),
        ("model", []),
    ],
)
def test_absurd_configs(run, key, value):
    change(run / "config.json", **{key: value})
    with pytest.raises(UserError, match=f"^{run}/config.json: ") as error:
        load_run(run)
    assert "\n" not in str(error.value)


def test_ids_that_leave_room_for_gigabytes(run):
    tokenizer = json.loads((run / "tokenizer" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 2**31
    (run / "tokenizer" / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match=f"tokenizer: a token has the id {2**31}, of 2.. tokens$"):
        load_run(run)
