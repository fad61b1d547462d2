"""What `serving_soak.py` sends: questions about easy-VQA's pictures and clips of them with the answers that must come
back, requests that are broken, and files to upload."""

import dataclasses
import hashlib
import io
import json
from pathlib import Path
import random
import struct
from typing import Any
import zlib

import av
import httpx
import numpy as np
from PIL import Image

from benchmarks import served
import voco_jax
from voco_jax.api import Model, Request
from voco_jax.data.sources import easyvqa
from voco_jax.data.turns import text_of
from voco_jax.errors import UserError
from voco_jax.infer.memory_file import load_memory

KNOWN, SEVERAL, CLIPS, UPLOADS = 50, 60, 24, 400
NEW_TOKENS = 12
PNG, MP4 = "image/png", "video/mp4"


@dataclasses.dataclass(frozen=True)
class Case:
    """A question, what it is about (parts of a message), and its greedy answer. `tokens`: read of each memory."""

    kind: str
    question: str
    parts: tuple[dict, ...]
    expected: str
    tokens: int | None

    def body(self, **more: Any) -> bytes:
        read = {} if self.tokens is None else {"tokens": self.tokens}
        how = {"max_tokens": NEW_TOKENS} | read | more
        return json.dumps(served.chat(self.question, self.parts) | how).encode()


@dataclasses.dataclass(frozen=True)
class Material:
    """broken: name, body, and the status that it must get. uploads: name and content of files, each another.
    memory_bytes: of a picture."""

    cases: dict[str, list[Case]]
    broken: list[tuple[str, bytes, int]]
    uploads: list[tuple[str, bytes]]
    memory_bytes: int
    fingerprint: str
    directory: Path

    @classmethod
    def make(cls, run: Path, directory: Path, fresh: int, seed: int) -> "Material":
        """With the answers of the run's model, computed in this process."""
        model, rng = voco_jax.load(run), random.Random(seed)
        records = easyvqa.load("test")[: KNOWN + fresh]
        pictures = [Path(record.images[0].file) for record in records]
        questions = [[text_of(c[0]["value"]).removeprefix("<image>\n") for c in r.conversations] for r in records]
        clips = [_clip(directory / f"{i}.mp4", rng.sample(pictures, rng.randint(2, 6))) for i in range(CLIPS)]
        about: dict[str, list[tuple[str, list[Path]]]] = {
            "known": [(q, [pictures[i]]) for i in range(KNOWN) for q in rng.sample(questions[i], 4)],
            "fresh": [(rng.choice(questions[i]), [pictures[i]]) for i in range(KNOWN, len(pictures))],
            "several": [
                (rng.choice(rng.choice(questions)), rng.sample(pictures[:KNOWN], rng.randint(2, 4)))
                for _ in range(SEVERAL)
            ],
            "clip": [(q, [clip]) for clip in clips for q in rng.choice(questions)[:2]],
            "text": [(questions[i][0], []) for i in range(8)],
        }  # fmt: skip
        return cls(
            {kind: _cases(model, kind, asked, rng) for kind, asked in about.items()},
            _broken(pictures[0].read_bytes(), clips[0].read_bytes()), _uploads(directory, records, rng),
            model.compress(pictures[0]).nbytes, model.fingerprint, directory,
        )  # fmt: skip

    def damage(self, url: str, id: str, content: bytes | None) -> str | None:
        """What is wrong with a memory that the server has, or should have; None where it is the one that was downloaded
        before, or where none was, one whose checksums are right."""
        response = httpx.get(f"{url}/v1/memories/{id}", timeout=60)
        if not response.is_success:
            return response.text
        files = [self.directory / name for name in ("after.voco", "before.voco")]
        files[0].write_bytes(response.content)
        files[1].write_bytes(response.content if content is None else content)
        try:
            after, before = (load_memory(file, self.fingerprint) for file in files)
        except UserError as error:
            return str(error)
        same = after.items == before.items and after.arrays.keys() == before.arrays.keys()
        same = same and all(x.tobytes() == before.arrays[name].tobytes() for name, x in after.arrays.items())
        return None if same else "another one than before"


