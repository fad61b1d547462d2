"""Learning rate over the steps, clipping, weight decay, and Muon's idea of a matrix."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.test_two_streams import CONFIG
from voco_jax.config import default_config
from voco_jax.config_keys import OptimConfig
from voco_jax.errors import UserError
from voco_jax.models.build import abstract_model
from voco_jax.models.llama import LlamaConfig
from voco_jax.models.vit import ViTConfig
from voco_jax.models.voco import VoCoConfig
from voco_jax.optim import make_schedule
from voco_jax.train.from_config import make_optimizer
from voco_jax.train.optimizer import decayed, muon_dimension_numbers


def optim(**changes):
    config = default_config().optim
    with config.unlocked():
        config.update(changes)
    return config


def typed_optim(**changes) -> OptimConfig:
    return dataclasses.replace(OptimConfig(), **changes)


def optimizer_of(steps=100, **changes):
    config = default_config()
    config.optim = optim(**{"warmup_steps": 0} | changes)
    config.train.steps = steps
    return make_optimizer(config)


@pytest.mark.parametrize(
    ("name", "points"),  # warm-up to step 10 of 110, a learning rate of 0.2 that ends at a tenth
    [
        ("cosine", {60: 0.2 * (0.1 + 0.9 * 0.5), 35: 0.2 * (0.1 + 0.9 * (1 + np.cos(np.pi / 4)) / 2), 110: 0.02}),
        ("linear", {60: 0.2 * 0.55, 35: 0.2 * (1 - 0.9 / 4), 110: 0.02}),
        ("wsd", {60: 0.2, 87: 0.2, 88: 0.2, 99: 0.2 * 0.55, 110: 0.02}),  # the last 22 steps, a fifth
        ("constant", {60: 0.2, 110: 0.2}),
    ],
)
def test_schedules(name, points):
    schedule = make_schedule(
        typed_optim(learning_rate=0.2, schedule=name, warmup_steps=10, decay_fraction=0.2, min_lr_ratio=0.1),
        steps=110,
    )
    points = {0: 0.0, 5: 0.1, 10: 0.2} | points
    np.testing.assert_allclose([schedule(step) for step in points], list(points.values()), atol=1e-7)
    to_zero = make_schedule(typed_optim(learning_rate=0.2, schedule=name, warmup_steps=0, min_lr_ratio=0.0), steps=50)
    np.testing.assert_allclose(to_zero(50), 0.2 if name == "constant" else 0.0, atol=1e-7)
    np.testing.assert_allclose(to_zero(0), 0.2, rtol=1e-6)


@pytest.mark.parametrize(("share", "found"), [(0.95, 95), (0.0, 0)])
def test_a_decay_that_has_no_room(share, found):
    with pytest.raises(UserError, match=rf"optim.decay_fraction: expected 1 to 90 steps of decay .*; found {found}$"):
        make_schedule(typed_optim(schedule="wsd", warmup_steps=10, decay_fraction=share), steps=100)


def test_the_schedule_is_that_of_the_updates():
    """Adam's first updates are as long as the learning rate, whatever the gradient: here 0, 1/2, 1 times it."""
    params = {"fc": {"kernel": jnp.ones((2, 2))}}
    optimizer = optimizer_of(learning_rate=0.01, warmup_steps=2)
    step = jax.jit(optimizer.update)
    state, found = optimizer.init(params), []
    for _ in range(3):
        update, state = step({"fc": {"kernel": jnp.full((2, 2), 3.0)}}, state, params, value=1.0)
        found.append(float(update["fc"]["kernel"][0, 0]))
    np.testing.assert_allclose(found, [0, -0.005, -0.01], atol=1e-6)


def first_update(optimizer, gradients, params):
    """(update, state after it)."""
    return jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p, value=1.0))(gradients, params)


@functools.cache
def updates(name: str, **changes):
    """(first update, gradients) for parameters (a kernel, an embedding, a norm) that are all ones."""
    params = {
        "embed": {"embedding": jnp.ones((3, 4))},
        "fc": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)},
        "norm": {"scale": jnp.ones(4)},
    }
    rng = np.random.default_rng(0)
    gradients = jax.tree.map(lambda p: jnp.array(rng.normal(size=p.shape), p.dtype), params)
    optimizer = optimizer_of(name=name, learning_rate=0.01, **changes)
    return first_update(optimizer, gradients, params)[0], gradients


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_weight_decay_is_for_matrices(name):
    """Norms and biases are not drawn to zero."""
    without, _ = updates(name)
    decayed, _ = updates(name, weight_decay=0.5)
    difference = jax.tree.map(lambda a, b: np.asarray(a - b), decayed, without)
    np.testing.assert_allclose(difference["fc"]["kernel"], -0.01 * 0.5, atol=1e-6)
    np.testing.assert_allclose(difference["embed"]["embedding"], -0.01 * 0.5, atol=1e-6)
    assert (difference["fc"]["bias"] == 0).all() and (difference["norm"]["scale"] == 0).all()


