"""The same LLaVA asked twice: by transformers, and by this package with and without VoCo tokens.

Weights are made by transformers and taken over by the converter's rules (`llava_pair.take_over`); one set of ours
serves both compressors, which have the same parameters. Prompts are the same token ids. Answers are greedy, of a given
number of tokens. Both sides say when the first token was there and when the last.
"""

from collections.abc import Sequence
import copy
import dataclasses
import time
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from benchmarks.counted import encoder, with_compressor
from benchmarks.llava_pair import take_over
from voco_jax.data.conversations import Sample
from voco_jax.infer.engine import GREEDY, Engine, Visual, bucket, grow_cache
from voco_jax.models.build import abstract_model
from voco_jax.models.llama import LlamaConfig
from voco_jax.models.presets import LLAMA, VIT
from voco_jax.models.vit import ViTConfig
from voco_jax.models.voco import Cache, Memory, VoCoConfig

VOCABULARY = 32002  # the tokenizer's 32,000, <voco>, and what stands for a picture in transformers
PICTURE_TOKEN = VOCABULARY - 1


def _config(llama: LlamaConfig, vision: ViTConfig, dtype: str = "float32") -> VoCoConfig:
    llama = dataclasses.replace(llama, vocab_size=VOCABULARY)
    return VoCoConfig(llama=llama, vision=vision, dtype=dtype, param_dtype=dtype)


SIZES = {
    "7b": _config(LLAMA["vicuna-7b"], VIT["clip-vit-l-14-336"], "bfloat16"),
    # TinyLlama 1.1B's dimensions
    "1b": _config(
        LlamaConfig(
            hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
            num_key_value_heads=4, max_position_embeddings=2048,
        ),
        VIT["clip-vit-l-14-336"],
    ),
    # LLaVA's picture of 576 tokens, a narrow tower, 70 M parameters: a question takes tens of milliseconds
    "small": _config(
        LlamaConfig(
            hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8,
            max_position_embeddings=2048,
        ),
        ViTConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=6),
    ),
    "tiny": _config(
        LlamaConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=512,
        ),
        ViTConfig(
            image_size=56, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        ),
    ),
}  # fmt: skip


class Answers(NamedTuple):
    """Token ids [R, N], and seconds from the question to the first token and to the last."""

    tokens: np.ndarray
    first: float
    last: float

    @property
    def decoding(self) -> float:
        """Tokens a second after the first, all rows together."""
        rows, length = self.tokens.shape
        return rows * (length - 1) / (self.last - self.first)


class Clock:
    def __init__(self):
        self._start = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self._start


# ---- This package ----------------------------------------------------------------------------------------------


class Ours:
    """An `Engine` for each compressor, over the same parameters."""

    def __init__(self, config: VoCoConfig, params: dict, template: str):
        self.engines = {}
        for compressor in ("none", "voco"):
            c = dataclasses.replace(config, compressor=compressor)
            prompts = encoder(with_compressor(c, compressor), template)
            ids = prompts.ids
            c = dataclasses.replace(
                c, voco_token_id=ids.voco_token_id, prefix_ids=ids.prefix_ids, suffix_ids=ids.suffix_ids
            )
            self.engines[compressor] = Engine(nnx.merge(abstract_model(c)[0], params), prompts)

    def encode_images(self, compressor: str, pixels: np.ndarray) -> Visual:
        """What is kept of pictures [I, height, width, 3]."""
        return jax.block_until_ready(self.engines[compressor].encode_images(pixels[None]))

    def ask(
        self, compressor: str, prompts: Sequence[Sample], new_tokens: int, *, pixels: np.ndarray | None = None,
        visual: Visual = None, past: tuple[Cache, int] | None = None,
    ) -> Answers:  # fmt: skip
        """About a picture that is seen now (`pixels`), or was before (`visual`), or is in the cache (`past`)."""
        engine, clock = self.engines[compressor], Clock()
        if pixels is not None:
            visual = engine.encode_images(pixels[None])
        pictures = [range(0 if visual is None else 1)] * len(prompts)
        state = engine.prefill(
            prompts, visual, pictures, new_tokens, GREEDY, range(len(prompts)), past
        )  # fmt: skip
        np.asarray(state.output)
        first = clock()
        if new_tokens > 1:
            state = engine.decode(state, new_tokens)
        tokens = np.asarray(state.output)[: len(prompts)]
        last = clock()
        if int(state.num_tokens) != new_tokens:
            raise SystemExit(
                f"expected answers of {new_tokens} tokens, found one that ended after {int(state.num_tokens)}"
            )
        return Answers(tokens, first, last)

    def read_picture(self, prompt: Sample, visual: jax.Array, rows: int, room: int) -> tuple[Cache, int]:
        """Uncompressed, the cache after all up to a picture's last token, for `rows` questions with `room` for each."""
        kept = int(np.flatnonzero(prompt.slot_index >= 0)[-1]) + 1
        head = part(prompt, slice(kept))
        state = self.engines["none"].prefill([head], visual, [range(1)], 1, GREEDY, [0])
        cache = grow_cache(Cache(*(x[:, :, :kept] for x in state.cache)), bucket(kept + room, 32))
        return Cache(*(jnp.repeat(x, rows, axis=1) for x in cache)), kept


