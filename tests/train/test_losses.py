"""A loss of one's own, through the config alone: it trains, accumulates, is evaluated and logged."""

import json
import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import tiny
from tests.helpers.losses import cross_entropy
from tests.models.test_two_streams import make
from tests.parallel.test_meshes import BASE, random_batch
from voco_jax.errors import UserError
from voco_jax.models.voco import Read
from voco_jax.train import losses
from voco_jax.train.loop import train
from voco_jax.train.losses import LossConfig, LossOutput, make_loss


def with_z_loss(config):
    """Twice the cross-entropy, computed plainly, and a z-loss (the squared logarithm of softmax's denominator)."""

    def loss(model, batch):
        read = Read(*(batch[name] for name in Read._fields))
        logits = model(read, batch["pixel_values"])
        log_z = jax.nn.logsumexp(logits, axis=-1)
        at_target = jnp.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
        weights = batch["weights"]
        entropy, z = ((log_z - at_target) * weights).sum(), (log_z**2 * weights).sum()
        return LossOutput(2 * entropy + 0.5 * z, weights.sum(), {"z_loss": (z, weights.sum())})

    return loss


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(losses.LOSSES, "with_z_loss", with_z_loss)


def test_its_numbers():
    """Against numpy, from the model's logits."""
    batch, (graphdef, params) = random_batch(BASE), make(BASE)
    found = cross_entropy(graphdef, params, batch, make_loss(LossConfig("with_z_loss"))).means()
    plain = cross_entropy(graphdef, params, batch).means()["loss"]
    model = nnx.merge(graphdef, params)
    logits = np.asarray(model(Read(*(batch[name] for name in Read._fields)), batch["pixel_values"]), np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    z_loss = (log_z**2)[batch["weights"] > 0].mean()
    assert float(found["z_loss"]) == pytest.approx(z_loss, rel=1e-5)
    assert float(found["loss"]) == pytest.approx(2 * float(plain) + 0.5 * z_loss, rel=1e-5)


def lines_of(workdir, **changes) -> list[dict]:
    changes = (
        dict(train__steps=2, train__log_every=1, eval__every=2, eval__num_answers=0, eval__num_batches=2) | changes
    )
    run = train(tiny.config(workdir, optim__warmup_steps=0, optim__learning_rate=1e-3, **changes))
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_trains_accumulates_and_evaluates_with_it(tmp_path):
    plain = lines_of(tmp_path / "plain")
    whole = lines_of(tmp_path / "whole", train__loss="with_z_loss")
    pieces = lines_of(tmp_path / "pieces", train__loss="with_z_loss", train__accumulate=2)
    # Before the first update the parameters are the same
    assert whole[0]["loss"] == pytest.approx(2 * plain[0]["loss"] + 0.5 * whole[0]["z_loss"], rel=1e-5)
    assert whole[0]["z_loss"] > 1 and "z_loss" not in plain[0]
    for one, other in zip(whole, pieces, strict=True):
        for name in {"loss", "z_loss", "grad_norm", "eval_loss", "eval_z_loss"} & one.keys():
            assert one[name] == pytest.approx(other[name], rel=1e-4), name
    *_, last = whole
    assert last["step"] == 2 and last.keys() == {"step", "eval_loss", "eval_z_loss"} and plain[-1].keys() == {
        "step", "eval_loss",
    }  # fmt: skip
    assert last["eval_loss"] > 0.5 * last["eval_z_loss"] > 1


def test_a_name_that_is_not_there():
    message = "config.train.loss: expected one of cross_entropy, with_z_loss; found 'entropy'"
    with pytest.raises(UserError, match=re.escape(message)):
        make_loss(LossConfig("entropy"))
