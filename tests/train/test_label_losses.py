"""The fused cross-entropy against optax's, which holds all logits: loss and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from voco_jax.train import label_losses
from voco_jax.train.label_losses import label_cross_entropy

ROWS, LENGTH, SIZE, VOCAB = 3, 20, 8, 50


def inputs(weights: str, columns: int, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    hidden = jnp.array(rng.normal(size=(ROWS, LENGTH, SIZE)), dtype)
    head = jnp.array(rng.normal(size=(SIZE, columns)), jnp.float32)
    targets = rng.integers(0, VOCAB, (ROWS, LENGTH))
    drawn = rng.random((ROWS, LENGTH))
    weights = {"labels": (drawn < 0.4) * 1.0, "fractions": drawn * (drawn < 0.7), "nowhere": 0 * drawn}[weights]
    return hidden, head, targets, weights.astype(np.float32)


def whole(hidden, head, targets, weights):
    logits = (hidden.astype(jnp.float32) @ head)[..., :VOCAB]
    return (optax.softmax_cross_entropy_with_integer_labels(logits, targets) * weights).sum()


def fused(hidden, head, targets, weights):
    return label_cross_entropy(hidden, head, targets, weights, VOCAB)


def with_gradients(loss, arguments):
    """Of twice the loss: gradients have to be scaled by what comes from above."""
    return jax.jit(jax.value_and_grad(lambda *x: 2 * loss(*x), argnums=(0, 1)))(*arguments)


@pytest.mark.parametrize("weights", ["labels", "fractions", "nowhere"])
@pytest.mark.parametrize("chunk", [1, 7, 1024])  # 60 tokens: whole chunks, one that is filled up, one for all
@pytest.mark.parametrize("columns", [VOCAB, 64])
def test_loss_and_gradients(monkeypatch, weights, chunk, columns):
    monkeypatch.setattr(label_losses, "CHUNK", chunk)
    arguments = inputs(weights, columns)
    found, expected = with_gradients(fused, arguments), with_gradients(whole, arguments)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-6), found, expected)
    np.testing.assert_allclose(2 * jax.jit(fused)(*arguments), expected[0], rtol=1e-6)  # by itself: another program
    _, (d_hidden, d_head) = found
    assert (d_head[:, VOCAB:] == 0).all() and (d_hidden[arguments[-1] == 0] == 0).all()


def test_in_bfloat16_the_heads_gradient_keeps_its_own_type():
    arguments = inputs("labels", 64, jnp.bfloat16)
    loss, (d_hidden, d_head) = with_gradients(fused, arguments)
    assert (loss.dtype, d_hidden.dtype, d_head.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    expected, (_, expected_head) = with_gradients(whole, arguments)
    np.testing.assert_allclose(loss, expected, rtol=1e-2)
    assert np.abs(d_head - expected_head).max() < 0.02 * np.abs(expected_head).max()


def test_logits_are_never_whole(monkeypatch):
    monkeypatch.setattr(label_losses, "CHUNK", 8)
    gradient = jax.make_jaxpr(jax.grad(fused, argnums=(0, 1)))(*inputs("labels", VOCAB))
    sizes = {var.aval.size for jaxpr in subjaxprs(gradient.jaxpr) for eqn in jaxpr.eqns for var in eqn.outvars}
    assert 8 * VOCAB in sizes and max(sizes) < ROWS * LENGTH * VOCAB / 2


def subjaxprs(jaxpr):
    """A jaxpr and all that its equations hold."""
    yield jaxpr
    for eqn in jaxpr.eqns:
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            value = getattr(value, "jaxpr", value)
            if hasattr(value, "eqns"):
                yield from subjaxprs(value)
