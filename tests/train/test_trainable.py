"""What is frozen stays to the bit, and has no optimizer state; the VoCo token's row trains all the same."""

import dataclasses

from flax.traverse_util import flatten_dict
import jax
import numpy as np
import pytest

from tests.helpers.losses import label_loss
from tests.models.test_two_streams import make
from tests.parallel.test_meshes import BASE, random_batch
from voco_jax.config import default_config
from voco_jax.errors import UserError
from voco_jax.train.from_config import loss_of, make_optimizer, trainable_filter
from voco_jax.train.step import make_train_step
from voco_jax.train.trainable import VOCO_ROW

TIED = dataclasses.replace(BASE, llama=dataclasses.replace(BASE.llama, tie_word_embeddings=True))
EMBEDDING = ("llama", "embed_tokens", "embedding")


def config_of(*freeze: str):
    config = default_config()
    config.train.freeze, config.optim.warmup_steps, config.optim.weight_decay = freeze, 0, 0.1
    return config


@pytest.mark.parametrize(
    ("model", "freeze"),
    [
        (BASE, ("vision_tower", "llama")),
        (TIED, ("vision_tower", "llama.embed_tokens", "llama.layers.q_proj", "projector.linear_1.bias")),
        (dataclasses.replace(BASE, compressor="none"), ("vision_tower", "llama")),
        (dataclasses.replace(BASE, compressor="average_pool"), ("vision_tower", "llama")),
    ],
)
def test_steps_change_what_trains_and_nothing_else(model, freeze):
    """Two steps with weight decay; of a frozen embedding the VoCo token's row alone."""
    config = config_of(*freeze)
    graphdef, params = make(model)
    before, params = jax.tree.map(np.array, params), jax.tree.map(lambda x: x.copy(), params)
    trainable, optimizer = trainable_filter(config, model), make_optimizer(config)
    trained = flatten_dict(trainable.split(params)[0])
    opt_state = optimizer.init(trainable.split(params)[0])
    assert sum(x.size for x in jax.tree.leaves(opt_state) if x.ndim) == 2 * sum(x.size for x in trained.values())
    has_row = model.compressor != "average_pool" and any(path.startswith("llama") for path in freeze)
    assert (VOCO_ROW in trained) == has_row
    batch = random_batch(BASE)
    batch["tokens"][:, 5] = model.voco_token_id  # uncompressed, they are in the text
    if model.compressor == "average_pool":
        batch["slot_index"] = np.where(batch["slot_index"] >= 0, batch["slot_index"] // BASE.num_voco_tokens, -1)
    step = make_train_step(graphdef, loss_of(config), optimizer, trainable)
    for _ in range(2):
        params, opt_state, metrics = step(params, opt_state, batch)
    assert np.isfinite(float(metrics["loss"]))
    for keys, leaf in flatten_dict(jax.device_get(params)).items():
        changed = leaf != flatten_dict(before)[keys]
        if keys in trained:
            assert changed.any() or "post_layernorm" in keys, keys  # which nobody uses
        elif keys == EMBEDDING and has_row:
            assert changed[model.voco_token_id].all() and changed.any(1).sum() == 1
        else:
            assert not changed.any(), keys


def test_the_rows_gradient_is_the_embeddings():
    """Tied, so that it is a row of the head too."""
    graphdef, params = make(TIED)
    batch = random_batch(TIED)
    trainable = trainable_filter(config_of("llama"), TIED)
    trained, frozen = trainable.split(params)
    of_trained = jax.grad(lambda t: label_loss(graphdef, trainable.merge(t, frozen), batch))
    of_all = jax.grad(lambda p: label_loss(graphdef, p, batch))
    found, expected = jax.jit(lambda t, p: (of_trained(t), of_all(p)))(trained, params)
    row = flatten_dict(expected)[EMBEDDING][TIED.voco_token_id]
    assert np.abs(row).max() > 0
    np.testing.assert_allclose(flatten_dict(found)[VOCO_ROW], row, rtol=1e-4, atol=1e-7)


def test_split_and_merge_are_inverses():
    _, params = make(BASE)
    for freeze in ((), ("llama",), ("vision_tower", "llama.layers", "llama.embed_tokens.embedding")):
        trainable = trainable_filter(config_of(*freeze), BASE)
        jax.tree.map(np.testing.assert_array_equal, trainable.merge(*trainable.split(params)), params)


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        (("vision",), "expected parts such as .*vision_tower; found 'vision'"),
        (("llama.layer",), "expected parts such as .*; found 'llama.layer'"),
        (("vision_tower", "projector", "compressor", "llama"), "expected something to train, found vision_tower, .*"),
    ],
)
def test_parts_that_cannot_be_frozen(freeze, message):
    model = dataclasses.replace(BASE, compressor="qformer")  # which has no VoCo token to train
    _, params = make(model)
    with pytest.raises(UserError, match=f"config.train.freeze: {message}"):
        trainable_filter(config_of(*freeze), model).split(params)
