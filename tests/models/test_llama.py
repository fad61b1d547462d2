import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from voco_jax.models import presets
from voco_jax.models.build import abstract_model
from voco_jax.models.linear import LinearGeneral, dot_general
from voco_jax.models.llama import Llama, LlamaConfig, RopeScaling, apply_rope, rope_frequencies, rope_tables
from voco_jax.models.vit import ViTConfig
from voco_jax.models.voco import VoCoConfig


def test_rope_turns_pairs_of_half_a_head_apart():
    """Position 1, theta 100, four dimensions: pairs (0, 2) by 1 radian and (1, 3) by 1/10."""
    config = LlamaConfig(hidden_size=4, num_attention_heads=1, num_key_value_heads=1, rope_theta=100.0)
    turned = apply_rope(jnp.array([[[1.0, 1.0, 0.0, 0.0]]]), rope_tables(config, jnp.array([1])))
    expected = [[[np.cos(1.0), np.cos(0.1), np.sin(1.0), np.sin(0.1)]]]
    np.testing.assert_allclose(turned, expected, rtol=1e-6)


def test_llama_3_scaling():
    """Fast pairs are left alone, slow ones divided by 8, the three between are interpolated."""
    plain = LlamaConfig(hidden_size=64, num_attention_heads=1, num_key_value_heads=1, rope_theta=500000.0)
    scaled = LlamaConfig(**vars(plain) | {"rope_scaling": RopeScaling()})
    ratio = np.asarray(rope_frequencies(plain) / rope_frequencies(scaled))
    turns = 8192 * np.asarray(rope_frequencies(plain)) / (2 * np.pi)  # in the original context
    np.testing.assert_allclose(ratio[turns > 4], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[turns < 1], 8, rtol=1e-6)
    between = (turns > 1) & (turns < 4)
    assert between.sum() == 3
    share = (turns[between] - 1) / 3
    np.testing.assert_allclose(1 / ratio[between], share + (1 - share) / 8, rtol=1e-5)


def test_head_counts_must_divide():
    with pytest.raises(ValueError, match=r"^num_attention_heads: expected a multiple of num_key.* \(4\), found 9"):
        LlamaConfig(hidden_size=576, num_attention_heads=9, num_key_value_heads=4)


def count(params) -> int:
    return sum(p.size for p in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("llama", "parameters"),
    [
        # Hugging Face's counts of these checkpoints.
        ("llama-2-7b", 6_738_415_616),
        ("llama-2-13b", 13_015_864_320),
        ("llama-3.1-8b", 8_030_261_248),
        ("smollm2-135m", 134_515_008),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824),
        ("mistral-7b", 7_248_023_552),
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2.5-3b", 3_085_938_688),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-1.7b", 1_720_574_976),
        ("qwen3-4b", 4_022_468_096),
        ("qwen3-8b", 8_190_735_360),
    ],
)
def test_language_presets_have_the_real_sizes(llama, parameters):
    config = VoCoConfig(llama=presets.LLAMA[llama], vision=presets.VIT["demo"], voco_token_id=0)
    _, params = abstract_model(config)
    assert count(params["llama"]) == parameters


@pytest.mark.parametrize(
    ("vision", "parameters", "patches"),
    [
        # transformers' counts, SigLIP's without the head that pools features.
        ("clip-vit-b-16", 85_799_424, 196),
        ("clip-vit-l-14", 303_179_776, 256),
        ("clip-vit-l-14-336", 303_507_456, 576),
        ("siglip-base-16-224", 85_797_120, 196),
        ("siglip-so400m-14-384", 412_987_248, 729),
        ("siglip2-base-16-256", 85_843_200, 256),
        ("siglip2-so400m-14-384", 412_987_248, 729),
    ],
)
def test_vision_presets_have_the_real_sizes(vision, parameters, patches):
    config = VoCoConfig(llama=presets.LLAMA["demo"], vision=presets.VIT[vision], voco_token_id=0)
    _, params = abstract_model(config)
    assert count(params["vision_tower"]) == parameters
    assert presets.VIT[vision].num_patches == patches


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(image_size=13), r"^image_size: expected at least patch_size \(14\), found 13"),
        (dict(hidden_size=1000), r"^hidden_size: expected a multiple of num_attention_heads \(16\), found 1000"),
        (dict(further_layers=(-1, 25)), "^further_layers: expected -25 to 24, found 25"),
        (dict(hidden_act="relu"), "^hidden_act: expected one of quick_gelu, gelu, gelu_tanh; found 'relu'"),
        (
            dict(class_token=False, select_feature="cls_patch"),
            "^select_feature: expected 'patch', as there is no class token; found 'cls_patch'",
        ),
        (dict(select_layer=-26), "^select_layer: expected -25 to 24, found -26"),
        (dict(select_feature="cls"), "^select_feature: expected one of patch, cls_patch; found 'cls'"),
    ],
)
def test_wrong_vision_dimensions(wrong, message):
    with pytest.raises(ValueError, match=message):
        ViTConfig(**wrong)


