"""One training step: next-token cross-entropy on the labels, gradients, update."""

from flax import nnx
import jax
import jax.numpy as jnp
import optax

from voco_jax.models.voco import Read


def label_loss(graphdef, params, batch: dict) -> jax.Array:
    """Mean cross-entropy (nats) over the labels of a batch (see `data/pipeline.py`), in float32."""
    model = nnx.merge(graphdef, params)
    read = Read(batch["tokens"], batch["positions"], batch["segment_ids"], batch["visual"])
    logits = model(read, batch["pixel_values"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    return (losses * batch["weights"]).sum() / jnp.maximum(batch["weights"].sum(), 1)


def make_train_step(graphdef, optimizer: optax.GradientTransformation):
    """A jitted `(params, opt_state, batch) -> (params, opt_state, loss)`; the first two are given up to it."""

    def step(params, opt_state, batch):
        loss, gradients = jax.value_and_grad(lambda params: label_loss(graphdef, params, batch))(params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return jax.jit(step, donate_argnums=(0, 1))
