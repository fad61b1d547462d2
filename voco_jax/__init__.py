"""VoCo-LLaMA in JAX: vision-language models that compress an image into a few tokens of their own.

`models/voco.py` is where to begin reading; `train`, `evaluate`, `compress`, `ask` and `chat` are the commands
(`python -m voco_jax.…`), and `voco_jax.load` is the Python API (`api.py`).
"""

from voco_jax.interrupts import listen_in_a_command
from voco_jax.platforms import set_defaults

listen_in_a_command()  # before anything that takes a moment
set_defaults()  # before jax looks for devices


def __getattr__(name: str):
    """`voco_jax.load` and `voco_jax.Sampling`, imported when they are asked for: commands set jax up beforehand."""
    if name == "load":
        from voco_jax.api import load

        return load
    if name == "Sampling":
        from voco_jax.infer.generate import Sampling

        return Sampling
    raise AttributeError(f"module 'voco_jax' has no attribute {name!r}")
