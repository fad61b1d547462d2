"""What the backward pass keeps changes its memory and its time, and not what comes out."""

import dataclasses
import functools
import itertools

from flax import nnx
import jax
import numpy as np
import pytest

from tests.models.test_two_streams import CONFIG, make, make_features, two_samples
from tests.train.test_label_losses import subjaxprs
from voco_jax.models.stack import REMAT

BASE = dataclasses.replace(CONFIG, llama=dataclasses.replace(CONFIG.llama, num_hidden_layers=2))


def gradient_of(remat: str, unroll: bool):
    graphdef, params = make(dataclasses.replace(BASE, remat=remat, unroll_layers=unroll))

    def loss(params, features):
        return (nnx.merge(graphdef, params).forward(two_samples(), features) ** 2).mean()

    return jax.value_and_grad(loss, argnums=(0, 1)), (params, make_features(1))


@functools.cache
def kept_everything():
    gradient, arguments = gradient_of("none", unroll=True)
    return jax.jit(gradient)(*arguments)


@pytest.mark.parametrize("remat", ["full", "attention", "dots"])
def test_loss_and_gradients_are_the_same(remat):
    gradient, arguments = gradient_of(remat, unroll=True)
    for x, y in zip(*map(jax.tree.leaves, (jax.jit(gradient)(*arguments), kept_everything())), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-6 * np.abs(y).max())


@pytest.mark.parametrize(
    ("unroll", "policies"),
    [pytest.param(False, [*REMAT, "none"], marks=pytest.mark.slow), (True, ["full", "dots", "none"])],
)
def test_each_policy_computes_less_again_than_the_one_above(unroll, policies):
    """Matrix products in the gradient's program."""
    products = []
    for remat in policies:
        gradient, arguments = gradient_of(remat, unroll)
        jaxprs = subjaxprs(jax.make_jaxpr(gradient)(*arguments).jaxpr)
        products.append(sum(eqn.primitive.name == "dot_general" for jaxpr in jaxprs for eqn in jaxpr.eqns))
    assert all(a > b for a, b in itertools.pairwise(products)), products
