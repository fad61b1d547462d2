"""Decoding over slots and a cache is full recomputation under the dense mask, whatever stands beside it."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import oracle
from tests.models.test_two_streams import CONFIG, FAMILIES, PATCHES, VOCAB, make, make_model
from voco_jax.infer.generate import Sampling, SamplingState, StopIds, choose, decode, prefill
from voco_jax.models.voco import Cache, Memory, VoCoLlama

IMAGES, NEW, LATER, PLACES = 3, 64, 8, 128
# As one program: operation by operation, each test would compile a hundred
compress = nnx.jit(VoCoLlama.compress)
STOP = StopIds(jnp.array([-1]), jnp.int32(0))  # an id that never comes: all rows go on
# What each row of the batch says: texts of so many random words, and images by number
ROWS = [
    [("image", 1), ("text", 9)],
    [("text", 3), ("image", 2), ("text", 2), ("image", 0), ("image", 1), ("text", 4)],
    [("text", 5)],
    [("image", 2), ("text", 14)],
]
TURNS = [("text", 4), [("image", 0), ("text", 3)], ("text", 7), ("text", 1)]  # what each row says next
CASES = {
    "voco, Qwen3": dict(num_voco_tokens=2, llama=FAMILIES["Qwen3"]),
    "voco, unrolled, no grouped heads, Qwen2": dict(
        num_voco_tokens=1, unroll_layers=True, llama=dataclasses.replace(FAMILIES["Qwen2"], num_key_value_heads=4)
    ),
    "voco, Mistral v0.1": dict(num_voco_tokens=2, llama=FAMILIES["Mistral v0.1"]),
    "embeddings": dict(compressor="voco_embedding", num_voco_tokens=2),
    "uncompressed": dict(compressor="none"),
}


def make_features(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(1, IMAGES, PATCHES, 32)).astype(np.float32)


class Conversation:
    """One row as the oracle has it, growing; and what of it is new for the cache."""

    def __init__(self, config):
        self.config, self.parts, self.length = config, [], 0  # parts: (token, patch, segment, is_voco, compress place)
        self.segments = 0

    def say(self, parts, rng):
        """(tokens, positions, slot_index) of text, and (places, slots) of images, as `extend` and `fill` take them."""
        c, K = self.config, self.config.num_voco_tokens
        tokens, positions, slot_index, places, slots = [], [], [], [], []

        def put(token, index=-1):
            tokens.append(token), positions.append(self.length), slot_index.append(index)
            self.length += 1

        for kind, what in parts:
            if kind == "text":
                for token in rng.integers(4, VOCAB - 1, what) if isinstance(what, int) else what:
                    self.parts.append((int(token), (0, 0), -1, False, 0))
                    put(int(token))
            elif c.has_compress_stream:
                whole = [(t, (0, 0), self.segments, False) for t in c.prefix_ids]
                whole += [(-1, (what, p), self.segments, False) for p in range(PATCHES)]
                whole += [(t, (0, 0), self.segments, False) for t in c.suffix_ids]
                whole += [(c.voco_token_id, (0, 0), self.segments, True)] * K
                self.parts += [(*token, place) for place, token in enumerate(whole)]
                self.segments += 1
                if c.compressor == "voco_embedding":
                    for token in range(K):
                        put(c.voco_token_id, what * K + token)
                    continue
                places += range(self.length, self.length + K)
                slots += range(what * K, (what + 1) * K)
                self.length += K
            else:
                self.parts += [(-1, (what, p), -1, False, 0) for p in range(PATCHES)]
                for p in range(PATCHES):
                    put(0, what * PATCHES + p)
        return tokens, positions, slot_index, places, slots

    def sequence(self):
        token, patch, segment, is_voco, place = (np.array(column) for column in zip(*self.parts, strict=True))
        read = (segment < 0) | is_voco
        return oracle.Sequence(token, patch, segment, is_voco, place, np.cumsum(read) - 1)


def batch(said, width):
    """Of all rows, padded: (tokens, positions, slot_index) [R, width] and slots [R, PLACES]."""
    arrays = [np.full((len(said), width), fill, np.int32) for fill in (0, -1, -1)]
    slots = np.full((len(said), PLACES), -1, np.int32)
    for row, (*columns, places, which) in enumerate(said):
        for array, column in zip(arrays, columns, strict=True):
            array[row, : len(column)] = column
        slots[row, places] = which
    return *arrays, slots


@pytest.mark.parametrize("case", CASES)
def test_tokens_and_logits_over_two_turns(case):
    config = dataclasses.replace(CONFIG, **CASES[case])
    graphdef, params = make(config)
    rng = np.random.default_rng(1)
    features = make_features(1)
    in_slots = config.compressor == "voco"
    memory = compress(nnx.merge(graphdef, params), features) if config.has_compress_stream else features
    conversations = [Conversation(config) for _ in ROWS]

    @jax.jit
    def turn(params, tokens, positions, slot_index, slots, cache):
        model = nnx.merge(graphdef, params)
        if in_slots:
            cache = model.fill(memory, slots, cache)
        state, first = prefill(
            model, tokens, positions, cache, NEW, STOP, None, slot_index, None if in_slots else memory
        )
        return decode(model, state, jnp.int32(NEW)), first

    @jax.jit
    def one_more(params, token, position, cache):
        model = nnx.merge(graphdef, params)
        hidden, cache = model.extend(token[:, None], position[:, None], cache)
        return model.llama.logits(hidden)[:, 0], cache

    dense = jax.jit(lambda params, sequence: oracle.logits(params, config, sequence, jnp.array(features[0])))
    cache, width = nnx.merge(graphdef, params).empty_cache(len(ROWS), PLACES), 24
    for turn_number, parts_of_rows in enumerate((ROWS, TURNS)):
        parts_of_rows = [parts if isinstance(parts, list) else [parts] for parts in parts_of_rows]
        said = [c.say(parts, rng) for c, parts in zip(conversations, parts_of_rows, strict=True)]
        prompts = batch(said, width)
        new = NEW if turn_number == 0 else LATER
        state, logits = turn(params, *prompts, cache)
        output = np.asarray(state.output)[:, :new]
        # Once more, a token at a time, for the logits
        position = prompts[1].max(axis=1) + 1
        again, _ = turn(params, *prompts, cache)
        step_cache = again.cache
        found = [np.asarray(logits)]
        for i in range(new - 1):
            logits, step_cache = one_more(params, output[:, i], position + i, step_cache)
            found.append(np.asarray(logits))
        for row, conversation in enumerate(conversations):
            start = len(conversation.parts)
            conversation.say([("text", output[row].tolist())], rng)
            expected = np.asarray(dense(params, conversation.sequence().padded(160)))[start - 1 : start - 1 + new]
            np.testing.assert_array_equal(output[row], expected.argmax(-1))
            np.testing.assert_allclose(np.stack([x[row] for x in found]), expected, atol=1e-4, rtol=0)
        # Of the answer all is read but the last token, which the next turn begins with
        _, cache = one_more(params, output[:, new - 1], position + new - 1, step_cache)
    assert len(np.unique(output)) > 5  # or the comparison would say little


def test_long_prompts_of_fused_kernels_are_read_as_whole_rows(monkeypatch):
    """Slots in between, padding, and a second prompt after what is in the cache: as the other way, to rounding."""
    config = dataclasses.replace(CONFIG, num_voco_tokens=2, attention="splash")
    model, rng = make_model(config), np.random.default_rng(3)
    assert [model._reads_whole_rows(*sizes) for sizes in ((1, 64), (511, 512), (512, 640), (512, 641))] == [
        False, False, True, False,
    ]  # fmt: skip
    plain = make_model(dataclasses.replace(config, attention="xla"))
    assert not plain._reads_whole_rows(2048, 2048)
    memory = compress(plain, make_features(3))
    conversations = [Conversation(config) for _ in ROWS]
    monkeypatch.setattr(VoCoLlama, "_reads_whole_rows", lambda self, *sizes: self.config.attention == "splash")

    @nnx.jit
    def read(model, memory, tokens, positions, slot_index, slots, cache):
        return model.extend(tokens, positions, model.fill(memory, slots, cache), slot_index)

    caches = [model.empty_cache(len(ROWS), PLACES)] * 2
    for rows in (ROWS, [parts if isinstance(parts, list) else [parts] for parts in TURNS]):
        said = [c.say(parts, rng) for c, parts in zip(conversations, rows, strict=True)]
        tokens, positions, slot_index, slots = batch(said, 24)
        found = []
        for i, of in enumerate((model, plain)):
            hidden, caches[i] = jax.device_get(read(of, memory, tokens, positions, slot_index, slots, caches[i]))
            found.append(np.where(positions[..., None] >= 0, hidden, 0))
        np.testing.assert_allclose(*found, atol=2e-5)
        filled = np.arange(PLACES) < np.array([c.length for c in conversations])[:, None]
        for a, b in zip(*caches, strict=True):
            np.testing.assert_allclose(*(np.where(filled[..., None, None], x, 0) for x in (a, b)), atol=2e-5)


def test_padding_batch_mates_and_room_change_nothing():
    """A row's tokens do not depend on the rows beside it, the padding, or how long the cache is."""
    config = dataclasses.replace(CONFIG, num_voco_tokens=2)
    model, rng = make_model(config), np.random.default_rng(2)
    memory = compress(model, make_features(2))
    said = [Conversation(config).say(parts, rng) for parts in ROWS]

    @nnx.jit
    def generate(model, tokens, positions, slot_index, slots, sampling):
        cache = model.fill(memory, slots)
        state, _ = prefill(model, tokens, positions, cache, 6, STOP, sampling, slot_index, None)
        return decode(model, state, jnp.int32(6)).output

    def answer(rows, width, places, sampling):
        tokens, positions, slot_index, slots = batch([said[i] for i in rows], width)
        drawn = SamplingState(*map(np.float32, (1.0, 0, 1.0)), np.uint32(7), np.array(rows, np.uint32))
        slots = slots[:, :places]
        return np.asarray(generate(model, tokens, positions, slot_index, slots, drawn if sampling else None))

    for sampling in (False, True):
        together = answer([0, 1, 2, 3], 24, 64, sampling)
        for row in range(4):
            np.testing.assert_array_equal(answer([row], 16, 32, sampling)[0], together[row])


