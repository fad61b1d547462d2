"""Config files and command lines: what they set, and one line for what they cannot."""

import ast
import dataclasses
import json
from pathlib import Path
import re
import sys

import pytest

from voco_jax.chat_templates import CHAT_TEMPLATES
from voco_jax.command_line import parse_arguments
from voco_jax.config import (
    GROUPS_AND_KEYS,
    default_config,
    first_difference,
    flatten,
    load_config,
    save_config,
    source,
    sources,
    typed,
    with_earlier_values,
)
from voco_jax.config_keys import SOURCE_KEYS
from voco_jax.errors import UserError
from voco_jax.models import presets
from voco_jax.models.llama import RopeScaling

FILE = f"--config={Path(__file__).parents[1] / 'configs/easyvqa.py'}"


def parse(*arguments):
    return parse_arguments(["train", *arguments])[0]


def test_the_command_line_sets_keys():
    config = parse(FILE, "--config.optim.learning_rate=0.5", "--config.model.llama.hidden_size=64")
    assert config.optim.learning_rate == 0.5
    assert typed(config).model.llama.hidden_size == 64
    assert config.model.num_voco_tokens == 1
    config = parse(FILE, "--config.train.tensorboard=false", "--config.optim.b1=0", "--config.model.llama.head_dim=32")
    assert (config.train.tensorboard, config.optim.b1, config.model.llama.head_dim) == (False, 0.0, 32)
    assert parse(FILE, "--config.model.unroll_layers").model.unroll_layers is True
    assert parse(FILE, "--noconfig.model.unroll_layers").model.unroll_layers is False
    for text in ("['projector']", "('projector',)", "'projector'", "projector"):
        assert parse(FILE, f"--config.train.freeze={text}").train.freeze == ("projector",)
    with pytest.raises(UserError, match="head_dim: expected an even number from 2, .* found 0"):
        typed(parse(FILE, "--config.model.llama.head_dim=0", "--config.model.llama.hidden_size=1"))
    scaling = parse(FILE, "--config.model.llama.rope_scaling={'factor': 2.0}").model.llama.rope_scaling
    assert scaling.to_dict() == dataclasses.asdict(RopeScaling(factor=2.0))  # as a run will store it
    assert parse(FILE, "--config.data.train.easyvqa.weight=0.5").data.train.easyvqa.weight == 0.5


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        *(
            (f"--config.{key}=1", rf"--config.{key}: no such key; did you mean config.optim.learning_rate\?$")
            for key in ("optim.learning_rat", "optm.learning_rate", "optim.lr", "train.learning_rate", "lr")
        ),
        ("--lr=1", r"--lr: no such option; did you mean --config.optim.learning_rate\?$"),
        ("--conf.train.steps=3", r"--conf.train.steps: no such option; did you mean --config.train.steps\?$"),
        ("--config.model.lora_rank=3", r"did you mean config.model.lora.rank\?$"),
        ("--config.optm=adamw", r"did you mean config.optim\?$"),
        ("--config.optim=adamw", "--config.optim: is a group of keys, for example config.optim.b1"),
        (
            "--config.optim.rate_scale.llama=1",
            "--config.optim.rate_scale.llama: renamed to config.optim.lr_multiplier.llama$",
        ),
        ("--config.data.rows_per_bin=1", "--config.data.rows_per_bin: renamed to config.data.rows_per_pack$"),
        ("--config.xyz=1", "--config.xyz: no such key; --help lists all"),
        ("--config.data.train.mine.file=x", r"no such source; a config file adds one: config.data.train = sources\("),
        ("--config.data.train.easyvqa.spilt=x", r"did you mean config.data.train.easyvqa.split\?$"),
        ("--config.data.train={'mine': {'file': 'x'}}", "--config.data.train.mine: expected a source"),
        ("--config.train.steps=many", "--config.train.steps: expected an integer, found 'many'"),
        ("--config.train.steps=1e3", "--config.train.steps: expected an integer, found '1e3'"),
        ("--config.train.freeze=llama vit", r"--config.train.freeze: expected a tuple, found 'llama vit'"),
        ("--config.train.freeze=(1,)", "--config.train.freeze: expected a tuple of texts, found 1 in it"),
        ("--config.train.tensorboard=maybe", "--config.train.tensorboard: expected true or false, found 'maybe'"),
        ("--config.train.steps=0", "config.train.steps: expected at least 1, found 0"),
        ("--config.optim.learning_rate=-1", "config.optim.learning_rate: expected at least 1e-12, found -1.0"),
        ("--config.seed=-1", r"config.seed: expected at least 0 and below 2147483648, found -1"),
        ("train", "'train' is not an option; options: --help, --config, --config.KEY"),
        ("mine.py", "'mine.py' is not an option; did you mean --config=mine.py?"),
        ("easyvqa", "'easyvqa' is not an option; did you mean --config=easyvqa?"),
    ],
)
def test_wrong_keys_and_values(argument, message):
    with pytest.raises(UserError, match=message) as error:
        parse(FILE, argument)
    assert "\n" not in str(error.value)


