"""The compressors outside the language model, which the paper's Table 1 compares with."""

from flax import nnx
import jax
import numpy as np
import pytest

from voco_jax.models.compressors import COMPRESSORS, AveragePool, QFormer
from voco_jax.models.config import VoCoConfig, model_error
from voco_jax.models.llama import LlamaConfig
from voco_jax.models.vit import ViTConfig

PATCHES, WIDTH = 6, 8
KWARGS = dict(dtype="float32", param_dtype="float32")


def features():
    return np.random.default_rng(0).normal(size=(2, 3, PATCHES, WIDTH)).astype(np.float32)


def config(compressor="none", num_tokens=1):
    llama = LlamaConfig(vocab_size=8, hidden_size=WIDTH, num_attention_heads=2, num_key_value_heads=2)
    return VoCoConfig(
        llama, ViTConfig(image_size=28), compressor, num_voco_tokens=3, voco_token_id=7,
        num_compressed_tokens=num_tokens,
    )  # fmt: skip


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_average_pooling_is_the_mean_then_a_linear_map(num_tokens):
    pool = AveragePool(config(num_tokens=num_tokens), **KWARGS, rngs=nnx.Rngs(0))
    x = features()
    size = PATCHES // num_tokens
    means = np.stack([x[:, :, i * size : (i + 1) * size].sum(2) / size for i in range(num_tokens)], axis=2)
    expected = means @ np.asarray(pool.linear.kernel[...]) + np.asarray(pool.linear.bias[...])
    np.testing.assert_allclose(pool(features()), expected, atol=1e-5)


def test_patches_that_do_not_divide():
    pool = AveragePool(config(num_tokens=4), **KWARGS, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="num_compressed_tokens: expected a divisor of the 6 patches, found 4"):
        pool(features())


def test_a_q_former_reads_every_patch_of_its_own_image_alone():

    @jax.jit
    def gradient(x):
        qformer = QFormer(config(num_tokens=2), **KWARGS, rngs=nnx.Rngs(0))
        assert qformer(x).shape == (2, 3, 2, WIDTH)
        return jax.grad(lambda x: (qformer(x)[1, 2] ** 2).sum())(x)

    reached = np.abs(gradient(features())).sum(-1) > 0
    expected = np.zeros((2, 3, PATCHES), bool)
    expected[1, 2] = True
    np.testing.assert_array_equal(reached, expected)


def test_what_each_compressor_puts_into_the_read_stream():
    """(visual tokens, tokens of a compress segment, VoCo tokens in the text, LLaVA's own text with K and without)."""
    found = {
        name: (
            config(name, 2).num_visual_tokens, config(name, 2).compress_length, kind.has_voco_tokens,
            kind.keeps_text(3), kind.keeps_text(0),
        )
        for name, kind in COMPRESSORS.items()
    }  # fmt: skip
    assert found == {
        "voco": (3, 1 + 4 + 2 + 3, True, False, False),
        "voco_embedding": (3, 1 + 4 + 2 + 3, True, False, False),
        "none": (4, 0, True, False, True),
        "average_pool": (2, 0, False, False, False),
        "qformer": (2, 0, False, False, False),
    }


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("num_voco_tokens: expected 1, found 0"), "config.model.num_voco_tokens: expected 1, found 0"),
        (ValueError("of jax\nand more"), "config.model: of jax"),
        (NotImplementedError(), "config.model: NotImplementedError"),
    ],
)
def test_errors_of_a_model_in_a_line(error, line):
    assert str(model_error(error)) == line
