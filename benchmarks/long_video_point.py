"""One point of `benchmarks.long_video`, in a process of its own: so many frames of a clip compressed and asked about.

    python -m benchmarks.long_video_point --run runs/easyvqa --clip clip.mp4 --frames 512

Prints a line of JSON. Nothing is imported that asking does not need, so that the process is what a user's would be.
"""

import argparse
import json
from pathlib import Path
import re
import statistics
import time

import numpy as np

import voco_jax
from voco_jax.data.video import FrameSampling
from voco_jax.errors import one_line_errors
from voco_jax.infer.engine import GREEDY
from voco_jax.infer.prompts import encode_prompt, gather

QUESTION = "what shape is in the image?"


@one_line_errors
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_video_point", description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True)
    parser.add_argument("--clip", type=Path, required=True)
    parser.add_argument("--frames", type=int, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(json.dumps(measure(args.run, args.clip, args.frames, args.rounds)))


def measure(run: str, clip: Path, frames: int, rounds: int) -> dict:
    """Bytes and seconds. Compressing takes the clip's decoding in, the first token the prompt's tokens."""
    model = voco_jax.load(run)
    sampling = FrameSampling(num_frames=frames)
    bank = model.compress_video(clip, sampling=sampling)  # compiles
    start = time.perf_counter()
    bank = model.compress_video(clip, sampling=sampling)
    compress_s = time.perf_counter() - start
    engine = model.engine.for_images(bank)

    def ask():
        sample = encode_prompt(engine, QUESTION, bank).sample
        state = engine.prefill([sample], *gather([bank]), 1, GREEDY, [0])
        np.asarray(state.output)
        return len(sample), sum(x.nbytes for x in state.cache)

    tokens, cache_bytes = ask()  # compiles
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        ask()
        seconds.append(time.perf_counter() - start)
    config = model.config
    return {
        "frames": len(bank), "tokens_a_frame": bank.num_tokens, "tokens": tokens,
        "memory_bytes": bank.nbytes, "cache_bytes": cache_bytes, "peak_bytes": peak_bytes(),
        "compress_s": compress_s, "first_token_s": statistics.median(seconds),
        "token_bytes": bank.nbytes // (len(bank) * bank.num_tokens),
        "uncompressed_tokens_a_frame": config.vision.num_features,
        "context": config.llama.max_position_embeddings,
        "model": f"{config.llama.num_hidden_layers} layers of {config.llama.hidden_size}, {config.dtype}",
    }  # fmt: skip


def peak_bytes() -> int:
    """The most memory that the process has had since it began its program (not its parent's, as getrusage would)."""
    return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])


if __name__ == "__main__":
    main()
