"""A batch in pieces is the batch: loss and gradients, whatever labels each piece has."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from tests.helpers.losses import cross_entropy
from tests.models.test_two_streams import make
from tests.parallel.test_meshes import BASE, assert_close, random_batch
from tests.train.test_losses import with_z_loss
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


@pytest.fixture(scope="module")
def computed() -> dict:
    """(LossOutput, gradients) of a batch as a whole and in 4 pieces, of a loss with metrics of its own."""
    graphdef, params = make(SCANNED)
    loss_of = functools.partial(cross_entropy, graphdef, loss=with_z_loss(None))
    batch = random_batch(SCANNED)
    return {
        n: jax.device_get(jax.jit(lambda p, b, n=n: loss_and_gradients(loss_of, p, b, n))(params, batch))
        for n in (1, 4)
    }


def test_loss_and_gradients_are_the_whole_batchs(computed):
    labels = random_batch(SCANNED)["weights"].reshape(4, -1).sum(1)
    assert len(set(labels)) == 4  # a mean of means would be another
    (whole, whole_gradients), (pieces, gradients) = computed[1], computed[4]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), pieces, whole)
    assert pieces.weight == whole.weight == labels.sum()
    difference = jax.tree.map(lambda a, b: a - b, gradients, whole_gradients)
    assert global_norm(difference) <= 1e-6 * global_norm(whole_gradients)
    assert_close(gradients, whole_gradients, 3e-6)


def test_a_training_step_in_pieces(computed):
    graphdef, params = make(SCANNED)
    optimizer = make_optimizer(default_config())
    step = make_train_step(graphdef, with_z_loss(None), optimizer, accumulate=4)
    metrics = step(jax.tree.map(lambda x: x.copy(), params), optimizer.init(params), random_batch(SCANNED))[2]
    whole, gradients = computed[1]
    expected = whole.means() | {"grad_norm": global_norm(gradients), "bad": 0.0}
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6)


def test_packs_that_do_not_divide():
    message = "config.data.batch_size: expected a multiple of 3, train.accumulate; found 8"
    with pytest.raises(UserError, match=message):
        split_batch(random_batch(BASE), 3)
