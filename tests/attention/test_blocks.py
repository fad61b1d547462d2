"""Attention in blocks, as CPUs compute it, against attention over whole rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from voco_jax.attention import blocks, xla


def arrays(heads: int, groups: int, length: int):
    rng = np.random.default_rng(0)
    shapes = [(2, length, n, 16) for n in (heads, groups, groups, heads)]
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize("kind, groups", [("causal", 4), ("packed", 2), ("full", 4)])
def test_same_function(kind, groups):
    """Values and gradients; a row that no block divides, segments that end in the middle of blocks, padding."""
    heads, length = 4, blocks.BLOCK + 37
    q, k, v, d_out = arrays(heads, groups, length)
    segment_ids = None
    if kind == "packed":
        ends = np.array([[50, length - 30], [blocks.BLOCK + 1, length]])
        segment_ids = jnp.asarray((np.arange(length) >= ends[:, :1]).astype(np.int32) + 1)
        segment_ids = jnp.where(jnp.arange(length) < ends[:, 1:], segment_ids, 0)
    mask = None if segment_ids is None else (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    causal = kind != "full"

    def whole(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal)

    def ours(q, k, v):
        return xla.causal(q, k, v, segment_ids) if causal else xla.full(q, k, v)

    def with_gradients(function):
        out, pull = jax.vjp(function, q, k, v)
        return out, *pull(d_out)

    assert "custom_vjp" in str(jax.make_jaxpr(ours)(q, k, v))  # it is the blocks that are tested
    for found, expected in zip(*map(jax.jit(with_gradients, static_argnums=0), (ours, whole)), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5, rtol=0)


def test_short_rows_and_other_devices_are_left_alone(monkeypatch):
    """The programs of small models, of meshes and for TPUs are what they were."""

    def traced(length: int) -> str:
        q, k, v, _ = arrays(4, 4, length)
        return str(jax.make_jaxpr(lambda q, k, v: (xla.causal(q, k, v), xla.full(q, k, v)))(q, k, v))

    assert traced(blocks.BLOCK + 1).count("custom_vjp") == 2
    assert "custom_vjp" not in traced(blocks.BLOCK)
    for name, value in ("platform", lambda: "tpu"), ("axis_size", lambda *_: 2):
        with monkeypatch.context() as patch:
            patch.setattr(xla, name, value)
            assert "custom_vjp" not in traced(blocks.BLOCK + 1)
