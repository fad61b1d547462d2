"""Text that reads images whole, beside the compress stream: against the oracle, and against the uncompressed model."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import oracle
from tests.models.test_two_streams import (
    CONFIG,
    IMAGES,
    LENGTH,
    PATCHES,
    VOCAB,
    forward,
    make,
    make_features,
    make_model,
)
from voco_jax.data.conversations import Sample
from voco_jax.data.packing import pack_row
from voco_jax.models.read import Read, first_tokens, whole_layout, whole_places
from voco_jax.models.voco import VoCoLlama, Whole

K = 2
TWO = dataclasses.replace(CONFIG, num_voco_tokens=K)
S = TWO.compress_length
CONVERSATIONS = [([1], [5, 6, 7]), ([2, 0], [8, 9]), ([1], [10]), ([], [11, 12])]  # images, words


def conversation(images, words, before=()):
    slots = [image * K + i for image in images for i in range(K)]
    tokens = [*before, *[VOCAB - 1] * len(slots), *words]
    slot_index = np.array([*[-1] * len(before), *slots, *[-1] * len(words)], np.int32)
    return Sample(np.array(tokens, np.int32), np.ones(len(tokens), bool), slot_index, len(images))


def make_read(conversations=CONVERSATIONS) -> Read:
    row = pack_row([conversation(*c) for c in conversations], LENGTH)
    return Read(*(getattr(row, name)[None] for name in Read._fields))


def as_sequence(images, words) -> oracle.Sequence:
    """All of the images' segments, which all text may see, at the places that they have in one long sequence."""
    parts = []  # token, patch, segment, seen by text, compress position, read position
    for segment, image in enumerate(images):
        tokens = [(t, (0, 0)) for t in TWO.prefix_ids] + [(-1, (image, p)) for p in range(PATCHES)]
        tokens += [(t, (0, 0)) for t in (*TWO.suffix_ids, *[VOCAB - 1] * K)]
        parts += [(*token, segment, True, place, segment * S + place) for place, token in enumerate(tokens)]
    parts += [(word, (0, 0), -1, False, 0, len(images) * S + i) for i, word in enumerate(words)]
    return oracle.Sequence(*(np.array(column) for column in zip(*parts, strict=True)))


@pytest.mark.parametrize("with_student", [False, True])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_equals_the_oracle(with_student, remat):
    """Logits of all text that is taught, and the gradient of every parameter and of the images' embeddings."""
    if remat == "full" and not with_student:
        return
    config = dataclasses.replace(TWO, remat=remat)
    graphdef, params = make(config)
    rng = np.random.default_rng(0)
    read, features = make_read(), rng.normal(size=(IMAGES, PATCHES, 32)).astype(np.float32)
    taught = np.asarray(whole_places(read, K, 4))[0]
    words = np.isin(read.tokens[0], range(5, 11))
    assert taught.tolist() == words.tolist()
    direction = rng.normal(size=(LENGTH, VOCAB)).astype(np.float32) * taught[:, None]

    def value(params, features):
        model = nnx.merge(graphdef, params)
        student, whole = read_both(model, read, features[None], Whole(4), compressed=with_student)
        assert (student is not None) == with_student
        logits = model.llama.logits(whole.hidden)[0]
        return (logits * direction).sum(), logits

    gradient, logits = jax.device_get(jax.jit(jax.grad(value, (0, 1), has_aux=True))(params, features))

    @jax.jit
    def theirs(params, features, sequence, direction):
        def value(params, features):
            logits = oracle.logits(params, config, sequence, features)
            return (logits * direction).sum(), logits

        return jax.grad(value, (0, 1), has_aux=True)(params, features)

    expected = jax.tree.map(np.zeros_like, (params, features))
    for i, (images, text) in enumerate(CONVERSATIONS[:3]):
        sequence, places = as_sequence(images, text).padded(40), np.flatnonzero(taught & (read.segment_ids[0] == i + 1))
        its_places = np.arange(len(images) * S, len(images) * S + len(text))
        its_direction = np.zeros((40, VOCAB), np.float32)
        its_direction[its_places] = direction[places]
        its_gradient, its_logits = jax.device_get(theirs(params, features, sequence, its_direction))
        np.testing.assert_allclose(logits[places], its_logits[its_places], atol=2e-5, rtol=2e-5)
        expected = jax.tree.map(np.add, expected, its_gradient)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(1, np.abs(b).max())),
        gradient,
        expected,
    )


def read_both(model: VoCoLlama, read, features, whole, **options):
    """`streams`, of images' embeddings in place of pixels."""
    model.encode_images = lambda pixels: pixels
    return model.streams(read, features, whole=whole, **options)


