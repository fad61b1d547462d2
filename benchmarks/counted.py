"""Bytes and FLOPs of asking about a picture, counted by XLA from shapes alone: the paper's efficiency table.

The functions counted are those that `infer/engine.py` compiles, with their layers in straight-line code (XLA counts
a loop's body once), lowered for one GPU, on which all of attention is plain matrix products; nothing is allocated, and
no GPU is needed. Every count stands beside the formula of `models/flops.py`. Four ways to the first token:

    no cache      vision tower, projector, and all tokens through the language model: uncompressed LLaVA
    full cache    the picture's 576 tokens' keys and values are kept: text alone
    hit           its memory of one token is kept: text alone
    miss          vision tower, projector, compress stream, and then as a hit
"""

import dataclasses
import functools
from pathlib import Path

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh
import numpy as np

from voco_jax.chat_templates import CHAT_TEMPLATES
from voco_jax.data.conversations import Encoder, Sample
from voco_jax.data.tokenizer import load_tokenizer
from voco_jax.models.build import abstract_model
from voco_jax.models.voco import Cache, Memory, VoCoConfig
from voco_jax.parallel.mesh import AXES

TOKENIZER = Path(__file__).parents[1] / "tests" / "fixtures" / "llama_tokenizer"
NO_CACHE, FULL, HIT, MISS = WAYS = ("no cache", "full cache", "VoCo, hit", "VoCo, miss")
QUESTION = "What is in the image?"
PROMPTS = {  # what stands in the table: template, and question
    "released template, short question": ("voco_v1", QUESTION),
    "released template, benchmarks' question": (
        "voco_v1", "What color is the bus?\nAnswer the question using a single word or phrase.",
    ),
    "no system prompt, short question": ("bare", QUESTION),
    "no system prompt, benchmarks' question": (
        "bare", "What color is the bus?\nAnswer the question using a single word or phrase.",
    ),
}  # fmt: skip
PAPER = {NO_CACHE: 9.6e12, FULL: 1.2e12, HIT: 0.5e12}  # FLOPs (arXiv 2406.12275, table 3)
PAPER_SAVES = 0.948  # FLOPs of a hit against no cache
GPU = AbstractDevice(device_kind="NVIDIA A100", num_cores=None, platform="gpu")


@functools.cache
def tokenizer():
    return load_tokenizer(TOKENIZER)


def encoder(config: VoCoConfig, template: str) -> Encoder:
    """Prompts as the package lays them out: VoCo tokens, or LLaVA's picture among the text."""
    compressed, places = config.compressor == "voco", config.num_visual_tokens
    return Encoder(tokenizer(), CHAT_TEMPLATES[template], places if compressed else 0, places, compressed)


def with_compressor(config: VoCoConfig, compressor: str) -> VoCoConfig:
    return dataclasses.replace(config, compressor=compressor, unroll_layers=True)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Tokens of a prompt: those kept of the picture, the text after them, and (uncompressed) BOS before them."""

    before: int
    kept: int
    text: int

    @property
    def length(self) -> int:
        return self.before + self.kept + self.text


def prompt_of(sample: Sample) -> Prompt:
    places = np.flatnonzero(sample.slot_index >= 0)
    return Prompt(int(places[0]), len(places), len(sample) - int(places[-1]) - 1)


def prompts(config: VoCoConfig, template: str, question: str) -> tuple[Prompt, Prompt]:
    """Uncompressed, and with VoCo tokens."""
    made = (with_compressor(config, compressor) for compressor in ("none", "voco"))
    return tuple(prompt_of(encoder(c, template).encode_question(question)) for c in made)


# ---- Bytes -----------------------------------------------------------------------------------------------------


def kept_bytes(config: VoCoConfig) -> dict[str, int]:
    """What is kept of a picture, by the shapes of what the model returns."""
    graphdef, params = abstract_model(with_compressor(config, "voco"))
    features = jax.ShapeDtypeStruct(
        (1, 1, config.vision.num_features, config.llama.hidden_size), jnp.dtype(config.dtype)
    )
    memory = jax.eval_shape(lambda params, x: nnx.merge(graphdef, params).compress(x), params, features)
    places = config.vision.num_features
    cache = jax.eval_shape(lambda params: nnx.merge(graphdef, params).empty_cache(1, places), params)
    return {FULL: _nbytes(cache), HIT: _nbytes(memory)}


def _nbytes(arrays) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays))


# ---- FLOPs -----------------------------------------------------------------------------------------------------


def counted_flops(config: VoCoConfig, uncompressed: Prompt, compressed: Prompt) -> dict[str, float]:
    """By XLA, to the first token's logits."""
    plain, voco = with_compressor(config, "none"), with_compressor(config, "voco")
    pictures = _see_flops(voco)
    hit = _read_flops(voco, compressed.text, compressed.length, compressed.kept)
    whole = _read_flops(plain, uncompressed.length, uncompressed.length, uncompressed.kept)
    full = _read_flops(plain, uncompressed.text, uncompressed.length, 0)
    return {NO_CACHE: _see_flops(plain) + whole, FULL: full, HIT: hit, MISS: pictures + hit}


