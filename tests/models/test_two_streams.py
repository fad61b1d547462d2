"""The two streams are the one masked sequence: random layouts against the oracle, forward, gradient and by gradient."""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import oracle
from voco_jax.data.conversations import Sample
from voco_jax.data.packing import pack_row
from voco_jax.models import voco
from voco_jax.models.build import abstract_model
from voco_jax.models.llama import LlamaConfig
from voco_jax.models.vit import ViTConfig
from voco_jax.models.voco import Read, VoCoConfig, VoCoLlama

VOCAB, PATCHES, IMAGES, LENGTH = 50, 4, 4, 64
SEQUENCE_LENGTH = 48  # 6 words, and at most 4 images of 1 + 4 + 2 + 3 tokens
CONFIG = VoCoConfig(
    llama=LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    vision=ViTConfig(image_size=8, patch_size=4, hidden_size=16, intermediate_size=16, num_attention_heads=2,
                     num_hidden_layers=2),
    voco_token_id=VOCAB - 1,
    prefix_ids=(1,),
    suffix_ids=(2, 3),
)  # fmt: skip


@dataclasses.dataclass
class Layout:
    """A random row of the two streams and the same samples as sequences of the oracle."""

    read: Read
    sequences: list[oracle.Sequence]
    text_places: list[np.ndarray]  # where in the row each sequence's text tokens stand


def random_layout(rng: np.random.Generator, config: VoCoConfig, numbering: str) -> Layout:
    """A few samples in one row, each with 0 to 4 of the row's images anywhere between random text."""
    K, M = config.num_voco_tokens, config.num_visual_tokens
    samples, sequences, positions = [], [], []
    for _ in range(rng.integers(1, 4)):
        images = rng.choice(IMAGES, size=rng.integers(0, IMAGES + 1), replace=False)
        cuts = np.sort(rng.integers(0, 6, size=len(images)))
        text = rng.integers(4, VOCAB - 1, size=6)
        tokens, slot_index, parts = [], [], []  # parts: (token, patch, segment, is_voco, compress position)
        done = 0
        for segment, (image, cut) in enumerate(zip(images, cuts, strict=True)):
            for token in text[done:cut]:
                tokens.append(token), slot_index.append(-1), parts.append((token, (0, 0), -1, False, 0))
            done = cut
            if config.has_compress_stream:
                slots = [(config.voco_token_id, (0, 0), segment, True) for _ in range(K)]
                whole = [(t, (0, 0), segment, False) for t in config.prefix_ids]
                whole += [(-1, (image, p), segment, False) for p in range(PATCHES)]
                whole += [(t, (0, 0), segment, False) for t in config.suffix_ids] + slots
                parts += [(*token, place) for place, token in enumerate(whole)]
                tokens += [config.voco_token_id] * K
            else:  # in the open: patches are tokens of the read stream like any other
                parts += [(-1, (image, p), -1, False, 0) for p in range(PATCHES)]
                tokens += [0] * M
            slot_index += range(image * M, (image + 1) * M)
        for token in text[done:]:
            tokens.append(token), slot_index.append(-1), parts.append((token, (0, 0), -1, False, 0))
        if sum(map(len, samples)) + len(tokens) > LENGTH:
            break
        token, patch, segment, is_voco, place = (np.array(column) for column in zip(*parts, strict=True))
        read_place = (segment < 0) | is_voco
        read_position = np.arange(len(token)) if numbering == "released" else np.cumsum(read_place) - 1
        sequences.append(oracle.Sequence(token, patch, segment, is_voco, place, read_position))
        positions.append(read_position[read_place])
        samples.append(
            Sample(np.array(tokens, np.int32), np.ones(len(tokens), bool), np.array(slot_index, np.int32), len(images))
        )
    row = pack_row(samples, LENGTH)
    for i, position in enumerate(positions):
        row.positions[row.segment_ids == i + 1] = position
    places = [np.flatnonzero(row.segment_ids == i + 1) for i in range(len(samples))]
    if config.has_compress_stream:  # a slot has no output of its own
        places = [place[row.slot_index[place] < 0] for place in places]
    return Layout(Read(*(getattr(row, name)[None] for name in Read._fields)), sequences, places)