@pytest.mark.parametrize("tied", [False, True])
def test_padding_of_the_vocabulary_changes_nothing(tied):
    """The same logits; and no gradient goes into the rows that no token has, whatever stands in them."""
    plain = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    padded = dataclasses.replace(plain, vocab_multiple=32)
    assert (plain.padded_vocab_size, padded.padded_vocab_size) == (50, 64)
    rng, tokens = np.random.default_rng(0), np.array([[3, 49, 7], [0, 1, 2]])

    def make(config):
        graphdef, state = nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))
        return graphdef, jax.tree.map(lambda p: rng.normal(size=p.shape).astype(p.dtype), nnx.to_pure_dict(state))

    def logits(graphdef, params):
        model = nnx.merge(graphdef, params)
        return model.logits(model.embed_tokens(tokens))

    @jax.jit
    def both(params, narrow):
        loss = lambda params: jax.nn.logsumexp(logits(graphdef, params), axis=-1).sum()  # noqa: E731
        return logits(graphdef, params), logits(narrow_graphdef, narrow), jax.grad(loss)(params)

    (narrow_graphdef, narrow), (graphdef, params) = make(plain), make(padded)
    assert params["embed_tokens"]["embedding"].shape == (64, 16)
    params["embed_tokens"]["embedding"][:50] = narrow["embed_tokens"]["embedding"]
    params["norm"] = narrow["norm"]
    if not tied:
        assert params["lm_head"]["kernel"].shape == (16, 64)
        params["lm_head"]["kernel"][:, :50] = narrow["lm_head"]["kernel"]
    found, expected, gradients = jax.device_get(both(params, narrow))
    assert found.shape == (2, 3, 50)
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=1e-6)
    embedding = gradients["embed_tokens"]["embedding"]
    assert np.abs(embedding[:50]).max() > 0 and not embedding[50:].any()
    if not tied:
        head = gradients["lm_head"]["kernel"]
        assert np.abs(head[:, :50]).min(axis=0).all() and not head[:, 50:].any()


def test_dot_general_is_laxs():
    x, kernel = np.random.default_rng(0).normal(size=(2, 5, 3, 4)), np.random.default_rng(1).normal(size=(3, 4, 6, 2))
    axes = (((2, 3), (0, 1)), ((), ()))
    np.testing.assert_allclose(dot_general(x, kernel, axes), np.einsum("btnh,nhde->btde", x, kernel), rtol=1e-5)
    with pytest.raises(ValueError, match="expected tokens"):
        dot_general(x, kernel, (((1, 2), (0, 1)), ((), ())))


def test_linear_layers_lower_for_a_tpu_without_flattening():
    from flax import nnx

    layer = nnx.eval_shape(lambda: LinearGeneral(8, (2, 4), rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(layer)
    function = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
    x = jax.ShapeDtypeStruct((2, 16, 8), jnp.float32)
    assert "reshape" in function.trace(state, x).lower(lowering_platforms=("cpu",)).as_text()
    tpu = function.trace(state, x).lower(lowering_platforms=("tpu",)).as_text()
    assert "tensor<32x8xf32>" not in tpu and "dot_general" in tpu
