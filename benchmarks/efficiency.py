"""The paper's efficiency table: what a compressed picture saves, in bytes, in FLOPs, and in time beside transformers.

    python -m benchmarks.efficiency --out docs/efficiency.json

Bytes and FLOPs are of the real 7B shape (Vicuna-7B behind CLIP ViT-L/14-336), bfloat16; its programs are lowered with
every layer written out, and XLA counts their FLOPs. Nothing of them runs. Times are of a random model of 1.1 billion
parameters in float32 behind the same CLIP, all in one run, ways in turns, medians of rounds, to the first token:

    no cache      the picture is encoded, and its 576 tokens are computed with the prompt
    full cache    the keys and values of the picture's 576 tokens are at hand
    VoCo, hit     the picture's memory of 1 token is at hand
    VoCo, miss    the picture is compressed first
    transformers  `LlavaForConditionalGeneration` with the same weights and prompt, sdpa; the model of "no cache"

Our uncompressed model's tokens and transformers' must be the same before anything is timed. Decoding is timed after the
first token, questions from their text to the end of their answers; the peer processes the picture with each of them.
"""

import argparse
import dataclasses
import json
import os
from pathlib import Path
import statistics
import time

from flax import nnx
import jax
from jax.sharding import AbstractDevice, AbstractMesh
import numpy as np
import torch
from tqdm import tqdm

from benchmarks.llava_pair import Shape, make_llava, take_over
from benchmarks.machine import machine, others
from voco_jax.data.conversations import Encoder, Sample, get_template
from voco_jax.data.tokenizer import load_tokenizer
from voco_jax.infer.answerer import GREEDY, Answerer
from voco_jax.models.presets import LLAMA, VIT
from voco_jax.models.voco import Cache, VoCoConfig, VoCoLlama
from voco_jax.parallel.mesh import AXES
from voco_jax.run import abstract_model

TOKENIZER = Path(__file__).parents[1] / "tests" / "data" / "llama_tokenizer"
QUESTION = "What is in the image?"
QUESTIONS = (
    "What is in the image?", "What color is the bus?", "Is there a dog in the picture?", "How many people are there?",
    "What is the man doing?", "Where was this taken?", "What is written on the sign?", "Is it day or night?",
)  # fmt: skip
SMALL = Shape(
    vocabulary=32064, hidden=2048, mlp=5632, heads=32, layers=22, vision_hidden=1024, vision_mlp=4096, vision_heads=16,
    vision_layers=24,
)  # fmt: skip
TINY = Shape(
    vocabulary=32064, hidden=64, mlp=128, heads=2, layers=2, vision_hidden=32, vision_mlp=64, vision_heads=2,
    vision_layers=2, picture=56,
)  # fmt: skip
NEW, ANSWER = 32, 8  # tokens: decoded for tokens/s, and of an answer in a batch of questions
NO, FULL, HIT, MISS, PEER = "no cache", "full cache", "VoCo, hit", "VoCo, miss", "transformers"
PAPER = {NO: (None, 9.6, 440.5), FULL: (302.4e6, 1.2, 154.9), HIT: (0.525e6, 0.5, 134.0)}  # bytes, TFLOPs, ms


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.efficiency", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures as JSON too")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="time a model of no size, to try the command")
    parser.add_argument("--no-times", action="store_true", help="bytes and FLOPs alone")
    args = parser.parse_args()
    figures = {"counted": {name: counts(name) for name in ("voco_v1", "bare")}}
    print(counts_table(figures["counted"]))
    if not args.no_times:
        figures |= {"machine": machine(), "load_before": others()}
        figures["timed"] = times(TINY if args.tiny else SMALL, args.rounds)
        figures["load_after"] = others()
        print(times_table(figures["timed"]))
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")


# ---- Bytes and FLOPs of the 7B ---------------------------------------------------------------------------------