def test_a_command_with_arguments_of_its_own():
    def add_arguments(parser):
        parser.add_argument("--topology", help="a slice")
        parser.add_argument("--chips", type=int, default=4, help="of it")

    def parse(*arguments):
        config, args = parse_arguments(["aot", FILE, *arguments], add_arguments)
        return config.seed, args.topology, args.chips, args.changes

    assert parse("--topology=v5e:4x4", "--config.seed=3") == (3, "v5e:4x4", 4, {"seed": "3"})
    assert parse("--config.seed", "3", "--chips", "8") == (3, None, 8, {"seed": "3"})
    with pytest.raises(UserError, match="^--chips: invalid int value: 'many'") as error:
        parse("--chips=many")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"^--topolgy: no such option; did you mean --topology\?"):
        parse("--topolgy=v5e:4x4")


def test_a_config_file_that_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"--config=FILE is missing, for example --config=easyvqa"):
        parse()
    with pytest.raises(UserError, match=r"--config=easyvqaa: not found; .*; did you mean easyvqa\?$"):
        parse("--config=easyvqaa")
    with pytest.raises(UserError, match=r"--config=nothing.py: not found; .* one of easyvqa, .*, voco_qwen3_8b$"):
        parse("--config=nothing.py")
    with pytest.raises(UserError, match=f"--config={tmp_path}: is a directory; expected a Python file or one of "):
        parse(f"--config={tmp_path}")


