"""Time to the first token and bytes kept, against the number of pictures in context: 1 to 1,000 at one token each.

    python -m benchmarks.growth --out docs/growth          # writes docs/growth.png and docs/growth.json; minutes

A small model with Llama's context of 4,096 places and 576 tokens a picture, random weights, through `Engine`; a
question about all pictures at once. Memories are kept with one token a picture. Uncompressed, either the pictures'
embeddings are kept and read with each question, or all their keys and values are; both stop where the context is full.
Some pictures are compressed, and repeated for more: neither times nor bytes depend on which they are.
"""

import argparse
import dataclasses
import json
from pathlib import Path
import statistics
import time

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import charts
from benchmarks.asked_pair import after_picture, memory_bytes, part
from benchmarks.counted import QUESTION, encoder, kept_bytes, with_compressor
from benchmarks.machine import machine, others
from voco_jax.infer.engine import GREEDY, Engine, bucket, grow_cache
from voco_jax.models.llama import LlamaConfig
from voco_jax.models.presets import LLAMA, VIT
from voco_jax.models.vit import ViTConfig
from voco_jax.models.voco import Cache, Memory, VoCoConfig, VoCoLlama

CONFIG = VoCoConfig(
    llama=LlamaConfig(
        vocab_size=32001, hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=4096,
    ),
    vision=ViTConfig(hidden_size=256, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=4),
)  # fmt: skip
REAL = VoCoConfig(llama=LLAMA["vicuna-7b"], vision=VIT["clip-vit-l-14-336"], dtype="bfloat16", voco_token_id=0)
COUNTS = (1, 2, 4, 7, 16, 32, 64, 128, 256, 512, 1000)
MEMORY, READ, KEPT = "VoCo, 1 token a picture", "uncompressed, read with each question", "uncompressed, full cache"
COLORS = {MEMORY: charts.BLUE, READ: charts.RED, KEPT: charts.ORANGE}
MADE = 8  # pictures


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="where to write, without .png and .json")
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="numbers of pictures")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    figures = measure(CONFIG, args.counts, args.rounds)
    draw(figures, args.out.with_suffix(".png"))
    args.out.with_suffix(".json").write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n")
    print(table(figures))


def measure(config: VoCoConfig, counts, rounds: int) -> dict:
    growth = Growth(config)
    result = {"machine": machine(), "load_before": others(), "rounds": rounds}
    c = config.llama
    result["model"] = (
        f"{c.num_hidden_layers} layers of {c.hidden_size}, {config.dtype}, {jax.default_backend().upper()}"
    )
    result |= {"context": config.llama.max_position_embeddings, "compress_s_a_picture": growth.seconds_a_picture}
    points = []
    for count in counts:
        for name, prepare in ((MEMORY, growth.memory), (READ, growth.embeddings), (KEPT, growth.cache)):
            prepared = prepare(count)
            if prepared is None:
                continue
            tokens, kept, ask = prepared
            ask()  # compiles
            seconds = float(f"{statistics.median(timed(ask) for _ in range(rounds)):.4g}")
            points.append({"way": name, "pictures": count, "tokens": tokens, "bytes": kept, "first_token_s": seconds})
            print(f"{name}: {count} pictures, {tokens} tokens, {kept / 1e6:.1f} MB, {seconds:.3f} s", flush=True)
    real = kept_bytes(REAL)
    return result | {
        "load_after": others(),
        "most_uncompressed": growth.most_uncompressed(),
        "bytes_a_picture_of_7b": {"uncompressed": real["full cache"], "VoCo": real["VoCo, hit"]},
        "points": points,
    }


def timed(ask) -> float:
    start = time.perf_counter()
    ask()
    return time.perf_counter() - start


