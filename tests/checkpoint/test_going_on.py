"""A run goes on when the world around it has moved: its base, its data, its tokenizer, its own directory, its end."""

import contextlib
import json
import os
from pathlib import Path
import shutil

from array_record.python.array_record_module import ArrayRecordWriter
from flax import nnx
from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from tests.helpers import tiny
from tests.helpers.record_lists import ListSource, plain_picture, turns
from voco_jax.checkpoint.checkpointer import Checkpointer
from voco_jax.checkpoint.init_from import begin_with_run
from voco_jax.checkpoint.resume import continued, kept_values
from voco_jax.checkpoint.run import load_run
from voco_jax.checkpoint.workdir import check_workdir
from voco_jax.config import load_config, save_config, source, sources
from voco_jax.data.contents import contents_of, difference
from voco_jax.data.from_config import make_model_config
from voco_jax.data.index import Index
from voco_jax.data.records import Clip, Frames, Picture, Record
from voco_jax.data.reports import Report
from voco_jax.data.sources.array_records import pack_record
from voco_jax.data.tokenizer import load_tokenizer, save_tokenizer
from voco_jax.data.training_data import open_training_data
from voco_jax.errors import UserError
from voco_jax.models.build import init_params
from voco_jax.parallel.mesh import make_mesh
from voco_jax.train.from_config import abstract_state, make_optimizer
from voco_jax.train.load_initial_params import load_initial_params
from voco_jax.train.loop import train

STEPS = 6
LOW = dict(model__param_dtype="bfloat16", model__lora__rank=2, train__freeze="('vision_tower',)")


def write_data(directory: Path, count: int = 12) -> Path:
    """Pictures of a colour each, a question about each."""
    (directory / "images").mkdir(parents=True)
    rows = []
    for i in range(count):
        Image.new("RGB", (32, 32), (i * 10, 255 - i * 10, 90)).save(directory / "images" / f"p{i}.png")
        rows.append({"image": f"p{i}.png", "conversations": turns("what number?", f"number {i}")})
    (directory / "mix.json").write_text(json.dumps(rows))
    return directory


def config_of(workdir: Path, data: Path, **changes):
    """A tiny run on `write_data`'s pictures."""
    keys = dict(train__steps=STEPS, train__log_every=1, train__checkpoint_every=2, train__keep=9)
    config = tiny.config(workdir, optim__schedule="constant", **keys | changes)
    with config.unlocked():
        config.data.train = sources(mix=source("llava", file=f"{data}/mix.json", images=f"{data}/images"))
        config.data.test = sources()
    return config


def save_base(directory: Path, data: Path, dtype: str = "float32") -> tuple[Path, dict]:
    """(run, parameters) of a run of 2 steps, which nobody has trained."""
    config = config_of(directory, data, seed=3, model__param_dtype=dtype)
    found = open_training_data(config, log=lambda line: None)
    params = init_params(found.model_config, config.seed)
    with contextlib.closing(Checkpointer(directory, create=True)) as checkpointer:
        checkpointer.save(2, params, {"count": jnp.zeros(())}, {})
    save_tokenizer(found.tokenizer, directory / "tokenizer")
    save_config(config, directory / "config.json")
    return directory, jax.device_get(flatten_dict(params))


def parameters(run: Path) -> dict[tuple, np.ndarray]:
    return flatten_dict(jax.device_get(nnx.to_pure_dict(nnx.state(load_run(run).model))))


def losses(run: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Path]:
    """`base`, a run of 2 steps, and `run`, which began with it and was never disturbed: LoRA, in bfloat16."""
    root = tmp_path_factory.mktemp("world")
    paths = {"data": write_data(root / "data"), "base": root / "base", "run": root / "run"}
    save_base(paths["base"], paths["data"])
    train(config_of(paths["run"], paths["data"], init_from=f"{paths['base']}/", **LOW))
    return paths


def stopped(world, tmp_path: Path, step: int = 2, **changes) -> Path:
    """A copy of the run as it was at a step, at another place, with another config."""
    run = shutil.copytree(world["run"], tmp_path / "moved run")
    for later in (run / "checkpoints").iterdir():
        if int(later.name) > step:
            shutil.rmtree(later)
    config = load_config(run / "config.json")
    config.update_from_flattened_dict(changes)
    save_config(config, run / "config.json")
    return run


