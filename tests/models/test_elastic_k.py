"""Reading the first k of an image's VoCo tokens is a model that compresses to k, in training and in inference."""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.test_two_streams import CONFIG, IMAGES, make, make_features, make_model
from voco_jax.chat_templates import CHAT_TEMPLATES
from voco_jax.data.conversations import Encoder
from voco_jax.data.packing import pack_row
from voco_jax.infer.engine import Engine
from voco_jax.infer.memory import Item, from_memory
from voco_jax.infer.prompts import Prompt, score
from voco_jax.models.read import HIDDEN, Read, first_tokens
from voco_jax.models.voco import VoCoLlama

K, NUMBERS, LENGTH = 4, (1, 3), 60  # each of two packs reads another number
# Of each pack two rows, of each row its conversations: (first of the pack's images, how many, the question)
ROWS = [
    [[(0, 1, "<image>\nis it red?"), (2, 2, "<image> a <image>\ncat?")], [(3, 1, "it is <image> red?")]],
    [[(1, 1, "<image>\nwhat?"), (0, 0, "red?")], [(0, 1, "<image>\na cat?"), (0, 1, "<image>\nis a cat red?")]],
]  # fmt: skip


@pytest.fixture(scope="module")
def encoder_of(small_tokenizer):
    """The prompts of a model that compresses to k."""
    bare = CHAT_TEMPLATES["bare"]
    return functools.cache(lambda k: Encoder(small_tokenizer, bare, k, k, compressed=True))


def config_of(encoder: Encoder):
    """A model for an encoder."""
    ids = {name: getattr(encoder.ids, name) for name in ("voco_token_id", "prefix_ids", "suffix_ids")}
    llama = dataclasses.replace(CONFIG.llama, vocab_size=len(encoder.tokenizer), num_hidden_layers=2)
    return dataclasses.replace(CONFIG, llama=llama, num_voco_tokens=encoder.num_voco_tokens, **ids)


def rows_of(encoder: Encoder, pack_: int) -> dict[str, np.ndarray]:
    """A pack's rows, as training has them."""
    rows = []
    for row in ROWS[pack_]:
        samples = [
            encoder.encode([{"from": "human", "value": text}, {"from": "gpt", "value": "a red cat"}], count)
            for _, count, text in row
        ]
        firsts = [first * encoder.num_visual_tokens for first, _, _ in row]
        rows.append(pack_row(samples, LENGTH, firsts).arrays())
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def read_of(rows: dict[str, np.ndarray]) -> Read:
    return Read(*(rows[name] for name in Read._fields))


def elastic_rows(encoder: Encoder) -> tuple[dict[str, np.ndarray], Read]:
    """Both packs' rows of K tokens, and how they are read: the first of `NUMBERS` of each."""
    packs = [rows_of(encoder, pack_) for pack_ in range(2)]
    rows = {name: np.concatenate([rows[name] for rows in packs]) for name in packs[0]}
    return rows, first_tokens(read_of(rows), jnp.array(NUMBERS), K)


def with_gradient(graphdef, read, features, labels, direction):
    """(logits [n, V] at the labels, gradients of a scalar of them by the parameters and the images' embeddings)."""

    def value(params, features):
        logits = nnx.merge(graphdef, params).forward(read, features)[labels]
        return (logits * direction).sum(), logits

    return jax.jit(jax.grad(value, (0, 1), has_aux=True))


@pytest.mark.slow
def test_training(encoder_of):
    """Logits at all labels, and the gradients of every parameter and of the images' embeddings."""
    features = make_features(2)
    rows, read = elastic_rows(encoder_of(K))
    labels = np.nonzero(rows["weights"])
    direction = np.random.default_rng(1).normal(size=(len(labels[0]), len(encoder_of(K).tokenizer))).astype(np.float32)
    graphdef, params = make(config_of(encoder_of(K)))
    (gradient, of_images), logits = with_gradient(graphdef, read, features, labels, direction)(params, features)
    expected, done = jax.tree.map(np.zeros_like, params), 0
    for pack_, k in enumerate(NUMBERS):
        short = rows_of(encoder_of(k), pack_)
        its_labels = np.nonzero(short["weights"])
        its = slice(done, done + len(its_labels[0]))
        done = its.stop
        graphdef, params = make(config_of(encoder_of(k)))
        its_features = features[pack_ : pack_ + 1]
        compute = with_gradient(graphdef, read_of(short), its_features, its_labels, direction[its])
        (its_gradient, its_of_images), its_logits = compute(params, its_features)
        np.testing.assert_allclose(logits[its], its_logits, atol=2e-5, rtol=2e-5)
        np.testing.assert_allclose(of_images[pack_], its_of_images[0], atol=2e-5, rtol=1e-4)
        expected = jax.tree.map(np.add, expected, its_gradient)
    assert done == len(labels[0]) > 20
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(1, np.abs(b).max())),
        gradient,
        expected,
    )


def test_slots_that_are_not_read(encoder_of):
    """They have no influence, to the last bit, and no gradient."""
    rows, read = elastic_rows(encoder_of(K))
    is_label = (rows["weights"] > 0)[..., None]
    model = make_model(config_of(encoder_of(K)))
    memory = nnx.jit(VoCoLlama.compress)(model, make_features(2))
    beyond = np.arange(IMAGES * K) % K >= np.array(NUMBERS)[:, None]  # [packs, I·K]
    other = jax.tree.map(lambda x: jnp.where(beyond[None, :, :, None, None], 100 - x, x), memory)
    compute = jax.jit(jax.value_and_grad(lambda memory: (jnp.where(is_label, model.read(read, memory), 0) ** 2).sum()))
    (value, gradient), (of_other, its_gradient) = compute(memory), compute(other)
    assert value == of_other
    jax.tree.map(np.testing.assert_array_equal, gradient, its_gradient)
    hidden = np.asarray(read.segment_ids) == HIDDEN
    assert (rows["slot_index"][hidden & (rows["segment_ids"] > 0)] % K >= 1).all()
    for of_memory in gradient:
        seen = np.abs(of_memory).max((0, 3, 4)) > 0
        assert not seen[beyond].any() and seen.any(axis=1).all()


@pytest.mark.parametrize("k", [1, 3])
def test_inference(encoder_of, k):
    """A memory of K tokens, of which the first k are read (`--tokens k`), scores as one that was made with k."""
    scores = []
    for tokens in (K, k):
        encoder = encoder_of(tokens)
        engine = Engine(make_model(config_of(encoder)), encoder)
        pixels = np.random.default_rng(0).normal(size=(1, 3, 8, 8, 3)).astype(np.float32)
        bank = from_memory(engine.encode_images(pixels), tokens, (Item(""),) * 3, "model").first_tokens(k)
        turns = [{"from": "human", "value": "<image>\nis it?"}, {"from": "gpt", "value": "a red cat"}]
        prompts = [Prompt(encoder_of(k).encode(turns, 1), bank[[i]]) for i in range(3)]
        scores.append([found.log_probability for found in score(engine, prompts)])
    np.testing.assert_allclose(*scores, rtol=2e-5)
    assert len(set(scores[0])) == 3
