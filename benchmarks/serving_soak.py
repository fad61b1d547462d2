"""A server under all that clients do, for minutes: each answer is that of `Model.ask`, and nothing is lost.

    python -m benchmarks.serving_soak --run runs/video_demo_images                            # 64 clients, ten minutes
    python -m benchmarks.serving_soak --run runs/video_demo_images --minutes 0.5 --clients 8  # a quick look

`voco serve` is a process of its own, with limits so small that memories are dropped all the time. Clients ask about
easy-VQA's pictures and clips of them, one or several, streamed or not; leave in the middle of a stream, before the
answer, or before their request has come; and send what is broken. Then all of it must be idle, every row must be
usable, and the process must not have grown. After that memories are uploaded while the server is killed (`kill -9`) and
started anew: those that it had acknowledged must be there, bit for bit.

Exit status 1, with a line for each thing that was not so.
"""

import argparse
import asyncio
from collections import Counter
from collections.abc import Sequence
import json
from pathlib import Path
import random
import signal
import sys
import tempfile
import time
from typing import NamedTuple

import httpx
import numpy as np
from tqdm import tqdm

from benchmarks import served
from benchmarks.serving_material import Case, Material

ROWS = 16
WARM_UP = 0.3  # of the time, after which memory must be flat
GROWTH, LEAST_MINUTES = 0.05, 5.0  # that is allowed of the process's memory, in a run of so many minutes at least
KINDS = {  # what a client does, and how often
    "known": 30, "several": 10, "fresh": 20, "clip": 8, "text": 4, "left stream": 8, "left answer": 5, "half sent": 3,
    "broken": 12,
}  # fmt: skip
UPLOADERS, KILLS, LEAST_UPLOADS = 8, 3, 20


class Problems(list[str]):
    """What was not as it must be: the first of each kind are told."""

    def add(self, what: str, **about: object) -> None:
        self.append(f"{what}: " + ", ".join(f"{name} {str(x)[:300]!r}" for name, x in about.items()))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving_soak", description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="a trained model with memories")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--pictures", type=int, default=500, help="that are fresh, until they begin again (500)")
    parser.add_argument("--kills", type=int, default=KILLS, help=f"of the server while memories are uploaded ({KILLS})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the figures as JSON too")
    args = parser.parse_args()
    problems = Problems()
    with tempfile.TemporaryDirectory(prefix="voco-soak-") as text:
        directory = Path(text)
        material = Material.make(args.run, directory, args.pictures, args.seed)
        figures = {"minutes": args.minutes, "clients": args.clients}
        figures |= soak(args.run, directory, material, args.minutes * 60, args.clients, args.seed, problems)
        if args.minutes >= LEAST_MINUTES and figures["growth"] > GROWTH:
            problems.add("memory has grown", figures=figures)
        import shutil; shutil.copytree(directory, "/tmp/sb/soakdir", dirs_exist_ok=True)
        figures["acknowledged"] = crash(args.run, directory, material, args.kills, args.seed, problems)
    print(json.dumps(figures, indent=2))
    if args.out:
        args.out.write_text(json.dumps(figures | {"problems": problems}, indent=2) + "\n")
    for line in problems[:50]:
        print(f"problem: {line}", file=sys.stderr)
    print(f"{len(problems)} problems" if problems else "every answer right, nothing lost")
    sys.exit(1 if problems else 0)


# ---- Load --------------------------------------------------------------------------------------------------------


