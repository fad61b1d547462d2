"""Bad steps are seen, and leave no trace where they are to be skipped."""

import contextlib
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers import tiny
from voco_jax.checkpoint.checkpointer import Checkpointer
from voco_jax.config import default_config
from voco_jax.data.from_config import make_model_config
from voco_jax.data.tokenizer import load_tokenizer
from voco_jax.errors import UserError
from voco_jax.parallel.mesh import make_mesh
from voco_jax.train.from_config import abstract_state, make_optimizer
from voco_jax.train.loop import train
from voco_jax.train.skip_bad_updates import WARM_UP, skip_bad_updates, was_bad

PARAMS = {"fc": {"kernel": jnp.array([[1.5, -0.0], [0.0, 3.0]]), "bias": jnp.ones(2)}}
GRADIENTS = jax.tree.map(lambda p: jnp.full_like(p, 0.1), PARAMS)
NO_NUMBERS = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), PARAMS)


@functools.cache  # and with it what jax has compiled of it
def optimizer_of(name="adamw", action="skip", spike_factor=0.0):
    config = default_config()
    config.optim.name, config.optim.warmup_steps, config.optim.weight_decay = name, 0, 0.1
    config.train.on_bad_step, config.train.spike_factor = action, spike_factor
    return make_optimizer(config)


def steps(optimizer, losses, gradients=GRADIENTS, state=None, params=PARAMS):
    """(params, state, whether each step was bad)."""
    state, bad = optimizer.init(params) if state is None else state, []
    update = jax.jit(optimizer.update)
    for loss in losses:
        before = state
        updates, state = update(gradients, state, params, value=jnp.float32(loss))
        params = optax.apply_updates(params, updates)
        bad.append(bool(was_bad(before, state)))
    return params, state, bad


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
@pytest.mark.parametrize(("loss", "gradients"), [(np.nan, GRADIENTS), (np.inf, GRADIENTS), (1.0, NO_NUMBERS)])
def test_a_skipped_step_leaves_no_trace(name, loss, gradients):
    """Parameters (zeros' signs too), moments and the learning rate's step are bit for bit what they were."""
    optimizer = optimizer_of(name)
    params, state, _ = steps(optimizer, [1.0, 1.1])
    after, its_state, bad = steps(optimizer, [loss], gradients, state, params)
    assert bad == [True] and bits(after) == bits(params)
    assert bits(its_state.inner) == bits(state.inner)
    assert bits((its_state.mean_loss, its_state.good_steps)) == bits((state.mean_loss, state.good_steps))
    untouched, _, _ = steps(optimizer, [loss], gradients)
    assert bits(untouched) == bits(PARAMS)  # -0.0 among them
    # And then it goes on as if nothing had been
    straight, with_gap = steps(optimizer, [1.0, 1.1, 1.2]), steps(optimizer, [1.2], GRADIENTS, its_state, after)
    assert bits(straight[:2]) == bits(with_gap[:2])


def test_a_step_to_stop_at_goes_through():
    params, state, bad = steps(optimizer_of(action="stop"), [1.0, np.nan])
    assert bad == [False, True] and int(state.good_steps) == 1
    assert bits(params) == bits(steps(optimizer_of(action="stop"), [1.0, 1.0])[0])


def test_a_spike_is_a_multiple_of_the_mean_of_good_losses():
    optimizer = optimizer_of(spike_factor=3.0)
    early = [1.0] * (WARM_UP - 2) + [50.0]  # too early to tell
    _, _, bad = steps(optimizer, early)
    assert not any(bad)
    _, state, bad = steps(optimizer, [2.0] * WARM_UP + [5.9, 6.7, 100.0, 2.0])
    assert [i - WARM_UP for i, b in enumerate(bad) if b] == [1, 2]
    mean = (2.0 * WARM_UP + 5.9 + 2.0) / (WARM_UP + 2)  # bad ones are not in it
    np.testing.assert_allclose(state.mean_loss, mean, rtol=1e-6)
    assert int(state.good_steps) == WARM_UP + 2
    assert not any(steps(optimizer_of(), [2.0] * WARM_UP + [1e6])[2])  # without a factor none is


def test_the_mean_forgets():
    _, state, _ = steps(skip_bad_updates(optax.sgd(0.1)), [8.0] * 100 + [1.0] * 300)
    assert 1.0 < float(state.mean_loss) < 1.02


def test_other_actions():
    with pytest.raises(UserError, match="config.train.on_bad_step: expected stop or skip; found 'warn'"):
        optimizer_of(action="warn")


def stored(run, config, step: int):
    """(parameters, optimizer state) of a checkpoint of a tiny run."""
    model_config = make_model_config(config, load_tokenizer(run / "tokenizer"))
    state = abstract_state(config, model_config, make_optimizer(config), make_mesh(config.mesh))
    with contextlib.closing(Checkpointer(run)) as checkpointer:
        return checkpointer.restore(step, state.params, state.opt_state)[1:3]


@pytest.mark.slow
def test_a_run_that_goes_on_remembers_what_was_normal(tmp_path):
    """With a spike at less than half of the mean, some steps are skipped; resumed, it is the same ones."""
    changes = dict(train__steps=40, train__on_bad_step="skip", train__spike_factor=0.45, train__max_skipped=40)
    config = tiny.config(tmp_path / "run", **changes)
    run = train(config)
    again = shutil.copytree(run, tmp_path / "again")
    shutil.rmtree(again / "checkpoints" / "40")
    train(tiny.config(again, **changes))
    expected, found = stored(run, config, 40), stored(again, config, 40)
    assert bits(found) == bits(expected)
    skipping = expected[1]
    assert WARM_UP <= int(skipping.good_steps) < 40 and float(skipping.mean_loss) > 0
    assert int(skipping.good_steps) == counts(skipping.inner)


def counts(inner) -> int:
    """Steps of the learning rate's schedule."""
    (count,) = {int(leaf) for leaf in jax.tree.leaves(inner) if leaf.dtype == jnp.int32}
    return count
