"""Servers as processes, and clients that ask them over HTTP: what `serving.py` and `serving_soak.py` share."""

import asyncio
import base64
from collections.abc import Sequence
import dataclasses
import io
import json
import os
from pathlib import Path
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import httpx
import numpy as np
from PIL import Image

from benchmarks.machine import cpu_seconds, memory_of
from benchmarks.trainings import HUGE_PAGES

TIMEOUT = httpx.Timeout(1200, connect=30)


# ---- Servers -----------------------------------------------------------------------------------------------------


class Served:
    """A server's process, which listens at `url` when it is made. Its output goes into the file `log`."""

    def __init__(self, command: Sequence[object], port: int, log: Path, ready: str, seconds: float = 900):
        self.url, self.log, began = f"http://127.0.0.1:{port}", log, time.monotonic()
        with log.open("ab") as file:
            env = HUGE_PAGES | {"HF_HUB_OFFLINE": "1"} | os.environ
            self._process = subprocess.Popen([str(c) for c in command], stdout=file, stderr=file, env=env)
        try:
            while not self._is_ready(ready):
                if self._process.poll() is not None or time.monotonic() - began > seconds:
                    raise SystemExit(f"{log}: the server is not ready: python {' '.join(map(str, command[1:]))}")
                time.sleep(0.2)
        except BaseException:
            self.kill()
            raise
        self.seconds = time.monotonic() - began

    def _is_ready(self, path: str) -> bool:
        try:
            return httpx.get(self.url + path, timeout=10).is_success
        except httpx.TransportError:
            return False

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    @property
    def memory(self) -> int:
        """Resident bytes."""
        return memory_of(self._process.pid)

    @property
    def cpu_seconds(self) -> float:
        return cpu_seconds(self._process.pid)

    def metrics(self) -> dict[str, float]:
        """What /metrics says, by name and labels."""
        lines = httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines()
        return {name: float(value) for name, value in (x.rsplit(" ", 1) for x in lines if x and x[0] != "#")}

    def stop(self) -> int:
        """As an operator does; its exit status."""
        self._process.terminate()
        return self._process.wait(120)

    def kill(self) -> None:
        """As a machine does that fails."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_alive:
            self.kill()


def ours(run: Path, log: Path, *options: object) -> Served:
    """`voco serve`, whose model has the name "model"."""
    port = free_port()
    command = [sys.executable, "-m", "voco_jax", "serve", "--run", run, "--name", "model", "--port", port, *options]
    return Served(command, port, log, "/ready")


def transformers(directory: Path, log: Path) -> Served:
    """`transformers serve`, whose model has the directory's name."""
    port = free_port()
    command = [
        sys.executable, "-m", "transformers.cli.transformers", "serve", directory, "--device", "auto", "--host",
        "127.0.0.1", "--port", port,
    ]  # fmt: skip
    return Served(command, port, log, "/health")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


# ---- Requests ----------------------------------------------------------------------------------------------------


def picture(seed: int, size: tuple[int, int] = (640, 480), kind: str = "JPEG") -> bytes:
    """A file; each seed shows other coloured clouds."""
    clouds = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(clouds).resize(size, Image.Resampling.BICUBIC).save(stream, kind, quality=90)
    return stream.getvalue()


def data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def picture_part(content: bytes, kind: str = "image/jpeg") -> dict:
    return {"type": "image_url", "image_url": {"url": data_uri(content, kind)}}


def chat(question: str, parts: Sequence[dict], **more: Any) -> dict:
    """The body of a chat request."""
    content = [*parts, {"type": "text", "text": question}]
    return {"model": "model", "messages": [{"role": "user", "content": content}], "temperature": 0} | more


# ---- Clients -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Answer:
    """A streamed answer, stripped; its tokens; and seconds from the request to its first text and to its end."""

    text: str
    tokens: int
    first: float
    last: float


async def ask(client: httpx.AsyncClient, body: bytes) -> Answer:
    """SystemExit for a request that is not answered."""
    began, first, texts, tokens = time.perf_counter(), 0.0, [], 0
    headers = {"Content-Type": "application/json"}
    async with client.stream("POST", "/v1/chat/completions", content=body, headers=headers) as response:
        if not response.is_success:
            raise SystemExit(f"{client.base_url}: {response.status_code} {(await response.aread())[:500]!r}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise SystemExit(f"{client.base_url}: {event['error']}")
            for choice in event["choices"]:
                if text := choice["delta"].get("content"):
                    first = first or time.perf_counter() - began
                    texts.append(text)
            if usage := event.get("usage"):
                tokens = usage["completion_tokens"]
    return Answer("".join(texts).strip(), tokens, first, time.perf_counter() - began)


async def ask_all(url: str, bodies: Sequence[bytes], clients: int) -> tuple[list[Answer], float]:
    """Answers in order, and the seconds that so many clients take, each of which asks again when it has its answer."""
    answers: list[Answer | None] = [None] * len(bodies)
    left = iter(range(len(bodies)))
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)

    async def one(client: httpx.AsyncClient) -> None:
        for i in left:
            answers[i] = await ask(client, bodies[i])

    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT, limits=limits, trust_env=False) as client:
        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(one(client))
        seconds = time.perf_counter() - began
    return [answer for answer in answers if answer is not None], seconds
