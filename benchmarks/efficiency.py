"""The paper's efficiency table: what a memory of a picture saves, counted for 7B and timed beside transformers.

    python -m benchmarks.efficiency --out docs/efficiency.json          # 15 minutes on 2 cores
    python -m benchmarks.efficiency --time 7b --out …                   # times too of 7B in bfloat16, where a GPU is

Bytes and FLOPs are XLA's count of the real 7B shape (`counted.py`). Times are of a model that a CPU holds, in float32,
through `Engine`, beside `LlavaForConditionalGeneration.generate` with the same weights, prompts and threads
(`asked_pair.py`); before anything is timed the greedy tokens of both must be the same. Ways are taken in turns, in an
order that moves on every round; figures are medians of all rounds, ratios those of one round.
"""

import argparse
from collections.abc import Callable
import json
import os
from pathlib import Path
import resource
import statistics

import jax
import numpy as np
import torch
from tqdm import tqdm

from benchmarks import counted
from benchmarks.asked_pair import SIZES, Answers, Ours, Peer, after_picture, make_llava, memory_bytes, our_params
from benchmarks.counted import FULL, HIT, MISS, NO_CACHE, QUESTION
from benchmarks.machine import machine, others
from voco_jax.data.conversations import Sample
from voco_jax.models.voco import VoCoConfig

OURS, PEER = SIDES = ("voco_jax", "transformers")
TEMPLATE = "voco_v1"
NEW_TOKENS, ANSWER_TOKENS = 16, 8  # of an answer, where decoding is timed, and where questions are
ROWS, QUESTIONS = 8, 16  # decoded together; asked together
BATCHES = (1, 3)  # questions, each with its picture, that transformers is given together: whichever is faster
NOUNS = ("bus", "car", "dog", "cat", "tree", "house", "ball", "shirt", "chair", "table", "bird", "boat", "door", "hat")
FULL_ROWS = f"{FULL}, {ROWS} rows"
ASK_MEMORY, ASK_PICTURE, ASK_KEPT = "questions: memory", "questions: picture with each", "questions: full cache"
SAME_TOKENS = (NO_CACHE, FULL, FULL_ROWS)  # ways that are the same function on both sides


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.efficiency", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures as JSON too")
    parser.add_argument("--count", choices=SIZES, default="7b", help="model whose bytes and FLOPs are counted")
    parser.add_argument("--time", choices=SIZES, default="1b", help="model that is timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="cores to be used (default: all that there are)")
    args = parser.parse_args()
    # Where both sides share a GPU, neither may take all of it at once
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    threads = use_cores(args.threads)
    figures = {"machine": machine(), "threads": threads, "counted": counted.count(SIZES[args.count])}
    figures["counted"]["size"] = args.count
    print(counted.table(figures["counted"]), "\n", flush=True)
    figures["timed"] = measure(SIZES[args.time], args.rounds) | {"size": args.time}
    print(table(figures))
    if args.out:
        args.out.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n")


def use_cores(count: int | None) -> int:
    """Both sides take so many threads: XLA one for each core that the process may use when it begins."""
    cores = sorted(os.sched_getaffinity(0))
    if count is not None:
        if count > len(cores):
            raise SystemExit(f"--threads {count}: this process may use {len(cores)} cores")
        cores = cores[:count]
        os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))
    return len(cores)


# ---- Times -----------------------------------------------------------------------------------------------------