@functools.cache
def _see_flops(config: VoCoConfig) -> float:
    graphdef, params = abstract_model(config)

    def see(params, pixel_values):
        model = nnx.merge(graphdef, params)
        features = model.encode_images(pixel_values)
        return model.compress(features) if config.compressor == "voco" else features

    size = config.vision.image_size
    return _flops(see, params, jax.ShapeDtypeStruct((1, 1, size, size, 3), jnp.dtype(config.dtype)))


@functools.cache
def _read_flops(config: VoCoConfig, tokens: int, places: int, visual_tokens: int) -> float:
    """So many tokens join a cache that has their places and no others; with VoCo tokens these are put into it first."""
    graphdef, params = abstract_model(config)
    c, dtype = config.llama, jnp.dtype(config.dtype)
    is_voco = config.compressor == "voco"
    kept = (c.num_hidden_layers, 1, visual_tokens if is_voco else places, c.num_key_value_heads, c.head_dim)
    kept = (jax.ShapeDtypeStruct(kept, dtype),) * 2
    embeddings = jax.ShapeDtypeStruct((1, 1, visual_tokens, c.hidden_size), dtype) if visual_tokens else None

    def read(params, ids, positions, slots, kept, embeddings):
        model = nnx.merge(graphdef, params)
        if is_voco:
            cache, slot_index, features = model.fill(Memory(*kept), slots), None, None
        else:
            cache, slot_index, features = Cache(*kept), ids, embeddings
        hidden, cache = model.extend(ids, positions, cache, slot_index, features)
        return model.llama.logits(hidden[:, -1:]), cache

    row, slots = (jax.ShapeDtypeStruct((1, n), jnp.int32) for n in (tokens, places))
    return _flops(read, params, row, row, slots, kept, embeddings)


def _flops(function, *shapes) -> float:
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,) * len(AXES), AXES, abstract_device=GPU)):
        lowered = jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",))
    return float(lowered.cost_analysis()["flops"])


def formula_flops(config: VoCoConfig, uncompressed: Prompt, compressed: Prompt) -> dict[str, float]:
    """By `models/flops.py`; every place of the cache is scored, seen or not."""
    c = config.llama
    see = config.vision.flops(1) + config.projector_flops(1)
    head = c.head_flops(1)

    def read(tokens: int, places: int) -> float:
        return c.layers_flops(tokens, 2 * places) + head

    hit = read(compressed.text, compressed.length)
    return {
        NO_CACHE: see + read(uncompressed.length, uncompressed.length),
        FULL: read(uncompressed.text, uncompressed.length),
        HIT: hit,
        MISS: see + with_compressor(config, "voco").compress_flops(1) + hit,
    }


# ---- The table -------------------------------------------------------------------------------------------------


