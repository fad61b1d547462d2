"""VoCo-LLaMA in JAX: vision-language models that compress an image into a few tokens of their own.

`models/voco.py` is where to begin reading; `train`, `evaluate`, `compress`, `ask` and `chat` are the commands
(`voco …`), and `voco_jax.load` is the Python API (`api.py`).
"""

import importlib

from voco_jax.interrupts import listen_in_a_command
from voco_jax.platforms import set_defaults

listen_in_a_command()  # before anything that takes a moment
set_defaults()  # before jax looks for devices


# Imported when they are asked for: commands set jax up beforehand, and `import voco_jax` takes no time.
_PUBLIC = {
    "load": "voco_jax.api",
    "Model": "voco_jax.api",
    "Request": "voco_jax.api",
    "Chat": "voco_jax.infer.chat",
    "LiveVideo": "voco_jax.infer.live_video",
    "AutoTokens": "voco_jax.infer.auto_tokens",
    "Sampling": "voco_jax.infer.generate",
    "FrameSampling": "voco_jax.data.video",
    "MemoryBank": "voco_jax.infer.memory",
    "Embeddings": "voco_jax.infer.memory",
    "UserError": "voco_jax.errors",
}
__all__ = [*_PUBLIC]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'voco_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(_PUBLIC)
