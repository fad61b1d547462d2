"""The vision tower's choices; its numbers are compared with the released code's in test_reference.py."""

import dataclasses

from flax import nnx
import jax
import numpy as np
import pytest

from voco_jax.models.vit import ViT, ViTConfig, quick_gelu, sincos_positions

CONFIG = ViTConfig(image_size=8, patch_size=4, hidden_size=8, intermediate_size=8, num_hidden_layers=3,
                   num_attention_heads=2, select_layer=-1)  # fmt: skip
PIXELS = np.random.default_rng(0).normal(size=(2, 3, 8, 8, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def params():
    state = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: ViT(CONFIG, rngs=nnx.Rngs(0)))))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), state)


def features(params, pixels=PIXELS, unroll=False, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: ViT(config, unroll=unroll, rngs=nnx.Rngs(0))))
    return np.asarray(jax.jit(lambda params, pixels: nnx.merge(graphdef, params)(pixels))(params, pixels))


def first_layers(params, n: int):
    return params | {"layers": jax.tree.map(lambda p: p[:n], params["layers"])}


def test_quick_gelu():
    np.testing.assert_allclose(
        quick_gelu(np.array([-1.0, 0.0, 2.0])), [-1 / (1 + np.exp(1.702)), 0, 2 / (1 + np.exp(-3.404))], atol=1e-6
    )


@pytest.mark.parametrize("unroll", [False, True])
def test_selected_layer_is_the_output_of_the_layers_below(params, unroll):
    expected = features(first_layers(params, 2), num_hidden_layers=2)
    np.testing.assert_allclose(features(params, select_layer=-2, unroll=unroll), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(features(params, select_layer=2, unroll=unroll), expected, rtol=1e-4, atol=1e-4)
    assert np.abs(features(params) - expected).max() > 0.1


def test_several_layers_are_features_side_by_side(params):
    """In the order of the config, whatever is run first; layers above the last of them are not run."""
    found = features(params, select_layer=-2, further_layers=(0, -2, 1))
    alone = [features(params, select_layer=layer) for layer in (2, 0, 1)]
    expected = np.concatenate([alone[0], alone[1], alone[0], alone[2]], axis=-1)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    config = dataclasses.replace(CONFIG, select_layer=0, further_layers=(2, -4))
    assert config.num_active_layers == 2 and config.feature_size == 24
    assert config.flops(1) == dataclasses.replace(CONFIG, select_layer=2).flops(1)


def test_without_class_token_and_norm(params):
    """The patches' positions alone; a layer sees as many tokens less, and so do the FLOPs."""
    kept = {name: leaf for name, leaf in params.items() if name not in ("class_embedding", "pre_layernorm")}
    kept["position_embedding"] = params["position_embedding"][1:]
    switches = dict(class_token=False, pre_layernorm=False, select_layer=0)
    kernel, positions = params["patch_embedding"]["kernel"], kept["position_embedding"]
    patches = PIXELS.reshape(2, 3, 2, 4, 2, 4, 3).transpose(0, 1, 2, 4, 3, 5, 6).reshape(2, 3, 4, 48)
    np.testing.assert_allclose(features(kept, **switches), patches @ kernel + positions, rtol=1e-4, atol=1e-4)
    with_bias = kept | {"patch_embedding": {"kernel": kernel, "bias": np.arange(8, dtype=np.float32)}}
    found = features(with_bias, **switches, patch_bias=True)
    np.testing.assert_allclose(found, patches @ kernel + np.arange(8) + positions, rtol=1e-4, atol=1e-4)
    per_layer = [
        (config := dataclasses.replace(CONFIG, class_token=token)).flops(1)
        - dataclasses.replace(config, select_layer=0).flops(1)
        for token in (True, False)
    ]
    assert per_layer == [3 * n * (2 * (4 * 64 + 2 * 64) + 4 * 8 * n) for n in (5, 4)]


def test_pixels_beyond_the_last_patch_are_not_seen(params):
    """As a convolution leaves them; those before them are."""
    rest = np.random.default_rng(2).normal(size=(2, 3, 11, 11, 3)).astype(np.float32)
    rest[:, :, :8, :8] = PIXELS
    np.testing.assert_array_equal(features(params, rest, image_size=11), features(params))


def test_class_token(params):
    both = features(params, select_feature="cls_patch")
    assert both.shape == (2, 3, 5, 8)
    np.testing.assert_array_equal(both[:, :, 1:], features(params))


def test_patches_are_read_row_by_row(params):
    """Below the first layer a feature depends on its own patch alone: the second is the upper right one."""
    changed = PIXELS.copy()
    changed[:, :, :4, 4:] += 1
    before, after = (features(params, pixels, select_layer=0) for pixels in (PIXELS, changed))
    assert np.abs(before - after).max((0, 1, 3)).astype(bool).tolist() == [False, True, False, False]


def test_pictures_of_another_size(params):
    with pytest.raises(ValueError, match=r"pixel_values: expected \[..., 8, 8, 3\], found \[1, 8, 12, 3\]"):
        features(params, np.zeros((1, 8, 12, 3), np.float32))


def test_positions_of_sines_and_cosines():
    """Near patches' positions are more alike than those of others; by columns as by rows."""
    config = ViTConfig(image_size=64, patch_size=8, hidden_size=128, num_attention_heads=2, num_hidden_layers=1)
    config = dataclasses.replace(config, position_init="sincos")
    positions = np.asarray(jax.jit(lambda: ViT(config, rngs=nnx.Rngs(0)).position_embedding[...])())
    assert positions.shape == (65, 128) and not positions[0].any()
    grid = positions[1:].reshape(8, 8, 128)
    alike = np.einsum("rcd,d->rc", grid, grid[0, 0])
    assert (np.diff(alike[:, :6], axis=1) < 0).all() and alike[:, 6:].max() < alike[0, 2]
    np.testing.assert_allclose(alike, alike.T, rtol=1e-4)
    np.testing.assert_array_equal(sincos_positions(dataclasses.replace(config, class_token=False)), positions[1:])


def test_positions_that_there_are_not():
    with pytest.raises(ValueError, match="hidden_size: expected a multiple of 4, for 'sincos'; found 66"):
        ViTConfig(hidden_size=66, num_attention_heads=2, position_init="sincos")
