"""The compiled programs of continuous batching: what the devices do with the rows of one cache."""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from voco_jax.infer.generate import SamplingState, choose
from voco_jax.models.voco import Cache, Memory
from voco_jax.parallel.mesh import ROWS, constrain

Visual = Memory | jax.Array
# Of tokens: ids, log-probabilities, the likeliest tokens' ids, and theirs
Told = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


class Answers(NamedTuple):
    """Of R rows: the last token, which is not in the cache yet, and its place; how many tokens of the answer there are
    (`counts`), at most `limits`; and how they are drawn. Rows without an answer have `ended`. All [R]."""

    tokens: jax.Array
    positions: jax.Array
    counts: jax.Array
    limits: jax.Array
    ended: jax.Array
    sampling: SamplingState


class RowState(NamedTuple):
    """A cache of R rows, and the answers in them."""

    cache: Cache
    answers: Answers


class Programs(NamedTuple):
    """Each compiled once for a size. Rows beyond the end, by number, stand for none."""

    empty: Callable[..., RowState]
    resize: Callable[..., RowState]
    take: Callable[..., Cache]
    pad: Callable[..., Cache]
    room: Callable[..., Visual]
    place: Callable[..., Visual]
    embeddings: Callable[..., jax.Array]
    fill: Callable[..., Cache]
    extend: Callable[..., tuple[jax.Array, Cache]]
    put: Callable[..., tuple[RowState, Told]]
    decode: Callable[..., tuple[RowState, Told]]
    end: Callable[..., RowState]


@functools.lru_cache(maxsize=8)
def programs_of(graphdef: nnx.GraphDef) -> Programs:
    """Compiled once for all models of one architecture."""
    return Programs(
        empty=jax.jit(functools.partial(_empty, graphdef), static_argnums=(0, 1)),
        resize=jax.jit(_resize, static_argnums=0),
        take=jax.jit(_take),
        pad=jax.jit(_pad, static_argnums=0),
        room=jax.jit(_room, static_argnums=(0, 1, 2)),
        place=jax.jit(_place, donate_argnums=0),
        embeddings=jax.jit(lambda features: jnp.asarray(features)[None]),
        fill=jax.jit(functools.partial(_fill, graphdef), donate_argnums=1),
        extend=jax.jit(functools.partial(_extend, graphdef), donate_argnums=1),
        put=jax.jit(_put, static_argnums=(0, 1), donate_argnums=2),
        decode=jax.jit(functools.partial(_decode, graphdef), static_argnums=(0, 1, 2), donate_argnums=4),
        end=jax.jit(_end, donate_argnums=0),
    )


def _empty(graphdef, rows: int, places: int, params) -> RowState:
    cache = nnx.merge(graphdef, params).empty_cache(rows, places)
    none = jnp.zeros(rows, jnp.int32)
    real, unsigned = none.astype(jnp.float32), none.astype(jnp.uint32)
    sampling = SamplingState(real, none, real + 1, unsigned, unsigned)
    return RowState(cache, Answers(none, none, none, none, jnp.ones(rows, bool), sampling))


def _resize(places: int, state: RowState, rows: jax.Array) -> RowState:
    """These rows of the state, with so many places."""
    answers = jax.tree.map(lambda x: x.at[rows].get(mode="fill", fill_value=0), state.answers)
    ended = state.answers.ended.at[rows].get(mode="fill", fill_value=True)
    return RowState(_pad(places, _take(state.cache, rows)), answers._replace(ended=ended))


def _end(state: RowState, row: jax.Array) -> RowState:
    return state._replace(answers=state.answers._replace(ended=state.answers.ended.at[row].set(True)))


def _take(cache: Cache, rows: jax.Array) -> Cache:
    taken = (x.at[:, rows].get(mode="fill", fill_value=0) for x in cache)
    return Cache(*(constrain(x, None, ROWS, None, "tensor") for x in taken))


def _pad(places: int, cache: Cache) -> Cache:
    more = max(0, places - cache.keys.shape[2])
    return Cache(*(jnp.pad(x, [(0, 0), (0, 0), (0, more), (0, 0), (0, 0)])[:, :, :places] for x in cache))


def _room(kind: Any, tokens: int, images: int, like: Visual) -> Visual:
    """Zeros of a dtype, for so many images, or tokens of them, as `like` has one."""
    if isinstance(like, Memory):
        return Memory(*(jnp.zeros((*x.shape[:2], tokens, *x.shape[3:]), kind) for x in like))
    return jnp.zeros((1, images, *like.shape[2:]), kind)