@pytest.mark.parametrize("compressor", ["voco", "voco_embedding"])
def test_a_memory_of_k_tokens_holds_those_of_fewer(compressor):
    """The first k of K tokens' keys and values, or embeddings, are those of compressing to k."""
    of = {}
    for k in (1, 2, 3):
        config = dataclasses.replace(CONFIG, compressor=compressor, num_voco_tokens=k)
        memory = compress(make_model(config), make_features(0))
        arrays = memory if compressor == "voco" else [memory[None].reshape(1, 1, IMAGES * k, -1)]
        of[k] = [np.reshape(m, (*m.shape[:2], IMAGES, k, *m.shape[3:])) for m in arrays]
    for k in (1, 2):
        for few, many in zip(of[k], of[3], strict=True):
            np.testing.assert_allclose(few, many[:, :, :, :k], atol=1e-5)
            assert np.abs(few).max() > 0.1


def test_filling_keeps_what_is_there():
    model, rng = make_model(dataclasses.replace(CONFIG, num_voco_tokens=2)), np.random.default_rng(0)
    old = Cache(*(rng.normal(size=(3, 1, 8, 2, 8)).astype(np.float32) for _ in range(2)))
    memory = Memory(*(rng.normal(size=(3, 1, 2, 2, 8)).astype(np.float32) for _ in range(2)))
    slots = np.array([[-1, -1, 1, -1, 0, -1, -1, -1]])
    filled = jax.device_get(nnx.jit(VoCoLlama.fill)(model, memory, slots, old))
    kept = [0, 1, 3, 5, 6, 7]
    for new, before in zip(filled, old, strict=True):
        np.testing.assert_array_equal(new[:, :, kept], before[:, :, kept])
    np.testing.assert_array_equal(filled.values[:, 0, [2, 4]], memory.values[:, 0, [1, 0]])
    assert not np.allclose(filled.keys[:, 0, 4], memory.keys[:, 0, 0])  # turned to their places


