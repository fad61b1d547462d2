"""One training step: next-token cross-entropy on the labels, gradients, update."""

from collections.abc import Sequence

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import optax

from voco_jax.models.voco import Read
from voco_jax.train.cross_entropy import label_cross_entropy
from voco_jax.train.freeze import merge_params, split_params


def label_loss(graphdef, params, batch: dict) -> jax.Array:
    """Mean cross-entropy (nats) over the labels of a batch (see `data/pipeline.py`), in float32."""
    model = nnx.merge(graphdef, params)
    read = Read(batch["tokens"], batch["positions"], batch["segment_ids"], batch["visual"])
    hidden = model.llama.norm(model.hidden(read, batch["pixel_values"]))
    head, vocab_size = model.llama.head(), model.config.llama.vocab_size
    loss = label_cross_entropy(hidden, head, batch["targets"], batch["weights"], vocab_size)
    return loss / jnp.maximum(batch["weights"].sum(), 1)


def make_train_step(graphdef, optimizer: optax.GradientTransformation, freeze: Sequence[str] = (), shardings=None):
    """A jitted `(params, opt_state, batch) -> (params, opt_state, loss)`; the first two are given up to it.

    What `freeze` names has no gradient; `opt_state` is of the rest. `shardings` (of params, of opt_state) are those
    in which they come and leave, over the ambient mesh.
    """

    def step(params, opt_state, batch):
        trained, frozen = split_params(params, freeze)
        loss, gradients = jax.value_and_grad(lambda p: label_loss(graphdef, merge_params(p, frozen), batch))(trained)
        updates, opt_state = optimizer.update(gradients, opt_state, trained)
        return merge_params(optax.apply_updates(trained, updates), frozen), opt_state, loss

    out_shardings = None if shardings is None else (*shardings, NamedSharding(jax.tree.leaves(shardings)[0].mesh, P()))
    return jax.jit(step, donate_argnums=(0, 1), out_shardings=out_shardings)
