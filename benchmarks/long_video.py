"""A long clip on a CPU: what grows with its frames, from 8 to 512 of them, one a second.

    python -m benchmarks.long_video --run runs/easyvqa --out docs/long_video   # docs/long_video.png and .json; minutes

The clip is made of easy-VQA's test pictures, another each second, enlarged to 640 × 640 so that frames which stayed in
memory would show, and encoded as mp4 (H.264, a keyframe every ten seconds). Of its whole length n frames are taken,
evenly, and all asked about together. Each n is a process of its own (`long_video_point.py`), that its peak of memory
is its own; everything is compiled before it is timed. Beside the memory stands what the same model would keep without
VoCo tokens, by count: the keys and values of every patch.
"""

import argparse
import json
from pathlib import Path
import subprocess
import sys
import tempfile

import numpy as np
from PIL import Image
from tqdm import tqdm

from benchmarks import charts
from benchmarks.machine import machine, others
from voco_jax.data.sources import easyvqa

COUNTS = (8, 16, 32, 64, 128, 256, 512)
SIZE = 640  # pixels of a side


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_video", description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, help="a run directory with VoCo compression")
    parser.add_argument("--out", type=Path, required=True, help="where to write, without .png and .json")
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="numbers of frames")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    figures = measure(args.run, sorted(args.counts), args.rounds)
    draw(figures, args.out.with_suffix(".png"))
    args.out.with_suffix(".json").write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n")
    print(table(figures))


def measure(run: str, counts: list[int], rounds: int) -> dict:
    result = {"machine": machine(), "load_before": others(), "rounds": rounds}
    with tempfile.TemporaryDirectory() as directory:
        clip = Path(directory) / "clip.mp4"
        write_clip(clip, max(counts))
        result["clip"] = {"seconds": max(counts), "frame_bytes": SIZE * SIZE * 3, "file_bytes": clip.stat().st_size}
        points = []
        for count in tqdm(counts, desc="asking", unit="point"):
            command = [sys.executable, "-m", "benchmarks.long_video_point", "--run", run, "--clip", str(clip)]
            command += ["--frames", str(count), "--rounds", str(rounds)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode:  # it has said why
                sys.exit(done.returncode)
            points.append(json.loads(done.stdout))
    # Of all points the same
    for name in ("tokens_a_frame", "token_bytes", "uncompressed_tokens_a_frame", "context", "model"):
        result[name] = [point.pop(name) for point in points][0]
    for point in points:
        point["uncompressed_bytes"] = point["frames"] * result["uncompressed_tokens_a_frame"] * result["token_bytes"]
        point |= {name: float(f"{point[name]:.4g}") for name in ("compress_s", "first_token_s")}
    return result | {"load_after": others(), "points": points}


def write_clip(file: Path, seconds: int) -> None:
    """An mp4 of easy-VQA's test pictures, a frame and a picture a second."""
    import av

    records = easyvqa.load("test")
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=1, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv420p"
        stream.codec_context.gop_size = 10
        for i in tqdm(range(seconds), desc="encoding", unit="frame"):
            image = Image.open(records[i % len(records)].images[0].file).convert("RGB").resize((SIZE, SIZE))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(image))))
        container.mux(stream.encode())


# ---- Shown -----------------------------------------------------------------------------------------------------


def table(figures: dict) -> str:
    lines = [
        "| frames | tokens in context | kept, MB | decoding cache, MB | uncompressed, MB (counted) | process, MB "
        "| compress, s | first token, s |",
        "|---:" * 8 + "|",
    ]
    for p in figures["points"]:
        sizes = [f"{p[f'{name}_bytes'] / 1e6:.2f}" for name in ("memory", "cache", "uncompressed")]
        seconds = (f"{p['compress_s']:.2f}", f"{p['first_token_s']:.3f}")
        cells = (p["frames"], f"{p['tokens']:,}", *sizes, f"{p['peak_bytes'] / 1e6:,.0f}", *seconds)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def draw(figures: dict, file: Path) -> None:
    """What is kept, the process, seconds; each against the frames."""
    figure, (kept, process, seconds) = charts.panels(3, width=4.6)
    points = figures["points"]
    frames = np.array([p["frames"] for p in points])

    def line(axis, key, color, label, factor=1e-6, style="o-"):
        axis.plot(frames, [p[key] * factor for p in points], style, color=color, markersize=4, label=label)

    patches = figures["uncompressed_tokens_a_frame"]
    charts.log_log(kept, "frames asked about", "MB")
    line(kept, "uncompressed_bytes", charts.ORANGE, f"uncompressed, {patches} tokens a frame (counted)", style="--")
    most = figures["context"] // patches
    if frames[0] < most < frames[-1]:
        kept.plot(most, most * patches * figures["token_bytes"] / 1e6, "x", color=charts.ORANGE, markersize=10)
        kept.annotate(
            f"{most} frames fill\n{figures['context']:,} places",
            (most, most * patches * figures["token_bytes"] / 1e6), xytext=(6, -4), textcoords="offset points",
            va="top", fontsize=9, color=charts.GREY,
        )  # fmt: skip
    line(kept, "cache_bytes", charts.RED, "decoding cache, while asked")
    line(kept, "memory_bytes", charts.BLUE, f"memory: {figures['tokens_a_frame']} token{_s(figures)} a frame")
    kept.legend(frameon=False, fontsize=9, loc="upper left")
    kept.set_ylim(top=kept.get_ylim()[1] * 8)
    kept.set_title(f"{figures['model']}, on a CPU", fontsize=9, color=charts.GREY, loc="left")

    line(process, "peak_bytes", charts.BLUE, "the whole process, at its peak")
    held = points[0]["peak_bytes"] + (frames - frames[0]) * figures["clip"]["frame_bytes"]
    process.plot(frames, held / 1e6, "--", color=charts.ORANGE, label="if decoded frames stayed (counted)")
    process.set(xlabel="frames asked about", ylabel="MB", ylim=(0, None))
    process.grid(which="major", color="#eeeeee")
    process.set_axisbelow(True)
    process.legend(frameon=False, fontsize=9, loc="upper left")

    charts.log_log(seconds, "frames asked about", "seconds")
    line(seconds, "compress_s", charts.BLUE, "to decode and compress them, once", 1)
    line(seconds, "first_token_s", charts.RED, "to an answer's first token", 1)
    seconds.legend(frameon=False, fontsize=9, loc="upper left")
    charts.save(figure, file)


def _s(figures: dict) -> str:
    return "" if figures["tokens_a_frame"] == 1 else "s"


if __name__ == "__main__":
    main()
