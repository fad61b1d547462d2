"""Next-token cross-entropy from hidden states, without ever holding the logits of all tokens.

Labels are gathered to the front and go through the head a chunk at a time; chunks without a label cost nothing. The
gradients of a chunk are made while its logits are at hand (loss and gradients in one pass, as in Liger Kernel's fused
linear cross-entropy), so the head multiplies three times for a label and not four.

Over a mesh every device takes the tokens of its own rows, shared out over the frame and tensor axes, with the head
whole: what it costs does not depend on how the labels fall, and nothing is communicated between chunks.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from voco_jax.attention.platform import platform
from voco_jax.errors import UserError
from voco_jax.parallel.mesh import PARAMS, ROWS, axis_keys, axis_size

CHUNK = 1024  # labels; logits of a chunk are 131 MB for 32,000 tokens
CPU_CHUNK = 256  # large enough for its products to run at full speed, and a last one that is half empty costs less
SPREAD = ("frame", "tensor")


def label_cross_entropy(hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, vocab_size: int):
    """Sum of weights · cross-entropy (nats) over all tokens, float32.

    Args:
      hidden: normalised hidden states [R, T, D], whose type is that of the computation.
      head: [D, V'], of which the first `vocab_size` columns are tokens; in its own type, which is its gradient's.
      targets: integers [R, T]; weights: [R, T], 0 where a token has no label.
    """
    size = axis_size(*SPREAD)
    if hidden.shape[1] % size:
        expected = f"expected a multiple of {size}, the devices along {axis_keys(SPREAD)}"
        raise UserError(f"config.data.row_length: {expected}; found {hidden.shape[1]}")
    return _cross_entropy(hidden, head, jnp.asarray(targets), jnp.asarray(weights), vocab_size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cross_entropy(hidden, head, targets, weights, vocab_size):
    return _over_mesh(hidden, head, targets, weights, vocab_size, with_gradients=False)[0]


def _forward(hidden, head, targets, weights, vocab_size):
    loss, d_hidden, d_head = _over_mesh(hidden, head, targets, weights, vocab_size, with_gradients=True)
    # The layers' backward pass waits until the head's gradient is shards: whole, it is half a GiB for a Llama of 7B.
    return loss, jax.lax.optimization_barrier((d_hidden, d_head.astype(head.dtype)))


def _backward(_, gradients, cotangent):
    d_hidden, d_head = ((g * cotangent).astype(g.dtype) for g in gradients)
    return d_hidden, d_head, None, None


_cross_entropy.defvjp(_forward, _backward)


def _over_mesh(hidden, head, targets, weights, vocab_size, with_gradients):
    function = functools.partial(_on_device, vocab_size=vocab_size, with_gradients=with_gradients)
    head = head.astype(hidden.dtype)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or (mesh.size == 1 and platform() == "cpu"):  # XLA for CPUs leaves collectives of one device in
        return function(hidden, head, targets, weights)
    tokens = P(ROWS, SPREAD)

    def summed(*arguments):
        loss, d_hidden, d_head = function(*arguments)
        loss = jax.lax.psum(loss, mesh.axis_names)
        if not with_gradients:
            return loss, (), ()
        d_head = jax.lax.psum(d_head, "data")
        for axes, dimension in ((PARAMS, 0), ("tensor", 1)):
            d_head = jax.lax.psum_scatter(d_head, axes, scatter_dimension=dimension, tiled=True)
        return loss, d_hidden, d_head

    specs = (P(), tokens, P(PARAMS, "tensor")) if with_gradients else (P(), (), ())
    return jax.shard_map(summed, in_specs=(tokens, P(), tokens, tokens), out_specs=specs, check_vma=False)(
        hidden, head, targets, weights
    )


def _on_device(hidden, head, targets, weights, *, vocab_size, with_gradients):
    """(loss, gradient of hidden, gradient of head in float32), or (loss, (), ()) without gradients."""
    shape, dtype = hidden.shape, hidden.dtype
    hidden, targets, weights = hidden.reshape(-1, shape[-1]), targets.reshape(-1), weights.reshape(-1)
    chunk = min(CHUNK, CPU_CHUNK if platform() == "cpu" else CHUNK, len(targets))
    num_chunks = -(-len(targets) // chunk)
    # Labels first, in their order; places that fill up the last chunk point nowhere.
    order = jnp.argsort(weights == 0, stable=True)
    order = jnp.pad(order, (0, num_chunks * chunk - len(order)), constant_values=len(order)).reshape(num_chunks, chunk)
    is_token = jnp.arange(head.shape[1]) < vocab_size

    def compute(carry, places):
        loss, d_hidden, d_head = carry
        x = hidden.at[places].get(mode="fill", fill_value=0)
        y = targets.at[places].get(mode="fill", fill_value=0)
        w = weights.at[places].get(mode="fill", fill_value=0)
        logits = jnp.dot(x, head, preferred_element_type=jnp.float32)
        if vocab_size < head.shape[1]:
            logits = jnp.where(is_token, logits, -jnp.inf)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        is_target = jnp.arange(head.shape[1]) == y[:, None]
        at_target = jnp.where(is_target, logits, 0).sum(-1)
        loss += ((log_z - at_target) * w).sum()
        if with_gradients:
            d_logits = ((jnp.exp(logits - log_z[:, None]) - is_target) * w[:, None]).astype(dtype)
            d_x = jnp.dot(d_logits, head.T, preferred_element_type=jnp.float32).astype(dtype)
            d_hidden = d_hidden.at[places].set(d_x, mode="drop", unique_indices=True)
            d_head += jnp.dot(x.T, d_logits, preferred_element_type=jnp.float32)
        return loss, d_hidden, d_head

    def step(carry, places):
        has_label = weights.at[places[0]].get(mode="fill", fill_value=0) != 0
        return jax.lax.cond(has_label, compute, lambda carry, _: carry, carry, places), None

    gradients = (jnp.zeros_like(hidden), jnp.zeros(head.shape, jnp.float32)) if with_gradients else ((), ())
    (loss, d_hidden, d_head), _ = jax.lax.scan(step, (jnp.float32(0), *gradients), order)
    return loss, d_hidden.reshape(shape) if with_gradients else (), d_head