@pytest.mark.slow
def test_everything_has_moved_and_the_run_is_what_it_would_have_been(world, tmp_path, capsys):
    """Base, data and the run itself are elsewhere, it was to end at step 4; all bits are as if nothing had been."""
    run = stopped(world, tmp_path, **{"train.steps": 4, "init_from": str(tmp_path / "gone")})
    data = tmp_path / "moved data"
    shutil.copytree(world["data"], data)
    changes = dict(data__num_threads=2, data__prefetch=5, train__keep=3)
    train(config_of(run, data, **LOW | changes))
    assert f"resuming, at step 2 of {STEPS}" in capsys.readouterr().out
    assert losses(run) == losses(world["run"])
    found, undisturbed, base = (parameters(path) for path in (run, world["run"], world["base"]))
    assert found.keys() == undisturbed.keys() > base.keys()
    for key, leaf in found.items():
        np.testing.assert_array_equal(leaf, undisturbed[key])
        assert leaf.dtype == np.float32 or leaf.dtype == jnp.bfloat16
        if key in base:  # the projector and the VoCo token's row train; all else is as it was cast at first
            changed = leaf != base[key].astype(jnp.bfloat16).astype(leaf.dtype)
            trains = key[0] == "projector" or key == ("llama", "embed_tokens", "embedding")
            assert changed.any() if trains else not changed.any(), key
    config = load_config(run / "config.json")
    assert (config.train.steps, config.data.train.mix.file) == (STEPS, f"{data}/mix.json")
    assert config.init_from == str(tmp_path / "gone")  # where it came from


def test_a_base_is_one_by_any_address_and_not_needed(world, tmp_path, monkeypatch):
    run, base = stopped(world, tmp_path), world["base"]
    moved, other = tmp_path / "moved base", tmp_path / "other base"
    shutil.copytree(base, moved)
    train_again = shutil.copytree(base, other) / "checkpoints" / "2" / "_CHECKPOINT_METADATA"
    train_again.write_text(train_again.read_text().replace("timestamp_nsecs", "timestamp_nsecs_of_another"))
    (tmp_path / "link").symlink_to(base)
    monkeypatch.chdir(base.parent)
    known = [base, f"{base}/", base.name, f"./{base.name}/", os.path.relpath(base), tmp_path / "link", "", moved]
    for address in known:
        config = continued(config_of(run, world["data"], **LOW, init_from=address), run)
        assert check_workdir(run, config) and config.init_from == f"{base}/"
        assert config.model.llama.vocab_size == load_config(run / "config.json").model.llama.vocab_size
    for address in other, tmp_path / "nowhere":
        with pytest.raises(UserError, match=f"config.init_from: .*began with {base}/, and {address} is another run"):
            continued(config_of(run, world["data"], **LOW, init_from=address), run)
    (run / "init_from.json").unlink()  # as runs have it that began earlier
    with pytest.raises(UserError, match="is another run; leave it out to go on"):
        continued(config_of(run, world["data"], **LOW, init_from=moved), run)
    with pytest.raises(UserError, match=r"config.model.llama.hidden_size: .* has 32, found 64"):
        continued(config_of(run, world["data"], **LOW, model__llama__hidden_size=64), run)


def test_defaults_of_before_are_kept_and_said(world, tmp_path):
    run = stopped(world, tmp_path)
    stored = json.loads((run / "config.json").read_text())
    del stored["data"]["transparency"], stored["optim"]["rounding"], stored["data"]["processor"]
    (run / "config.json").write_text(json.dumps(stored))
    asked = config_of(run, world["data"], **LOW)
    config = continued(asked, run)
    assert check_workdir(run, config)
    assert kept_values(asked, config, run) == (
        f"{run}: goes on with the defaults of when it began: data.transparency = 'drop' (now 'white'), "
        "optim.rounding = 'nearest' (now 'stochastic')"
    )
    assert kept_values(config, config, run) == ""


