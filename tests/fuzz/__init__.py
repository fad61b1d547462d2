"""Hostile and damaged input, by the thousand: every case is one line or a result, in bounded time and memory.

    python -m tests.fuzz                     all kinds in full (`make fuzz`)
    python -m tests.fuzz json --share 0.05   a twentieth of one kind
    python -m tests.fuzz json --case 17      one case again, in this process, with its traceback

A case is made from the seed and its number alone, so that it can be repeated.
"""

import importlib

from tests.fuzz.harness import Target

# By name, "module:class": what is not asked for is not imported
TARGETS = {
    "json": "tests.fuzz.json_objects:JSONObjects",
    "logs": "tests.fuzz.logs:Logs",
    "memory": "tests.fuzz.memory:MemoryFiles",
    "safetensors": "tests.fuzz.weights:Safetensors",
    "bin": "tests.fuzz.weights:Torch",
    "gguf": "tests.fuzz.gguf_files:GGUF",
    "checkpoints": "tests.fuzz.checkpoints:Checkpoints",
    "tokenizers": "tests.fuzz.checkpoints:Tokenizers",
    "clips": "tests.fuzz.clips:Clips",
    "pictures": "tests.fuzz.pictures:Pictures",
    "json_rows": "tests.fuzz.json_rows:JSONRows",
    "runs": "tests.fuzz.runs:Runs",
}


def target(name: str) -> Target:
    """Of a name in `TARGETS`, or of "module:class"."""
    module, _, of_class = TARGETS.get(name, name).partition(":")
    return getattr(importlib.import_module(module), of_class)()
