"""Prefill and decoding of answers, token by token, over a cache of fixed size.

Decoding is one loop on the devices that runs for as many tokens as it is told: to the end for a batch of answers, a few
at a time for a stream. The answer of a row does not depend on the other rows of the batch.
"""

from collections.abc import Sequence
import dataclasses
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from voco_jax.errors import UserError
from voco_jax.models.voco import Cache, Memory, Read, VoCoLlama

Array = jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 takes the most likely one (greedy).

    Above 0, it is sampled from softmax(logits / temperature), among the `top_k` most likely tokens (0: all) and, of
    those, among the fewest whose probabilities sum to `top_p`. The same seed gives the same answers.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        for name, valid, expected in (
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("seed", 0 <= self.seed < 2**32, "0 … 2³² - 1"),
        ):
            if not valid:
                raise UserError(f"{name}: expected {expected}, found {getattr(self, name)}")


class SamplingState(NamedTuple):
    """A `Sampling` as arrays, of all rows, or [R] of each. `streams` [R]: each row draws from the random stream of this
    number."""

    temperature: Array
    top_k: Array
    top_p: Array
    seed: Array
    streams: Array


class StopIds(NamedTuple):
    """Token `ids` [S], each of which ends an answer. `padding` replaces it and fills the rest of the row."""

    ids: Array
    padding: Array


class DecodeState(NamedTuple):
    """R answers that are being decoded: all that `decode` needs.

    `output` [R, N] holds `num_tokens` tokens a row. The last of them is not in the cache yet: its position is
    `positions` [R]. A row that has `ended` is filled with `stop.padding` from its stop token on. `log_probabilities`
    float32 [R, N] are the tokens' (the stop token's too) under the model, in nats, whatever the temperature; 0 after
    the end. `sampling` is None for greedy decoding.
    """

    cache: Cache
    output: jax.Array
    log_probabilities: jax.Array
    num_tokens: jax.Array
    positions: jax.Array
    ended: jax.Array
    stop: StopIds
    sampling: SamplingState | None


def choose(logits: jax.Array, sampling: SamplingState | None, count: jax.Array) -> jax.Array:
    """Token ids [R] of logits [R, V]: the likeliest, or drawn, but for rows of temperature 0. `count`, of all rows or
    [R], tells a row's tokens apart."""
    greedy = logits.argmax(-1).astype(jnp.int32)
    if sampling is None:
        return greedy
    temperature, top_k, top_p, seed, streams, count = (
        jnp.broadcast_to(x, (len(logits),)) for x in (*sampling, count)
    )  # fmt: skip
    is_drawn = temperature > 0
    logits = logits / jnp.where(is_drawn, temperature, 1)[:, None]
    likeliest = -jnp.sort(-logits)
    k = jnp.where(top_k > 0, top_k, logits.shape[-1])[:, None]
    among_k = jnp.arange(logits.shape[-1]) < k
    probabilities = jax.nn.softmax(jnp.where(among_k, likeliest, -jnp.inf))
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # of the tokens that are likelier
    kept = among_k & (before < top_p[:, None])
    kept = kept.at[:, 0].set(True)
    least = jnp.where(kept, likeliest, jnp.inf).min(axis=-1, keepdims=True)

    def draw(logits, seed, stream, count):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), count)
        return jax.random.categorical(key, logits)

    drawn = jax.vmap(draw)(jnp.where(logits >= least, logits, -jnp.inf), seed, streams, count)
    return jnp.where(is_drawn, drawn, greedy).astype(jnp.int32)


