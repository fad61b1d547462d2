"""The compressors outside the language model, which the paper's Table 1 compares with."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from voco_jax.models.compressors import AveragePool, QFormer

PATCHES, WIDTH = 6, 8


def features():
    return jnp.array(np.random.default_rng(0).normal(size=(2, 3, PATCHES, WIDTH)), jnp.float32)


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_average_pooling_is_the_mean_then_a_linear_map(num_tokens):
    pool = AveragePool(num_tokens, WIDTH, dtype="float32", param_dtype="float32", rngs=nnx.Rngs(0))
    x = np.asarray(features())
    size = PATCHES // num_tokens
    means = np.stack([x[:, :, i * size : (i + 1) * size].sum(2) / size for i in range(num_tokens)], axis=2)
    expected = means @ np.asarray(pool.linear.kernel[...]) + np.asarray(pool.linear.bias[...])
    np.testing.assert_allclose(pool(features()), expected, atol=1e-5)


def test_patches_that_do_not_divide():
    pool = AveragePool(4, WIDTH, dtype="float32", param_dtype="float32", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="average pooling: 6 patches do not divide into 4 tokens"):
        pool(features())


def test_a_q_former_reads_every_patch_of_its_own_image_alone():
    qformer = QFormer(2, WIDTH, 2, 2, dtype="float32", param_dtype="float32", rngs=nnx.Rngs(0))
    assert qformer(features()).shape == (2, 3, 2, WIDTH)
    gradient = jax.grad(lambda x: (qformer(x)[1, 2] ** 2).sum())(features())
    reached = np.abs(gradient).sum(-1) > 0
    expected = np.zeros((2, 3, PATCHES), bool)
    expected[1, 2] = True
    np.testing.assert_array_equal(reached, expected)