@functools.cache
def make(config: VoCoConfig):
    """A model with random parameters, norms' scales included: drawn by numpy, which has nothing to compile."""
    graphdef, shapes = abstract_model(config)
    rng = np.random.default_rng(0)

    def draw(path, p):
        return jnp.asarray((("scale" in str(path)) + 0.2 * rng.normal(size=p.shape)).astype(p.dtype))

    return graphdef, jax.tree_util.tree_map_with_path(draw, shapes)


def make_model(config: VoCoConfig = CONFIG) -> VoCoLlama:
    return nnx.merge(*make(config))


def make_features(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, IMAGES, PATCHES, 32)).astype(np.float32)


# As one program: operation by operation, each test would compile a hundred
forward = nnx.jit(VoCoLlama.forward)

FAMILIES = {
    name: dataclasses.replace(CONFIG.llama, **switches)
    for name, switches in {
        "Qwen2": dict(qkv_bias=True, tie_word_embeddings=True),
        "Qwen3": dict(qk_norm=True, head_dim=12),
        "Mistral v0.1": dict(sliding_window=5),
    }.items()
}
CASES = {
    "one VoCo token, tied embeddings": dict(llama=dataclasses.replace(CONFIG.llama, tie_word_embeddings=True)),
    "three VoCo tokens": dict(num_voco_tokens=3),
    "unrolled, no grouped heads, no prefix": dict(
        num_voco_tokens=2, unroll_layers=True, prefix_ids=(), suffix_ids=(2,),
        llama=dataclasses.replace(CONFIG.llama, num_key_value_heads=4),
    ),
    "embeddings": dict(compressor="voco_embedding", num_voco_tokens=3),
    "uncompressed": dict(compressor="none"),
    **{name: dict(num_voco_tokens=2, llama=llama) for name, llama in FAMILIES.items()},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_equals_the_oracle(case):
    """Logits at every text token, and the gradient of every parameter and image embedding, in float32."""
    config = dataclasses.replace(CONFIG, **CASES[case])
    graphdef, params = make(config)

    # A random direction in logit space makes a scalar, whose gradient is compared.
    def with_gradient(logits):
        def value(params, features, layout, direction):
            out = logits(params, features, layout)
            return (out * direction).sum(), out

        return jax.jit(jax.grad(value, argnums=(0, 1), has_aux=True))

    ours = with_gradient(lambda params, features, read: nnx.merge(graphdef, params).forward(read, features[None])[0])
    theirs = with_gradient(lambda params, features, sequence: oracle.logits(params, config, sequence, features))

    for seed in range(4):
        rng = np.random.default_rng(seed)
        layout = random_layout(rng, config, numbering="released" if seed % 2 else "compact")
        features = rng.normal(size=(IMAGES, PATCHES, 32)).astype(np.float32)
        direction = rng.normal(size=(LENGTH, VOCAB)).astype(np.float32)
        direction[~np.isin(np.arange(LENGTH), np.concatenate(layout.text_places))] = 0
        gradient, logits = jax.device_get(ours(params, features, layout.read, direction))
        assert np.isfinite(logits).all()

        expected_gradient = jax.tree.map(np.zeros_like, (params, features))
        for sequence, places in zip(layout.sequences, layout.text_places, strict=True):
            text = np.flatnonzero(sequence.segment < 0)
            its_direction = np.zeros((SEQUENCE_LENGTH, VOCAB), np.float32)
            its_direction[text] = direction[places]
            padded = sequence.padded(SEQUENCE_LENGTH)
            its_gradient, expected = jax.device_get(theirs(params, features, padded, its_direction))
            np.testing.assert_allclose(logits[places], expected[text], atol=2e-5, rtol=2e-5)
            expected_gradient = jax.tree.map(np.add, expected_gradient, its_gradient)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(1, np.abs(b).max())),
            gradient,
            expected_gradient,
        )


def test_the_mask_drawn():
    """BOS V V \\n VoCo VoCo | text text text: the released code's mask for one image at the front."""
    segment = np.array([0, 0, 0, 0, 0, 0, -1, -1, -1])
    is_voco = np.array([0, 0, 0, 0, 1, 1, 0, 0, 0], bool)
    zeros = np.zeros(9, int)
    drawn = oracle.Sequence(zeros, np.zeros((9, 2), int), segment, is_voco, zeros, zeros).allowed().astype(int)
    assert drawn.tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 1, 1, 1, 0],
        [0, 0, 0, 0, 1, 1, 1, 1, 1],
    ]