def test_sampling_draws_from_what_it_should():
    """Shares of 20,000 draws against the probabilities by hand."""
    logits = np.log(np.array([0.05, 0.4, 0.3, 0.2, 0.05], np.float32))

    draw = jax.jit(choose)

    def shares(**kwargs):
        s = Sampling(**{"temperature": 1.0} | kwargs)
        rows = 20_000
        sampling = SamplingState(
            *map(np.float32, (s.temperature, s.top_k, s.top_p)), np.uint32(s.seed), np.arange(rows)
        )
        drawn = draw(np.broadcast_to(logits, (rows, 5)), sampling, np.int32(3))
        return np.bincount(drawn, minlength=5) / rows

    np.testing.assert_allclose(shares(), [0.05, 0.4, 0.3, 0.2, 0.05], atol=0.015)
    np.testing.assert_allclose(shares(top_k=2), [0, 4 / 7, 3 / 7, 0, 0], atol=0.015)
    np.testing.assert_allclose(shares(top_p=0.75), [0, 4 / 9, 3 / 9, 2 / 9, 0], atol=0.015)  # 0.7 do not reach it
    np.testing.assert_allclose(shares(top_p=1e-6), [0, 1, 0, 0, 0], atol=0)
    squared = np.array([0.05, 0.4, 0.3, 0.2, 0.05]) ** 2
    np.testing.assert_allclose(shares(temperature=0.5), squared / squared.sum(), atol=0.015)
    assert (shares(seed=1) != shares(seed=2)).any() and (shares(seed=1) == shares(seed=1)).all()