def soak(
    run: Path, directory: Path, material: Material, seconds: float, clients: int, seed: int, problems: Problems
) -> dict:  # fmt: skip
    log, one = directory / "soak.log", material.memory_bytes
    limits = ("--host-size", 150 * one, "--device-size", 75 * one, "--store-size", 300 * one)
    with served.ours(run, log, "--rows", ROWS, "--store", directory / "store", *limits) as server:
        done, samples = asyncio.run(_soak(server, material, seconds, clients, seed, problems))
        if (status := server.stop()) not in (0, -signal.SIGTERM):
            problems.add("exit status", found=status)
    for line in log.read_text().splitlines():
        if " ERROR " in line or line.startswith("Traceback"):
            problems.add("log", line=line)
    times, memory = np.array([(s.time, s.memory) for s in samples]).T
    later = times > WARM_UP * seconds
    times, memory = times[later], memory[later]
    part = max(1, len(memory) // 5)
    first, last = np.median(memory[:part]), np.median(memory[-part:])
    return {
        "requests": sum(done.values()), "requests_per_s": round(sum(done.values()) / seconds, 1), "done": dict(done),
        "memory_mb": round(last / 1e6), "growth": round(float(last / first - 1), 4),
        "mb_a_minute": round(float(np.polyfit(times, memory, 1)[0]) * 60 / 1e6, 2) if len(times) > 1 else None,
        "most_running": max(s.running for s in samples), "most_waiting": max(s.waiting for s in samples),
    }  # fmt: skip


class Sample(NamedTuple):
    time: float
    memory: int
    running: float
    waiting: float


async def _soak(
    server: served.Served, material: Material, seconds: float, clients: int, seed: int, problems: Problems
) -> tuple[Counter, list[Sample]]:  # fmt: skip
    began, done, samples = time.monotonic(), Counter(), []
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits, trust_env=False) as http:

        async def client(number: int) -> None:
            rng = random.Random(f"{seed}, {number}")
            does = Client(http, material, rng, problems)
            while time.monotonic() - began < seconds and server.is_alive:
                (kind,) = rng.choices([*KINDS], [*KINDS.values()])
                try:
                    await does.one(kind)
                except (httpx.HTTPError, OSError) as error:
                    problems.add(kind, error=repr(error))
                done[kind] += 1

        async def watch() -> None:
            with tqdm(total=round(seconds), unit="s") as bar:
                while (now := time.monotonic() - began) < seconds and server.is_alive:
                    running, waiting = await at_work(http)
                    samples.append(Sample(now, server.memory, running, waiting))
                    bar.set_postfix(requests=sum(done.values()), MB=server.memory >> 20, problems=len(problems))
                    bar.update(min(round(now), bar.total) - bar.n)
                    await asyncio.sleep(min(2.0, seconds / 20))

        async with asyncio.TaskGroup() as group:
            group.create_task(watch())
            for number in range(clients):
                group.create_task(client(number))
        if not server.is_alive:
            problems.add("the server has ended", log=server.log.read_text()[-300:])
            return done, samples
        if not await becomes(http, (0, 0)):
            problems.add("not idle", running_and_waiting=await at_work(http))
        await use_every_row(http, problems)
    return done, samples


class Client:
    """Each kind of request; what comes back is compared with what must."""

    def __init__(self, http: httpx.AsyncClient, material: Material, rng: random.Random, problems: Problems):
        self._http, self._material, self._rng, self._problems = http, material, rng, problems

    async def one(self, kind: str) -> None:
        if kind in self._material.cases:
            await self.ask(self._rng.choice(self._material.cases[kind]))
        elif kind == "broken":
            await self.send_broken()
        else:
            await {"left stream": self.leave_stream, "left answer": self.leave, "half sent": self.send_half}[kind]()

    async def ask(self, case: Case) -> None:
        is_streamed = self._rng.random() < 0.5
        if is_streamed:
            found = (await served.ask(self._http, case.body(stream=True))).text
        else:
            response = await self._post(case.body())
            choices = response.json()["choices"] if response.is_success else []
            found = choices[0]["message"]["content"] if choices else f"{response.status_code}: {response.text}"
        if found != case.expected:
            self._problems.add(case.kind, question=case.question, expected=case.expected, found=found)

    async def send_broken(self) -> None:
        name, body, status = self._rng.choice(self._material.broken)
        response = await self._post(body)
        is_told = response.headers["content-type"] == "application/json" and response.json()["error"]["message"]
        if response.status_code != status or not is_told:
            self._problems.add(name, expected=status, found=response.status_code, text=response.text)

    async def leave_stream(self) -> None:
        """After some of it."""
        body, left = self._long(stream=True), self._rng.randint(1, 4)
        async with self._http.stream("POST", "/v1/chat/completions", content=body) as response:
            async for _ in response.aiter_lines():
                left -= 1
                if not left:
                    break

    async def leave(self) -> None:
        """Without waiting for the answer."""
        try:
            async with asyncio.timeout(self._rng.uniform(0.001, 0.5)):
                await self._post(self._long())
        except TimeoutError:
            pass

    async def send_half(self) -> None:
        """And go."""
        url, body = self._http.base_url, self._long()
        _, writer = await asyncio.open_connection(url.host, url.port)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {url.host}\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body[: self._rng.randrange(len(body))])
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    def _long(self, **more: object) -> bytes:
        case = self._rng.choice(self._material.cases[self._rng.choice(["known", "fresh", "clip"])])
        return case.body(max_tokens=400, temperature=2, **more)

    async def _post(self, body: bytes) -> httpx.Response:
        return await self._http.post("/v1/chat/completions", content=body)