def test_one_image_is_the_uncompressed_model():
    """The same parameters with compressor 'none' and the VoCo tokens in the text; the student is not disturbed."""
    config, features, words = dataclasses.replace(TWO, compressor="none"), make_features(1), [5, 6, 7]
    tokens = [*TWO.prefix_ids, *[0] * PATCHES, *TWO.suffix_ids, *[VOCAB - 1] * K, *words]
    slot_index = np.full(len(tokens), -1, np.int32)
    slot_index[1 : 1 + PATCHES] = PATCHES + np.arange(PATCHES)  # of image 1
    row = pack_row([Sample(np.array(tokens, np.int32), np.ones(len(tokens), bool), slot_index, 1)], LENGTH)
    expected = forward(make_model(config), Read(*(getattr(row, name)[None] for name in Read._fields)), features)
    model, read = make_model(TWO), make_read(CONVERSATIONS[:1])
    both = nnx.jit(lambda model, features: read_both(model, read, features, Whole(1), layers=True))
    student, whole = both(model, features)
    logits = model.llama.logits(whole.hidden)
    np.testing.assert_allclose(logits[0, K : K + 3], expected[0, S : S + 3], atol=2e-5, rtol=2e-5)
    np.testing.assert_allclose(student.hidden, nnx.jit(VoCoLlama._hidden)(model, read, features), atol=1e-5)
    for out in (student, whole):
        assert out.layers.shape == (3, 1, LENGTH, 32)
        np.testing.assert_array_equal(out.layers[-1], out.hidden)


def test_what_is_not_taught():
    """Images for which there is no room, an image after text, text alone."""
    read = make_read([([1], [5]), ([2, 0], [6]), ([3], [7], [9]), ([], [8]), ([3], [10])])
    for most, expected in ((1, {5}), (2, {5}), (3, {5, 6}), (5, {5, 6, 10})):
        assert set(read.tokens[np.asarray(whole_places(read, K, most))].tolist()) == expected


def test_a_constant_stream_has_no_gradient():
    graphdef, params = make(TWO)

    def value(params, features, constant):
        model = nnx.merge(graphdef, params)
        _, whole = read_both(model, make_read(), features, Whole(4, constant), layers=True, queries=np.array([[3]]))
        return (whole.hidden**2).sum() + (whole.layers**2).sum() + (whole.attention**2).sum()

    for constant in (True, False):
        gradient = jax.jit(jax.grad(value, (0, 1)), static_argnums=2)(params, make_features(1), constant)
        llama = jax.tree.leaves(gradient[0]["llama"]["layers"])
        assert all((np.asarray(leaf) == 0).all() == constant for leaf in [*llama, gradient[1]])


def test_where_tokens_look():
    """Of the first layer, from the formula: softmax over an image's patches, mean over heads and over who looks."""
    model, features, read = make_model(TWO), make_features(1), make_read()
    queries = np.array([[K + 1, K + 2, 13, -1]])  # of the first conversation twice, of the third; nobody
    assert read.tokens[0, queries[0, :3]].tolist() == [6, 7, 10]
    both = nnx.jit(lambda model, features: read_both(model, read, features, Whole(4), queries=queries))
    student, whole = both(model, features)
    for out in (student, whole):
        assert out.attention.shape == (2, 1, IMAGES, PATCHES)
    np.testing.assert_allclose(student.attention.sum(-1), 1, atol=1e-6)
    np.testing.assert_allclose(whole.attention.sum(-1), [[[0, 1, 0, 0]]] * 2, atol=1e-6)

    params = jax.tree.map(lambda x: np.asarray(x[0], np.float64), make(TWO)[1]["llama"]["layers"])
    table = np.asarray(make(TWO)[1]["llama"]["embed_tokens"]["embedding"], np.float64)

    def project(x, name, positions):
        x = oracle.rms_norm(x, params["input_layernorm"]["scale"])
        return oracle.rotate(np.einsum("td,dnh->tnh", x, params[name]["kernel"]), positions, TWO.llama.rope_theta)

    def look(q, k):  # [Q, N, H], [P, G, H]
        k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
        weights = np.exp(np.einsum("qnh,pnh->qnp", q, k) / np.sqrt(q.shape[-1]))
        return (weights / weights.sum(-1, keepdims=True)).mean((0, 1))

    keys = project(np.asarray(features[0, 1], np.float64), "k_proj", 1 + np.arange(PATCHES))
    text = project(table[[6, 7, 10]], "q_proj", np.array([S + 1, S + 2, S]))
    np.testing.assert_allclose(whole.attention[0, 0, 1], look(text, keys), atol=1e-5)
    voco = project(table[[VOCAB - 1] * K], "q_proj", np.array([S - 2, S - 1]))
    np.testing.assert_allclose(student.attention[0, 0, 1], look(voco, keys), atol=1e-5)