def _cases(model: Model, kind: str, asked: list[tuple[str, list[Path]]], rng: random.Random) -> list[Case]:
    """Some are read with fewer tokens of each memory."""
    most = model.run.encoder.num_visual_tokens
    tokens = [rng.randint(1, most) if about and rng.random() < 0.3 else None for _, about in asked]
    expected: dict[int, str] = {}
    for some in {*tokens}:
        which = [i for i, n in enumerate(tokens) if n == some]
        given = model.answers(
            [Request(asked[i][0], [str(file) for file in asked[i][1]] or None) for i in which], tokens=some,
            max_new_tokens=NEW_TOKENS,
        )  # fmt: skip
        expected |= zip(which, given, strict=True)
    return [
        Case(kind, question, tuple(_part(file) for file in about), expected[i], tokens[i])
        for i, (question, about) in enumerate(asked)
    ]


def _part(file: Path) -> dict:
    if file.suffix == ".mp4":
        return {"type": "video_url", "video_url": {"url": served.data_uri(file.read_bytes(), MP4)}}
    return served.picture_part(file.read_bytes(), PNG)


def _clip(file: Path, pictures: list[Path]) -> Path:
    """Each picture is shown for a second."""
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=5)
        stream.width, stream.height = Image.open(pictures[0]).size
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            for _ in range(5):
                frame = av.VideoFrame.from_ndarray(np.asarray(Image.open(picture).convert("RGB")))
                container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file


def _broken(picture: bytes, clip: bytes) -> list[tuple[str, bytes, int]]:
    def about(part: dict, **more: Any) -> bytes:
        return json.dumps(served.chat("what?", [part]) | more).encode()

    def shown(content: bytes, kind: str = PNG) -> bytes:
        return about(served.picture_part(content, kind))

    def clip_of(content: bytes) -> bytes:
        return about({"type": "video_url", "video_url": {"url": served.data_uri(content, MP4)}})

    def linked(url: str) -> bytes:
        return about({"type": "image_url", "image_url": {"url": url}})

    good = served.picture_part(picture, PNG)
    return [
        ("not JSON", b'{"messages": [', 400),
        ("not UTF-8", b'{"messages": "\xff"}', 400),
        ("no messages", b'{"messages": []}', 400),
        ("no picture", shown(b""), 400),
        ("noise", shown(random.Random(0).randbytes(5000)), 400),
        ("a picture that is cut off", shown(picture[: len(picture) // 2]), 400),
        ("a picture of too many pixels", shown(_bomb()), 400),
        ("text", shown(b"hello", "text/plain"), 400),
        ("a clip as a picture", shown(clip), 400),
        ("a clip that is cut off", clip_of(clip[: len(clip) // 2]), 400),
        ("a picture as a clip", clip_of(picture), 400),
        ("a URL that is not allowed", linked("https://example.com/a.png"), 400),
        ("a file of the server", linked("file:///etc/passwd"), 400),
        ("not base64", linked("data:image/png;base64,@@@@"), 400),
        ("an unknown memory", about({"type": "image_url", "uuid": "nobody's"}), 404),
        ("an unknown model", about(good, model="another"), 404),
        ("a wrong number", about(good, temperature=-1), 400),
        ("an unknown key", about(good, beams=5), 400),
        ("too many tokens", about(good, max_tokens=10**6), 400),
        ("a long question", json.dumps(served.chat("what " * 20_000, [good])).encode(), 400),
    ]


def _bomb() -> bytes:
    """A small PNG that says that it has 10 billion pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(10**5))) + chunk(b"IEND", b"")
    )


def _uploads(directory: Path, records: list, rng: random.Random) -> list[tuple[str, bytes]]:
    """Pictures, and a clip for every eight of them; each is another, for a pixel is."""
    files, pictures = [], [Path(record.images[0].file) for record in records]
    for i in range(UPLOADS):
        if i % 8 == 7:
            file = _clip(directory / "upload.mp4", rng.sample(pictures, 3))
            files.append((f"{i}.mp4", file.read_bytes()))
            continue
        pixels = np.array(Image.open(rng.choice(pictures)).convert("RGB"))
        pixels[0, 0] = np.frombuffer(hashlib.sha256(str(i).encode()).digest()[:3], np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        files.append((f"{i}.png", stream.getvalue()))
    return files
