import base64
import contextlib
import io
from pathlib import Path
import socket
import threading
import time

import av
import numpy as np
from openai import OpenAI
from PIL import Image
import pytest
import uvicorn

import voco_jax
from voco_jax.serve.build import Options, make_server


class Running:
    """A server in a thread of this process, and an OpenAI client of it."""

    def __init__(self, model, options: Options):
        self.app = make_server(model, options)
        self.server = self.app.state.server
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        config = uvicorn.Config(self.app, log_config=None, timeout_graceful_shutdown=10)
        self._uvicorn = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._uvicorn.run, args=([self._socket],), daemon=True)

    def __enter__(self) -> "Running":
        self._thread.start()
        until(lambda: self.server.is_ready, "the server is not ready")
        return self

    def __exit__(self, *_) -> None:
        self._uvicorn.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()

    @property
    def scheduler(self):
        return self.server.service.scheduler

    def client(self, key: str = "none", **options) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, timeout=60, max_retries=0, **options)


def until(what, message: str, seconds: float = 60) -> None:
    """Wait for it to be true."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, message
        time.sleep(0.01)


@contextlib.contextmanager
def running(model, **options):
    with Running(model, Options(**{"warm_up": False, "name": "tiny"} | options)) as server:
        yield server


@pytest.fixture(scope="session")
def model(two_tokens_run):
    return voco_jax.load(two_tokens_run)


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    """With a store on disk."""
    with running(model, store=str(tmp_path_factory.mktemp("store")), rows=4) as server:
        yield server


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> list[Path]:
    """Four small files, each of another grey picture."""
    directory, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    files = []
    for i in range(4):
        files.append(directory / f"{i}.png")
        Image.fromarray(rng.integers(0, 256, (20 + i, 30, 3), np.uint8)).save(files[-1])
    return files


def data_uri(file: Path, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(Path(file).read_bytes()).decode()}"


def part(file: Path, **more) -> dict:
    return {"type": "image_url", "image_url": {"url": data_uri(file)}, **more}


def said(*content) -> list[dict]:
    """One message: texts, and files of pictures."""
    parts = [
        {"type": "text", "text": c} if isinstance(c, str) else c if isinstance(c, dict) else part(c) for c in content
    ]
    return [{"role": "user", "content": parts}]


def shown(i: int = 0) -> Image.Image:
    y, x = np.mgrid[:48, :64]
    return Image.fromarray(np.stack([4 * x + i, 5 * y - i, x * y // 16 + 3 * i], axis=-1).astype(np.uint8))


def clip(container: str = "mp4", codec: str = "libx264", frames: int = 24, rate: int = 8) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(frames):
            output.mux(stream.encode(av.VideoFrame.from_image(shown(i))))
        output.mux(stream.encode())
    return file.getvalue()


def png(size=(8, 8)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, "red").save(stream, "PNG")
    return stream.getvalue()