class Growth:
    """One model with both kinds of visual tokens; each method prepares asking about so many pictures: tokens in
    context, bytes kept, and the question. None where the context is too short."""

    def __init__(self, config: VoCoConfig):
        self._limit = config.llama.max_position_embeddings
        self._engines = {}
        params = None
        for compressor in ("voco", "none"):
            c = with_compressor(config, compressor)
            prompts = encoder(c, "voco_v1")
            ids = prompts.ids
            c = dataclasses.replace(
                c, voco_token_id=ids.voco_token_id, prefix_ids=ids.prefix_ids, suffix_ids=ids.suffix_ids
            )
            model = VoCoLlama(c, rngs=nnx.Rngs(0))
            if params is not None:  # the same parameters
                nnx.update(model, params)
            params = nnx.state(model)
            self._engines[compressor] = Engine(model, prompts)
        size = config.vision.image_size
        pixels = np.random.default_rng(0).standard_normal((MADE, 1, size, size, 3)).astype(np.float32)
        encode = self._engines["voco"].encode_images
        jax.block_until_ready(encode(pixels))
        start = time.perf_counter()
        self._made = jax.block_until_ready(encode(pixels))
        self.seconds_a_picture = (time.perf_counter() - start) / MADE
        self._features = self._engines["none"].encode_images(pixels)

    def _prompt(self, compressor: str, count: int):
        """None where it does not fit."""
        prompt = self._engines[compressor].encoder.encode_question(QUESTION, count)
        return prompt if len(prompt) + 1 <= self._limit else None

    def most_uncompressed(self) -> int:
        count = 1
        while self._prompt("none", count + 1) is not None:
            count += 1
        return count

    def memory(self, count: int):
        prompt = self._prompt("voco", count)
        if prompt is None:
            return None
        repeats = np.arange(count) % MADE
        memory = Memory(*(x[:, repeats, :].swapaxes(1, 2) for x in self._made))  # of one row
        return len(prompt), memory_bytes(memory), self._question("voco", prompt, memory, count)

    def embeddings(self, count: int):
        prompt = self._prompt("none", count)
        if prompt is None:
            return None
        features = self._repeated(count)
        return len(prompt), features.nbytes, self._question("none", prompt, features, count)

    def cache(self, count: int):
        prompt = self._prompt("none", count)
        if prompt is None:
            return None
        kept = int(np.flatnonzero(prompt.slot_index >= 0)[-1]) + 1
        head, engine = part(prompt, slice(kept)), self._engines["none"]
        state = engine.prefill([head], self._repeated(count), [range(count)], 1, GREEDY, [0])
        cache = Cache(*(x[:, :, :kept] for x in state.cache))
        nbytes = memory_bytes(cache)
        cache = grow_cache(cache, min(bucket(len(prompt) + 1, 32), self._limit))
        return len(prompt), nbytes, self._question("none", after_picture(prompt), None, 0, (cache, kept))

    def _repeated(self, count: int) -> jax.Array:
        return jnp.asarray(self._features)[np.arange(count) % MADE, 0][None]

    def _question(self, compressor: str, prompt, visual, count: int, past=None):
        engine = self._engines[compressor]

        def ask():
            state = engine.prefill([prompt], visual, [range(count)], 1, GREEDY, [0], past)
            np.asarray(state.output)

        return ask


# ---- Shown -----------------------------------------------------------------------------------------------------


def table(figures: dict) -> str:
    lines = ["| pictures | | tokens in context | kept, MB | first token, s |", "|---:|---|---:|---:|---:|"]
    for p in sorted(figures["points"], key=lambda p: p["pictures"]):
        cells = (p["pictures"], p["way"], f"{p['tokens']:,}", f"{p['bytes'] / 1e6:.2f}", f"{p['first_token_s']:.3f}")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def draw(figures: dict, file: Path) -> None:
    figure, axes = charts.panels(2)
    shown = (("first_token_s", "seconds to the first token", 1), ("bytes", "MB kept of the pictures", 1e-6))
    most, context = figures["most_uncompressed"], figures["context"]
    for axis, (key, label, factor) in zip(axes, shown, strict=True):
        for name, color in COLORS.items():
            points = [p for p in figures["points"] if p["way"] == name]
            if not points:
                continue
            x, y = [p["pictures"] for p in points], [p[key] * factor for p in points]
            axis.plot(x, y, "o-", color=color, markersize=4, label=name)
            if name != MEMORY:
                axis.plot(x[-1], y[-1], "x", color=color, markersize=10, markeredgewidth=2)
        axis.axvline(most, color="#999999", linewidth=1, linestyle=":", zorder=0)
        charts.log_log(axis, "pictures in context", label)
    axes[0].annotate(
        f"uncompressed stops:\n{most} pictures fill\n{context:,} places", (most, 0.97), xytext=(6, 0),
        xycoords=("data", "axes fraction"), textcoords="offset points", va="top", fontsize=9, color=charts.GREY,
    )  # fmt: skip
    last = figures["points"][-1]
    axes[0].annotate(
        f"{last['tokens']:,} places", (last["pictures"], last["first_token_s"]), xytext=(-8, 2),
        textcoords="offset points", ha="right", fontsize=9, color=charts.GREY,
    )  # fmt: skip
    axes[1].legend(frameon=False, fontsize=9, loc="lower right")
    real = {name: nbytes / 1e6 for name, nbytes in figures["bytes_a_picture_of_7b"].items()}
    axes[1].set_title(
        f"(7B in bfloat16: {real['VoCo']:.2f} MB a picture, uncompressed {real['uncompressed']:.0f})",
        fontsize=9, color=charts.GREY, loc="left",
    )  # fmt: skip
    axes[0].set_title(figures["model"], fontsize=9, color=charts.GREY, loc="left")
    charts.save(figure, file)


if __name__ == "__main__":
    main()