def test_a_tokenizer_is_compared_by_what_it_is(world, small_tokenizer, tmp_path):
    run = stopped(world, tmp_path, **{"init_from": "", "tokenizer.source": str(tmp_path / "gone" / "tokenizer")})
    shutil.copytree(run / "tokenizer", tmp_path / "same")
    save_tokenizer(small_tokenizer, tmp_path / "other")
    vocabulary = load_config(run / "config.json").model.llama.vocab_size

    def check(source):
        config = config_of(run, world["data"], **LOW, model__llama__vocab_size=vocabulary, tokenizer__source=source)
        return check_workdir(run, continued(config, run))

    assert check(tmp_path / "gone" / "tokenizer") and check(f"{tmp_path}/gone/tokenizer/") and check(tmp_path / "same")
    for other in tmp_path / "other", "train":
        with pytest.raises(UserError, match=f"holds a run with tokenizer.source = .*, this config has '{other}'"):
            check(other)


@pytest.mark.parametrize(
    ("done", "was", "now", "message"),
    [
        (6, {}, {"train.steps": 60}, ""),
        (4, {}, {"train.steps": 5}, ""),
        (6, {}, {"train.steps": 5}, r"config.train.steps: .* has done 6 steps already; found 5$"),
        (6, {}, {"optim.schedule": "wsd", "train.steps": 10}, ""),  # a constant rate that cools down in the end
        (6, {}, {"optim.min_lr_ratio": 0.1}, ""),  # which a constant rate never reads
        (4, {"optim.schedule": "wsd"}, {"train.steps": 60}, ""),
        (
            6, {"optim.schedule": "wsd", "optim.decay_fraction": 0.5}, {"train.steps": 60},
            "config.train.steps: .* has 6, this config 60; step 5, which is done, had .* of 0.006667, not 0.01 "
            ".*'wsd'.*: keep 6, begin another run with --config.init_from=.*, or remove the checkpoints after that of "
            "step 4$",
        ),
        (2, {"optim.schedule": "cosine"}, {"train.steps": 60}, ""),  # the warm-up is the same
        (6, {"optim.schedule": "cosine"}, {"train.steps": 60}, "step 4, .*'cosine'.*, or remove .* of step 2$"),
        (4, {"optim.schedule": "linear"}, {"optim.schedule": "constant"}, "config.optim.schedule: .* has 'linear'"),
        (4, {}, {"optim.learning_rate": 0.02}, "holds a run with optim.learning_rate = 0.01, this config has 0.02"),
        (4, {}, {"data.train.mix.weight": 2.0}, "holds a run with data.train with the weights = .*1.0.*2.0"),
    ],
)  # fmt: skip
def test_which_steps_may_still_change(world, tmp_path, done, was, now, message):
    """Those whose learning rate is to come: what is done must be what the config would have done."""
    run = stopped(world, tmp_path, done, **was)
    config = config_of(run, world["data"], **LOW)
    config.update_from_flattened_dict(was | now)
    if not message:
        assert check_workdir(run, continued(config, run))
        return
    with pytest.raises(UserError, match=message) as error:
        check_workdir(run, continued(config, run))
    assert "\n" not in str(error.value)


def test_a_float16_base_is_begun_with_exactly(world, tmp_path):
    """As released LLaVAs are stored; every number of float16 is one of float32."""
    base, half = save_base(tmp_path / "base", world["data"], "float16")
    for dtype in "float32", "bfloat16":
        config = begin_with_run(config_of(tmp_path / "run", world["data"], init_from=base, model__param_dtype=dtype))
        model_config = make_model_config(config, load_tokenizer(base / "tokenizer"))
        mesh = make_mesh(config.mesh)
        state = abstract_state(config, model_config, make_optimizer(config), mesh)
        params, step = load_initial_params(config.init_from, config.seed, model_config, state, lambda line: None)
        assert step == 2
        for key, leaf in flatten_dict(params).items():
            np.testing.assert_array_equal(leaf, half[key].astype(dtype))
    with pytest.raises(
        UserError, match="config.model.param_dtype: expected bfloat16 or float32 to train, found float16"
    ):
        train(config_of(tmp_path / "run", world["data"], init_from=base, model__param_dtype="float16"))
    assert not (tmp_path / "run").exists()
    config = load_config(base / "config.json")
    config.model.dtype = "float16"
    save_config(config, base / "config.json")
    with pytest.raises(
        UserError, match="config.json: model.dtype: float16 needs a GPU, found cpu; 'auto' takes float32$"
    ):
        load_run(base)


