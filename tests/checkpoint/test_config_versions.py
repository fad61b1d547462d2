"""A run that an earlier version trained: its config has the keys' old names, and everything still works with it."""

import hashlib
import json
from pathlib import Path
import tarfile

import numpy as np
import pytest

from tests.helpers.commands import run_main
import voco_jax
from voco_jax import evaluate
from voco_jax.config import RENAMED, VERSION, default_config, load_config, save_config
from voco_jax.convert.to_hf import to_hf
from voco_jax.convert.verify import open_side
from voco_jax.data.training_data import open_training_data
from voco_jax.errors import UserError
from voco_jax.train.loop import train

# A run of two steps on four pictures, its data, and what the version that wrote it made of the next two steps.
FIXTURE = Path(__file__).parents[1] / "fixtures" / "run_config_v1.tar.xz"


@pytest.fixture
def earlier(tmp_path, monkeypatch) -> Path:
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)  # where its config looks for the data
    return Path("run")


def test_a_config_with_the_keys_old_names(earlier):
    stored = json.loads((earlier / "config.json").read_text())
    assert "version" not in stored
    assert all(name.rpartition(".")[2] in stored[name.partition(".")[0]] for name in RENAMED)
    both = stored | {"optim": stored["optim"] | {"min_lr_ratio": 0.0}}
    (earlier / "both.json").write_text(json.dumps(both))
    with pytest.raises(UserError, match="both.json: config.optim.min_lr_ratio: expected it once, found it under"):
        load_config(earlier / "both.json")
    config = load_config(earlier / "config.json")
    assert (config.data.images_per_pack, config.data.rows_per_pack, config.data.max_skipped_fraction) == (1, 2, 0.25)
    assert (config.optim.lr_multiplier.projector, config.optim.lr_multiplier.llama) == (0.5, 1.0)
    assert (config.optim.min_lr_ratio, config.optim.decay_fraction) == (0.1, 0.25)
    save_config(config, earlier / "config.json")
    assert json.loads((earlier / "config.json").read_text())["version"] == VERSION
    assert load_config(earlier / "config.json") == config


def test_it_answers_and_is_scored_and_converted(earlier, monkeypatch, capsys):
    expected = json.loads(Path("expected.json").read_text())
    model = voco_jax.load(earlier)
    assert model.fingerprint == expected["fingerprint"]  # memories made by the earlier version stay of use
    assert capsys.readouterr().err == ""
    status, out, _ = run_main(evaluate, monkeypatch, capsys, "--run", earlier)
    results = json.loads((earlier / "results.colours.json").read_text())
    assert status == 0 and results["answers"] == 8
    assert results["loss"] == pytest.approx(expected["evaluation_loss"], rel=1e-4)
    to_hf(earlier, Path("converted"), "voco", None, 10**9)
    assert open_side(earlier).shapes == open_side(Path("converted")).shapes


def test_its_training_goes_on(earlier, capsys):
    expected = json.loads(Path("expected.json").read_text())
    config = load_config(earlier / "config.json")
    config.train.steps = 4
    batches = open_training_data(config, run=earlier).batches.dataset()
    for step, digests in expected["batches"].items():
        batch = batches[int(step)]
        assert {name: hashlib.sha256(batch[name].tobytes()).hexdigest() for name in digests} == digests
    train(config)
    assert "resuming, at step 2 of 4" in capsys.readouterr().out
    lines = [json.loads(line) for line in (earlier / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    found = [(line["loss"], line["grad_norm"]) for line in lines[2:]]
    np.testing.assert_allclose(found, expected["losses"], rtol=1e-4)


def test_a_config_of_a_later_version_is_refused(tmp_path):
    path = tmp_path / "config.json"
    save_config(default_config(), path)
    stored = json.loads(path.read_text())
    for version in VERSION + 1, "2", 0:
        path.write_text(json.dumps(stored | {"version": version}))
        with pytest.raises(UserError) as error:
            load_config(path)
        expected = f"{path}: version: expected {VERSION} at most, found {version!r}; it needs a newer voco_jax"
        assert str(error.value) == expected
