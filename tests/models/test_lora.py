"""LoRA: low-rank updates that begin as nothing, train alone, and merge into plain kernels."""

import dataclasses
import functools
import shutil

from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import numpy as np
import pytest

from tests.helpers import tiny
from tests.helpers.commands import run_main
from tests.models.test_two_streams import make
from tests.parallel.test_meshes import BASE, SWITCHES, random_batch
from tools import convert_weights
from voco_jax.checkpoint.init_from import begin_with_run
from voco_jax.checkpoint.run import load_run
from voco_jax.config import default_config
from voco_jax.errors import UserError
from voco_jax.models.build import init_params
from voco_jax.models.linear import LoRAConfig
from voco_jax.models.voco import Read
from voco_jax.parallel.mesh import make_mesh
from voco_jax.train.from_config import abstract_state, loss_of, make_optimizer, trainable_filter
from voco_jax.train.load_initial_params import load_initial_params
from voco_jax.train.loop import train
from voco_jax.train.step import make_train_step

LORA = LoRAConfig(4, 12.0, LoRAConfig.TARGETS)
ADAPTED = dataclasses.replace(BASE, lora=LORA)


@functools.cache
def program(config):
    graphdef, _ = make(config)
    batch = random_batch(config)
    read = Read(*(batch[name] for name in Read._fields))
    return jax.jit(lambda params: nnx.merge(graphdef, params)(read, batch["pixel_values"]))


def logits(config, params):
    return np.asarray(program(config)(params), np.float32)


def merged(params: dict, lora: LoRAConfig) -> dict:
    """W + alpha / rank · A B for each layer of each projection, by numpy."""
    leaves = {keys: np.asarray(leaf) for keys, leaf in flatten_dict(params).items()}
    plain = {keys: leaf for keys, leaf in leaves.items() if "lora" not in keys}
    for keys, kernel in plain.items():
        if keys[-1] == "kernel" and (*keys[:-1], "lora", "lora_a") in leaves:
            a, b = leaves[*keys[:-1], "lora", "lora_a"], leaves[*keys[:-1], "lora", "lora_b"]
            update = lora.alpha / lora.rank * np.einsum("lir,lro->lio", a, b)
            plain[keys] = kernel + update.reshape(kernel.shape).astype(kernel.dtype)
    return unflatten_dict(plain)


def test_fresh_matrices_change_nothing():
    """Not a logit's bit, and no other parameter's random numbers."""
    plain, adapted = flatten_dict(init_params(BASE, 3)), flatten_dict(init_params(ADAPTED, 3))
    added = {keys for keys in adapted if "lora" in keys}
    assert adapted.keys() - added == plain.keys() and len(added) == 2 * 7
    for keys, leaf in plain.items():
        np.testing.assert_array_equal(adapted[keys], leaf)
    for keys in added:
        inputs = adapted[keys].shape[1]
        values = np.abs(adapted[keys])
        assert not values.any() if keys[-1] == "lora_b" else 0.5 / inputs**0.5 < values.max() <= 1 / inputs**0.5
    params = unflatten_dict(adapted)
    np.testing.assert_array_equal(logits(ADAPTED, params), logits(BASE, unflatten_dict(plain)))


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({}, 1e-5),
        (dict(unroll_layers=False, remat="full"), 1e-5),
        (dict(lora=LoRAConfig(3, 1.5, ("q_proj", "o_proj")), **SWITCHES), 1e-5),
        (dict(dtype="bfloat16", unroll_layers=False), 0.03),
    ],
)
def test_is_the_model_with_merged_kernels(changes, tolerance):
    config = dataclasses.replace(ADAPTED, **changes)
    _, params = make(config)
    plain = dataclasses.replace(config, lora=None)
    found, expected = logits(config, params), logits(plain, merged(params, config.lora))
    without = logits(plain, unflatten_dict({k: v for k, v in flatten_dict(params).items() if "lora" not in k}))
    size, difference, effect = (np.sqrt((x**2).mean()) for x in (expected, found - expected, found - without))
    assert difference <= tolerance * size and effect > 0.1 * size


def test_what_trains():
    """LoRA's matrices, the projector and the VoCo token's row; all else is bit for bit as it was, without moments."""
    config = default_config()
    config.train.freeze, config.optim.warmup_steps = ("vision_tower",), 0
    graphdef, params = make(ADAPTED)
    before = params = jax.tree.map(np.array, params)
    optimizer, trainable = make_optimizer(config), trainable_filter(config, ADAPTED)
    step = make_train_step(graphdef, loss_of(config), optimizer, trainable)
    opt_state = jax.jit(optimizer.init)(trainable.split(params)[0])
    trains = [leaf for keys, leaf in flatten_dict(params).items() if keys[0] == "projector" or "lora" in keys]
    assert sum(leaf.size for leaf in jax.tree.leaves(opt_state) if leaf.ndim) == 2 * (sum(x.size for x in trains) + 32)
    for _ in range(2):
        params, opt_state, _ = step(params, opt_state, random_batch(ADAPTED))
    for keys, leaf in flatten_dict(jax.device_get(params)).items():
        was = flatten_dict(before)[keys]
        if keys[-1] == "embedding" and keys[0] == "llama":
            changed = (leaf != was).any(1)
            assert changed[ADAPTED.voco_token_id] and changed.sum() == 1
        else:
            assert (leaf != was).any() == (keys[0] == "projector" or "lora" in keys), keys