def test_the_first_tokens_of_a_row():
    """In numbers, and that the hidden slots of a row have no influence."""
    read = make_read([([1], [5, 6]), ([2, 0], [7], [8])])
    first = first_tokens(read, jnp.array([1]), K)
    assert np.asarray(first.segment_ids)[0, :10].tolist() == [1, 0, 1, 1, 2, 2, 0, 2, 0, 2]
    positions = np.where(first.segment_ids > 0, first.positions, -1)
    assert positions[0, :10].tolist() == [0, -1, 1, 2, 0, 1, -1, 2, -1, 3]
    all_of_it = first_tokens(read, jnp.array([K]), K)
    for name in Read._fields:
        np.testing.assert_array_equal(getattr(all_of_it, name), getattr(read, name))


@pytest.mark.parametrize("compressor", ["voco", "voco_embedding"])
def test_fewer_tokens_are_a_model_that_compresses_to_fewer(compressor):
    """In training's rows: the same logits, read through the VoCo tokens and whole; hidden slots have no gradient."""
    two = dataclasses.replace(TWO, compressor=compressor)
    one = dataclasses.replace(two, num_voco_tokens=1)
    features, conversations = make_features(1), CONVERSATIONS[:2]
    first = first_tokens(make_read(conversations), jnp.array([1]), K)
    short = [conversation(images, words) for images, words in conversations]
    for sample in short:
        keep = (sample.slot_index < 0) | (sample.slot_index % K == 0)
        sample.tokens, sample.labels, sample.slot_index = (
            x[keep] for x in (sample.tokens, sample.labels, np.where(sample.slot_index < 0, -1, sample.slot_index // K))
        )
    row = pack_row(short, LENGTH)
    expected = nnx.jit(VoCoLlama._hidden)(
        make_model(one), Read(*(getattr(row, name)[None] for name in Read._fields)), features
    )
    found, _ = nnx.jit(lambda model, features: read_both(model, first, features, None))(make_model(two), features)
    is_text = [np.flatnonzero((ids > 0) & (slots < 0)) for ids, slots in (
        (np.asarray(first.segment_ids[0]), first.slot_index[0]), (row.segment_ids, row.slot_index))]  # fmt: skip
    np.testing.assert_allclose(found.hidden[0, is_text[0]], expected[0, is_text[1]], atol=2e-5, rtol=2e-5)

    model = make_model(two)
    value = lambda memory: (model.read(first, memory)[0, is_text[0]] ** 2).sum()  # noqa: E731
    for gradient in jax.tree.leaves(jax.jit(jax.grad(value))(nnx.jit(VoCoLlama.compress)(model, features))):
        gradient = gradient.swapaxes(0, 2) if compressor == "voco" else gradient  # tokens first
        seen = np.abs(gradient).reshape(IMAGES * K, -1).max(1) > 0
        assert seen.tolist() == [True, False, True, False, True, False, False, False]


def test_beside_memories_of_embeddings():
    """The student is the model's own; what is read whole is the function of the model of keys and values."""
    features, read, queries = make_features(1), make_read(), np.array([[K + 1]])
    config = dataclasses.replace(TWO, compressor="voco_embedding")
    graphdef, params = make(config)
    model = nnx.merge(graphdef, params)
    of_voco = nnx.merge(make(TWO)[0], {part: params[part] for part in params if part != "compressor"})
    both = nnx.jit(lambda model, features: read_both(model, read, features, Whole(4), layers=True, queries=queries))
    (student, whole), (of_other, expected) = both(model, features), both(of_voco, features)
    np.testing.assert_allclose(student.hidden, nnx.jit(VoCoLlama._hidden)(model, read, features), atol=1e-5)
    np.testing.assert_allclose(student.attention, of_other.attention, atol=1e-5)
    assert student.layers.shape == whole.layers.shape and np.abs(student.hidden - of_other.hidden).max() > 0.1
    for found, other in zip(whole, expected, strict=True):
        np.testing.assert_allclose(found, other, atol=2e-5)
    teacher = nnx.jit(lambda model, features: read_both(model, read, features, Whole(4), compressed=False))
    none, alone = teacher(model, features)
    assert none is None
    np.testing.assert_allclose(alone.hidden, whole.hidden, atol=2e-5)


def test_whole_reading_needs_a_compress_stream():
    model = make_model(dataclasses.replace(CONFIG, compressor="none"))
    with pytest.raises(ValueError, match="needs 'voco' or 'voco_embedding', found 'none'"):
        model.streams(make_read(), None, whole=Whole(1))


def test_rows_without_images():
    """Nobody is taught; what is read whole is then plain text."""
    read = make_read([([], [5, 6, 7])])
    student, whole = make_model(TWO).streams(read, None, whole=Whole(1), queries=np.array([[0]]))
    np.testing.assert_array_equal(student.hidden, whole.hidden)
    assert not np.asarray(whole_layout(read, K, 1, S).taught).any()
