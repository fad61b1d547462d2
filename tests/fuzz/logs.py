"""What a run has logged: `metrics.jsonl` and `goodput.json`, as `voco_jax.train.curves` and a resumed training read."""

import json
import os
from pathlib import Path
import shutil

import numpy as np

from tests.fuzz.harness import Target
from tests.fuzz.mutations import damage, dumps, odd_json
from voco_jax.train.curves import draw_curves, read_history
from voco_jax.train.goodput import CATEGORIES
from voco_jax.train.writers import drop_after

_LINE = {"step": 4, "loss": 1.5, "accuracy": 0.5, "grad_norm": 2.0, "learning_rate": 1e-3, "goodput": 0.9}
_GOODPUT = {"version": 1, "seconds": dict.fromkeys(CATEGORIES, 2.5), "step": 8, "kept": {"4": 1.0}}


class Logs(Target):
    count = 1000

    def case(self, rng: np.random.Generator, directory: Path):
        run = directory / "run$\\frac$"
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir()
        lines, name = [_LINE | {"step": step} for step in (4, 8, 12)], "metrics.jsonl"
        contents = {name: b"".join(dumps(line) + b"\n" for line in lines), "goodput.json": dumps(_GOODPUT)}
        kind = rng.choice(["line", "account", "damaged", "pipe"], p=[0.4, 0.2, 0.38, 0.02])
        if kind == "line":
            what, lines[1] = odd_json(rng, lines[1])
            contents[name] = b"".join(dumps(line) + b"\n" for line in lines)
        elif kind == "account":
            what, content = odd_json(rng, _GOODPUT)
            contents["goodput.json"] = dumps(content)
        else:
            name = str(rng.choice(list(contents)))
            what, contents[name] = damage(rng, contents[name]) if kind == "damaged" else (name, b"")
        for file, content in contents.items():
            (run / file).write_bytes(content)
        if kind == "pipe":
            (run / name).unlink()
            os.mkfifo(run / name)
        draws = rng.random() < 0.02

        def read() -> str | None:
            history = read_history(run)
            if draws:
                draw_curves([history], run / "curves.png")
            drop_after(run / "metrics.jsonl", 8)
            steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
            return None if all(step <= 8 for step in steps) else "steps that a resumed run makes again are kept"

        return f"{kind}: {what}", read
