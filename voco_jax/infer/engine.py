"""The engine: compiled programs that encode images and answer questions about them, for inputs of a few sizes."""

from collections.abc import Callable, Generator, Sequence
import contextlib
import copy
import dataclasses
import functools
import threading
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from voco_jax.data.conversations import Encoder, Sample
from voco_jax.errors import UserError
from voco_jax.infer.generate import DecodeState, Sampling, SamplingState, StopIds, decode, prefill, trim
from voco_jax.infer.memory import EncodedImages, MemoryBank
from voco_jax.infer.text_stream import Detokenizer
from voco_jax.models.stack import part_layers
from voco_jax.models.voco import Cache, Memory, VoCoLlama
from voco_jax.parallel.mesh import ROWS, axis_size

# Encoded images as the model reads them: keys and values, or embeddings [B, I, M, D]; None: no images
Visual = Memory | jax.Array | None
GREEDY = Sampling()
PIECE = 16  # tokens that are decoded before a batch is searched for the texts that end an answer


class Prompts(NamedTuple):
    """A batch of prompts, int32: tokens, positions, slot_index [R, T] and slots [R, C], as in `extend` and `fill`.

    Keys and values stand in `slots`, and only text in `tokens`; embeddings stand among the tokens.
    """

    tokens: np.ndarray
    positions: np.ndarray
    slot_index: np.ndarray
    slots: np.ndarray


class GeneratedAnswer(NamedTuple):
    """An answer's text, and the log-probabilities [N] of its tokens, with the one that ended it, under the model (nats,
    whatever the temperature)."""

    text: str
    log_probabilities: np.ndarray


class Score(NamedTuple):
    """How likely an answer is: the sum of its tokens' log-probabilities (nats), their number, and whether greedy
    decoding would choose each of them. The end-of-sequence token counts as one."""

    log_probability: float
    num_tokens: int
    is_greedy: bool