def part(prompt: Sample, where: slice) -> Sample:
    slot_index = prompt.slot_index[where]
    return Sample(prompt.tokens[where], prompt.labels[where], slot_index, int((slot_index >= 0).any()))


def after_picture(prompt: Sample) -> Sample:
    return part(prompt, slice(int(np.flatnonzero(prompt.slot_index >= 0)[-1]) + 1, None))


def memory_bytes(kept: Memory | Cache, places: int | None = None) -> int:
    """Of a memory, or of the first places of a cache."""
    return sum(x[:, :, :places].nbytes for x in kept)


# ---- transformers ----------------------------------------------------------------------------------------------


def make_llava(config: VoCoConfig, seed: int = 0) -> transformers.LlavaForConditionalGeneration:
    """As transformers initialises it, in float32 on the host."""
    torch.manual_seed(seed)
    c, v = config.llama, config.vision
    text = transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads, max_position_embeddings=c.max_position_embeddings,
        rms_norm_eps=c.rms_norm_eps, rope_theta=c.rope_theta,
    )  # fmt: skip
    vision = transformers.CLIPVisionConfig(
        hidden_size=v.hidden_size, intermediate_size=v.intermediate_size, num_hidden_layers=v.num_hidden_layers,
        num_attention_heads=v.num_attention_heads, image_size=v.image_size, patch_size=v.patch_size,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=PICTURE_TOKEN, image_seq_length=v.num_patches,
        attn_implementation="sdpa",
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None  # answers have a given length
    model.generation_config.pad_token_id = 0
    return model


def our_params(model: torch.nn.Module, config: VoCoConfig) -> dict:
    """The peer's weights as ours, on the default device."""
    _, shapes = abstract_model(config)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return take_over(
        model, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
    )  # fmt: skip


class Times(transformers.generation.streamers.BaseStreamer):
    """When `generate` had each token: it hands the prompt over first."""

    def __init__(self, clock: Clock):
        self.clock, self.at = clock, []

    def put(self, value):
        self.at.append(self.clock())

    def end(self):
        pass


class Peer:
    """`generate` as users of transformers call it."""

    def __init__(self, model: transformers.LlavaForConditionalGeneration):
        self.model = model

    def ask(
        self, prompts: Sequence[Sample], new_tokens: int, *, pixels: np.ndarray | None = None, kept=None
    ) -> Answers:
        """About a picture [1, height, width, 3] that is processed with each question, or whose keys and values are
        `kept` (`read_picture`), as transformers' guide on caches does it."""
        rows, clock = len(prompts), Clock()
        length = max(map(len, prompts))
        ids, mask = np.zeros((2, rows, length), np.int64)
        for row, prompt in enumerate(prompts):  # padding stands on the left, as its guide on batches has it
            ids[row, length - len(prompt) :] = np.where(prompt.slot_index >= 0, PICTURE_TOKEN, prompt.tokens)
            mask[row, length - len(prompt) :] = 1
        inputs = {"input_ids": self._tensor(ids), "attention_mask": self._tensor(mask)}
        if kept is not None:
            if not mask.all():
                raise ValueError("kept keys and values have no room for padding before them: ask questions of a length")
            cache = copy.deepcopy(kept)
            cache.batch_repeat_interleave(rows)
            inputs["past_key_values"] = cache
        else:
            pixels = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
            pixels = pixels.to(self.model.device, self.model.dtype)
            inputs["pixel_values"] = pixels.expand(rows, *pixels.shape[1:])
        times = Times(clock)
        with torch.inference_mode():
            out = self.model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, streamer=times)
        tokens = out[:, length:].cpu().numpy()
        if tokens.shape != (rows, new_tokens):
            raise SystemExit(f"transformers: expected answers [{rows}, {new_tokens}], found {tokens.shape}")
        return Answers(tokens.astype(np.int32), times.at[1], clock())

    def read_picture(self, prompt: Sample, pixels: np.ndarray):
        """The cache after all up to a picture's last token."""
        kept = int(np.flatnonzero(prompt.slot_index >= 0)[-1]) + 1
        ids = np.where(prompt.slot_index >= 0, PICTURE_TOKEN, prompt.tokens)[None, :kept].astype(np.int64)
        pixels = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()).to(self.model.device, self.model.dtype)
        with torch.inference_mode():
            out = self.model(input_ids=self._tensor(ids), pixel_values=pixels, use_cache=True, logits_to_keep=1)
        return out.past_key_values

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.model.device)
