"""Many pictures in one context: time to the first token, and what is kept of them, with and without VoCo tokens.

    python -m benchmarks.growth --out docs

One question about n pictures, all of which have been seen before: with VoCo compression their memories at one token a
picture are at hand, without it their 576 embeddings each. Both models have the same random parameters, 12 layers of 768
(Llama's architecture), a context of 4,096 places as LLaVA-1.5 has, and the released prompt. Times are medians of rounds
in which the numbers of pictures take turns. What pictures show does not matter for them, and a few are repeated.
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
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

from benchmarks.machine import machine, others
from voco_jax.data.conversations import Encoder, get_template
from voco_jax.data.tokenizer import load_tokenizer
from voco_jax.infer.answerer import GREEDY, Answerer
from voco_jax.models.llama import LlamaConfig
from voco_jax.models.vit import ViTConfig
from voco_jax.models.voco import Memory, VoCoConfig
from voco_jax.run import abstract_model, init_params

TOKENIZER = Path(__file__).parents[1] / "tests" / "data" / "llama_tokenizer"
QUESTION = "Which of the pictures show a red circle?"
COUNTS = (1, 2, 3, 5, 7, 10, 20, 50, 100, 200, 500, 1000)
VOCO, PLAIN = "VoCo, 1 token a picture", "uncompressed, 576 tokens a picture"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs"), help="directory (default: runs)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a model of no size, to try the command")
    args = parser.parse_args()
    figures = measure(args.rounds, args.tiny)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "growth.json").write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    draw(figures, args.out / "growth.png")
    for name, rows in figures["models"].items():
        print(name)
        for row in rows:
            print(
                "  {pictures:5d} pictures {places:5d} places {kept_bytes:13,} bytes kept {first_token_s} s".format(
                    **row
                )
            )
        print(f"  stops: {figures['stops'][name]}")
    print(f"written: {args.out}/growth.json, {args.out}/growth.png")


def measure(rounds: int, tiny: bool) -> dict:
    """The figures as `growth.json` has them."""
    tokenizer = load_tokenizer(TOKENIZER)
    width, layers = (64, 2) if tiny else (768, 12)
    llama = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 64,
    )  # fmt: skip
    vision = ViTConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)  # never run
    encoder = Encoder(tokenizer, get_template("voco_v1"), num_voco_tokens=1, num_visual_tokens=1, compressed=True)
    config = VoCoConfig(
        llama=llama, vision=vision, voco_token_id=encoder.ids.voco_token_id, prefix_ids=encoder.ids.prefix_ids,
        suffix_ids=encoder.ids.suffix_ids,
    )  # fmt: skip
    features = np.random.default_rng(0).normal(size=(1, 4, vision.num_features, width)).astype(np.float32)
    params = init_params(config, seed=0)
    answerers = {}
    for name, compressor in ((VOCO, "voco"), (PLAIN, "none")):
        of = dataclasses.replace(config, compressor=compressor)
        graphdef, _ = abstract_model(of)
        if compressor == "none":
            encoder = dataclasses.replace(encoder, num_visual_tokens=vision.num_features, compressed=False)
        answerers[name] = Answerer(nnx.merge(graphdef, params), encoder)
    graphdef, _ = abstract_model(config)
    memory = jax.jit(lambda features: nnx.merge(graphdef, params).compress(features))(features)

    counts = [n for n in COUNTS if not tiny or n <= 10]
    cases, stops = [], {}
    limit = llama.max_position_embeddings
    for name, answerer in answerers.items():
        places = {n: len(answerer.encoder.encode_question(QUESTION, n)) for n in counts}
        fit = [n for n in counts if places[n] < limit]
        cases += [(name, n, places[n]) for n in fit]
        most = max(n for n in range(1, 3000) if len(answerer.encoder.encode_question(QUESTION, n)) < limit)
        stops[name] = f"at {most} pictures, of which one more does not fit {limit:,} places"

    times: dict[tuple, list[float]] = {case: [] for case in cases}
    load = others()
    for number in tqdm(range(rounds + 1), desc="rounds"):
        for name, n, _ in cases[number % 3 :] + cases[: number % 3]:
            answerer = answerers[name]
            prompt = answerer.encoder.encode_question(QUESTION, n)
            repeated = -(-n // 4)
            if name == VOCO:
                visual = Memory(*(jnp.tile(m, (1, 1, repeated, 1, 1))[:, :, :n] for m in memory))
            else:
                visual = jnp.tile(features, (1, repeated, 1, 1))[:, :n]
            jax.block_until_ready(visual)
            start = time.perf_counter()
            state, _, _ = answerer.start([prompt], visual, [range(n)], 1, GREEDY, [0])
            np.asarray(state.output)
            if number:  # the first compiles
                times[name, n, len(prompt)].append(time.perf_counter() - start)
    token = 2 * llama.num_hidden_layers * llama.num_key_value_heads * llama.head_dim * 4
    models = {
        name: [
            {
                "pictures": n,
                "places": places,
                "kept_bytes": n * answerers[name].encoder.num_visual_tokens * token,
                "first_token_s": round(statistics.median(times[of, n, places]), 4),
            }
            for of, n, places in cases
            if of == name
        ]
        for name in answerers
    }
    return {
        "machine": machine(), "load_before": load, "model": f"{layers} layers of {width}, float32", "rounds": rounds,
        "stops": stops, "models": models,
    }  # fmt: skip


def draw(figures: dict, path: Path) -> None:
    """Two plots over the number of pictures, both axes logarithmic."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    colours = {VOCO: "#0969da", PLAIN: "#cf222e"}
    for axis, key, title in (
        (axes[0], "first_token_s", "time to the first token, s"),
        (axes[1], "kept_bytes", "keys and values of the pictures, MiB"),
    ):
        for name, rows in figures["models"].items():
            x = [row["pictures"] for row in rows]
            y = [row[key] / (2**20 if key == "kept_bytes" else 1) for row in rows]
            axis.plot(x, y, marker="o", markersize=4, color=colours[name], label=name)
            if name == PLAIN:
                axis.plot(x[-1], y[-1], marker="X", markersize=11, color=colours[name])
                axis.annotate(
                    f"the context is full:\n{x[-1]} pictures", (x[-1], y[-1]), textcoords="offset points",
                    xytext=(12, -4), color=colours[name], fontsize=9, va="top",
                )  # fmt: skip
        axis.set(xscale="log", yscale="log", xlabel="pictures in the context", title=title)
        axis.grid(alpha=0.3, which="both", linewidth=0.5)
    axes[0].legend(fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
