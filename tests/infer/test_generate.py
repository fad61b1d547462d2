"""Greedy decoding with a cache is full recomputation, for every kind of visual tokens; and what `Engine` adds."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.test_two_streams import CONFIG, IMAGES, PATCHES, make, make_model
from voco_jax.chat_templates import CHAT_TEMPLATES
from voco_jax.data.conversations import Encoder
from voco_jax.infer.engine import GREEDY, Engine
from voco_jax.infer.generate import greedy
from voco_jax.models.stack import part_layers
from voco_jax.models.voco import Memory, Read

NEW = 6
EOS = 3


def prompts(rng, lengths, num_visual):
    """Random prompts of some lengths, padded; all but the last begin with the visual tokens of images 1 and 0."""
    size = max(lengths)
    read = Read(*np.zeros((4, len(lengths), size), np.int32))
    read.slot_index[:] = -1
    for row, n in enumerate(lengths):
        read.tokens[row, :n] = rng.integers(4, 49, n)
        read.segment_ids[row, :n] = 1
        read.positions[row] = np.arange(size)
        if row < len(lengths) - 1:
            both = np.arange(2 * num_visual)
            read.slot_index[row, 1 : 1 + len(both)] = (both + num_visual) % len(both)
    return read


@pytest.mark.parametrize("compressor", ["voco", "none", "average_pool", "qformer"])
def test_a_cache_changes_nothing(compressor):
    config = dataclasses.replace(CONFIG, compressor=compressor, num_voco_tokens=2)
    model, rng = make_model(config), np.random.default_rng(0)
    lengths = np.array([14, 11, 3])
    read = prompts(rng, lengths, config.num_visual_tokens)
    tokens_of_an_image = config.num_compressed_tokens if compressor in ("average_pool", "qformer") else PATCHES
    features = rng.normal(size=(3, IMAGES, tokens_of_an_image, 32)).astype(np.float32)

    @jax.jit
    def answered(read, lengths, features):
        return greedy(model, read, lengths, model.compress(features) if compressor == "voco" else features, NEW, -1)

    cached = np.asarray(answered(read, lengths, features))

    @jax.jit
    def recompute(tokens, segment_ids, slot_index):
        places = jnp.arange(tokens.shape[1])[None] * jnp.ones_like(tokens)
        return model.forward(Read(tokens, places, segment_ids, slot_index), features)

    full = Read(*(np.pad(x, [(0, 0), (0, NEW)]) for x in read))
    full.slot_index[:, -NEW:] = -1
    for step in range(NEW):
        logits = np.asarray(recompute(full.tokens, full.segment_ids, full.slot_index))
        for row, n in enumerate(lengths + step):
            full.tokens[row, n] = logits[row, n - 1].argmax()
            full.segment_ids[row, n] = 1
    recomputed = np.stack([full.tokens[row, n : n + NEW] for row, n in enumerate(lengths)])
    np.testing.assert_array_equal(cached, recomputed)
    assert len(np.unique(cached)) > 3  # or the comparison would say little


def test_a_row_that_has_ended_stays_ended():
    model, read = make_model(), prompts(np.random.default_rng(0), [8, 8], 1)
    features = np.zeros((2, IMAGES, PATCHES, 32), np.float32)
    answered = jax.jit(lambda eos: greedy(model, read, jnp.array([8, 8]), model.compress(features), NEW, eos))
    free = np.asarray(answered(-1))
    eos = int(free[0, 2])
    stopped = np.asarray(answered(eos))
    for before, after in zip(free, stopped, strict=True):
        end = np.flatnonzero(before == eos)
        n = end[0] if len(end) else NEW
        np.testing.assert_array_equal(after[:n], before[:n])
        assert (after[n:] == eos).all()
    assert (stopped[0] == eos).sum() >= NEW - 2


@pytest.fixture(scope="module")
def engine(small_tokenizer):
    llama = dataclasses.replace(CONFIG.llama, vocab_size=len(small_tokenizer))
    encoder = Encoder(small_tokenizer, CHAT_TEMPLATES["bare"], num_voco_tokens=1, num_visual_tokens=1, compressed=True)
    config = dataclasses.replace(CONFIG, llama=llama, voco_token_id=encoder.ids.voco_token_id)
    return Engine(make_model(config), encoder)


def answer(engine, questions, visual, rows, max_new_tokens):
    """About the one picture of row `rows[i]`."""
    prompts = [engine.encoder.encode_question(question, 1) for question in questions]
    return engine.generate(prompts, visual, [[row] for row in rows], max_new_tokens)


def test_each_question_is_answered_about_its_own_pictures(engine):
    """Together in one batch or alone, in any order: the same answers; another picture: another answer."""
    pixels = np.random.default_rng(0).normal(size=(2, 1, 8, 8, 3)).astype(np.float32)
    seen = engine.encode_images(pixels)
    assert isinstance(seen, Memory)
    questions = ["what is it?", "is it a red cat?", "what?", "what is it?"]
    together = answer(engine, questions, seen, [0, 0, 1, 1], 8)
    assert together[0] != together[3]
    for question, row, expected in zip(questions, [0, 0, 1, 1], together, strict=True):
        assert answer(engine, [question], engine.encode_images(pixels[row : row + 1]), [0], 8) == [expected]


def test_layers_parted_are_views_and_compute_the_same(engine):
    """On one CPU the engine reads each layer where it lies in the stack."""
    stacked = engine.params["llama"]["layers"]
    parted = part_layers(stacked)
    kernel, layers = stacked["gate_proj"]["kernel"], parted["gate_proj"]["kernel"]
    assert len(layers) == len(kernel) == 3
    np.testing.assert_array_equal(np.stack(layers), kernel)
    if kernel.nbytes // 3 % 64 == 0:  # where XLA's alignment allows
        addresses = [layer.unsafe_buffer_pointer() - kernel.unsafe_buffer_pointer() for layer in layers]
        assert addresses == [0, kernel.nbytes // 3, 2 * kernel.nbytes // 3]
    graphdef, _ = make(engine.config)
    inputs = jnp.array([[5, 6, 7]]), jnp.array([[0, 1, 2]])

    @jax.jit
    def hidden(params):
        model = nnx.merge(graphdef, params)
        return model.extend(*inputs, model.empty_cache(1, 4))[0]

    both = [hidden(engine.params | {"llama": engine.params["llama"] | {"layers": x}}) for x in (stacked, parted)]
    np.testing.assert_allclose(*both, rtol=1e-5, atol=1e-6)


def test_text_alone(engine):
    prompt = engine.encoder.encode_question("what is it?", 0)
    assert len(engine.generate([prompt], None, [[]], 4)) == 1


def test_any_of_several_tokens_ends_an_answer(engine):
    """In the place of each stands the padding, the tokenizer's own end; rows beside it go on."""
    prompts = [engine.encoder.encode_question(question, 0) for question in ("what is it?", "red?")]

    def ids(*stop_ids):
        encoder = dataclasses.replace(engine.encoder)
        object.__setattr__(
            encoder, "ids", dataclasses.replace(encoder.ids, stop_ids=(encoder.ids.eos_token_id, *stop_ids))
        )
        engine.encoder, before = encoder, engine.encoder
        state = engine.prefill(prompts, None, [[], []], 8, GREEDY, [0, 1])
        output = np.asarray(engine.decode(state, 8).output)[:2]
        engine.encoder = before
        return output

    free, eos = ids(), engine.encoder.ids.eos_token_id
    for row, column in ((0, 3), (1, 0)):
        stop = free[row, column]
        for before, after in zip(free, ids(stop), strict=True):
            end = np.flatnonzero(before == stop)
            n = end[0] if len(end) else 8
            np.testing.assert_array_equal(after, np.where(np.arange(8) < n, before, eos))