def two_samples() -> Read:
    """Two conversations in a row: one about image 0, one about image 1; images 2 and 3 nobody asks about."""

    def sample(tokens):
        labels = np.ones(len(tokens), bool)
        return Sample(np.array(tokens, np.int32), labels, np.array([0] + [-1] * (len(tokens) - 1), np.int32), 1)

    row = pack_row([sample([49, 5, 6, 7]), sample([49, 8, 9])], 10, first_slot=[0, 1])
    return Read(*(getattr(row, name)[None] for name in Read._fields))


def feature_gradients(config: VoCoConfig, read: Read, *places: slice) -> np.ndarray:
    """Size of the derivative of the logits at each of the places with respect to each image's embeddings:
    [places, images]."""
    model, weights = make_model(config), np.zeros((len(places), read.tokens.shape[1], 1), np.float32)
    for weight, place in zip(weights, places, strict=True):
        weight[place] = 1

    @jax.jit
    def gradients(features):
        value = lambda features, weight: (model.forward(read, features)[0] ** 2 * weight).sum()  # noqa: E731
        return jax.vmap(jax.grad(value), (None, 0))(features, weights)

    return np.abs(gradients(make_features(1))).sum((1, 3, 4))


@pytest.mark.parametrize("compressor", ["voco", "voco_embedding"])
def test_text_depends_on_its_own_image_through_the_slots_alone(monkeypatch, compressor):
    """Or through the embeddings that stand in their places."""
    config, read = dataclasses.replace(CONFIG, compressor=compressor), two_samples()
    gradients = feature_gradients(config, read, slice(1, 4), slice(5, 7))
    assert (gradients > 0).tolist() == [[True, False, False, False], [False, True, False, False]]
    fill = voco.fill_slots
    monkeypatch.setattr(voco, "fill_slots", lambda text, kept, i: fill(text, jax.lax.stop_gradient(kept), i))
    assert (feature_gradients(config, read, slice(None)) == 0).all()


def test_no_sample_of_a_row_sees_another():
    read, features, model = two_samples(), make_features(1), make_model()
    before = forward(model, read, features)[0]
    tokens, features = read.tokens.copy(), features.copy()
    tokens[0, :4] += 1
    features[0, 0] += 1
    other = forward(model, read._replace(tokens=tokens), features)[0]
    np.testing.assert_array_equal(before[4:7], other[4:7])
    assert (before[1:4] != other[1:4]).any()


def test_rows_that_share_images():
    """Two read rows over one row of images are the two rows with a copy of the images each."""
    model, features = make_model(), make_features(2, seed=1)
    read = Read(*(np.concatenate([x] * 4) for x in two_samples()))
    shared = forward(model, read, features)
    np.testing.assert_allclose(shared, forward(model, read, features.repeat(2, axis=0)), atol=1e-5)
    with pytest.raises(ValueError, match="3 read rows cannot share the images of 2 rows"):
        jax.eval_shape(model.forward, Read(*(x[:3] for x in read)), features)


def test_a_row_without_images_is_plain_text():
    model, read = make_model(), two_samples()
    read = read._replace(slot_index=np.full_like(read.slot_index, -1))
    call = nnx.jit(VoCoLlama.__call__)
    no_pixels = call(model, read, np.zeros((1, 0, 8, 8, 3), np.float32))
    np.testing.assert_array_equal(no_pixels, call(model, read, None))
    np.testing.assert_allclose(no_pixels, call(model, read, np.ones((1, 1, 8, 8, 3), np.float32)), atol=1e-5)


def test_computing_in_bfloat16():
    """Parameters stay float32, logits are float32; between them bfloat16, near the float32 numbers."""
    _, params = make(CONFIG)
    graphdef_bf16, _ = make(dataclasses.replace(CONFIG, dtype="bfloat16"))
    features = make_features(1)
    exact = np.asarray(forward(make_model(), two_samples(), features))
    model, features = nnx.merge(graphdef_bf16, params), features.astype(jnp.bfloat16)
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert jax.eval_shape(model.compress, features).keys.dtype == jnp.bfloat16
    rounded = np.asarray(forward(model, two_samples(), features))
    assert rounded.dtype == jnp.float32
    difference = np.abs(rounded - exact)[0, :7].max()
    assert 0 < difference < 0.05 * np.abs(exact).max()
