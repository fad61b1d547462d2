"""Losses of labels from hidden states, without ever holding the logits of all tokens: cross-entropy, and the
Kullback-Leibler divergence of a teacher's distribution beside it.

Labels are gathered to the front and go through the head a chunk at a time; chunks without a label cost nothing. The
gradients of a chunk are made while its logits are at hand (loss and gradients in one pass, as in Liger Kernel's fused
linear cross-entropy), so the head multiplies three times for a label and not four, and a teacher's head once more.

Over a mesh every device takes the tokens of its own rows, shared out over the frame and tensor axes, with the head
whole: what it costs does not depend on how the labels fall, and nothing is communicated between chunks.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from voco_jax.attention.platform import platform
from voco_jax.errors import UserError
from voco_jax.parallel.mesh import PARAMS, ROWS, axis_keys, axis_size

CHUNK = 1024  # labels; logits of a chunk are 131 MB for 32,000 tokens
CPU_CHUNK = 256  # large enough for its products to run at full speed, and a last one that is half empty costs less
SPREAD = ("frame", "tensor")
TOKENS = P(ROWS, SPREAD)  # [R, T, ...] as the devices share them out
WHOLE = ("head", "alpha")  # what all devices want whole


class Labels(NamedTuple):
    """What a model says of the tokens of some rows, and what it should say.

    hidden: normalised hidden states [R, T, D], whose type is that of the computation.
    head: [D, V'], of which the first columns are tokens; in its own type, which is its gradient's.
    targets: integers [R, T]; weights: [R, T], 0 where a token has no label.
    """

    hidden: jax.Array
    head: jax.Array
    targets: jax.Array
    weights: jax.Array


class TeacherLabels(NamedTuple):
    """What a teacher says of the same tokens; no gradient goes into it.

    Normalised hidden states [R, T, D'] and a head [D', V''], of any width; or logits [R, T, k] of the tokens `ids`,
    -inf where there are fewer than k.
    weights: [R, T], those of the labels that it teaches, 0 elsewhere.
    alpha: float32 scalar, the share of the KL divergence.
    """

    weights: jax.Array
    alpha: jax.Array
    hidden: Any = None  # arrays or None, in pairs
    head: Any = None
    ids: Any = None
    logits: Any = None


class Divergence(NamedTuple):
    """How the KL divergence is taken: of softmax(logits / temperature), times temperature². With `top_k` the teacher's
    distribution is that of its k most likely tokens, and the student's is that of all."""

    temperature: float = 1.0
    top_k: int = 0
    vocab_size: int = 0  # columns of the teacher's head that are tokens


class LabelLosses(NamedTuple):
    """Sums over all labels (nats), float32.

    total: of what is minimised, weight · ((1 - alpha) · cross-entropy + alpha · temperature² · KL), and of the
    cross-entropy alone for labels that no teacher teaches. It alone has gradients.
    kl: of the labels that are taught, with neither factor.
    """

    total: jax.Array
    cross_entropy: jax.Array
    kl: jax.Array


def label_cross_entropy(hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, vocab_size: int):
    """Sum of weights · cross-entropy (nats) over all tokens, float32; arguments as in `Labels`."""
    return label_losses(Labels(hidden, head, targets, weights), vocab_size).total


def label_losses(
    labels: Labels,
    vocab_size: int,
    teacher: TeacherLabels | None = None,
    divergence: Divergence = Divergence(),  # noqa: B008 (nobody changes it)
) -> LabelLosses:
    """The sums over all tokens of a batch, with a `teacher` or without one (its KL is 0 then).

    A teacher whose vocabulary has another size than `vocab_size` has the same tokens as far as both have them.
    UserError where the mesh does not divide the rows' length.
    """
    size = axis_size(*SPREAD)
    if labels.hidden.shape[1] % size:
        expected = f"expected a multiple of {size}, the devices along {axis_keys(SPREAD)}"
        raise UserError(f"config.data.row_length: {expected}; found {labels.hidden.shape[1]}")
    labels, teacher = jax.tree.map(jnp.asarray, (labels, teacher))
    return _losses(labels, teacher, vocab_size, divergence)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _losses(labels: Labels, teacher: TeacherLabels | None, vocab_size: int, divergence: Divergence) -> LabelLosses:
    return _over_mesh(labels, teacher, vocab_size, divergence, with_gradients=False)[0]


def _forward(labels, teacher, vocab_size, divergence):
    losses, d_hidden, d_head = _over_mesh(labels, teacher, vocab_size, divergence, with_gradients=True)
    # The layers' backward pass waits until the head's gradient is shards: whole, it is half a GiB for a Llama of 7B.
    return losses, jax.lax.optimization_barrier((d_hidden, d_head.astype(labels.head.dtype)))


def _backward(vocab_size, divergence, gradients, cotangents):
    d_hidden, d_head = ((g * cotangents.total).astype(g.dtype) for g in gradients)
    return Labels(d_hidden, d_head, None, None), None


_losses.defvjp(_forward, _backward)


def _over_mesh(
    labels: Labels, teacher: TeacherLabels | None, vocab_size: int, divergence: Divergence, with_gradients: bool
):
    function = functools.partial(
        _on_device, vocab_size=vocab_size, divergence=divergence, with_gradients=with_gradients
    )
    labels = labels._replace(head=labels.head.astype(labels.hidden.dtype))
    if teacher is not None and teacher.head is not None:
        teacher = teacher._replace(head=teacher.head.astype(teacher.hidden.dtype))
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or (mesh.size == 1 and platform() == "cpu"):  # XLA for CPUs leaves collectives of one device in
        return function(labels, teacher)

    def summed(*arguments):
        losses, d_hidden, d_head = function(*arguments)
        losses = jax.lax.psum(losses, mesh.axis_names)
        if not with_gradients:
            return losses, (), ()
        d_head = jax.lax.psum(d_head, "data")
        for axes, dimension in ((PARAMS, 0), ("tensor", 1)):
            d_head = jax.lax.psum_scatter(d_head, axes, scatter_dimension=dimension, tiled=True)
        return losses, d_hidden, d_head

    in_specs = tuple(None if part is None else _specs(part) for part in (labels, teacher))
    out_specs = (P(), TOKENS, P(PARAMS, "tensor")) if with_gradients else (P(), (), ())
    return jax.shard_map(summed, in_specs=in_specs, out_specs=out_specs, check_vma=False)(labels, teacher)


def _specs(part: Labels | TeacherLabels) -> Any:
    """Where each array is wanted: tokens shared out over the devices, or whole."""
    specs: dict[str, Any] = {k: x if x is None else P() if k in WHOLE else TOKENS for k, x in part._asdict().items()}
    return type(part)(**specs)


def _on_device(
    labels: Labels, teacher: TeacherLabels | None, *, vocab_size: int, divergence: Divergence, with_gradients
):
    """(losses, gradient of hidden, gradient of head in float32), or (losses, (), ()) without gradients."""
    head, shape, dtype = labels.head, labels.hidden.shape, labels.hidden.dtype
    hidden, targets, weights = (_flat(x) for x in (labels.hidden, labels.targets, labels.weights))
    chunk = min(CHUNK, CPU_CHUNK if platform() == "cpu" else CHUNK, len(targets))
    num_chunks = -(-len(targets) // chunk)
    # Labels first, in their order; places that fill up the last chunk point nowhere.
    order = jnp.argsort(weights == 0, stable=True)
    order = jnp.pad(order, (0, num_chunks * chunk - len(order)), constant_values=len(order)).reshape(num_chunks, chunk)
    is_token = jnp.arange(head.shape[1]) < vocab_size

    def compute(carry, places):
        losses, d_hidden, d_head = carry

        def take(x):
            return x.at[places].get(mode="fill", fill_value=0)

        x, y, w = take(hidden), take(targets), take(weights)
        logits = jnp.dot(x, head, preferred_element_type=jnp.float32)
        if vocab_size < head.shape[1]:
            logits = jnp.where(is_token, logits, -jnp.inf)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        is_target = jnp.arange(head.shape[1]) == y[:, None]
        entropy = log_z - jnp.where(is_target, logits, 0).sum(-1)
        d_entropy = jnp.exp(logits - log_z[:, None]) - is_target
        total, d_logits, of_kl = entropy * w, d_entropy * w[:, None], jnp.zeros_like(w)
        if teacher is not None:
            tokens = {k: x for k, x in teacher._asdict().items() if x is not None and k not in WHOLE}
            here = teacher._replace(**{k: take(_flat(x)) for k, x in tokens.items()})
            kl, d_kl = _divergence(logits, here, vocab_size, divergence)
            of_kl, share = kl * here.weights, here.weights * here.alpha
            total = entropy * (w - share) + kl * share * divergence.temperature**2
            d_logits = d_entropy * (w - share)[:, None] + d_kl * (share * divergence.temperature**2)[:, None]
        sums = LabelLosses(total.sum(), (entropy * w).sum(), of_kl.sum())
        losses = jax.tree.map(jnp.add, losses, sums)
        if with_gradients:
            d_logits = d_logits.astype(dtype)
            d_x = jnp.dot(d_logits, head.T, preferred_element_type=jnp.float32).astype(dtype)
            d_hidden = d_hidden.at[places].set(d_x, mode="drop", unique_indices=True)
            d_head += jnp.dot(x.T, d_logits, preferred_element_type=jnp.float32)
        return losses, d_hidden, d_head

    def step(carry, places):
        has_label = weights.at[places[0]].get(mode="fill", fill_value=0) != 0
        return jax.lax.cond(has_label, compute, lambda carry, _: carry, carry, places), None

    nothing = LabelLosses(*[jnp.zeros((), jnp.float32)] * 3)
    gradients = (jnp.zeros_like(hidden), jnp.zeros(head.shape, jnp.float32)) if with_gradients else ((), ())
    (losses, d_hidden, d_head), _ = jax.lax.scan(step, (nothing, *gradients), order)
    return losses, d_hidden.reshape(shape) if with_gradients else (), d_head


def _divergence(
    logits: jax.Array, teacher: TeacherLabels, vocab_size: int, divergence: Divergence
) -> tuple[jax.Array, jax.Array]:
    """(KL divergence [n] of a chunk, its gradient by the student's logits [n, V'])."""
    columns, temperature, ids = logits.shape[1], divergence.temperature, teacher.ids
    if ids is None:
        said = jnp.dot(teacher.hidden, teacher.head, preferred_element_type=jnp.float32)
        both = min(vocab_size, divergence.vocab_size)
        said = jnp.pad(said[:, :both], ((0, 0), (0, columns - both)), constant_values=-jnp.inf)
        if divergence.top_k:
            said, ids = jax.lax.top_k(said, min(divergence.top_k, both))
    else:
        said = jnp.where(
            teacher.weights[:, None] != 0, teacher.logits, 0
        )  # where it does not teach, it may be all -inf
    log_p, log_q = (jax.nn.log_softmax(x / temperature, axis=-1) for x in (said, logits))
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    at_ids = log_q if ids is None else jnp.take_along_axis(log_q, ids, axis=1)
    kl = jnp.where(p > 0, p * (log_p - at_ids), 0).sum(-1)
    d_logits = q - p if ids is None else q.at[jnp.arange(len(q))[:, None], ids].add(-p)
    return kl, d_logits / temperature


def _flat(x: jax.Array) -> jax.Array:
    """[R, T, ...] as [R·T, ...]."""
    return x.reshape(-1, *x.shape[2:])