def test_parts_that_cannot_be_frozen():
    config = default_config()
    _, params = make(ADAPTED)
    config.train.freeze = ("llama.layers.q_proj.lora",)
    with pytest.raises(UserError, match="train.freeze: LoRA's matrices always train; found 'llama.layers.q_proj.lora'"):
        trainable_filter(config, ADAPTED).split(params)
    config.train.freeze = ("llama",)  # is LoRA's own business, and no mistake
    trained, _ = trainable_filter(config, ADAPTED).split(params)
    assert {keys[-1] for keys in flatten_dict(trained["llama"])} == {"lora_a", "lora_b", "voco_row"}


CHANGES = dict(model__lora__rank=4, model__lora__alpha=8.0, train__steps=6, train__checkpoint_every=3)


@pytest.fixture(scope="module")
def lora_run(tiny_run, tmp_path_factory):
    run = tmp_path_factory.mktemp("lora") / "run"
    return train(tiny.config(run, init_from=tiny_run, optim__name="adamw", optim__learning_rate=0.02, **CHANGES))


def params_of(run) -> dict:
    return flatten_dict(nnx.to_pure_dict(nnx.state(load_run(run).model)))


def run_logits(run):
    model = load_run(run).model
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, model.config.llama.vocab_size, (2, 24)).astype(np.int32)
    read = Read(tokens, *(np.broadcast_to(x, tokens.shape) for x in (np.arange(24), 1, -1)))
    read = read._replace(slot_index=np.where(np.arange(24) == 3, 0, -1) + 0 * tokens)
    pixels = rng.normal(size=(2, 1, 64, 64, 3)).astype(np.float32)
    return np.asarray(jax.jit(lambda m, r, p: m(r, p))(model, read, pixels))


def assert_begins_with(run, config) -> None:
    """Another run's first parameters are those of this run."""
    config.init_from = str(run)
    config, model_config, mesh = begin_with_run(config), load_run(run).model.config, make_mesh(config.mesh)
    state = abstract_state(config, model_config, make_optimizer(config), mesh)
    params, step = load_initial_params(config.init_from, 0, model_config, state)
    expected = params_of(run)
    assert step == load_run(run).step and flatten_dict(params).keys() == expected.keys()
    for keys, leaf in flatten_dict(params).items():
        np.testing.assert_array_equal(leaf, expected[keys])


@pytest.fixture
def convert(monkeypatch, capsys):
    return lambda *arguments: run_main(convert_weights, monkeypatch, capsys, *arguments)


def test_a_run_begins_with_a_plain_one(lora_run, tiny_run):
    """The language model is the plain run's, but for the VoCo token's row; LoRA has learned something."""
    base, adapted = params_of(tiny_run), params_of(lora_run)
    row = load_run(lora_run).model.config.voco_token_id
    for keys, leaf in base.items():
        changed = np.asarray(leaf) != np.asarray(adapted[keys])
        if keys[-1] == "embedding" and keys[0] == "llama":
            assert changed[row].all() and not np.delete(changed, row, 0).any()
        elif keys[0] == "llama":
            assert not changed.any(), keys
    assert all(np.asarray(adapted[keys]).any() for keys in adapted if keys[-1] == "lora_b")
    assert len(adapted) - len(base) == 14


def test_merging(lora_run, tmp_path, convert):
    """The plain run's logits are the LoRA run's; and others may begin with it."""
    plain = tmp_path / "plain"
    status, out, _ = convert("merge", lora_run, plain)
    assert status == 0 and out == f"written: {plain}\n"
    assert load_run(plain).config.model.lora.rank == 0 and load_run(plain).step == 0
    expected, found = run_logits(lora_run), run_logits(plain)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    np.testing.assert_array_equal(params_of(plain)["projector", "linear_1", "kernel"],
                                  params_of(lora_run)["projector", "linear_1", "kernel"])  # fmt: skip
    assert_begins_with(plain, tiny.config(tmp_path / "again"))
    status, _, error = convert("merge", plain, tmp_path / "other")
    assert status == 2 and error.endswith(f"error: {plain}: expected a run with LoRA, found model.lora.rank 0\n")
    status, _, error = convert("merge", lora_run, plain)
    assert status == 2 and "exists already" in error


def test_a_run_with_lora_where_there_is_no_place_for_it(lora_run, tmp_path, convert):
    message = f"merge it first: voco convert merge {lora_run} DST"
    status, _, error = convert("to-hf", lora_run, tmp_path / "hf", "--format", "voco")
    assert status == 2 and message in error and len(error.splitlines()) == 1
    for changes in {}, dict(CHANGES, model__lora__rank=8), dict(CHANGES, model__lora__targets="('q_proj',)"):
        with pytest.raises(UserError, match=r"config.model.lora.\w+: .* has LoRA with .*, found .*; merge it first: "):
            train(tiny.config(tmp_path / "run", init_from=lora_run, **changes))
    assert not list(tmp_path.iterdir())


def test_a_run_with_lora_goes_on(lora_run, tmp_path, capsys):
    """After its first checkpoint, to the same numbers; and as the beginning of another run."""
    run = shutil.copytree(lora_run, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "6")
    config = load_run(run).config
    config.workdir = str(run)
    train(config)
    assert "resuming, at step 3 of 6" in capsys.readouterr().out
    expected = params_of(lora_run)
    for keys, leaf in params_of(run).items():
        np.testing.assert_array_equal(leaf, expected[keys])
    assert_begins_with(lora_run, tiny.config(tmp_path / "next", **CHANGES))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model__lora__targets="('q_proj', 'head')"), "config.model.lora.targets: expected .*; found 'head'"),
        (dict(model__lora__targets="()"), "config.model.lora.targets: expected some of q_proj, .*; found none"),
        (dict(model__lora__rank=-1), "config.model.lora.rank: expected at least 0 and below 1048576, found -1"),
    ],
)  # fmt: skip
def test_configs_that_cannot_be(tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        train(tiny.config(tmp_path / "run", **{"model__lora__rank": 4} | changes))
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