def counts(template: str, llama=LLAMA["vicuna-7b"], vision=VIT["clip-vit-l-14-336"]) -> dict:
    """KV places and bytes kept of a picture, and TFLOPs to the first token by XLA's count, for each way."""
    voco = _encoder(template)
    plain = dataclasses.replace(voco, num_visual_tokens=vision.num_features, compressed=False)
    config = VoCoConfig(
        llama=dataclasses.replace(llama, vocab_size=len(voco.tokenizer)), vision=vision, dtype="bfloat16",
        param_dtype="bfloat16", unroll_layers=True, voco_token_id=voco.ids.voco_token_id,
        prefix_ids=voco.ids.prefix_ids, suffix_ids=voco.ids.suffix_ids,
    )  # fmt: skip
    prompts = voco.encode_question(QUESTION), plain.encode_question(QUESTION)
    text = int((prompts[0].visual < 0).sum())
    in_llava = len(prompts[1]) - vision.num_features - len(voco.ids.prefix_ids)  # after the picture
    c, none = config.llama, dataclasses.replace(config, compressor="none")
    token_bytes = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * 2
    pixels = jax.ShapeDtypeStruct((1, 1, vision.image_size, vision.image_size, 3), jax.numpy.bfloat16)
    see = _flops(none, lambda model, pixels: model.encode_images(pixels), pixels)
    compress = _flops(config, lambda model, pixels: model.compress(model.encode_images(pixels)), pixels)
    hit = _flops(config, _first_logits, text, 1 + text)
    return {
        "text_tokens": text,
        "places": {FULL: vision.num_features, HIT: 1},
        "bytes": {FULL: vision.num_features * token_bytes, HIT: token_bytes},
        "tflops": {
            NO: (see + _flops(none, _first_logits, len(prompts[1]), len(prompts[1]))) / 1e12,
            FULL: _flops(none, _first_logits, in_llava, len(prompts[1])) / 1e12,
            HIT: hit / 1e12,
            MISS: (compress + hit) / 1e12,
        },
        "most_text_for_94_8_percent": _most_text(config, none, see, vision.num_features),
    }


def _most_text(config: VoCoConfig, none: VoCoConfig, see: float, patches: int) -> int:
    """Tokens of text up to which a hit saves 94.8 %: FLOPs grow all but linearly with them."""

    def saved(text: int) -> float:
        whole = see + _flops(none, _first_logits, patches + text, patches + text)
        return 1 - _flops(config, _first_logits, text, 1 + text) / whole

    least, most = 8, 64
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if saved(middle) >= 0.948 else (least, middle)
    return least


def _first_logits(model: VoCoLlama, tokens, positions, cache):
    """Of a prompt that joins a cache, the last token's."""
    hidden, cache = model.extend(tokens, positions, cache)
    return model.llama.logits(hidden[:, -1:]), cache


def _flops(config: VoCoConfig, function, *sizes) -> float:
    """By XLA, of a program for a GPU, where attention is plain; `sizes` are abstract arrays, or (tokens, places)."""
    graphdef, params = abstract_model(config)
    if isinstance(sizes[0], int):
        tokens, places = sizes
        c = config.llama
        shape = (c.num_hidden_layers, 1, places, c.num_key_value_heads, c.head_dim)
        cache = Cache(*[jax.ShapeDtypeStruct(shape, config.dtype)] * 2)
        sizes = (*[jax.ShapeDtypeStruct((1, tokens), np.int32)] * 2, cache)
    device = AbstractDevice(device_kind="GPU", num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,) * len(AXES), AXES, abstract_device=device)):
        traced = jax.jit(lambda params, *rest: function(nnx.merge(graphdef, params), *rest)).trace(params, *sizes)
        return traced.lower(lowering_platforms=("cuda",)).cost_analysis()["flops"]


