"""A 7B-shaped checkpoint through the converter and back, beside a plain copy of the same files.

    python -m benchmarks.convert --dir /some/scratch/disk          # 13.5 GB, needs 60 GB of disk for a while
    python -m benchmarks.convert --dir /some/scratch/disk --layers 1 --vocab-size 128256

Random weights in float16, in the released format with the vision tower inside. Each step begins with its input out of
the page cache and ends when its output is on the disk. Peak memory is the largest resident set of the step's process.
"""

import argparse
import dataclasses
import json
import os
from pathlib import Path
import shutil
import subprocess
import sys
import time

import numpy as np

from benchmarks.machine import memory_of
from voco_jax.convert.families import clip, llava
from voco_jax.convert.formats import FORMATS
from voco_jax.convert.to_hf import write_json, write_shards
from voco_jax.convert.to_jax import layers_of
from voco_jax.io.tensors import Tensor
from voco_jax.models import presets
from voco_jax.models.build import abstract_model
from voco_jax.models.voco import VoCoConfig

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools" / "convert_weights.py"
TOKENIZER = ROOT / "tests" / "fixtures" / "llama_tokenizer"


def make_checkpoint(directory: Path, num_layers: int, vocab_size: int) -> list[Tensor]:
    """Vicuna-7B and CLIP ViT-L/14-336 with their projector; returns the tensors."""
    llama = dataclasses.replace(presets.LLAMA["vicuna-7b"], num_hidden_layers=num_layers, vocab_size=vocab_size)
    vision = presets.VIT["clip-vit-l-14-336"]
    _, params = abstract_model(VoCoConfig(llama=llama, vision=vision))
    rng = np.random.default_rng(0)
    noise = rng.normal(scale=0.02, size=1 << 24).astype(np.float16)

    def tensor(shape) -> Tensor:
        start = int(rng.integers(len(noise)))
        return Tensor(shape, noise.dtype, directory, lambda: np.resize(np.roll(noise, start), shape))

    tensors = []
    for _, rule, layer, shape in layers_of(params):
        tensors.append((FORMATS[0].their_name(rule, layer), tensor(rule.transform.their_shape(shape))))
    directory.mkdir(parents=True)
    write_shards(directory, tensors, 5 * 10**9, lambda _: None)
    write_json(directory / "config.json", llava.to_released(llama, vision, "float16", {}, "pad"))
    tower = directory / "vision_tower"  # its dimensions; its tensors are inside
    tower.mkdir()
    write_json(tower / "config.json", clip.to_hf(vision))
    return [tensor for _, tensor in tensors]


def forget(directory: Path) -> None:
    """Drop the files of a directory from the page cache, so that every step reads from the disk."""
    os.sync()
    for file in directory.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def size_of(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def measure(name: str, read: list[Path], command: list) -> dict:
    """Run a command; seconds until its output is on the disk, and its peak memory."""
    for directory in read:
        forget(directory)
    start = time.perf_counter()
    process = subprocess.Popen([str(part) for part in command])
    peak = 0
    while process.poll() is None:
        peak = max(peak, memory_of(process.pid, "VmHWM"))  # a child's ru_maxrss would begin with its parent's
        time.sleep(0.1)
    os.sync()
    seconds = time.perf_counter() - start
    if process.returncode:
        sys.exit(f"{name}: failed")
    row = {"step": name, "seconds": seconds, "gb": sum(map(size_of, read)) / 1e9, "peak_mib": peak / 2**20}
    print(f"{name}: {seconds:.0f} s", flush=True)
    return row


def table(rows: list[dict]) -> str:
    lines = ["| step | GB | seconds | MB/s | of the copy | peak memory |", "|---|---:|---:|---:|---:|---:|"]
    copy = rows[0]["gb"] / rows[0]["seconds"]
    for row in rows:
        speed = row["gb"] / row["seconds"]
        lines.append(
            f"| {row['step']} | {row['gb']:.1f} | {row['seconds']:.0f} | {1000 * speed:.0f} | {speed / copy:.0%} "
            f"| {row['peak_mib']:,.0f} MiB |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="a directory that does not exist yet; it is removed")
    parser.add_argument("--layers", type=int, default=32, help="of the language model (default 32)")
    parser.add_argument("--vocab-size", type=int, default=32001, help="the largest tensor has this many rows of 4,096")
    args = parser.parse_args()
    args.dir.mkdir(parents=True)
    source, copied, run, back = (args.dir / name for name in ("source", "copy", "run", "back"))
    tool = [sys.executable, TOOL]
    try:
        tensors = make_checkpoint(source, args.layers, args.vocab_size)
        largest = max(tensor.nbytes for tensor in tensors)
        print(f"{sum(t.size for t in tensors):,} parameters, {size_of(source) / 1e9:.1f} GB", flush=True)
        rows = [measure("plain copy (cp -r)", [source], ["cp", "-r", source, copied])]
        shutil.rmtree(copied)
        rows += [
            measure("to-jax", [source], [*tool, "to-jax", source, run, "--tokenizer", TOKENIZER]),
            measure("to-hf --format voco", [run], [*tool, "to-hf", run, back, "--format", "voco"]),
            measure("verify (both read)", [source, back], [*tool, "verify", source, back]),
        ]
    finally:
        shutil.rmtree(args.dir)
    print(table(rows))
    limit = 2048 + 2 * largest / 2**20
    print(f"memory allowed (2 GiB + twice the largest tensor): {limit:,.0f} MiB")
    print(json.dumps({"rows": rows, "limit_mib": limit}))


if __name__ == "__main__":
    main()
