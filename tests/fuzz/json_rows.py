"""JSON files of records, read as training does: `voco_jax/data/sources/`, and what becomes of their rows."""

import os
from pathlib import Path
import tempfile
from types import SimpleNamespace

import numpy as np
from PIL import Image

from tests.fuzz.harness import Target
from tests.fuzz.mutations import damage, dumps, odd_json
from voco_jax.chat_templates import CHAT_TEMPLATES
from voco_jax.data.conversations import Encoder
from voco_jax.data.index import make_index
from voco_jax.data.records import BadRecord
from voco_jax.data.samples import SampleMaker
from voco_jax.data.sources.llava import LlavaSource, VideoQuestionSource
from voco_jax.data.tokenizer import train_tokenizer
from voco_jax.data.video import FrameSampling

_ROWS = [
    {"id": "1", "image": "a.png", "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A bus."}]},
    {"id": "2", "image": ["a.png", "b.png"], "conversations": [
        {"from": "human", "value": "<image><image>\nAlike?"}, {"from": "gpt", "value": "No."},
        {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "One is red."}]},
    {"id": "3", "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hello."}]},
    {"video": "c.mp4", "question": "What is shown?", "answer": "Nothing.", "kind": "what"},
]  # fmt: skip
_BOMBS = {
    "numbers": b"1,", "lists": b"[],", "objects": b"{},", "lines": b"\n", "short lines": b"1\n", "text": b'"x",',
    "blanks": b" \n",
}  # fmt: skip


class JSONRows(Target):
    count = 1000

    def make(self, directory: Path) -> None:
        for name in ("a.png", "b.png"):
            Image.new("RGB", (20, 10), "red").save(directory / name)
        tokenizer = train_tokenizer(["USER: what is it? ASSISTANT: a red bus. hello word\n"] * 9, vocab_size=400)
        encoder = Encoder(tokenizer, CHAT_TEMPLATES["bare"], num_voco_tokens=1, num_visual_tokens=1, compressed=True)
        self.maker = SampleMaker(encoder, 512, 4, FrameSampling(4))

    def case(self, rng: np.random.Generator, directory: Path):
        lines = bool(rng.random() < 0.5)
        file = Path(tempfile.mkdtemp(dir=directory)) / ("rows.jsonl" if lines else "rows.json")
        kind = str(rng.choice(["odd", "damaged", "bomb", "special", "long"], p=[0.5, 0.38, 0.05, 0.05, 0.02]))
        what, rows = "sound", list(_ROWS)
        if kind == "odd":
            for _ in range(rng.integers(1, 4)):
                what, rows = odd_json(rng, rows)
        if kind in ("odd", "damaged"):
            rows = rows if isinstance(rows, list) else [rows]
            deep = 2000 if rng.random() < 0.5 else 100_000
            parts = [dumps(row, deep) for row in rows]
            data = b"\n".join(parts) if lines else b"[" + b",\n".join(parts) + b"]"
            if kind == "damaged":
                what, data = damage(rng, data)
            data = (b"\xef\xbb\xbf" if rng.random() < 0.1 else b"") + data
            data = data.decode("utf-8", "replace").encode("utf-16") if rng.random() < 0.03 else data
            file.write_bytes(data)
        elif kind == "bomb":
            what = str(rng.choice(list(_BOMBS)))
            data = _BOMBS[what] * (int(rng.choice([10_000, 30_000_000])) // len(_BOMBS[what]))
            file.write_bytes(data if lines else b"[" + data + b"0]")
        elif kind == "long":
            row = b'{"conversations": [{"from": "human", "value": "%s"}, {"from": "gpt", "value": "a"}]}\n'
            file.write_bytes(row % (b"word " * int(rng.choice([100_000, 800_000, 20_000_000]))))
        else:
            what = str(rng.choice(["pipe", "device", "directory", "nothing", "no permission"]))
            file = {"device": Path("/dev/zero"), "directory": directory}.get(what, file)
            if what == "pipe":
                os.mkfifo(file)
            elif what == "no permission":
                file.write_bytes(b"{}")
                file.chmod(0)
        of_videos = bool(rng.random() < 0.3)

        def read() -> None:
            source = VideoQuestionSource(file, directory) if of_videos else LlavaSource(file, directory, directory)
            index = make_index(source, self.maker, directory / "cache", 0, "rows")
            assert len(index) <= len(source) and index.report.lines()
            for i in range(min(len(source), 50)):
                try:
                    record = source[i]
                    unopened = SimpleNamespace(load=lambda picture, on_warning: picture)
                    self.maker.load_images(record, self.maker.frame_times(record), unopened)
                except BadRecord:
                    pass

        return f"{kind}: {what}", read
