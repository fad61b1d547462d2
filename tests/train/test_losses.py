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
from voco_jax.train.loss_types import LossConfig, LossOutput
from voco_jax.train.losses import make_loss


def with_z_loss(config):
    """Twice the cross-entropy, computed plainly, and a z-loss (the squared logarithm of softmax's denominator)."""

    def loss(model, batch, extra):
        read = Read(*(batch[name] for name in Read._fields))
        logits = model(read, batch["pixel_values"])
        log_z = jax.nn.logsumexp(logits, axis=-1)
        at_target = jnp.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
        weights = batch["weights"]
        entropy, z = ((log_z - at_target) * weights).sum(), (log_z**2 * weights).sum()
        metrics = {"z_loss": (z, weights.sum()), "cross_entropy": (entropy, weights.sum())}
        return LossOutput(2 * entropy + 0.5 * z, weights.sum(), metrics)

    return loss


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(losses.LOSSES, "with_z_loss", with_z_loss)


def test_a_metric_is_the_mean_over_its_weight():
    """Whatever the weight; the loss is not made larger by few labels."""
    one, weight = jnp.float32(1), jnp.float32(0.25)
    found = LossOutput(one, weight, {"kl": (one, weight), "of_none": (0 * one, 0 * one)}).means()
    assert found["loss"] == 1 and found["kl"] == 4 and jnp.isnan(found["of_none"])


def test_its_numbers():
    """Against numpy, from the model's logits."""
    batch, (graphdef, params) = random_batch(BASE), make(BASE)

    @jax.jit
    def computed(params, batch):
        found = cross_entropy(graphdef, params, batch, make_loss(LossConfig("with_z_loss"))).means()
        logits = nnx.merge(graphdef, params)(Read(*(batch[name] for name in Read._fields)), batch["pixel_values"])
        return found, cross_entropy(graphdef, params, batch).means()["loss"], logits

    found, plain, logits = jax.device_get(computed(params, batch))
    log_z = np.log(np.exp(logits.astype(np.float64)).sum(-1))
    z_loss = (log_z**2)[batch["weights"] > 0].mean()
    assert found["z_loss"] == pytest.approx(z_loss, rel=1e-5)
    assert found["cross_entropy"] == pytest.approx(plain, rel=1e-5)
    assert found["loss"] == pytest.approx(2 * plain + 0.5 * z_loss, rel=1e-5)


def test_a_run_trains_accumulates_and_evaluates_with_it(tmp_path):
    """Sums and metrics of pieces and of batches add up alike, or the loss would not be that of its metrics."""
    run = train(
        tiny.config(
            tmp_path / "run", train__loss="with_z_loss", train__accumulate=2, train__steps=2, optim__warmup_steps=0,
            train__log_every=1, eval__every=2, eval__num_answers=0, eval__num_batches=2,
        )
    )  # fmt: skip
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 2]
    for line, prefix in zip(lines, ("", "", "eval_"), strict=True):
        loss, cross_entropy, z_loss = (line[prefix + name] for name in ("loss", "cross_entropy", "z_loss"))
        assert loss == pytest.approx(2 * cross_entropy + 0.5 * z_loss, rel=1e-4) and min(cross_entropy, z_loss) > 1
    assert lines[-1].keys() == {"step", "eval_loss", "eval_cross_entropy", "eval_z_loss"}


def test_a_name_that_is_not_there():
    message = "config.train.loss: expected one of cross_entropy, distillation, with_z_loss; found 'entropy'"
    with pytest.raises(UserError, match=re.escape(message)):
        make_loss(LossConfig("entropy"))