def log_probability(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Of tokens [R] under logits [R, V], float32 [R]."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=1)


def prefill(
    model: VoCoLlama,
    tokens: jax.Array,
    positions: jax.Array,
    cache: Cache,
    max_new_tokens: int,
    stop: StopIds,
    sampling: SamplingState | None = None,
    slot_index: jax.Array | None = None,
    features: jax.Array | None = None,
) -> tuple[DecodeState, jax.Array]:
    """Write the prompts into the cache and choose the first token of each answer; arguments as `VoCoLlama.extend`'s.

    Returns the state to `decode`, and the logits [R, V] that the first tokens were chosen from. The cache needs room
    for max_new_tokens - 1 places after each prompt.
    """
    hidden, cache = model.extend(tokens, positions, cache, slot_index, features)
    last = positions.argmax(axis=1)
    logits = model.llama.logits(jnp.take_along_axis(hidden, last[:, None, None], axis=1))[:, 0]
    first = choose(logits, sampling, jnp.int32(0))
    sure = jnp.zeros((len(tokens), max_new_tokens), jnp.float32).at[:, 0].set(log_probability(logits, first))
    ended = (first[:, None] == stop.ids).any(axis=1)
    first = jnp.where(ended, stop.padding, first)
    output = jnp.full((len(tokens), max_new_tokens), stop.padding, jnp.int32).at[:, 0].set(first)
    state = DecodeState(cache, output, sure, jnp.int32(1), positions.max(axis=1) + 1, ended, stop, sampling)
    return state, logits


def decode(model: VoCoLlama, state: DecodeState, limit: jax.Array) -> DecodeState:
    """Append tokens until the answers have `limit` tokens each, or all have ended."""
    graphdef, params = nnx.split(model)

    def unfinished(state):
        return (state.num_tokens < limit) & ~state.ended.all()

    def step(state):
        model = nnx.merge(graphdef, params)
        token = jnp.take(state.output, state.num_tokens - 1, axis=1)
        hidden, cache = model.extend(token[:, None], state.positions[:, None], state.cache)
        logits = model.llama.logits(hidden)[:, 0]
        chosen = choose(logits, state.sampling, state.num_tokens)
        sure = jnp.where(state.ended, 0, log_probability(logits, chosen))
        ended = state.ended | (chosen[:, None] == state.stop.ids).any(axis=1)
        output = state.output.at[:, state.num_tokens].set(jnp.where(ended, state.stop.padding, chosen))
        sure = state.log_probabilities.at[:, state.num_tokens].set(sure)
        return state._replace(
            cache=cache, output=output, log_probabilities=sure, num_tokens=state.num_tokens + 1,
            positions=state.positions + 1, ended=ended,
        )  # fmt: skip

    return jax.lax.while_loop(unfinished, step, state)


def greedy(
    model: VoCoLlama, read: Read, lengths: jax.Array, visual: Memory | jax.Array | None,
    max_new_tokens: int, eos_token_id: int,
) -> jax.Array:  # fmt: skip
    """Greedy answers to prompts as training lays them out, a conversation a row: ids [R, max_new_tokens].

    `lengths` [R] are the prompts' (the rest of a row is padding), `visual` the images' memory, their embeddings
    without VoCo compression, or None for text alone. After its end-of-sequence token a row is filled with that token.
    """
    places = jnp.arange(read.tokens.shape[1])
    is_prompt = places < lengths[:, None]
    capacity = [(0, 0), (0, max_new_tokens)]
    if isinstance(visual, Memory):
        assert read.slot_index is not None, "a memory is read through slots"
        slots = jnp.where(is_prompt, read.slot_index, -1)
        cache = model.fill(visual, jnp.pad(slots, capacity, constant_values=-1))
        positions, features = jnp.where(is_prompt & (slots < 0), places, -1), None
    else:
        cache = model.empty_cache(len(lengths), len(places) + max_new_tokens)
        positions, features = jnp.where(is_prompt, places, -1), visual
    stop = StopIds(jnp.array([eos_token_id], jnp.int32), jnp.int32(eos_token_id))
    state, _ = prefill(model, read.tokens, positions, cache, max_new_tokens, stop, None, read.slot_index, features)
    return decode(model, state, jnp.int32(max_new_tokens)).output


def trim(ids: Sequence[int], stop: Sequence[int]) -> list[int]:
    """An answer's tokens up to its first stop token, which is left out."""
    ids = list(map(int, ids))
    ends = [i for i, token in enumerate(ids) if token in stop]
    return ids[: ends[0]] if ends else ids