# ---- Data -------------------------------------------------------------------------------------------------------


def change_picture(data: Path):
    Image.new("RGB", (32, 32), "red").save(data / "images" / "p7.png")


def change_answer(data: Path):
    file = data / "mix.json"
    file.write_text(file.read_text().replace("number 7", "number 8"))


def change_count(data: Path):
    file = data / "mix.json"
    file.write_text(json.dumps(json.loads(file.read_text())[:-1]))


def lose_pictures(data: Path):
    shutil.rmtree(data / "images")
    (data / "images").mkdir()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_picture, r"mix.json\[7\] has another picture or clip than when this run began"),
        (change_answer, "conversations of other text than when this run began"),
        (change_count, "12 usable records when this run began, 11 now"),
        (lose_pictures, r"no picture or clip of the 12 looked at can be read now, as that of mix.json\[0\]"),
    ],
)
def test_other_data_are_refused(world, tmp_path, change, message):
    data = shutil.copytree(world["data"], tmp_path / "data")
    open_ = lambda: open_training_data(config_of(tmp_path, data), run=world["run"], log=lambda line: None).batches  # noqa: E731
    state = json.loads(json.dumps(open_().get_state()))
    change(data)
    batches = open_()
    with pytest.raises(UserError, match=rf"config.data.train.mix: {message}; a run goes on with the same") as error:
        batches.set_state(state)
    assert "\n" not in str(error.value)


def test_shards_move_too(world, tmp_path):
    """ArrayRecord shards under another name and path give the batches that they gave."""
    (tmp_path / "a").mkdir()
    writer = ArrayRecordWriter(str(tmp_path / "a" / "mix.array_record"), "group_size:1")
    for i in range(12):
        writer.write(pack_record(Record([plain_picture(i)], None, [turns("what?", f"number {i}")], f"row {i}")))
    writer.close()
    batches = []
    for directory in tmp_path / "a", tmp_path / "b" / "c":
        if not directory.exists():
            directory.parent.mkdir()
            shutil.move(tmp_path / "a", directory)
        config = config_of(tmp_path / "run", world["data"])
        with config.unlocked():
            config.data.train = sources(mix=source("array_record", files=str(directory)))
        batches.append(open_training_data(config, run=world["run"], log=lambda line: None).batches)
    first = batches[0].get_state()
    assert len(first["contents"]["mix"]["visual"]) == 12
    batches[1].set_state(first | {"batches": 1})


def test_what_is_seen_is_compared(tmp_path):
    """Pictures, clips (both ends and the size) and frames; a record whose picture cannot be read is not."""
    big = bytearray(os.urandom(3 * 2**20))
    clip = tmp_path / "clip.mp4"

    def contents(records):
        n = len(records)
        numbers = np.arange(n)
        ones = np.ones(n, np.int32)
        index = Index(numbers, ones, numbers, np.arange(n + 1), 0 * ones, ones, numbers, numbers, Report())
        return contents_of(ListSource(records), index)

    def at(change):
        content = bytearray(big)
        content[change] ^= 1
        clip.write_bytes(content)
        return contents([Record(video=Clip(clip))])["visual"]["0"]

    assert len({at(0), at(2**20 - 1), at(2 * 2**20), at(-1)}) == 4
    assert at(3 * 2**19) == at(3 * 2**19 + 1)  # a clip's middle is not read
    frames = [Frames([plain_picture(grey)], [0.0], "a") for grey in (5, 6)]
    before, after = (contents([Record(video=f), Record([Picture(tmp_path / "none.png")]), Record()]) for f in frames)
    assert before["visual"].keys() == {"0"} and before["visual"] != after["visual"]
    source = ListSource([Record(video=frames[0])])
    assert difference(before, before, source) == ""
    assert difference(before, after, source) == "list[0] has another picture or clip than when this run began"
    many = contents([Record([plain_picture(1)])] * 1000)
    assert len(many["visual"]) == 64 and {"0", "999"} <= many["visual"].keys()