def _place(room: Visual, image: Visual, at: jax.Array) -> Visual:
    """With an image, or several, from number `at` on: of its tokens, or of embeddings the image's."""
    axis = 2 if isinstance(image, Memory) else 1
    return jax.tree.map(
        lambda room, x: jax.lax.dynamic_update_slice_in_dim(room, x.astype(room.dtype), at, axis), room, image
    )


def _fill(graphdef, params, cache: Cache, memory: Memory, slots: jax.Array) -> Cache:
    return nnx.merge(graphdef, params).fill(memory, slots, cache)


def _extend(graphdef, params, cache: Cache, tokens, positions, slot_index, features) -> tuple[jax.Array, Cache]:
    """Logits [R, V] after the last token of each row, and the cache."""
    model = nnx.merge(graphdef, params)
    hidden, cache = model.extend(tokens, positions, cache, slot_index, features)
    last = positions.argmax(axis=1)
    return model.llama.logits(jnp.take_along_axis(hidden, last[:, None, None], axis=1))[:, 0], cache


def _told(logits: jax.Array, chosen: jax.Array, top: int) -> Told:
    sure = jax.nn.log_softmax(logits.astype(jnp.float32))
    likeliest, ids = jax.lax.top_k(sure, top) if top else (sure[:, :0], jnp.zeros((len(sure), 0), jnp.int32))
    return chosen, jnp.take_along_axis(sure, chosen[:, None], axis=1)[:, 0], ids, likeliest


def _put(
    is_drawn: bool, top: int, state: RowState, rows: jax.Array, cache: Cache, logits: jax.Array, lengths: jax.Array,
    limits: jax.Array, stop: jax.Array, sampling: SamplingState,
) -> tuple[RowState, Told]:  # fmt: skip
    """Prompts of so many tokens into these rows, and the first token of each answer."""
    first = choose(logits, sampling if is_drawn else None, jnp.int32(0))
    ended = (first[:, None] == stop).any(axis=1) | (limits <= 1)
    new = Answers(first, lengths, jnp.ones_like(first), limits, ended, sampling)
    answers = jax.tree.map(lambda old, x: old.at[rows].set(x, mode="drop"), state.answers, new)
    caches = (old.at[:, rows].set(x, mode="drop") for old, x in zip(state.cache, cache, strict=True))
    return RowState(Cache(*caches), answers), _told(logits, first, top)


def _decode(
    graphdef, is_drawn: bool, top: int, steps: int, params, state: RowState, stop: jax.Array, hurry: jax.Array
) -> tuple[RowState, Told]:  # fmt: skip
    """At most so many tokens more of each row that has not ended, ids -1 where there are none; with `hurry` until one
    ends. Each of what is told is [R, steps, …]."""
    rows, ended_before = len(state.answers.tokens), state.answers.ended
    told = (
        jnp.full((rows, steps), -1, jnp.int32), jnp.zeros((rows, steps), jnp.float32),
        jnp.zeros((rows, steps, top), jnp.int32), jnp.zeros((rows, steps, top), jnp.float32),
    )  # fmt: skip

    def unfinished(carry):
        i, (_, answers), _ = carry
        has_news = hurry & (answers.ended != ended_before).any()
        return (i < steps) & ~answers.ended.all() & ~has_news

    def step(carry):
        i, (cache, answers), told = carry
        model, had_ended = nnx.merge(graphdef, params), answers.ended
        positions = jnp.where(had_ended, -1, answers.positions)
        hidden, cache = model.extend(answers.tokens[:, None], positions[:, None], cache)
        logits = model.llama.logits(hidden)[:, 0]
        chosen = choose(logits, answers.sampling if is_drawn else None, answers.counts)
        ids, *rest = _told(logits, chosen, top)
        news = (jnp.where(had_ended, -1, ids), *rest)
        told = tuple(old.at[:, i].set(new) for old, new in zip(told, news, strict=True))
        counts = jnp.where(had_ended, answers.counts, answers.counts + 1)
        answers = answers._replace(
            tokens=jnp.where(had_ended, answers.tokens, chosen), positions=answers.positions + ~had_ended,
            counts=counts, ended=had_ended | (chosen[:, None] == stop).any(axis=1) | (counts >= answers.limits),
        )  # fmt: skip
        return i + 1, RowState(cache, answers), told

    _, state, told = jax.lax.while_loop(unfinished, step, (jnp.int32(0), state, told))
    return state, told
