"""`Model.answers` in a process of its own, for `serving.py`: a line of JSON on stdin is a batch of requests, and a line
on stdout what came of it.

    {"requests": [["a.jpg", "What is it?"], …], "is_seen": true, "tokens": 16, "together": 64}
    {"texts": ["…", …], "seconds": 1.23}

Pictures that have been seen are encoded before the clock starts.
"""

import json
from pathlib import Path
import sys
import time

import voco_jax
from voco_jax.api import Request


def main() -> None:
    model, kept = voco_jax.load(sys.argv[1]), {}

    def encode(files: list[str]) -> dict:
        encoded = model.encode_images([Path(file) for file in files], batch_size=16)
        return {file: encoded[i] for i, file in enumerate(files)}

    for line in sys.stdin:
        asked = json.loads(line)
        files = list(dict.fromkeys(file for file, _ in asked["requests"]))
        if asked["is_seen"] and (new := [file for file in files if file not in kept]):
            kept |= encode(new)
        began = time.perf_counter()
        encoded = kept if asked["is_seen"] else encode(files)
        requests = [Request(question, encoded[file]) for file, question in asked["requests"]]
        texts = model.answers(requests, max_new_tokens=asked["tokens"], batch_size=asked["together"])
        print(json.dumps({"texts": texts, "seconds": time.perf_counter() - began}), flush=True)


if __name__ == "__main__":
    main()