def measure(config: VoCoConfig, rounds: int) -> dict:
    """Figures of one model, ready for JSON."""
    llava, note = make_llava(config), None
    ours, peer = Ours(config, our_params(llava, config), TEMPLATE), Peer(llava)
    if jax.default_backend() == "gpu":
        if torch.cuda.is_available():
            llava.to("cuda", getattr(torch, config.dtype))
        else:
            peer, note = None, f"{PEER} is left out: torch {torch.__version__} sees no GPU"
    bench = Bench(config, ours, peer)
    result = {"model": describe(config), "rounds": rounds, "note": note, "text_tokens": bench.text_tokens()}
    result |= {"kept_bytes": bench.kept_bytes(), "same_tokens": bench.check()}
    result |= {"peers_batch": bench.batch, "load_before": others()}
    taken: dict[str, list[Answers]] = {name: [] for name in bench.ways}
    names = list(bench.ways)
    with tqdm(total=rounds * len(names), desc="timing", unit="way") as bar:
        for number in range(rounds):
            first = number * len(names) // rounds
            for name in names[first:] + names[:first]:
                taken[name].append(bench.ways[name]())
                bar.update()
    result["load_after"] = others()
    result["peak_rss_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1)
    return result | summary(taken)


class Bench:
    """The ways to ask, by side and name, and what they need."""

    def __init__(self, config: VoCoConfig, ours: Ours, peer: Peer | None):
        self.exact = config.dtype == "float32"
        self.ways: dict[tuple[str, str], Callable[[], Answers]] = {}
        self.batch, self._peer = None, peer
        size = config.vision.image_size
        self.pixels = pixels = np.random.default_rng(0).standard_normal((1, size, size, 3)).astype(np.float32)
        self.plain, self.voco = (ours.engines[c].encoder.encode_question(QUESTION) for c in ("none", "voco"))
        plain, voco = [self.plain], [self.voco]
        self._plain_many, voco_many = many_questions(ours)
        self._memory, features = ours.encode_images("voco", pixels), ours.encode_images("none", pixels)
        room = len(self.plain) + NEW_TOKENS
        self._cache, caches = (ours.read_picture(self.plain, features, rows, room) for rows in (1, ROWS))
        text = after_picture(self.plain)
        self._add(OURS, NO_CACHE, lambda: ours.ask("none", plain, NEW_TOKENS, pixels=pixels))
        self._add(OURS, FULL, lambda: ours.ask("none", [text], NEW_TOKENS, past=self._cache))
        self._add(OURS, HIT, lambda: ours.ask("voco", voco, NEW_TOKENS, visual=self._memory))
        self._add(OURS, MISS, lambda: ours.ask("voco", voco, NEW_TOKENS, pixels=pixels))
        self._add(OURS, FULL_ROWS, lambda: ours.ask("none", [text] * ROWS, NEW_TOKENS, past=caches))
        self._add(OURS, ASK_MEMORY, lambda: ours.ask("voco", voco_many, ANSWER_TOKENS, visual=self._memory))
        if peer is None:
            return
        kept = peer.read_picture(self.plain, pixels)
        self._add(PEER, NO_CACHE, lambda: peer.ask(plain, NEW_TOKENS, pixels=pixels))
        self._add(PEER, FULL, lambda: peer.ask(plain, NEW_TOKENS, kept=kept))
        self._add(PEER, FULL_ROWS, lambda: peer.ask(plain * ROWS, NEW_TOKENS, kept=kept))
        self._add(PEER, ASK_PICTURE, lambda: self._ask_with_picture(self.batch))
        self._add(PEER, ASK_KEPT, lambda: peer.ask(self._plain_many, ANSWER_TOKENS, kept=kept))

    def _add(self, side: str, name: str, way: Callable[[], Answers]) -> None:
        self.ways[side, name] = way

    def _ask_with_picture(self, batch: int) -> Answers:
        return self._peer.ask(self._plain_many[:batch], ANSWER_TOKENS, pixels=self.pixels)

    def check(self) -> dict[str, float]:
        """The share of greedy tokens that both sides have in common where they compute the same; SystemExit for less
        than all of them in float32. Every way has then been taken once, and the peer's batch is chosen."""
        given = {}
        with tqdm(total=len(self.ways), desc="compiling and checking", unit="way") as bar:
            for name, way in self.ways.items():
                if name == (PEER, ASK_PICTURE):  # after another way of the peer, whose first run takes longer
                    self.batch = max(BATCHES, key=lambda batch: batch / self._ask_with_picture(batch).last)
                else:
                    given[name] = way().tokens
                bar.update()
        pairs = {name: ((OURS, name), (PEER, name)) for name in SAME_TOKENS if self._peer is not None}
        pairs |= {"voco_jax: full cache as no cache": ((OURS, FULL), (OURS, NO_CACHE))}
        pairs |= {"voco_jax: hit as miss": ((OURS, HIT), (OURS, MISS))}
        same = {name: float((given[a] == given[b]).mean()) for name, (a, b) in pairs.items()}
        if self.exact and min(same.values()) < 1:
            raise SystemExit(f"greedy tokens differ: {same}\n{given}")
        return same

    def kept_bytes(self) -> dict[str, int]:
        return {
            FULL: memory_bytes(self._cache[0], int((self.plain.slot_index >= 0).sum())),
            HIT: memory_bytes(self._memory),
        }

    def text_tokens(self) -> dict[str, int]:
        return {name: int((p.slot_index < 0).sum()) for name, p in (("uncompressed", self.plain), ("VoCo", self.voco))}


def many_questions(ours: Ours) -> tuple[list[Sample], list[Sample]]:
    """QUESTIONS prompts of one length, uncompressed and with VoCo tokens: the peer's kept cache allows no padding."""
    encoders = [ours.engines[compressor].encoder for compressor in ("none", "voco")]
    texts = [f"What color is the {noun}?" for noun in NOUNS]
    lengths = [len(encoders[0].encode_question(text)) for text in texts]
    usual = statistics.mode(lengths)
    texts = [text for text, length in zip(texts, lengths, strict=True) if length == usual]
    return tuple([e.encode_question(texts[i % len(texts)]) for i in range(QUESTIONS)] for e in encoders)


def describe(config: VoCoConfig) -> str:
    c, v = config.llama, config.vision
    return (
        f"{c.num_hidden_layers} layers of {c.hidden_size}, {c.num_attention_heads} heads, {c.num_key_value_heads} of "
        f"keys and values, vocabulary {c.vocab_size}; vision tower: {v.num_hidden_layers} layers of {v.hidden_size}, "
        f"{v.image_size} px, {v.num_features} tokens a picture; {config.dtype}"
    )


def summary(taken: dict[tuple[str, str], list[Answers]]) -> dict:
    """Medians, and ratios of the same round with their least and most."""
    ways: dict[str, dict] = {side: {} for side in SIDES}
    for (side, name), answers in taken.items():
        rows, length = answers[0].tokens.shape
        ways[side][name] = {
            "rows": rows,
            "tokens": length,
            "first_token_s": _median([a.first for a in answers]),
            "tokens_per_s": _median([a.decoding for a in answers]),
            "questions_per_s": _median([rows / a.last for a in answers]),
        }
    first, rate = (lambda a: a.first), (lambda a: a.decoding)
    asked = lambda a: len(a.tokens) / a.last  # noqa: E731
    compared = {
        "first token: no cache over hit": (first, (OURS, NO_CACHE), (OURS, HIT)),
        "first token: no cache over full cache": (first, (OURS, NO_CACHE), (OURS, FULL)),
        "first token: transformers over voco_jax, no cache": (first, (PEER, NO_CACHE), (OURS, NO_CACHE)),
        "tokens/s: voco_jax over transformers, 1 row": (rate, (OURS, FULL), (PEER, FULL)),
        f"tokens/s: voco_jax over transformers, {ROWS} rows": (rate, (OURS, FULL_ROWS), (PEER, FULL_ROWS)),
        "questions/s: memory over picture with each": (asked, (OURS, ASK_MEMORY), (PEER, ASK_PICTURE)),
        "questions/s: memory over transformers' full cache": (asked, (OURS, ASK_MEMORY), (PEER, ASK_KEPT)),
    }
    ratios = {}
    for name, (figure, above, below) in compared.items():
        if above in taken and below in taken:
            of_rounds = [figure(a) / figure(b) for a, b in zip(taken[above], taken[below], strict=True)]
            ratios[name] = [_median(of_rounds), *(float(f"{x:.3g}") for x in (min(of_rounds), max(of_rounds)))]
    return {"ways": ways, "ratios": ratios}


def _median(values: list[float]) -> float:
    return float(f"{statistics.median(values):.4g}")


# ---- Shown -----------------------------------------------------------------------------------------------------


def table(figures: dict) -> str:
    timed = figures["timed"]
    text = timed["text_tokens"]
    lines = [
        f"{timed['model']}; {text['VoCo']} tokens of text ({text['uncompressed']} uncompressed); "
        f"{figures['threads']} threads of {figures['machine']}; {timed['rounds']} rounds", "",
        "| | first token, s | tokens/s after it | questions/s |",
        "|---|---:|---:|---:|",
    ]  # fmt: skip
    for side, ways in timed["ways"].items():
        for name, way in ways.items():
            asked = f"{way['questions_per_s']} ({way['rows']} × {way['tokens']} tokens)" if "questions" in name else ""
            lines.append(f"| {side}, {name} | {way['first_token_s']} | {way['tokens_per_s']} | {asked} |")
    lines += ["", "| ratio | median of rounds | least and most |", "|---|---:|---:|"]
    lines += [f"| {name} | {median} | {least}–{most} |" for name, (median, least, most) in timed["ratios"].items()]
    ratios = timed["ratios"]
    lines += [
        "",
        f"A hit saves {1 - 1 / ratios['first token: no cache over hit'][0]:.1%} of the time to the first token.",
    ]
    return "\n".join(lines + [timed["note"]] * bool(timed["note"]))


if __name__ == "__main__":
    main()
