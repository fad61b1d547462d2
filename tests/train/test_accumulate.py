"""A batch in pieces is the batch: loss and gradients, whatever labels each piece has."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers.losses import cross_entropy
from tests.models.test_two_streams import make
from tests.parallel.test_meshes import BASE, assert_close, random_batch
from tests.train.test_losses import with_z_loss
from voco_jax.errors import UserError
from voco_jax.train.skip_bad_updates import global_norm, skip_bad_updates
from voco_jax.train.step import loss_and_gradients, make_train_step, split_batch

SCANNED = dataclasses.replace(BASE, unroll_layers=False)


def test_pieces_keep_rows_with_their_images():
    """Rows of a pack (here two) and its pictures are in one piece, in their order."""
    batch = random_batch(BASE)
    pieces = split_batch(batch, 4)
    assert pieces["tokens"].shape == (4, 4, 128) and pieces["pixel_values"].shape[:2] == (4, 2)
    for name, array in batch.items():
        np.testing.assert_array_equal(np.concatenate(pieces[name]), array)


def test_a_step_in_pieces_is_that_of_the_whole_batch():
    """Loss, its metrics and every gradient, which the momentum's first value is."""
    loss, batch = with_z_loss(None), random_batch(SCANNED)
    labels = batch["weights"].reshape(4, -1).sum(1)
    assert len(set(labels)) == 4  # a mean of means would be another
    graphdef, params = make(SCANNED)
    whole = jax.jit(lambda p, b: loss_and_gradients(functools.partial(cross_entropy, graphdef, loss=loss), p, b))
    output, expected = jax.device_get(whole(params, batch))
    assert output.weight == labels.sum()
    optimizer = skip_bad_updates(optax.sgd(0.1, momentum=0.9))
    step = make_train_step(graphdef, loss, optimizer, accumulate=4)
    _, state, metrics = jax.device_get(step(jax.tree.map(jnp.copy, params), optimizer.init(params), batch))
    expected_metrics = output.means() | {"grad_norm": global_norm(expected), "bad": 0.0}
    assert metrics.keys() == expected_metrics.keys()
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6)
    (gradients,) = [part.trace for part in state.inner if hasattr(part, "trace")]
    difference = jax.tree.map(lambda a, b: a - b, gradients, expected)
    assert global_norm(difference) <= 1e-6 * global_norm(expected)
    assert_close(gradients, expected, 3e-6)


def test_packs_that_do_not_divide():
    message = "config.data.batch_size: expected a multiple of 3, train.accumulate; found 8"
    with pytest.raises(UserError, match=message):
        split_batch(random_batch(BASE), 3)