class Engine:
    """A model with its tokenizer and prompt rules: encodes images, and answers questions about them.

    Shapes are padded to a few sizes, so that questions of any length compile a few times only. Over a `mesh` (enter
    `on_mesh` around each call) all processes ask the same, and all have the answers. `timestamps`: the frames of a
    video are given with their times. `params` are the model's parameters, a nested dict; others of the same shapes may
    replace them.
    """

    def __init__(
        self, model: VoCoLlama, encoder: Encoder, mesh: Mesh | None = None, timestamps: bool = False
    ):  # fmt: skip
        self.encoder, self.mesh, self.timestamps = encoder, mesh, timestamps
        self.config = model.config
        self.graphdef, state = nnx.split(model)
        self._is_one_cpu = mesh is None and jax.default_backend() == "cpu"
        self.params = nnx.to_pure_dict(state)
        self._encode_images, self._prefill, self._decode, self._score = _programs(self.graphdef)
        self.whole = np.asarray if mesh is None else jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))

    @property
    def params(self) -> dict:
        return self._params

    @params.setter
    def params(self, params: dict) -> None:
        self._params = self.parted = params
        self._by_tokens: dict[int, Engine] = {}  # copies with these parameters
        # Shapes alone may be given first, as training does
        if self._is_one_cpu and all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params)):
            llama = params["llama"]
            self.parted = params | {"llama": llama | {"layers": part_layers(llama["layers"])}}

    def on_mesh(self) -> contextlib.AbstractContextManager:
        """Makes the engine's mesh the ambient one."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def for_images(self, *images: EncodedImages | None) -> "Engine":
        """This engine for memories with fewer tokens each; the number is that of the first memory given. Prompts are
        others, compiled programs the same."""
        tokens = next((one.num_tokens for one in images if isinstance(one, MemoryBank)), None)
        return self if tokens is None else self.for_tokens(tokens)

    def for_tokens(self, tokens: int) -> "Engine":
        """This engine for memories with so many tokens each."""
        if tokens == self.encoder.num_visual_tokens:
            return self
        if tokens not in self._by_tokens:
            engine = self._by_tokens[tokens] = copy.copy(self)
            engine.encoder = dataclasses.replace(self.encoder, num_voco_tokens=tokens, num_visual_tokens=tokens)
        return self._by_tokens[tokens]

    def encode_images(self, pixel_values: np.ndarray | jax.Array) -> Memory | jax.Array:
        """Encode images [B, I, height, width, 3]: to their memory, or without VoCo tokens to embeddings.

        Over a mesh, B and I must be multiples of the devices along the rows' axes and along the frame axis.
        """
        return self._encode_images(self.parted, pixel_values)

    def generate(
        self, prompts: Sequence[Sample], visual: Visual, pictures: Sequence[Sequence[int]], max_new_tokens: int,
        sampling: Sampling = GREEDY, until: Sequence[str] = (), streams: Sequence[int] | None = None,
    ) -> list[str]:  # fmt: skip
        """Texts of `answers`."""
        given = self.answers(prompts, visual, pictures, max_new_tokens, sampling, until, streams)
        return [answer.text for answer in given]

    def answers(
        self, prompts: Sequence[Sample], visual: Visual, pictures: Sequence[Sequence[int]], max_new_tokens: int,
        sampling: Sampling = GREEDY, until: Sequence[str] = (), streams: Sequence[int] | None = None,
    ) -> list[GeneratedAnswer]:  # fmt: skip
        """Answers to encoded prompts. An answer ends before the first of the texts `until` that occurs in it.

        `pictures[i]` are the images of prompt i, in its order, as indices into all B·I that `encode_images` returned.
        `streams[i]` numbers the random stream of prompt i (default: 0, 1, …). UserError for more tokens than the model
        has positions.
        """
        streams = range(len(prompts)) if streams is None else streams
        state = self.prefill(prompts, visual, pictures, max_new_tokens, sampling, streams)
        limit = min(PIECE, max_new_tokens) if until else max_new_tokens
        while True:
            state = self.decode(state, limit)
            answers = np.asarray(self.whole(state.output))[: len(prompts), :limit]
            ended = np.asarray(self.whole(state.ended))[: len(prompts)]
            if limit == max_new_tokens or all(
                is_whole or any(end in self.sure_text(ids.tolist()) for end in until)
                for ids, is_whole in zip(answers, ended, strict=True)
            ):
                sure = np.asarray(self.whole(state.log_probabilities))
                return [self._answer(ids.tolist(), row, until) for ids, row in zip(answers, sure, strict=False)]
            limit = min(limit + PIECE, max_new_tokens)

    def score(self, samples: Sequence[Sample], visual: Visual, pictures: Sequence[Sequence[int]]) -> list[Score]:
        """Of encoded conversations, how likely their labels (the answers) are; other arguments as `generate`'s."""
        self.check_length(max(map(len, samples)), 0)
        batch = self._batch_size(len(samples))
        order = [*range(len(samples)), *[0] * (batch - len(samples))]
        in_slots = isinstance(visual, Memory)
        laid_out = self._lay_out(
            [samples[i] for i in order], [np.asarray(pictures[i], np.int32) for i in order], 0, 0, in_slots, None
        )
        length = bucket(max(int(sample.labels.sum()) for sample in samples), 8)
        before, labels = np.zeros((batch, length), np.int32), np.full((batch, length), -1, np.int32)
        for row, i in enumerate(order):
            in_text = samples[i].slot_index < 0 if in_slots else slice(None)
            places = np.flatnonzero(samples[i].labels[in_text])
            before[row, : len(places)] = places - 1  # where a label is predicted
            labels[row, : len(places)] = samples[i].tokens[in_text][places]
        scores = self._score(visual is None, self.params, _in_one_row(visual), laid_out, before, labels)
        total, is_greedy = (np.asarray(self.whole(x)) for x in scores)
        counts = (labels >= 0).sum(axis=1)
        return [Score(float(total[i]), int(counts[i]), bool(is_greedy[i])) for i in range(len(samples))]

    # ---- What a conversation of several turns is made of -------------------------------------------------------

    def prefill(
        self, prompts: Sequence[Sample], visual: Visual, pictures: Sequence[Sequence[int]], max_new_tokens: int,
        sampling: Sampling, streams: Sequence[int], past: tuple[Cache, int] | None = None,
    ) -> DecodeState:  # fmt: skip
        """The first token of every answer; arguments as `generate`'s. `past`: a cache of one row with room for all
        that comes, and how many places of it are filled."""
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens: expected at least 1, found {max_new_tokens}")
        self.check_length(max(map(len, prompts)) + (past[1] if past else 0), max_new_tokens)
        cache, filled = past or (None, 0)
        # Where every prompt has a row of pictures to itself, these stay on the devices that have its row
        rows = count = 0  # of pictures, and pictures in a row
        if isinstance(visual, Memory):
            rows, count = visual.keys.shape[1], visual.keys.shape[2] // self.encoder.num_visual_tokens
        elif visual is not None:
            rows, count = visual.shape[:2]
        apart = count > 0 and rows == len(prompts) and cache is None
        apart = apart and len(prompts) % axis_size(*ROWS) == 0  # else rows are added, as for every later turn
        apart = apart and all(p // count == row for row, of_prompt in enumerate(pictures) for p in of_prompt)
        batch = len(prompts) if apart else self._batch_size(len(prompts))
        order = [*range(len(prompts)), *[0] * (batch - len(prompts))]  # filled up with the first prompt, which ends too
        laid_out = self._lay_out(
            [prompts[i] for i in order],
            [np.asarray(pictures[i], np.int32) % count if apart else np.asarray(pictures[i], np.int32) for i in order],
            max_new_tokens, filled, isinstance(visual, Memory), None if cache is None else cache.keys.shape[2],
        )  # fmt: skip
        stop = StopIds(np.array(self.encoder.stop_ids, np.int32), np.array(self.encoder.ids.eos_token_id, np.int32))
        drawn = None
        if sampling.temperature:
            drawn = SamplingState(
                np.array(sampling.temperature, np.float32), np.array(sampling.top_k, np.int32),
                np.array(sampling.top_p, np.float32), np.array(sampling.seed, np.uint32),
                np.array([streams[i] for i in order], np.uint32),
            )  # fmt: skip
        if not apart:
            visual = _in_one_row(visual)
        return self._prefill(max_new_tokens, visual is None, self.parted, visual, laid_out, stop, drawn, cache)

    def decode(self, state: DecodeState, limit: int) -> DecodeState:
        """Append tokens until the answers have `limit` tokens each, or all have ended. The state given is used up."""
        return self._decode(self.parted, state, np.int32(limit))

    def stream(self, state: DecodeState, keep: Callable[[DecodeState, int], None]) -> Generator[str, None, None]:
        """The text of one answer in pieces, each as soon as no later token can change it. Joined, they are the answer.

        At the end, or where the caller stops or is interrupted, `keep` is called with the state and the number of its
        tokens that were read: the state is one token ahead.
        """
        length, said, read = state.output.shape[1], "", 0
        stop_ids = np.asarray(state.stop.ids)
        try:
            for count in range(1, length + 1):
                if count < length:
                    state = self.decode(state, count + 1)
                ids = np.asarray(state.output)[0, :count]
                ended, read = bool(np.isin(ids, stop_ids).any()), count
                text = self.text(ids.tolist()) if ended or count == length else self.sure_text(ids.tolist())
                if len(text) > len(said):
                    yield text[len(said) :]
                    said = text
                if ended:
                    break
        finally:
            if read and not state.output.is_deleted():  # it is where an interruption comes while it is decoded
                keep(state, read)

    def _answer(self, ids: list[int], log_probabilities: np.ndarray, until: Sequence[str]) -> GeneratedAnswer:
        count = min(len(self._until_end(ids)) + 1, len(ids))
        if until:  # only the tokens up to the text that ends it
            ends = (n for n in range(1, count) if any(end in self.text(ids[:n]) for end in until))
            count = next(ends, count)
        return GeneratedAnswer(_cut(self.text(ids), until), log_probabilities[:count])

    def text(self, ids: Sequence[int]) -> str:
        """An answer's text, of its tokens up to the end-of-sequence token."""
        return self._detokenizer.text(self._until_end(ids))

    def sure_text(self, ids: Sequence[int]) -> str:
        """The text that an answer with these first tokens begins with, whatever tokens follow."""
        return self._detokenizer.sure(self._until_end(ids))

    def token(self, i: int) -> tuple[str, bytes | None]:
        """A token's text, with the space before it, and its bytes, None where it is some of a letter's."""
        return self._detokenizer.token(i)

    @functools.cached_property
    def _detokenizer(self) -> Detokenizer:
        return Detokenizer(self.encoder.tokenizer)

    def _until_end(self, ids: Sequence[int]) -> list[int]:
        return trim(ids, [self.encoder.ids.eos_token_id])  # which stands in the place of any stop token

    def check_length(self, tokens: int, max_new_tokens: int) -> None:
        """UserError where a prompt and its answer are longer than the model has positions."""
        positions = self.config.llama.max_position_embeddings
        if tokens + max_new_tokens > positions:
            raise UserError(
                f"question: expected at most {positions} tokens with the answer (max_position_embeddings), "
                f"found {tokens} and {max_new_tokens} for the answer"
            )

    # ---- Shapes ------------------------------------------------------------------------------------------------

    def _batch_size(self, prompts: int) -> int:
        together = axis_size(*ROWS)
        return -(-bucket(prompts, 1) // together) * together

    def _lay_out(
        self, prompts: Sequence[Sample], pictures: Sequence[np.ndarray], max_new_tokens: int, filled: int,
        in_slots: bool, capacity: int | None,
    ) -> Prompts:  # fmt: skip
        """Arrays of prompts that begin at place `filled` of a cache, about pictures by their numbers."""
        limit, per_image = self.config.llama.max_position_embeddings, self.encoder.num_visual_tokens
        in_text = [(p.slot_index < 0) if in_slots else np.ones(len(p), bool) for p in prompts]
        length = bucket(max(int(keep.sum()) for keep in in_text), 16)
        if capacity is None:
            capacity = min(bucket(filled + max(map(len, prompts)) + max_new_tokens, 32), limit)
        arrays = Prompts(
            np.zeros((len(prompts), length), np.int32),
            np.full((len(prompts), length), -1, np.int32),
            np.full((len(prompts), length), -1, np.int32),
            np.full((len(prompts), capacity), -1, np.int32),
        )
        for row, (prompt, keep, which) in enumerate(zip(prompts, in_text, pictures, strict=True)):
            n, places = int(keep.sum()), filled + np.arange(len(prompt))
            slot_index, is_slot = prompt.slot_index.copy(), prompt.slot_index >= 0
            image, token = divmod(slot_index[is_slot], per_image)
            slot_index[is_slot] = which[image] * per_image + token
            arrays.tokens[row, :n], arrays.positions[row, :n] = prompt.tokens[keep], places[keep]
            if in_slots:
                arrays.slots[row, places] = slot_index
            else:
                arrays.slot_index[row, :n] = slot_index
        return arrays


_DEVICE = threading.Lock()


def _one_at_a_time(program: Callable) -> Callable:
    """The program for callers in several threads. On a GPU compiling one program breaks the capture of another one's
    CUDA graph, so none is compiled or started while another is; what has been started runs on beside."""

    def call(*arguments):
        with _DEVICE:
            return program(*arguments)

    return call


@functools.lru_cache(maxsize=8)
def _programs(graphdef: nnx.GraphDef) -> tuple[Callable, Callable, Callable, Callable]:
    """Encoding, prefill, decoding and scoring, compiled once for all engines of one architecture."""
    return (
        _one_at_a_time(jax.jit(functools.partial(_encode_images, graphdef))),
        _one_at_a_time(jax.jit(functools.partial(_prefill, graphdef), static_argnums=(0, 1))),
        _one_at_a_time(jax.jit(functools.partial(_decode, graphdef), donate_argnums=1)),
        _one_at_a_time(jax.jit(functools.partial(_score, graphdef), static_argnums=0)),
    )


def grow_cache(cache: Cache, places: int) -> Cache:
    """The cache with room for so many places."""
    room = places - cache.keys.shape[2]
    return (
        cache if room <= 0 else Cache(*(jax.numpy.pad(x, [(0, 0), (0, 0), (0, room), (0, 0), (0, 0)]) for x in cache))
    )


def bucket(n: int, smallest: int) -> int:
    """The next of 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, … from `smallest` on: few sizes, and none a quarter too large."""
    if n <= smallest:
        return smallest
    step = max(1, 1 << (n - 1).bit_length() >> 3)
    return -(-n // step) * step


def _encode_images(graphdef, params, pixel_values):
    model = nnx.merge(graphdef, params)
    features = model.encode_images(pixel_values)
    return model.compress(features) if model.config.has_compress_stream else features


def _prefill(graphdef, max_new_tokens, text_alone, params, visual, prompts: Prompts, stop, sampling, cache):
    model = nnx.merge(graphdef, params)
    if isinstance(visual, Memory):
        cache, features = model.fill(visual, prompts.slots, cache), None
    else:
        cache, features = model.empty_cache(*prompts.slots.shape) if cache is None else cache, visual
    slot_index = None if text_alone else jnp.asarray(prompts.slot_index)
    tokens, positions = jnp.asarray(prompts.tokens), jnp.asarray(prompts.positions)
    state, _ = prefill(model, tokens, positions, cache, max_new_tokens, stop, sampling, slot_index, features)
    return state


def _score(graphdef, text_alone, params, visual, prompts: Prompts, before, labels):
    """Log-probabilities' sum, float32 [R], and whether all are the likeliest, of labels [R, N] (-1: none), each
    predicted by the token of the row's place `before`."""
    model = nnx.merge(graphdef, params)
    if isinstance(visual, Memory):
        cache, features = model.fill(visual, prompts.slots), None
    else:
        cache, features = model.empty_cache(*prompts.slots.shape), visual
    hidden, _ = model.extend(
        prompts.tokens, prompts.positions, cache, None if text_alone else prompts.slot_index, features
    )  # fmt: skip
    logits = model.llama.logits(jnp.take_along_axis(hidden, before[..., None], axis=1))
    is_label = labels >= 0
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    is_likeliest = logits.argmax(axis=-1) == labels
    return jnp.where(is_label, chosen, 0).sum(axis=1), (is_likeliest | ~is_label).all(axis=1)


def _decode(graphdef, params, state, limit):
    return decode(nnx.merge(graphdef, params), state, limit)


def _in_one_row(visual: Visual) -> Visual:
    """All rows' pictures as one row's, which any number of prompts share."""
    if isinstance(visual, Memory):
        return Memory(*(m.reshape(m.shape[0], 1, -1, *m.shape[3:]) for m in visual))
    return None if visual is None else visual.reshape(1, -1, *visual.shape[2:])


def _cut(text: str, until: Sequence[str]) -> str:
    for end in until:
        text = text.split(end)[0]
    return text.strip() if until else text
