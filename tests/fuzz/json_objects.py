"""Files of one JSON object: `voco_jax/io/json_files.py`."""

import os
from pathlib import Path

import numpy as np

from tests.fuzz.harness import Target
from tests.fuzz.mutations import damage, dumps, odd_json
from voco_jax.io.json_files import MOST, read_object

_SOUND = {"model": {"layers": 2, "names": ["a", "b"], "rate": 0.5}, "data": {"train": {"kind": "llava"}}}
_BOMBS = {"lists": b"[],", "objects": b"{},", "numbers": b"1,", "text": b'"\xf0\x9f\x98\x80",'}


class JSONObjects(Target):
    count = 500

    def case(self, rng: np.random.Generator, directory: Path):
        file = directory / "object.json"
        file.unlink(missing_ok=True)
        kind = rng.choice(["odd", "damaged", "bomb", "special"], p=[0.5, 0.4, 0.05, 0.05])
        if kind == "odd":
            what, value = odd_json(rng, _SOUND)
            file.write_bytes(dumps(value))
        elif kind == "damaged":
            what, data = damage(rng, dumps(_SOUND))
            file.write_bytes(data)
        elif kind == "bomb":
            what = str(rng.choice(list(_BOMBS)))
            length = int(rng.choice([MOST // 2, MOST - 100, MOST * 8]))
            file.write_bytes(b'{"x": [' + _BOMBS[what] * (length // len(_BOMBS[what])) + b"0]}")
        else:
            what = str(rng.choice(["pipe", "device", "directory", "nothing"]))
            if what == "pipe":
                os.mkfifo(file)
            elif what == "device":
                file = Path(str(rng.choice(["/dev/zero", "/dev/tty", "/dev/null"])))
            elif what == "directory":
                file = directory

        def read() -> str | None:
            return None if isinstance(read_object(file), dict) else "no object"

        return f"{kind}: {what}", read
