"""Parameters stored in bfloat16 move as float32 ones do, on average; and what cannot be trained in is refused."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from voco_jax.aot.programs import make_program
from voco_jax.config import default_config, load_config, save_config
from voco_jax.errors import UserError
from voco_jax.parallel.mesh import make_mesh
from voco_jax.train.from_config import make_optimizer
from voco_jax.train.rounding import _bits, lost_updates, stochastic_round

STEPS = 20


def config_of(**changes):
    config = default_config()
    keys = {"warmup_steps": 0, "schedule": "constant", "learning_rate": 2e-5, "clip_norm": 1e9} | changes
    config.update_from_flattened_dict({f"optim.{key}": value for key, value in keys.items()})
    return config


@jax.jit
def rounded_often(x):
    """2^16 times, by other random bits each time."""
    return stochastic_round(jnp.full(2**16, x, jnp.float32), _bits((2**16,), "x", 1))


@pytest.mark.parametrize(
    "x", [1 + 2**-10, -3.14159, 1e-30, 3e38, 2.0**-7 - 2.0**-17, 0.0, 1.5, -np.inf, np.inf, np.nan]
)
def test_a_rounded_number_is_a_neighbour_and_exact_on_average(x):
    """Also across a power of two, where the gap is another on each side."""
    rounded = np.asarray(rounded_often(x), np.float64)
    if not np.isfinite(x):
        np.testing.assert_array_equal(rounded, x)
        return
    exact = float(np.float32(x))
    gap = 2.0 ** (np.floor(np.log2(abs(exact))) - 7) if exact else 0
    assert (abs(rounded - exact) < gap).all() or (rounded == exact).all()
    assert abs(rounded.mean() - exact) <= 4 * gap / 2 / np.sqrt(len(rounded))
    if float(jnp.bfloat16(exact)) == exact:
        assert (rounded == exact).all()


def test_random_bits_are_uniform_and_independent():
    """Of places, steps and arrays; a shape is nothing but an order of places."""
    n, side = 2**20, 2**10
    flat = np.asarray(_bits((n,), "a", 3))
    np.testing.assert_array_equal(_bits((side, side), "a", 3), flat.reshape(side, side))
    for byte in 16, 24:  # of the half that is used
        counts = np.bincount(flat >> byte & 255, minlength=256)
        assert ((counts - n / 256) ** 2 / (n / 256)).sum() < 255 + 4 * np.sqrt(2 * 255)
    centred = (flat >> 16) / 2**16 - 0.5
    others = {f"step {step}": np.asarray(_bits((n,), "a", step)) for step in (0, 2, 4, 7, 2**20)}
    others |= {"array": np.asarray(_bits((n,), "b", 3)), "next": np.roll(flat, 1), "row": np.roll(flat, side)}
    for name, bits in others.items():
        assert abs((centred * ((bits >> 16) / 2**16 - 0.5)).mean()) * 12 < 4 / side, name


@functools.cache
def moved(dtype, **changes) -> dict[str, np.ndarray]:
    """How far each element has gone in 20 steps at LLaVA's learning rate, by gradients that are the same for all."""
    rng = np.random.default_rng(0)
    shapes = {"fc": {"kernel": (128, 192), "bias": (512,)}, "norm": {"scale": (512,)}}
    gradients = jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s), dtype), shapes, is_leaf=lambda s: type(s) is tuple
    )
    begin = {"fc": {"kernel": 0.02, "bias": 0.1}, "norm": {"scale": 1.0}}
    params = jax.tree.map(lambda g, b: jnp.asarray(b * (1 + rng.uniform(size=g.shape)), dtype), gradients, begin)
    optimizer, first = make_optimizer(config_of(**changes)), params
    state, noise = optimizer.init(params), rng.normal(size=STEPS)

    @jax.jit
    def step(params, state, scale):
        updates, state = optimizer.update(jax.tree.map(lambda g: g * scale, gradients), state, params, value=1.0)
        return optax.apply_updates(params, updates), state

    for scale in noise:
        params, state = step(params, state, jnp.asarray(1 + 0.3 * scale, dtype))
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(params))
    distance = jax.tree.map(lambda a, b: np.asarray(a, np.float64) - np.asarray(b, np.float64), params, first)
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(distance)}


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_small_updates_are_not_lost(name):
    """Measured along float32's movement, bfloat16's is as long; rounded to the nearest, most of it is missing."""
    exact, stochastic = moved(jnp.float32, name=name), moved(jnp.bfloat16, name=name)
    nearest = moved(jnp.bfloat16, name=name, rounding="nearest")
    for key, distance in exact.items():
        ratio, lost = (found[key].ravel() @ distance.ravel() / (distance**2).sum() for found in (stochastic, nearest))
        assert abs(ratio - 1) < (0.03 if "kernel" in key else 0.25), (key, ratio)  # fewer elements, and a wider gap
        assert lost < 0.02, (key, lost)