def counts_table(counted: dict) -> str:
    lines = [
        f"7B, one picture, {QUESTION!r}, bfloat16; the paper's figures in brackets",
        "| prompt | | KV tokens | kept of a picture | TFLOPs |",
        "|---|---|---:|---:|---:|",
    ]
    for template, row in counted.items():
        for way, tflops in row["tflops"].items():
            kept, saved = row["bytes"].get(way), 100 * (tflops / row["tflops"][NO] - 1)
            bytes_text = "–"
            if kept is not None:
                fewer = f", {100 * (kept / row['bytes'][FULL] - 1):.1f} %" if way == HIT else ""
                bytes_text = f"{kept / 1e6:.3f} MB{fewer}"
            paper = PAPER.get(way)
            text = f"{tflops:.2f}" + ("" if way == NO else f" ({saved:+.1f} %)") + (f" [{paper[1]}]" if paper else "")
            places = row["places"].get(way, "–")
            lines.append(f"| {template}, {row['text_tokens']} tokens | {way} | {places} | {bytes_text} | {text} |")
    most = next(iter(counted.values()))["most_text_for_94_8_percent"]
    return "\n".join([*lines, f"A hit saves at least 94.8 % of the FLOPs for up to {most} tokens of text."])


# ---- Times of a model that fits --------------------------------------------------------------------------------


class Sides:
    """The random model: ours uncompressed and with VoCo tokens, by the same parameters, and the peer."""

    def __init__(self, shape: Shape):
        self.shape, self.voco_encoder = shape, _encoder("voco_v1")
        self.plain_encoder = dataclasses.replace(
            self.voco_encoder, num_visual_tokens=shape.patches, compressed=False
        )  # fmt: skip
        self.peer = make_llava(shape).eval()
        llama = dataclasses.replace(
            LLAMA["vicuna-7b"], vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.mlp,
            num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.heads,
            head_dim=shape.hidden // shape.heads,
        )  # fmt: skip
        vision = dataclasses.replace(
            VIT["clip-vit-l-14-336"], image_size=shape.picture, hidden_size=shape.vision_hidden,
            intermediate_size=shape.vision_mlp, num_hidden_layers=shape.vision_layers,
            num_attention_heads=shape.vision_heads,
        )  # fmt: skip
        ids = self.voco_encoder.ids
        config = VoCoConfig(
            llama=llama, vision=vision, voco_token_id=ids.voco_token_id, prefix_ids=ids.prefix_ids,
            suffix_ids=ids.suffix_ids,
        )  # fmt: skip
        _, abstract = abstract_model(config)
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), abstract)
        params = take_over(self.peer, abstract)
        graphdef, _ = abstract_model(config)
        self.voco = Answerer(nnx.merge(graphdef, params), self.voco_encoder)
        graphdef, _ = abstract_model(dataclasses.replace(config, compressor="none"))
        self.plain = Answerer(nnx.merge(graphdef, params), self.plain_encoder)
        size = shape.picture
        self.pixels = np.random.default_rng(0).normal(size=(1, 1, size, size, 3)).astype(np.float32)
        self.memory = jax.block_until_ready(self.voco.see(self.pixels))
        self.features = jax.block_until_ready(self.plain.see(self.pixels))

    # Ours

    def ask(self, answerer: Answerer, visual, questions, new: int):
        """Prefill and first tokens of `new`: what `Answerer.start` gives, waited for."""
        prompts = [answerer.encoder.encode_question(question) for question in questions]
        started = answerer.start(prompts, visual, [range(1)] * len(prompts), new, GREEDY, range(len(prompts)))
        np.asarray(started[0].output)
        return started

    def go_on(self, answerer: Answerer, started, new: int) -> np.ndarray:
        state, stop, drawing = started
        return np.asarray(answerer.advance(state, new, stop._replace(ids=np.array([-1], np.int32)), drawing).output)

    def picture_cache(self) -> tuple[Cache, int]:
        """What "full cache" has at hand: keys and values of BOS and the picture's tokens, with room for the rest."""
        whole = self.plain_encoder.encode_question(QUESTION)
        count = len(self.plain_encoder.ids.prefix_ids) + self.shape.patches
        prefix = Sample(whole.tokens[:count], whole.labels[:count], whole.visual[:count], 1)
        state, _, _ = self.plain.start([prefix], self.features, [range(1)], len(whole) - count + 2, GREEDY, [0])
        return jax.block_until_ready(state.cache), count

    def after_picture(self, cache: tuple[Cache, int]) -> np.ndarray:
        whole = self.plain_encoder.encode_question(QUESTION)
        tail = Sample(*(x[cache[1] :] for x in (whole.tokens, whole.labels, whole.visual)), 0)
        state, _, _ = self.plain.start([tail], None, [range(0)], 1, GREEDY, [0], cache)
        return np.asarray(state.output)

    # The peer, as its users write it

    def peer_inputs(self, questions, pictures: bool = True) -> dict:
        """Padding on the left, as `generate` wants it."""
        samples = [self.plain_encoder.encode_question(question) for question in questions]
        length = max(map(len, samples))
        ids, mask = np.zeros((len(samples), length), np.int64), np.zeros((len(samples), length), np.int64)
        for row, sample in enumerate(samples):
            ids[row, length - len(sample) :] = np.where(sample.visual >= 0, self.shape.picture_token, sample.tokens)
            mask[row, length - len(sample) :] = 1
        pixels = np.repeat(self.pixels[0].transpose(0, 3, 1, 2), len(samples), axis=0)
        return {
            "input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask),
            "pixel_values": torch.from_numpy(np.ascontiguousarray(pixels)),
        }  # fmt: skip

    def peer_first(self, questions) -> tuple[np.ndarray, object]:
        with torch.inference_mode():
            out = self.peer(**self.peer_inputs(questions), use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1), out.past_key_values

    def peer_answers(self, questions, new: int) -> np.ndarray:
        inputs = self.peer_inputs(questions)
        with torch.inference_mode():
            given = self.peer.generate(
                **inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False, use_cache=True, pad_token_id=0,
            )  # fmt: skip
        return given[:, inputs["input_ids"].shape[1] :].numpy()

    def peer_steps(self, token, cache, new: int) -> np.ndarray:
        """`new` tokens after the first, without padding among them."""
        tokens = [token]
        with torch.inference_mode():
            for _ in range(new):
                out = self.peer(input_ids=tokens[-1][:, None], past_key_values=cache, use_cache=True)
                tokens.append(out.logits[:, -1].argmax(-1))
        return torch.stack(tokens, 1).numpy()


