"""A batch in pieces is the batch: loss and gradients, whatever labels each piece has."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from tests.helpers.losses import CROSS_ENTROPY, cross_entropy
from tests.models.test_two_streams import make
from tests.parallel.test_meshes import BASE, assert_close, random_batch
from voco_jax.config import default_config
from voco_jax.errors import UserError
from voco_jax.train.from_config import make_optimizer
from voco_jax.train.skip_bad_updates import global_norm
from voco_jax.train.step import loss_and_gradients, make_train_step, split_batch

SCANNED = dataclasses.replace(BASE, unroll_layers=False)


def test_pieces_keep_rows_with_their_images():
    """Rows of a pack (here two) and its pictures are in one piece, in their order."""
    batch = random_batch(BASE)
    pieces = split_batch(batch, 4)
    assert pieces["tokens"].shape == (4, 4, 128) and pieces["pixel_values"].shape[:2] == (4, 2)
    for name, array in batch.items():
        np.testing.assert_array_equal(np.concatenate(pieces[name]), array)


def test_loss_and_gradients_are_the_whole_batchs():
    batch = random_batch(SCANNED)
    labels = batch["weights"].reshape(4, -1).sum(1)
    assert len(set(labels)) == 4  # a mean of means would be another
    graphdef, params = make(SCANNED)
    loss_of = functools.partial(cross_entropy, graphdef)
    whole, pieces = (jax.jit(lambda p, b, n=n: loss_and_gradients(loss_of, p, b, n))(params, batch) for n in (1, 4))
    np.testing.assert_allclose(pieces[0].sum, whole[0].sum, rtol=1e-6)
    assert pieces[0].weight == whole[0].weight == labels.sum()
    difference = jax.tree.map(lambda a, b: a - b, pieces[1], whole[1])
    assert global_norm(difference) <= 1e-6 * global_norm(whole[1])
    assert_close(jax.device_get(pieces[1]), jax.device_get(whole[1]), 3e-6)


def test_a_training_step_in_pieces():
    graphdef, params = make(SCANNED)
    optimizer = make_optimizer(default_config())
    found = []
    for pieces in 1, 4:
        step = make_train_step(graphdef, CROSS_ENTROPY, optimizer, accumulate=pieces)
        copy = jax.tree.map(lambda x: x.copy(), params)
        metrics = step(copy, optimizer.init(params), random_batch(SCANNED))[2]
        found.append({name: float(value) for name, value in metrics.items()})
    assert found[0]["grad_norm"] > 0 and found[1] == pytest.approx(found[0], rel=1e-6)


def test_packs_that_do_not_divide():
    message = "config.data.batch_size: expected a multiple of 3, train.accumulate; found 8"
    with pytest.raises(UserError, match=message):
        split_batch(random_batch(BASE), 3)