def test_which_parameters_decay_is_said_by_name():
    without, _ = updates("adamw")
    found, _ = updates("adamw", weight_decay=0.5, decayed=("bias", "embedding"))
    difference = jax.tree.map(lambda a, b: np.asarray(a - b), found, without)
    np.testing.assert_allclose(difference["fc"]["bias"], -0.01 * 0.5, atol=1e-6)
    assert (difference["fc"]["kernel"] == 0).all() and difference["embed"]["embedding"].all()
    alone = {"llama": {"embed_tokens": {"voco_row": jnp.ones(4)}, "norm": {"scale": jnp.ones(4)}}}
    assert decayed(alone, ("embedding",)) == {"llama": {"embed_tokens": {"voco_row": True}, "norm": {"scale": False}}}


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_parts_have_learning_rates_of_their_own(name):
    """Decay too: all of a part's update is scaled, others' are untouched."""

    def step(**scales):
        params = {
            part: {"fc": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}}
            for part in ("vision_tower", "projector", "llama")
        }
        rng = np.random.default_rng(0)
        gradients = jax.tree.map(lambda p: jnp.array(rng.normal(size=p.shape), p.dtype), params)
        config = optim(name=name, weight_decay=0.1).copy_and_resolve_references()
        config.lr_multiplier.update(scales)
        optimizer = optimizer_of(name=name, weight_decay=0.1, lr_multiplier=config.lr_multiplier)
        return jax.device_get(first_update(optimizer, gradients, params)[0])

    plain, scaled = step(), step(projector=0.1, vision_tower=3.0)
    for part, scale in ("projector", 0.1), ("vision_tower", 3.0), ("llama", 1.0):
        for found, expected in zip(jax.tree.leaves(scaled[part]), jax.tree.leaves(plain[part]), strict=True):
            assert np.abs(expected).min() > 0
            np.testing.assert_allclose(found, scale * expected, rtol=1e-6)


@pytest.mark.parametrize(("scale", "hint"), [(0.0, "train.freeze keeps a part as it is"), (-1.0, "it scales")])
def test_rates_that_cannot_be(scale, hint):
    config = default_config()
    config.optim.lr_multiplier.projector = scale
    with pytest.raises(
        UserError, match=f"config.optim.lr_multiplier.projector: expected above 0, found {scale}; {hint}"
    ):
        make_optimizer(config)


def test_adafactor_keeps_rows_and_columns():
    """Of a 7B less than a 500th of what Adam keeps."""
    _, params = abstract_model(VoCoConfig(LlamaConfig(), ViTConfig(), voco_token_id=3))
    size = {
        name: sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(optimizer_of(name=name).init, params)))
        for name in ("adamw", "adafactor")
    }
    assert size["adamw"] > 2 * sum(leaf.size for leaf in jax.tree.leaves(params))
    assert size["adafactor"] < size["adamw"] / 500


def test_adafactors_update_is_the_papers():
    """First step, a factored matrix: g / √(rows · columns / mean), its root mean square clipped to 1."""
    rng = np.random.default_rng(0)
    gradient = rng.normal(size=(130, 140)) * np.exp(rng.normal(size=(130, 1)))
    params = {"fc": {"kernel": jnp.ones((130, 140))}}
    optimizer = optimizer_of(name="adafactor", learning_rate=0.01, clip_norm=1e9)
    gradients = {"fc": {"kernel": jnp.array(gradient, jnp.float32)}}
    update, _ = first_update(optimizer, gradients, params)
    squares = gradient**2
    second = squares.mean(1, keepdims=True) * squares.mean(0, keepdims=True) / squares.mean()
    expected = gradient / np.sqrt(second)
    expected /= max(1, np.sqrt((expected**2).mean()))
    np.testing.assert_allclose(update["fc"]["kernel"], -0.01 * expected, rtol=2e-4)


def test_gradients_are_clipped_by_their_global_norm():
    """Adam's step forgets the gradient's scale; its first moment does not."""
    _, gradients = updates("adamw")
    norm = float(np.sqrt(sum((np.asarray(g) ** 2).sum() for g in jax.tree.leaves(gradients))))
    optimizer = optimizer_of(clip_norm=norm / 10)
    _, state = first_update(optimizer, gradients, gradients)
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    (first_moment,) = [leaf for key, leaf in leaves.items() if key.endswith(".mu['fc']['kernel']")]
    np.testing.assert_allclose(first_moment, (1 - 0.9) * gradients["fc"]["kernel"] / 10, rtol=1e-5)


def test_muon_updates_are_orthogonal_matrices_of_adams_size():
    update, _ = updates("muon")
    singular_values = np.linalg.svd(np.asarray(update["fc"]["kernel"]), compute_uv=False) / 0.01
    expected = 0.2 * np.sqrt(4)  # times the identity's: root mean square 0.2, as of Adam's updates
    assert (0.6 * expected < singular_values).all() and (singular_values < 1.3 * expected).all()


def test_which_axes_are_matrices_to_muon():
    _, params = abstract_model(dataclasses.replace(CONFIG, compressor="qformer"))
    dimensions = {
        jax.tree_util.keystr(path, simple=True, separator="."): value
        for path, value in jax.tree_util.tree_leaves_with_path(
            muon_dimension_numbers(params), is_leaf=lambda x: x is None or hasattr(x, "reduction_axis")
        )
    }

    def axes(name):
        (value,) = [value for key, value in dimensions.items() if key.endswith(name)]
        return value and (value.reduction_axis, value.output_axis)

    assert axes("llama.layers.q_proj.kernel") == ((1,), (2, 3))  # [layers, width, heads, head size]
    assert axes("llama.layers.o_proj.kernel") == ((1, 2), (3,))
    assert axes("llama.layers.down_proj.kernel") == ((1,), (2,))
    assert axes("vision_tower.layers.out_proj.kernel") == ((1, 2), (3,))
    assert axes("cross_attention.query.kernel") == ((1,), (2, 3))
    assert axes("cross_attention.out.kernel") == ((1, 2), (3,))
    assert axes("llama.embed_tokens.embedding") is None and axes("llama.lm_head.kernel") is None
    assert axes("llama.layers.input_layernorm.scale") is None