def count(config: VoCoConfig) -> dict:
    """All of it, ready for JSON."""
    kept = kept_bytes(config)
    by_prompt = {}
    for name, (template, question) in PROMPTS.items():
        pair = prompts(config, template, question)
        flops = counted_flops(config, *pair)
        by_prompt[name] = {
            "text_tokens": {"uncompressed": pair[0].before + pair[0].text, "VoCo": pair[1].text},
            "flops": flops,
            "formula": formula_flops(config, *pair),
            "saved_by_a_hit": 1 - flops[HIT] / flops[NO_CACHE],
        }
    return {
        "places": {FULL: config.vision.num_features, HIT: config.num_voco_tokens},
        "bytes": kept,
        "bytes_saved": 1 - kept[HIT] / kept[FULL],
        "by_prompt": by_prompt,
        "longest_text_that_saves_as_the_paper": _longest(config, lambda hit, none: hit <= (1 - PAPER_SAVES) * none),
        "text_of_the_paper's_hit": _longest(config, lambda hit, none: hit <= PAPER[HIT]),
        "text_of_the_paper's_no_cache": _longest(config, lambda hit, none: none <= PAPER[NO_CACHE]),
    }


def _longest(config: VoCoConfig, holds) -> dict:
    """The most tokens of text after the picture for which something holds of (hit, no cache): found by the formula,
    counted there and one further."""
    plain, voco = with_compressor(config, "none"), with_compressor(config, "voco")

    bare = prompts(config, *PROMPTS["no system prompt, short question"])

    def pair(text: int) -> tuple[Prompt, Prompt]:
        return tuple(dataclasses.replace(p, text=text + p.text - bare[1].text) for p in bare)

    def by_formula(text: int) -> bool:
        flops = formula_flops(config, *pair(text))
        return holds(flops[HIT], flops[NO_CACHE])

    @functools.cache
    def counted(text: int) -> tuple[float, float]:
        whole, compressed = pair(text)
        hit = _read_flops(voco, compressed.text, compressed.length, compressed.kept)
        return hit, _see_flops(plain) + _read_flops(plain, whole.length, whole.length, whole.kept)

    text = 1
    while text < 4096 and by_formula(text + 1):
        text += 1
    while text > 1 and not holds(*counted(text)):
        text -= 1
    while text < 4096 and holds(*counted(text + 1)):
        text += 1
    hit, no_cache = counted(text)
    return {"text_tokens": text, "hit": hit, "no_cache": no_cache}


def table(counted: dict) -> str:
    kept, places = counted["bytes"], counted["places"]
    shown = {NO_CACHE: ("–", "–"), MISS: (places[HIT], f"{kept[HIT] / 1e6:.3f} MB")}
    shown |= {way: (places[way], f"{kept[way] / 1e6:.3f} MB") for way in (FULL, HIT)}
    lines = []
    for name, row in counted["by_prompt"].items():
        text, flops = row["text_tokens"], row["flops"]
        lines += [
            f"{name}: {text['VoCo']} tokens of text ({text['uncompressed']} uncompressed)", "",
            "| | KV places | kept of a picture | TFLOPs | by formula | against no cache | the paper's |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]  # fmt: skip
        for way in WAYS:
            paper = f"{PAPER[way] / 1e12}" if way in PAPER else ""
            paper += f" (−{1 - PAPER[way] / PAPER[NO_CACHE]:.1%})" if way in (FULL, HIT) else ""
            saved = "" if way == NO_CACHE else f"{_signed(flops[way] / flops[NO_CACHE] - 1)}"
            lines.append(
                f"| {way} | {shown[way][0]} | {shown[way][1]} | {flops[way] / 1e12:.3f} | "
                f"{row['formula'][way] / 1e12:.3f} | {saved} | {paper} |"
            )
        lines.append("")
    limit, paper = counted["longest_text_that_saves_as_the_paper"], counted["text_of_the_paper's_hit"]
    whole = counted["text_of_the_paper's_no_cache"]
    lines += [
        f"Bytes kept: −{counted['bytes_saved']:.2%} (the paper: −99.8 %).",
        f"FLOPs of a hit: −{PAPER_SAVES:.1%} and more up to {limit['text_tokens']} tokens of text.",
        f"The paper's {PAPER[HIT] / 1e12} TFLOPs of a hit are {paper['text_tokens']} tokens of text, of which no cache "
        f"would take {paper['no_cache'] / 1e12:.1f}; its {PAPER[NO_CACHE] / 1e12} TFLOPs without a cache are "
        f"{whole['text_tokens']} tokens, of which a hit would take {whole['hit'] / 1e12:.1f}.",
    ]
    return "\n".join(lines)


def _signed(share: float) -> str:
    return f"{share:+.1%}".replace("-", "−")
