"""Answers: compress pictures once, then read each question against them, token by token with a cache."""

from collections.abc import Sequence
import functools

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from voco_jax.data.conversations import Encoder, Sample
from voco_jax.errors import UserError
from voco_jax.models.voco import Memory, Read, VoCoLlama
from voco_jax.parallel.mesh import ROWS, axis_size

Visual = Memory | jax.Array | None


def greedy(model: VoCoLlama, read: Read, lengths: jax.Array, visual: Visual, max_new_tokens: int, eos_token_id: int):
    """Greedy continuation of prompts [B, T] (padded on the right to T, of the given lengths): ids [B, max_new_tokens].

    Prompts' positions count from 0, and new tokens go on from there. After its end-of-sequence token a row is filled
    with that token; decoding stops when every row has ended.
    """
    logits, cache = model.prefill(read, lengths, visual)
    room = [(0, 0), (0, 0), (0, max_new_tokens), (0, 0), (0, 0)]
    cache = cache._replace(keys=jnp.pad(cache.keys, room), values=jnp.pad(cache.values, room))
    tokens = logits.argmax(-1).astype(jnp.int32)
    output = jnp.full((len(lengths), max_new_tokens), eos_token_id, jnp.int32).at[:, 0].set(tokens)
    graphdef, state = nnx.split(model)

    def unfinished(carry):
        step, tokens, _, _ = carry
        return (step < max_new_tokens) & (tokens != eos_token_id).any()

    def advance(carry):
        step, tokens, cache, output = carry
        logits, cache = nnx.merge(graphdef, state).decode(tokens, cache.lengths, cache)
        ended = tokens == eos_token_id
        tokens = jnp.where(ended, eos_token_id, logits.argmax(-1).astype(jnp.int32))
        return step + 1, tokens, cache, output.at[:, step].set(tokens)

    *_, output = jax.lax.while_loop(unfinished, advance, (1, tokens, cache, output))
    return output


class Answerer:
    """A model with its tokenizer and prompt rules: pictures in, memories; questions in, answers.

    Shapes are padded to a few sizes, so that questions of any length compile a few times only. Over a mesh (which is
    the ambient one then) all processes ask the same, and all have the answers. `params` are the model's parameters,
    a nested dict; others of the same shapes may take their place.
    """

    def __init__(self, model: VoCoLlama, encoder: Encoder, mesh: Mesh | None = None):
        self.encoder = encoder
        self._max_positions = model.config.llama.max_position_embeddings
        graphdef, state = nnx.split(model)
        self.params = nnx.to_pure_dict(state)
        everywhere = None if mesh is None else NamedSharding(mesh, P())
        self._see = jax.jit(functools.partial(_see, graphdef))
        self._greedy = jax.jit(functools.partial(_greedy, graphdef), static_argnums=(5, 6), out_shardings=everywhere)

    def see(self, pixel_values: np.ndarray | jax.Array) -> Visual:
        """What is kept of pictures [B, I, height, width, 3]: their memory (or embeddings, without VoCo tokens).

        Over a mesh B and I are multiples of the devices along the rows' axes and the frame axis.
        """
        return self._see(self.params, pixel_values)

    def answer(self, questions: Sequence[str], visual: Visual, rows: Sequence[int], max_new_tokens: int) -> list[str]:
        """Answer `questions[i]` about the pictures of row `rows[i]` of what `see` returned."""
        num_images = 0 if visual is None else _num_images(visual, self.encoder.num_visual_tokens)
        return self.complete(
            [self.encoder.encode_question(question, num_images) for question in questions],
            visual, rows, max_new_tokens,
        )  # fmt: skip

    def complete(self, prompts: Sequence[Sample], visual: Visual, rows: Sequence[int], max_new_tokens: int):
        """As `answer`, from encoded prompts. UserError for more tokens than the model has positions."""
        tokenizer, eos = self.encoder.tokenizer, self.encoder.ids.eos_token_id
        longest = max(map(len, prompts))
        if longest + max_new_tokens > self._max_positions:
            raise UserError(
                f"question: expected at most {self._max_positions} tokens with the answer "
                f"(max_position_embeddings), found {longest} and {max_new_tokens} for the answer"
            )
        rows_together = axis_size(*ROWS)
        batch, length = -(-_bucket(len(prompts), 1) // rows_together) * rows_together, _bucket(longest, 16)
        read = Read(*np.zeros((4, batch, length), np.int32))
        read.visual[:] = -1
        lengths = np.ones(batch, np.int32)
        order = np.arange(batch)
        order[len(prompts) :] = 0  # fill the batch with the first prompt: it ends when that ends
        for i, prompt in enumerate(prompts[j] for j in order):
            n = lengths[i] = len(prompt)
            read.tokens[i, :n], read.visual[i, :n], read.segment_ids[i, :n] = prompt.tokens, prompt.visual, 1
            read.positions[i] = np.arange(length)
        index = np.asarray(rows, np.int32)[order]
        output = np.asarray(self._greedy(self.params, read, lengths, visual, index, max_new_tokens, eos))
        return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in output[: len(prompts)]]


def _see(graphdef, state, pixel_values):
    model = nnx.merge(graphdef, state)
    features = model.encode_images(pixel_values)
    return model.compress(features) if model.config.compressor == "voco" else features


def _greedy(graphdef, state, read, lengths, visual, index, max_new_tokens, eos_token_id):
    if visual is not None:
        visual = Memory(*(m[:, index] for m in visual)) if isinstance(visual, Memory) else visual[index]
    return greedy(nnx.merge(graphdef, state), read, lengths, visual, max_new_tokens, eos_token_id)


def _num_images(visual: Visual, num_visual_tokens: int) -> int:
    return visual.keys.shape[2] // num_visual_tokens if isinstance(visual, Memory) else visual.shape[1]


def _bucket(n: int, smallest: int) -> int:
    """The next of 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, … from `smallest` on: few sizes, and none a quarter too large."""
    if n <= smallest:
        return smallest
    step = max(1, 1 << (n - 1).bit_length() >> 3)
    return -(-n // step) * step