@pytest.mark.parametrize("name", ["small_cpu", "small_cpu.py", "configs/small_cpu", "configs/small_cpu.py"])
def test_a_config_by_its_name(tmp_path, monkeypatch, name):
    """From any directory, a directory of that name beside it; a file of that path is taken first."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small_cpu").mkdir()
    assert parse(f"--config={name}").workdir == "runs/small_cpu"
    if name.endswith(".py"):
        (tmp_path / "configs").mkdir()
        text = (Path(__file__).parents[1] / "configs" / "easyvqa.py").read_text()
        (tmp_path / name).write_text(text.replace("runs/easyvqa", "runs/mine"))
        assert parse(f"--config={name}").workdir == "runs/mine"


def test_a_config_file_with_a_mistyped_key(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from voco_jax.config import default_config\ndef get_config():\n"
        "  config = default_config()\n  config.model.num_vocotokens = 2\n  return config\n"
    )
    with pytest.raises(UserError) as error:
        parse(f"--config={file}")
    assert str(error.value) == (
        f"{file}, line 4: config.model.num_vocotokens: no such key; did you mean config.model.num_voco_tokens?"
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("config.train.steps = 1e3", "config.train.steps: expected an integer, found 1000.0"),
        ("config.train.steps = '10'", "config.train.steps: expected an integer, found '10'"),
        ("config.update(dict(train=dict(steps=1e3)))", "config.train.steps: expected an integer, found 1000.0"),
        ("steps = config.train; steps.steps = 1e3", "config.train.steps: expected an integer, found 1000.0"),
        ("config.train.tensorboard = None", "config.train.tensorboard: expected true or false, found None"),
        ("config.train.freeze = 'llama'", "config.train.freeze: expected a tuple, found 'llama'"),
        ("config.optim = 'adamw'", "config.optim: expected a group of keys, found 'adamw'"),
        ("config.optim.lr = 1", "config.optim.lr: no such key; did you mean config.optim.learning_rate?"),
        (
            "optim = config.optim; optim.lr = 1",
            "config.optim.lr: no such key; did you mean config.optim.learning_rate?",
        ),
        ("config.optim.rate_scale.llama = 1", "config.optim.rate_scale: renamed to config.optim.lr_multiplier"),
        ("config.data.rows_per_bin = 1", "config.data.rows_per_bin: renamed to config.data.rows_per_pack"),
        (
            "config.data.train.easyvqa.spilt = 'test'",
            "config.data.train.easyvqa.spilt: no such key; did you mean config.data.train.easyvqa.split?",
        ),
        ("config.seed = config.optim.lr", "config.optim.lr: no such key; did you mean config.optim.learning_rate?"),
        (
            "config.unlock(); config.optim.lr = 1",
            "config.optim.lr: no such key; did you mean config.optim.learning_rate?",
        ),
        ("config.optim.learning_rate = -1", "config.optim.learning_rate: expected at least 1e-12, found -1.0"),
        ("config.optim.learning_rate = float('nan')", "config.optim.learning_rate: expected at least 1e-12, found nan"),
        ("mesh = config.mesh; mesh.data = -2", "config.mesh.data: expected at least -1, found -2"),
        (
            "config.data.train = source('llava', file='a.json')",
            "config.data.train: expected sources(NAME=source('llava', …)), found a source without a name",
        ),
        ("config.data.test = None", "config.data.test: expected sources(NAME=source(…)), found None"),
        (
            "config.data.test = [source('easyvqa')]",
            "config.data.test: expected sources(NAME=source(…)), found [kind: easyvqa split: train weight: 1.0 ]",
        ),
        ("config.train.freeze = (1,)", "config.train.freeze: expected a tuple of texts, found 1 in it"),
        (
            "config.data.processor.resize_to = ('a',)",
            "config.data.processor.resize_to: expected a tuple of integers, found 'a' in it",
        ),
        (
            "config.model.llama.rope_scaling = 'yarn'",
            "config.model.llama.rope_scaling: expected None or a group of keys, found 'yarn'",
        ),
        (
            "config.model.llama.rope_scaling = {'type': 'yarn'}",
            "config.model.llama.rope_scaling: expected keys of factor, low_freq_factor, high_freq_factor, "
            "original_max_position_embeddings, rope_type, beta_fast, beta_slow, attention_factor, truncate; "
            "found 'type'",
        ),
        (
            "config.model.llama.rope_scaling = {'factor': 'a'}",
            "config.model.llama.rope_scaling: factor: expected a number, found 'a'",
        ),
        ("config.data.train = sources(a=1)", "config.data.train.a: expected a source, as source() makes it; found 1"),
        (
            "config.data.train.mine = source('easyvqa')",
            "config.data.train.mine: no such source; a config file adds one: config.data.train = "
            "sources(NAME=source(KIND, …))",
        ),
        ("source('llava', fil='a')", "source llava: expected a key of weight, file, images, videos; found 'fil'"),
        ("[][1]", "list index out of range"),
        ("{}['a']", "KeyError: a"),
        ("assert config.seed", "AssertionError"),
    ],
)
def test_a_line_of_a_config_file(tmp_path, line, message):
    """Whatever is wrong with it, and whenever that shows, it is named with its file and its number."""
    file = tmp_path / "mine.py"
    file.write_text(
        "from voco_jax.config import default_config, source, sources\ndef get_config():\n"
        f"  config = default_config()\n  {line}\n  return config\n"
    )
    with pytest.raises(UserError) as error:
        parse(f"--config={file}")
    assert str(error.value) == f"{file}, line 4: {message}"


def test_a_line_of_the_file_that_a_config_begins_with(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "base_of_mine", raising=False)
    base, file = tmp_path / "base_of_mine.py", tmp_path / "mine.py"
    begin = "from voco_jax.config import default_config\ndef get_config():\n  config = default_config()\n"
    file.write_text("import base_of_mine\ndef get_config():\n  return base_of_mine.get_config()\n")
    base.write_text(f"{begin}  config.train.steps = 0\n  return config\n")
    with pytest.raises(UserError, match=f"{base}, line 4: config.train.steps: expected at least 1, found 0"):
        parse(f"--config={file}")
    with pytest.raises(UserError, match=r"^--config.train.steps: expected at least 1, found -1"):
        parse(f"--config={file}", "--config.train.steps=-1")


def test_help_lists_every_key_with_its_default_and_meaning(capsys):
    with pytest.raises(SystemExit) as end:
        parse_arguments(["train", "--config=nothing.py", "-h"], lambda parser: None, "voco train\n\nTrains.")
    text = capsys.readouterr().out
    assert not end.value.code and text.startswith("usage: voco train\n\nTrains.\n\noptions:")
    meant = {name: key.rules.explanation for name, key in GROUPS_AND_KEYS.items()}
    keys = {key for key in flatten(default_config()) if not key.startswith("data.train.")}
    assert {"optim.learning_rate", "model.llama.hidden_size", "model.vision.patch_size"} < keys
    for key in keys | {"data.train", "data.test"}:
        assert len(meant[key]) > 4, f"config.{key} has no comment"
        assert f"--config.{key}=" in text and meant[key].split()[-1] in text
    assert "--config.optim.learning_rate=0.001" in text and meant["optim.learning_rate"].endswith("after the warm-up")
    assert meant["train.compress_gradients"].startswith("whether gradients go through the compress stream; False: mem")
    assert all(template in text for template in CHAT_TEMPLATES) and all(kind in text for kind in SOURCE_KEYS)
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", r"mine.py: expected a function get_config\(\) that returns the config, found none"),
        ("def get_config():\n  pass\n", r"mine.py: get_config\(\) returned None; expected default_config\(\)"),
        ("def get_config(x):\n  pass\n", r"mine.py: get_config\(x\): missing a required argument: 'x'"),
        ("def get_config()\n", r"mine.py, line 1: expected ':'"),
        ("def get_config():\n  return default_confg()\n", "mine.py, line 2: name 'default_confg' is not defined"),
        ("import voco_jax.confg\n", "mine.py, line 1: No module named 'voco_jax.confg'"),
        ("from configs import voco_8b\n", "mine.py, line 1: cannot import name 'voco_8b' from 'configs'"),
        ("def get_config():\n  return 1 / 0\n", "mine.py, line 2: division by zero"),
        ("def get_config():\n  return other.it\nimport other\n", "other.py, line 1: name 'y' is not defined"),
    ],
)
def test_a_config_file_that_is_no_python(tmp_path, monkeypatch, text, message):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "other", raising=False)
    (tmp_path / "other.py").write_text("it = y\n")
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        parse(f"--config={tmp_path / 'mine.py'}")
    assert "\n" not in str(error.value)


def test_saved_and_loaded(tmp_path):
    config = parse(FILE, "--config.seed=7", "--config.train.freeze=('vision_tower', 'llama.norm')")
    assert config.train.freeze == ("vision_tower", "llama.norm")
    save_config(config, tmp_path / "config.json")
    loaded = load_config(tmp_path / "config.json")
    assert first_difference(config, loaded) is None
    assert loaded.train.freeze == config.train.freeze  # which JSON takes for a list
    loaded.optim.b1 = 0.5
    assert first_difference(config, loaded) == ("optim.b1", 0.9, 0.5)


def test_rope_scaling_survives_a_file(tmp_path):
    from voco_jax.config import llama_preset

    config = default_config()
    with config.unlocked():
        config.model.llama = llama_preset("llama-3.1-8b")
    save_config(config, tmp_path / "config.json")
    assert typed(load_config(tmp_path / "config.json")).model.llama == presets.LLAMA["llama-3.1-8b"]
    assert presets.LLAMA["llama-3.1-8b"].rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)
    stored = config.to_dict()  # as it was when there was one type
    names = "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
    stored["model"]["llama"]["rope_scaling"] = {name: stored["model"]["llama"]["rope_scaling"][name] for name in names}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert first_difference(load_config(tmp_path / "config.json"), config) is None
    with pytest.raises(UserError, match="llama preset: expected one of vicuna-7b, .*; found 'vicuna'"):
        llama_preset("vicuna")


def test_a_config_of_before_a_key_was_there(tmp_path):
    """It says what the run did; and a run that goes on keeps that, unless it is asked for something else."""
    path = tmp_path / "config.json"
    stored = default_config().to_dict()
    del stored["data"]["transparency"], stored["data"]["processor"]
    path.write_text(json.dumps(stored))
    loaded = load_config(path)
    assert loaded.data.transparency == "drop" and default_config().data.transparency == "white"
    assert first_difference(loaded, default_config()) == ("data.transparency", "drop", "white")
    config = default_config()
    assert first_difference(loaded, with_earlier_values(config, loaded)) is None
    assert config.data.transparency == "white"  # a copy
    assert with_earlier_values(config, config).data.transparency == "white"
    loaded.data.processor.resample = "box"
    assert first_difference(with_earlier_values(loaded, config), loaded) is None


def test_large_configs(tmp_path):
    """Hundreds of sources have room; what could not be read again is not written."""
    path, config = tmp_path / "config.json", default_config()
    for count, refused in ((1000, False), (3000, True)):
        names = [f"{i:05} of all that there are" for i in range(count)]
        config.data.train = sources(**{n: source("llava", file=f"/data/{n}.json", images=f"/data/{n}") for n in names})
        if not refused:
            save_config(config, path)
            assert path.stat().st_size > 2**17 and load_config(path).data.train.keys() == config.data.train.keys()
            continue
        with pytest.raises(UserError, match="config.json: cannot be written: expected 2048 groups of keys at most"):
            save_config(config, path)
        assert load_config(path).data.train.keys() != config.data.train.keys()
        path.write_text(json.dumps(config.to_dict()))
        with pytest.raises(UserError, match="config.json: expected 2048 groups of keys at most, found 3020$"):
            load_config(path)
    stored = default_config().to_dict()
    stored["model"] |= {f"k{i}": 0 for i in range(20_000)}
    path.write_text(json.dumps(stored))
    with pytest.raises(UserError, match="config.json: expected 20000 keys at most, found 2[0-9]{4}$"):
        load_config(path)
    path.write_text(json.dumps(stored | {"workdir": "x" * 2**20}))
    with pytest.raises(UserError, match="config.json: expected 1048576 bytes at most, found "):
        load_config(path)
    path.write_text(json.dumps(default_config().to_dict() | {"x" * 2**19: 0}))
    with pytest.raises(UserError) as error:
        load_config(path)
    assert len(str(error.value)) < 1000


def test_stored_configs_that_do_not_fit(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(UserError, match=r"config.json: not found; a run directory holds config.json"):
        load_config(path)
    for text, found in ("[]", "list"), ("null", "NoneType"):
        path.write_text(text)
        with pytest.raises(UserError, match=f"config.json: expected an object, found {found}"):
            load_config(path)
    path.write_text("{")
    with pytest.raises(UserError, match=r"config.json: not readable as JSON"):
        load_config(path)
    save_config(default_config(), path)
    path.write_text(re.sub(r'"num_voco_tokens": 1,\n', "", path.read_text()))
    with pytest.raises(UserError, match=r"config.json: key 'model.num_voco_tokens' is missing"):
        load_config(path)
    save_config(default_config(), path)
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 0, "speed": 1'))
    with pytest.raises(UserError, match=r"config.json: config.speed: no such key; did you mean config.seed\?"):
        load_config(path)


def test_a_config_from_before_a_key_was_there(tmp_path):
    """It means what it did; a missing key of old is an error still."""
    path = tmp_path / "config.json"
    config = default_config()
    config.model.projector_layers = 1
    save_config(config, path)
    assert load_config(path).model.projector_layers == 1
    stored = json.loads(path.read_text())
    del stored["model"]["projector_layers"]
    path.write_text(json.dumps(stored))
    assert load_config(path).model.projector_layers == 2


def test_a_checkpoint_of_another_project_is_no_run(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llava", "text_config": {}}')
    with pytest.raises(UserError, match=f"make one of it: voco convert to-jax {tmp_path} RUN"):
        load_config(tmp_path / "config.json")


def test_every_config_file_describes_a_model_and_a_workdir_of_its_own():
    files = [file for file in (Path(__file__).parents[1] / "configs").glob("*.py") if file.stem != "__init__"]
    for file in files:
        about = ast.get_docstring(ast.parse(file.read_text()))
        assert "Hardware: " in about and f"    voco train --config={file.stem}" in about
    configs = [parse(f"--config={file}") for file in files]
    for config in configs:
        typed(config)
    assert len({config.workdir for config in (*configs, default_config())}) == len(files) + 1
