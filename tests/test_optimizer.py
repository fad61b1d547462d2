"""Learning rate over the steps, clipping, weight decay, and Muon's idea of a matrix."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.test_two_streams import CONFIG, make
from voco_jax.config import default_config
from voco_jax.train.optimizer import make_optimizer, make_schedule, muon_dimension_numbers


def optim(**changes):
    config = default_config().optim
    with config.unlocked():
        config.update(changes)
    return config


def optimizer_of(steps=100, **changes):
    config = default_config()
    config.optim = optim(**{"warmup_steps": 0} | changes)
    config.train.steps = steps
    return make_optimizer(config)


def test_schedules():
    for name, half in ("cosine", 0.5), ("linear", 0.5):
        schedule = make_schedule(optim(learning_rate=0.2, schedule=name, warmup_steps=10), steps=110)
        np.testing.assert_allclose([schedule(i) for i in (0, 5, 10, 60, 110)], [0, 0.1, 0.2, 0.2 * half, 0], atol=1e-7)
    quarter = make_schedule(optim(learning_rate=1.0, schedule="cosine", warmup_steps=0), steps=100)(25)
    np.testing.assert_allclose(quarter, (1 + np.cos(np.pi / 4)) / 2, atol=1e-6)


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
    return optimizer.update(gradients, optimizer.init(params), params, value=1.0)[0], gradients


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_weight_decay_is_for_matrices(name):
    """Norms and biases are not drawn to zero."""
    without, _ = updates(name)
    decayed, _ = updates(name, weight_decay=0.5)
    difference = jax.tree.map(lambda a, b: np.asarray(a - b), decayed, without)
    np.testing.assert_allclose(difference["fc"]["kernel"], -0.01 * 0.5, atol=1e-6)
    np.testing.assert_allclose(difference["embed"]["embedding"], -0.01 * 0.5, atol=1e-6)
    assert (difference["fc"]["bias"] == 0).all() and (difference["norm"]["scale"] == 0).all()


def test_gradients_are_clipped_by_their_global_norm():
    """Adam's step forgets the gradient's scale; its first moment does not."""
    _, gradients = updates("adamw")
    norm = float(jnp.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradients))))
    optimizer = optimizer_of(clip_norm=norm / 10)
    _, state = optimizer.update(gradients, optimizer.init(gradients), gradients, value=1.0)
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    (first_moment,) = [leaf for key, leaf in leaves.items() if key.endswith(".mu['fc']['kernel']")]
    np.testing.assert_allclose(first_moment, (1 - 0.9) * gradients["fc"]["kernel"] / 10, rtol=1e-5)


def test_muon_updates_are_orthogonal_matrices_of_adams_size():
    update, _ = updates("muon")
    singular_values = np.linalg.svd(np.asarray(update["fc"]["kernel"]), compute_uv=False) / 0.01
    expected = 0.2 * np.sqrt(4)  # times the identity's: root mean square 0.2, as of Adam's updates
    assert (0.6 * expected < singular_values).all() and (singular_values < 1.3 * expected).all()


def test_which_axes_are_matrices_to_muon():
    _, params = make(dataclasses.replace(CONFIG, compressor="qformer"))
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
