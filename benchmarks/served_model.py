"""A LLaVA of random weights, as transformers and as this package serve it: the directories that `serving.py` needs.

    python -m benchmarks.served_model runs/served/small --size small

`hf` is a Hugging Face LLaVA with tokenizer, image processor and chat template; `voco` (one token a picture) and `none`
(uncompressed) are runs converted from it. All three have the same weights in float32 and ask with the same prompt. Only
words can be answered: rows of the output layer for all other tokens are zero, so that no answer ends before its limit
and each token is text.
"""

import argparse
import json
from pathlib import Path
import shutil
import subprocess
import sys

HF, VOCO, NONE = "hf", "voco", "none"
TEMPLATE = "llava_v1"


def make(directory: Path, size: str) -> dict:
    """What is there already is kept; a description of the model."""
    about = directory / "model.json"
    if not about.exists():
        subprocess.run([sys.executable, "-m", "benchmarks.served_model", directory, "--size", size], check=True)
    return json.loads(about.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.served_model", description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--size", default="small", help="of benchmarks.asked_pair")
    args = parser.parse_args()
    directory: Path = args.directory
    for name in ("raw", HF, VOCO, NONE):  # of a making that was interrupted
        shutil.rmtree(directory / name, ignore_errors=True)
    description = _save(directory / "raw", args.size)

    from benchmarks.counted import TOKENIZER

    for command in (
        ("to-jax", "raw", NONE, "--compressor", "none", "--tokenizer", TOKENIZER, "--template", TEMPLATE),
        ("to-hf", NONE, HF, "--format", "llava-hf"),
        ("to-jax", HF, VOCO, "--num-voco-tokens", 1, "--template", "tokenizer"),
    ):
        command = [str(directory / c) if c in ("raw", HF, VOCO, NONE) and i in (1, 2) else str(c)
                   for i, c in enumerate(command)]  # fmt: skip
        subprocess.run([sys.executable, "-m", "voco_jax", "convert", *command], check=True)
    shutil.rmtree(directory / "raw")
    (directory / "model.json").write_text(json.dumps(description) + "\n")


def _save(directory: Path, size: str) -> dict:
    """transformers' model without a tokenizer."""
    import transformers

    from benchmarks.asked_pair import SIZES, make_llava
    from benchmarks.counted import tokenizer
    from benchmarks.efficiency import describe

    config = SIZES[size]
    model = make_llava(config)
    pieces = tokenizer().convert_ids_to_tokens(list(range(config.llama.vocab_size - 1)))
    is_word = [piece.isascii() and piece.isalpha() for piece in (piece.lstrip("▁") for piece in pieces)]
    others = [i for i in range(config.llama.vocab_size) if i >= len(is_word) or not is_word[i]]
    model.lm_head.weight.data[others] = 0
    model.save_pretrained(directory)
    side = config.vision.image_size
    crop = {"height": side, "width": side}
    transformers.CLIPImageProcessor(size={"shortest_edge": side}, crop_size=crop).save_pretrained(directory)
    count = sum(p.numel() for p in model.parameters())
    return {"size": size, "model": describe(config), "parameters": count, "bytes": 4 * count}


if __name__ == "__main__":
    main()
