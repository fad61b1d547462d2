"""Attention on CPUs: one head after the other, a block of queries at a time, against the keys that it may see.

What XLA makes of attention over whole rows on a CPU goes through memory once for every little operation on the T × T
scores of all heads. Here the scores at hand are those of a block, which a core's cache holds; keys after it are left
out; and the backward pass makes them again from the log-sum-exp. The same function, to rounding.
"""

import functools

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

BLOCK = 192  # queries, about
MOST = 8  # blocks a row: each is code of its own


def attend(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, causal: bool) -> jax.Array:
    """As `xla.causal`, or without `causal` each query sees all keys of its segment: [R, T, N, H]."""
    return _attend(q, k, v, segment_ids, causal)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, segment_ids, causal):
    return _forward(q, k, v, segment_ids, causal)[0]


def _forward(q, k, v, segment_ids, causal):
    def head(arrays):
        q, k, v, segment_ids = arrays  # [M, T, H], [T, H], [T, H], [T] or None
        out, log_z = [], []
        for start, stop, end in _blocks(q.shape[1], causal):
            scores, visible = _scores(q[:, start:stop], k[:end], segment_ids, start, causal)
            if visible is not None:
                scores = jnp.where(visible, scores, -jnp.inf)
            top = scores.max(0)
            weights = jnp.exp(scores - top)
            total = weights.sum(0)
            attended = _dot(weights.astype(v.dtype), v[:end], 0, 0) / total[:, None]
            out.append(attended.reshape(len(q), -1, q.shape[2]).astype(q.dtype))
            log_z.append((top + jnp.log(total)).reshape(len(q), -1))
        return jnp.concatenate(out, axis=1), jnp.concatenate(log_z, axis=1)

    Q, K, V = _by_head(q, k.shape[2]), _by_head(k), _by_head(v)
    out, log_z = jax.lax.map(head, (Q, K, V, _by_head_ids(segment_ids, k.shape[2])))
    out = checkpoint_name(_by_token(out, len(q)), "context")
    return out, (q, k, v, segment_ids, out, checkpoint_name(log_z, "context"))


def _backward(causal, kept, d_out):
    q, k, v, segment_ids, out, log_z = kept

    def head(arrays):
        q, k, v, segment_ids, d_out, log_z, shift = arrays
        d_q, d_k, d_v = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
        for start, stop, end in _blocks(q.shape[1], causal):
            d_here = d_out[:, start:stop].reshape(-1, q.shape[2])
            q_here = q[:, start:stop].reshape(-1, q.shape[2])
            scores, visible = _scores(q[:, start:stop], k[:end], segment_ids, start, causal)
            weights = jnp.exp(scores - log_z[:, start:stop].reshape(-1))
            if visible is not None:
                weights = jnp.where(visible, weights, 0)
            d_weights = _dot(v[:end], d_here, 1, 1)
            d_scores = (weights * (d_weights - shift[:, start:stop].reshape(-1)) * _scale(q)).astype(q.dtype)
            d_q.append(_dot(d_scores, k[:end], 0, 0).reshape(len(q), -1, q.shape[2]).astype(q.dtype))
            d_k = d_k.at[:end].add(_dot(d_scores, q_here, 1, 0))
            d_v = d_v.at[:end].add(_dot(weights.astype(v.dtype), d_here, 1, 0))
        return jnp.concatenate(d_q, axis=1), d_k.astype(k.dtype), d_v.astype(v.dtype)

    groups = k.shape[2]
    shift = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)
    Q, K, V, D = _by_head(q, groups), _by_head(k), _by_head(v), _by_head(d_out, groups)
    shift = _by_head(shift, groups)[..., 0]
    d_q, d_k, d_v = jax.lax.map(head, (Q, K, V, _by_head_ids(segment_ids, groups), D, log_z, shift))
    return _by_token(d_q, len(q)), _by_token(d_k, len(q)), _by_token(d_v, len(q)), None


_attend.defvjp(_forward, _backward)


def _blocks(length: int, causal: bool):
    """(first query, end of queries, end of keys) of each block."""
    count = min(-(-length // BLOCK), MOST)
    size = -(-length // count // 16) * 16
    for start in range(0, length, size):
        stop = min(start + size, length)
        yield start, stop, stop if causal else length


def _scores(q, k, segment_ids, start, causal):
    """Scaled scores [keys, M · queries] in float32 of queries from place `start` on, and which may be seen (None: all).

    Keys come first: the products of the backward pass take them so.
    """
    heads, queries, size = q.shape
    scores = _dot(k, q.reshape(-1, size), 1, 1) * _scale(q)
    places = jnp.tile(jnp.arange(start, start + queries), heads)
    visible = None
    if causal:
        visible = jnp.arange(len(k))[:, None] <= places
    if segment_ids is not None:
        same = segment_ids[: len(k), None] == jnp.tile(segment_ids[start : start + queries], heads)
        visible = same if visible is None else visible & same
    return scores, visible


def _scale(q) -> float:
    return q.shape[-1] ** -0.5


def _dot(a, b, axis_a: int, axis_b: int):
    return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32)


def _by_head(x: jax.Array, groups: int | None = None) -> jax.Array:
    """[R, T, G, H] to [R · G, T, H]; with `groups`, [R, T, N, H] to [R · G, N / G, T, H]."""
    x = x.transpose(0, 2, 1, 3)
    rest = x.shape[2:]
    return x.reshape(-1, *rest) if groups is None else x.reshape(len(x) * groups, -1, *rest)


def _by_head_ids(segment_ids, groups):
    return None if segment_ids is None else jnp.repeat(segment_ids, groups, axis=0)


def _by_token(x: jax.Array, rows: int) -> jax.Array:
    """The way back, of both."""
    return x.reshape(rows, -1, *x.shape[-2:]).transpose(0, 2, 1, 3)