def test_float32_is_as_it_was():
    for name in "adamw", "muon":
        found, before = moved(jnp.float32, name=name), moved(jnp.float32, name=name, rounding="nearest")
        jax.tree.map(np.testing.assert_array_equal, found, before)


def test_a_skipped_step_changes_nothing():
    config = config_of()
    config.train.on_bad_step = "skip"
    optimizer, params = make_optimizer(config), {"kernel": jnp.full((64, 64), 0.3, jnp.bfloat16)}
    state = optimizer.init(params)
    updates, after = jax.jit(optimizer.update)(params, state, params, value=jnp.nan)
    np.testing.assert_array_equal(optax.apply_updates(params, updates)["kernel"], params["kernel"])
    jax.tree.map(np.testing.assert_array_equal, after, state)


def test_moments_are_stored_as_before():
    """So that checkpoints made earlier go on, and the state takes no more memory."""
    params = {"fc": {"kernel": jnp.ones((128, 128), jnp.bfloat16)}}
    for name in "adamw", "muon", "adafactor":
        now, before = (make_optimizer(config_of(name=name, rounding=r)).init(params) for r in ("stochastic", "nearest"))
        assert jax.tree.structure(now) == jax.tree.structure(before)
        assert [x.dtype for x in jax.tree.leaves(now)] == [x.dtype for x in jax.tree.leaves(before)]


@pytest.mark.parametrize(
    ("changes", "dtype", "told"),
    [
        ({"rounding": "nearest"}, jnp.bfloat16, "warning: .*above 0.01 do not move at optim.learning_rate = 2e-05"),
        ({"rounding": "nearest", "learning_rate": 1e-2}, jnp.bfloat16, "^$"),
        ({"rounding": "nearest"}, jnp.float32, "^$"),
        ({}, jnp.bfloat16, "^$"),
    ],
)
def test_what_is_lost_is_told(changes, dtype, told):
    params = {"kernel": jnp.ones(4, dtype), "scale": jnp.ones(4)}
    optim = config_of(**changes).optim
    assert re.search(told, lost_updates(optim.rounding, optim.learning_rate, params))


@pytest.mark.parametrize("key", ["dtype", "param_dtype"])
def test_float16_is_refused_in_training(key):
    config = config_of()
    config.model[key] = "float16"
    config.data.row_length, config.data.rows_per_pack = 64, 1
    mesh = make_mesh(config.mesh)
    message = (
        f"config.model.{key}: expected bfloat16 or float32 to train, found float16 .*; bfloat16 has as many bytes$"
    )
    with pytest.raises(UserError, match=message):
        make_optimizer(config)
    with pytest.raises(UserError, match=message):  # which is not compiled either
        make_program(config, "train", mesh)
    assert make_program(config, "decode", mesh)
    with pytest.raises(UserError, match="config.optim.rounding: expected stochastic or nearest; found 'up'"):
        make_optimizer(config_of(rounding="up"))


def test_runs_made_before_there_was_a_choice(tmp_path):
    config = default_config()
    save_config(config, tmp_path / "config.json")
    assert load_config(tmp_path / "config.json").optim.rounding == "stochastic"
    file = tmp_path / "config.json"
    file.write_text("\n".join(line for line in file.read_text().splitlines() if "rounding" not in line))
    assert load_config(file).optim.rounding == "nearest"
