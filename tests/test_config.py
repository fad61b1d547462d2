"""Config files and command lines: what they set, and one line for what they cannot."""

import json
from pathlib import Path
import re
import sys

from absl import flags
import pytest

from voco_jax.config import (
    default_config,
    first_difference,
    llama_config,
    load_config,
    parse_command_line,
    parse_flags,
    save_config,
    vision_config,
    with_earlier_values,
)
from voco_jax.errors import UserError
from voco_jax.models import presets
from voco_jax.models.llama import RopeScaling

FILE = f"--config={Path(__file__).parents[1] / 'configs/easyvqa.py'}"


def parse(*arguments):
    return parse_command_line(["train", *arguments])


def test_the_command_line_sets_keys():
    config = parse(FILE, "--config.optim.learning_rate=0.5", "--config.model.llama.hidden_size=64")
    assert config.optim.learning_rate == 0.5
    assert llama_config(config).hidden_size == 64
    assert config.model.num_voco_tokens == 1


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.optim.learning_rat=1", r"Did you mean \"learning_rate\" instead of \"learning_rat\""),
        ("--config.optm.learning_rate=1", r"Did you mean \"optim\" instead of \"optm\""),
        ("--config.train.steps=many", "many"),
        ("--conf.train.steps=3", "conf"),
        ("--config.train.steps=0", "config.train.steps: expected at least 1, found 0"),
        ("--config.optim.learning_rate=-1", "config.optim.learning_rate: expected at least 1e-12, found -1.0"),
        ("--config.seed=-1", r"config.seed: expected at least 0 and below 2147483648, found -1"),
        ("train", "'train' is no option; use --config=FILE --config.KEY=VALUE"),
    ],
)
def test_wrong_keys_and_values(argument, message):
    with pytest.raises(UserError, match=message) as error:
        parse(FILE, argument)
    assert "\n" not in str(error.value)


def test_a_command_with_flags_of_its_own():
    def define_flags(values):
        flags.DEFINE_string("topology", "", "a slice", flag_values=values)
        flags.DEFINE_integer("chips", 4, "of it", flag_values=values)

    def parse(*arguments):
        config, values = parse_flags(["aot", FILE, *arguments], define_flags)
        return config.seed, values.topology, values.chips

    assert parse("--topology=v5e:4x4", "--config.seed=3") == (3, "v5e:4x4", 4)
    with pytest.raises(UserError, match="command line: flag --chips=many: invalid literal") as error:
        parse("--chips=many")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="command line: Unknown command line flag 'topolgy'"):
        parse("--topolgy=v5e:4x4")


def test_a_config_file_that_is_not_there():
    with pytest.raises(UserError, match=r"--config=FILE is missing, for example --config=configs/easyvqa.py"):
        parse()
    with pytest.raises(UserError, match="configs/nothing.py"):
        parse("--config=configs/nothing.py")


def test_a_config_file_with_a_mistyped_key(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from voco_jax.config import default_config\ndef get_config():\n"
        "  config = default_config()\n  config.model.num_vocotokens = 2\n  return config\n"
    )
    with pytest.raises(UserError) as error:
        parse(f"--config={file}")
    assert str(error.value) == (
        f'config: {file}, line 4: Key "num_vocotokens" does not exist and cannot be added since the config is locked. '
        'Did you mean "num_voco_tokens" instead of "num_vocotokens"?'
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config()\n", r"expected ':' \(mine.py, line 1\)"),
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
    assert llama_config(load_config(tmp_path / "config.json")) == presets.LLAMA["llama-3.1-8b"]
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
    with pytest.raises(UserError, match=r"config.json: .*Did you mean \"seed\" instead of \"speed\""):
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


def test_every_config_file_describes_a_model_and_a_workdir_of_its_own():
    files = list((Path(__file__).parents[1] / "configs").glob("*.py"))
    configs = [parse(f"--config={file}") for file in files]
    for config in configs:
        llama_config(config), vision_config(config)
    assert len({config.workdir for config in (*configs, default_config())}) == len(files) + 1