async def at_work(http: httpx.AsyncClient) -> tuple[float, float]:
    """Requests that are being answered, and that wait."""
    lines = (await http.get("/metrics")).text.splitlines()
    found = dict(line.rsplit(" ", 1) for line in lines if line.startswith(("voco_running ", "voco_waiting ")))
    return float(found["voco_running"]), float(found["voco_waiting"])


async def becomes(http: httpx.AsyncClient, wanted: tuple[float, float], seconds: float = 60) -> bool:
    """Whether so many are being answered and wait within this time."""
    for _ in range(round(20 * seconds)):
        if await at_work(http) == wanted:
            return True
        await asyncio.sleep(0.05)
    return False


async def use_every_row(http: httpx.AsyncClient, problems: Problems) -> None:
    """As many long answers as there are rows run at once, unless a row was lost."""

    async def go_on(number: int) -> None:
        for seed in range(10**6):
            body = served.chat("what?", [], max_tokens=1000, seed=1000 * seed + number) | {"temperature": 2}
            await http.post("/v1/chat/completions", json=body)

    tasks = [asyncio.create_task(go_on(number)) for number in range(ROWS)]
    if not await becomes(http, (ROWS, 0)):
        problems.add("rows are lost", expected=ROWS, found=await at_work(http))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    if not await becomes(http, (0, 0)):
        problems.add("rows are not free again", found=await at_work(http))


# ---- Crashes -----------------------------------------------------------------------------------------------------


def crash(run: Path, directory: Path, material: Material, kills: int, seed: int, problems: Problems) -> int:
    """How many memories were acknowledged, over all kills."""
    kept: dict[str, bytes | None] = {}  # by id: the file that was downloaded after the acknowledgement
    files, log, rng = iter(material.uploads), directory / "crash.log", random.Random(seed)
    for kill in range(kills + 1):
        with served.ours(run, log, "--rows", ROWS, "--store", directory / "kept") as server:
            for id, content in kept.items():
                if (problem := material.damage(server.url, id, content)) is not None:
                    problems.add("after kill -9", id=id, problem=problem)
            if kill < kills:
                asyncio.run(_upload_and_kill(server, files, kept, rng.randint(LEAST_UPLOADS, 2 * LEAST_UPLOADS)))
    return len(kept)


async def _upload_and_kill(server: served.Served, files, kept: dict[str, bytes | None], count: int) -> None:
    """Kill it when so many more memories are acknowledged, while others are being uploaded."""
    begun = len(kept)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, trust_env=False) as http:

        async def upload() -> None:
            for name, content in files:
                response = (await http.post("/v1/memories", files={"file": (name, content)})).raise_for_status()
                for id in await acknowledged(response):
                    kept[id] = None
                    kept[id] = (await http.get(f"/v1/memories/{id}")).raise_for_status().content

        async def acknowledged(response: httpx.Response) -> Sequence[str]:
            found = response.json()
            while found["object"] == "job" and found["status"] == "running":
                await asyncio.sleep(0.05)
                found = (await http.get(f"/v1/jobs/{found['id']}")).raise_for_status().json()
            return [memory["id"] for memory in found["memories"]] if found["object"] == "job" else [found["id"]]

        tasks = [asyncio.create_task(upload()) for _ in range(UPLOADERS)]
        while len(kept) < begun + count and not any(task.done() for task in tasks):
            await asyncio.sleep(0.01)
        server.kill()
        for error in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(error, BaseException) and not isinstance(error, httpx.TransportError):
                raise error


if __name__ == "__main__":
    main()