def times(shape: Shape, rounds: int) -> dict:
    """Seconds, medians of rounds, in which ways take turns."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    sides = Sides(shape)
    same = [QUESTION] * 8  # of equal length: the peer's batch needs no padding to be decoded
    cache = sides.picture_cache()

    # The same model: tokens first, times then
    ours = sides.go_on(sides.plain, sides.ask(sides.plain, sides.features, [QUESTION], ANSWER), ANSWER)
    theirs = sides.peer_answers([QUESTION], ANSWER)
    if (ours[:1] != theirs).any() or sides.after_picture(cache)[0, 0] != ours[0, 0]:
        raise SystemExit(f"tokens differ: ours {ours.tolist()}, transformers' {theirs.tolist()}")

    def no_cache():
        return sides.ask(sides.plain, sides.plain.see(sides.pixels), [QUESTION], 1)

    def miss():
        return sides.ask(sides.voco, sides.voco.see(sides.pixels), [QUESTION], 1)

    ways = {
        (NO, "first token"): no_cache,
        (FULL, "first token"): lambda: sides.after_picture(cache),
        (HIT, "first token"): lambda: sides.ask(sides.voco, sides.memory, [QUESTION], 1),
        (MISS, "first token"): miss,
        (PEER, "first token"): lambda: sides.peer_first([QUESTION]),
        (HIT, "questions"): lambda: sides.go_on(
            sides.voco, sides.ask(sides.voco, sides.memory, QUESTIONS, ANSWER), ANSWER
        ),
        (PEER, "questions"): lambda: sides.peer_answers(QUESTIONS, ANSWER),
    }  # fmt: skip
    for batch in (1, 8):
        for way, answerer, visual in ((HIT, sides.voco, sides.memory), (NO, sides.plain, sides.features)):
            ways[way, f"decode {batch}"] = (
                lambda answerer=answerer, visual=visual, n=batch: sides.ask(answerer, visual, same[:n], NEW + 1),
                lambda started, answerer=answerer: sides.go_on(answerer, started, NEW + 1),
            )
        ways[PEER, f"decode {batch}"] = (
            lambda n=batch: sides.peer_first(same[:n]),
            lambda first: sides.peer_steps(*first, NEW),
        )
    seconds: dict[tuple, list[float]] = {way: [] for way in ways}
    for number in tqdm(range(rounds + 1), desc="rounds"):
        turn = list(ways.items())
        for way, run in turn[number * 5 % len(turn) :] + turn[: number * 5 % len(turn)]:
            if number == 0 and PEER in way and way[1] != "first token":
                continue  # nothing compiles there
            prepared = run[0]() if isinstance(run, tuple) else None
            start = time.perf_counter()
            jax.block_until_ready(run[1](prepared) if isinstance(run, tuple) else run())
            if number:
                seconds[way].append(time.perf_counter() - start)
    median = {f"{what}: {way}": round(statistics.median(s), 4) for (way, what), s in seconds.items()}
    least_and_most = {f"{what}: {way}": [round(min(s), 4), round(max(s), 4)] for (way, what), s in seconds.items()}
    first = {way: statistics.median(seconds[way, "first token"]) for way in (NO, FULL, HIT, MISS, PEER)}
    paired = lambda a, b: statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))  # noqa: E731
    return {
        "model": f"{shape.layers} layers of {shape.hidden}, {shape.patches} patches, float32, {jax.default_backend()}",
        "parameters": sum(p.numel() for p in sides.peer.parameters()),
        "rounds": rounds, "new_tokens": NEW, "answer_tokens": ANSWER, "questions": len(QUESTIONS),
        "seconds": median, "seconds_least_and_most": least_and_most,
        "less_time_than_no_cache": {way: round(1 - first[way] / first[NO], 4) for way in (FULL, HIT, MISS, PEER)},
        "decoding_times_the_peers": {
            f"batch {batch}, {way}": round(paired((PEER, f"decode {batch}"), (way, f"decode {batch}")), 3)
            for batch in (1, 8) for way in (HIT, NO)
        },
        "questions_times_the_peers": round(paired((PEER, "questions"), (HIT, "questions")), 2),
    }  # fmt: skip


def times_table(timed: dict) -> str:
    lines = [
        f"{timed['parameters'] / 1e9:.2f} billion parameters, {timed['model']}; medians of {timed['rounds']} rounds",
        "| | to the first token, s | against no cache |",
        "|---|---:|---:|",
    ]
    for way in (NO, FULL, HIT, MISS, PEER):
        less = timed["less_time_than_no_cache"].get(way)
        less = "" if less is None else f"{-100 * less:+.1f} %"
        lines.append(f"| {way} | {timed['seconds'][f'first token: {way}']:.2f} | {less} |")
    lines += ["| decoding | tokens/s | × transformers' |", "|---|---:|---:|"]
    for batch in (1, 8):
        for way in (HIT, NO, PEER):
            rate = batch * timed["new_tokens"] / timed["seconds"][f"decode {batch}: {way}"]
            ratio = timed["decoding_times_the_peers"].get(f"batch {batch}, {way}", "")
            lines.append(f"| batch {batch}, {'uncompressed' if way == NO else way} | {rate:.1f} | {ratio} |")
    rates = {w: timed["questions"] / timed["seconds"][f"questions: {w}"] for w in (HIT, PEER)}
    return "\n".join(
        [*lines, f"{timed['questions']} questions about one picture, {timed['answer_tokens']} tokens each: "
         f"{rates[HIT]:.2f} a second with its memory, {rates[PEER]:.3f} by transformers: "
         f"{timed['questions_times_the_peers']} times"]
    )  # fmt: skip


def _encoder(template: str) -> Encoder:
    return Encoder(load_tokenizer(TOKENIZER), get_template(template), 1, 1, compressed=True)


if __name__ == "__main__":
    main()
