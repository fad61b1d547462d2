"""Memories over HTTP: made by uploads and in chat, listed, read and deleted, and shared by servers."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
import contextlib
import hashlib
import os
from pathlib import Path
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import httpx
import numpy as np
from PIL import Image
import pytest

from tests.fuzz.mutations import damage
from tests.serve.conftest import clip, data_uri, png, running, said, shown, until
from voco_jax.api import Model, Request
from voco_jax.checkpoint.run import load_run
from voco_jax.data.video import FrameSampling
from voco_jax.infer.memory import MemoryBank
from voco_jax.serve import bodies, service, uploads
from voco_jax.serve.media import check_video

QUESTION = "what shape is in the image?"
KEYS = ("a key of sixteen letters", "another key of such a length")


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> list[Path]:
    """Two short clips."""
    directory = tmp_path_factory.mktemp("clips")
    for i, frames in enumerate((24, 12)):
        (directory / f"{i}.mp4").write_bytes(clip(frames=frames))
    return [directory / "0.mp4", directory / "1.mp4"]


def send(server, *files, names=(), key: str = "none", **options) -> httpx.Response:
    """Upload files: paths, or (name, content, content type)."""
    parts = [("file", f if isinstance(f, tuple) else (f.name, f.read_bytes())) for f in files]
    parts += [("name", (None, name)) for name in names]
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{server.url}/v1/memories", files=parts, headers=headers, timeout=60, **options)


def ended(server, response: httpx.Response) -> dict:
    """The job that was begun, when it has ended."""
    assert response.status_code == 202, response.text
    url = f"{server.url}{response.headers['location']}"
    assert url.endswith(response.json()["id"])
    until(lambda: httpx.get(url).json()["status"] != "running", "the job does not end")
    return httpx.get(url).json()


def begun(server, response: httpx.Response) -> tuple[str, Callable[[], dict]]:
    """A job's id, and what asks for its state."""
    assert response.status_code == 202 and response.json()["object"] == "job", response.text
    id = response.json()["id"]
    return id, lambda: get(server, f"/v1/jobs/{id}").json()


def get(server, path: str, key: str = "none", **query) -> httpx.Response:
    return httpx.get(f"{server.url}{path}", params=query, headers={"Authorization": f"Bearer {key}"}, timeout=60)


def metric(server, name: str) -> float:
    return float(re.search(rf"^voco_{name} (\S+)$", get(server, "/metrics").text, re.MULTILINE)[1])


def answer(server, *content, **options) -> str:
    how = dict(model="tiny", max_tokens=12, messages=said(QUESTION, *content)) | options
    return server.client().chat.completions.create(**how).choices[0].message.content


def downloaded(server, id: str, model: Model, directory: Path, key: str = "none") -> MemoryBank:
    response = get(server, f"/v1/memories/{id}", key)
    assert response.status_code == 200, response.text
    assert f'"{id}.voco"' in response.headers["content-disposition"]
    (directory / f"{id}.voco").write_bytes(response.content)
    return model.open(directory / f"{id}.voco")


def assert_same(found: MemoryBank, expected: MemoryBank) -> None:
    assert (found.model, found.dtype) == (expected.model, expected.dtype)
    for name, array in expected.arrays.items():
        np.testing.assert_array_equal(found.arrays[name], array)


# ---- Pictures ------------------------------------------------------------------------------------------------------


def test_a_picture_by_data_uri_and_by_upload(server, model, pictures, tmp_path):
    """One memory, whichever way it comes; its bytes are a memory file, and what `compress` gives."""
    body = {"url": data_uri(pictures[0]), "name": "first"}
    made = httpx.post(f"{server.url}/v1/memories", json=body, timeout=60)
    assert made.status_code == 201
    entry = made.json()
    expected = model.compress(pictures[0])
    told = {"object": "memory", "name": "first", "kind": "picture", "images": 1, "tokens": 2, "bytes": expected.nbytes}
    assert entry == told | {"id": entry["id"], "created": entry["created"]}
    again = send(server, pictures[0], names=["second"])
    assert again.status_code == 201 and again.json() == entry | {"name": "second"}
    assert send(server, pictures[0]).json() == again.json()  # without a name it keeps the one that it has
    found = downloaded(server, entry["id"], model, tmp_path)
    assert_same(found, expected)
    assert found.items[0].sha256 == hashlib.sha256(pictures[0].read_bytes()).hexdigest()
    assert model.ask(QUESTION, tmp_path / f"{entry['id']}.voco") == model.ask(QUESTION, pictures[0])


def test_what_a_memory_is_asked_for_by(server, model, pictures):
    """A name that an upload or a chat gives, the id, and the SHA-256 of the file; the newest has the name."""
    one, two = pictures[1:3]
    expected = [model.ask(QUESTION, file, max_new_tokens=12) for file in (one, two)]
    id = send(server, one, names=["the cat"]).json()["id"]
    sha256 = hashlib.sha256(one.read_bytes()).hexdigest()
    compressed = metric(server, "compressed_images_total")
    for uuid in ("the cat", id, id.upper(), sha256):
        for kind in ("image_url", "video_url", "input_video"):
            assert answer(server, {"type": kind, "uuid": uuid}) == expected[0]
    assert metric(server, "compressed_images_total") == compressed
    for uuid in ("the cat", hashlib.sha256(two.read_bytes()).hexdigest()):
        named = {"type": "image_url", "image_url": {"url": data_uri(two)}, "uuid": uuid}
        assert answer(server, named) == expected[1]
        assert answer(server, {"type": "image_url", "uuid": uuid}) == expected[1]
    both = [{"type": "image_url", "uuid": id}, {"type": "image_url", "uuid": "the cat"}]
    assert answer(server, *both) == model.ask(QUESTION, [one, two], max_new_tokens=12)
    stolen = {"type": "image_url", "image_url": {"url": data_uri(two)}, "uuid": id}  # another's id is no name for it
    response = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": said("a", stolen)}, timeout=60)
    assert response.status_code == 400 and "64 hex digits" in response.json()["error"]["message"]


def test_several_files(server, model, pictures, clips):
    """A job, with a name for each file or for none; one that cannot be read ends it, and what was made stays."""
    files = [*pictures[:2], clips[1]]
    job = ended(server, send(server, *files, names=["a", "b", "c"]))
    assert (job["status"], job["progress"], job["error"]) == ("done", {"done": 3, "total": 3}, None)
    assert [(m["name"], m["kind"], m["images"]) for m in job["memories"]] == [
        ("a", "picture", 1), ("b", "picture", 1), ("c", "video", 8),
    ]  # fmt: skip
    about = [{"type": "image_url", "uuid": name} for name in "ab"]
    assert answer(server, *about) == model.ask(QUESTION, pictures[:2], max_new_tokens=12)
    failed = ended(server, send(server, pictures[3], ("bad\x1b[2J.png", b"\x89PNG\r\n\x1a\nnothing"), clips[0]))
    assert failed["status"] == "failed" and failed["error"]["message"].startswith("bad")
    assert "\x1b" not in failed["error"]["message"] and len(failed["memories"]) == 1
    assert get(server, f"/v1/memories/{failed['memories'][0]['id']}").is_success


# ---- Clips ---------------------------------------------------------------------------------------------------------


def test_clips_in_chat(server, model, clips, pictures):
    """By `video_url`, `input_video` and `uuid`, alone and beside pictures: what `ask` says of `compress_video`."""
    bank = model.compress_video(clips[0])
    expected = model.ask(QUESTION, bank, max_new_tokens=12)
    uri = data_uri(clips[0], "video/mp4")
    given = [
        {"type": "video_url", "video_url": {"url": uri}, "uuid": "my clip"},
        {"type": "input_video", "input_video": {"data": uri.partition(",")[2], "format": "mp4"}},
        {"type": "input_video", "input_video": {"data": uri}},
        {"type": "video_url", "uuid": "my clip"},
        {"type": "video_url", "uuid": hashlib.sha256(clips[0].read_bytes()).hexdigest()},
    ]
    compressed = metric(server, "compressed_images_total")
    assert [answer(server, part) for part in given] == [expected] * len(given)
    assert metric(server, "compressed_images_total") - compressed in (0, len(bank))  # once, or by a test before
    mixed = model.ask(QUESTION, [model.compress(pictures[0]), bank, model.compress(pictures[1])], max_new_tokens=12)
    assert answer(server, pictures[0], given[0], pictures[1]) == mixed


def test_times_stand_before_frames(server, model, clips, monkeypatch):
    """Where a run was trained so."""
    monkeypatch.setattr(model.engine, "timestamps", True)
    asked, check = [], server.scheduler.batch.check
    monkeypatch.setattr(server.scheduler.batch, "check", lambda ask: (asked.append(ask), check(ask)))
    answer(server, {"type": "video_url", "video_url": {"url": data_uri(clips[1], "video/mp4")}}, max_tokens=1)
    (prompt,) = model.prompts([Request(QUESTION, model.compress_video(clips[1]))])
    np.testing.assert_array_equal(asked[-1].sample.tokens, prompt.sample.tokens)
    np.testing.assert_array_equal(asked[-1].sample.slot_index, prompt.sample.slot_index)


class Gate:
    """In place of `encode_pixels`: images are compressed when they are let through, a batch each time."""

    def __init__(self, encode):
        self.encode, self.batches, self._passes = encode, 0, threading.Semaphore(0)

    def __call__(self, *arguments):
        self.batches += 1
        assert self._passes.acquire(timeout=60)
        return self.encode(*arguments)

    def let(self, batches: int) -> None:
        self._passes.release(batches)

    def close(self) -> None:
        self.let(100)


@pytest.fixture
def gate(model, monkeypatch):
    gate = Gate(model.image_encoder.encode_pixels)
    monkeypatch.setattr(model.image_encoder, "encode_pixels", gate)
    monkeypatch.setattr(model.image_encoder, "sampling", FrameSampling(40))  # in three batches
    return gate


def test_a_clip_is_a_job(model, gate):
    """Its progress is told, and who cancels it stops the work."""
    with running(model) as server, contextlib.closing(gate):
        response = send(server, ("a.mp4", clip(frames=40)), names=["a clip"])
        id, state = begun(server, response)
        until(lambda: gate.batches == 1, "it does not begin")
        assert (state()["status"], state()["progress"]) == ("running", {"done": 0, "total": 40})
        gate.let(1)
        until(lambda: gate.batches == 2 and state()["progress"]["done"] == 16, "no progress")
        assert httpx.delete(f"{server.url}/v1/jobs/{id}").is_success
        until(lambda: state()["status"] == "cancelled", "it goes on")
        assert state()["error"] and state()["memories"] == []
        gate.let(10)
        job = ended(server, send(server, ("a.mp4", clip(frames=40)), names=["a clip"]))
        assert (job["status"], job["progress"]) == ("done", {"done": 40, "total": 40})
        assert gate.batches == 5  # two of the first, and all of the second
        (entry,) = job["memories"]
        assert (entry["name"], entry["kind"], entry["images"]) == ("a clip", "video", 40)
        assert httpx.delete(f"{server.url}/v1/jobs/{job['id']}").json()["status"] == "done"
        assert get(server, "/v1/jobs/job_nobody's").status_code == 404


def test_who_cancels_takes_nothing_from_others(model, clips, monkeypatch):
    """Of two that wait for the same clip the one whose file is being read."""
    go, reading = threading.Event(), threading.Event()

    def slow(*arguments):
        reading.set()
        assert go.wait(60)
        return check_video(*arguments)

    monkeypatch.setattr(service, "check_video", slow)
    with running(model) as server:
        first, first_state = begun(server, send(server, clips[0]))
        assert reading.wait(60)
        _, second_state = begun(server, send(server, clips[0]))
        making = server.server.service._making
        until(lambda: [len(one.listeners) for one in making.values()] == [2], "they do not wait for the same")
        httpx.delete(f"{server.url}/v1/jobs/{first}")
        until(lambda: [len(one.listeners) for one in making.values()] == [1], "it still waits")
        go.set()
        until(lambda: second_state()["status"] != "running", "it does not end")
        assert (second_state()["status"], second_state()["error"]) == ("done", None)
        until(lambda: first_state()["status"] == "cancelled", "it goes on")
        assert not making


# ---- Memory files --------------------------------------------------------------------------------------------------


def test_memory_files(server, model, pictures, clips, tmp_path):
    """An album that `save` wrote is one memory; a damaged one, and another model's, are refused."""
    album = model.compress(pictures)
    model.save(album, tmp_path / "album.voco")
    made = send(server, tmp_path / "album.voco", names=["album"])
    assert made.status_code == 201
    assert (made.json()["kind"], made.json()["images"], made.json()["name"]) == ("album", 4, "album")
    expected = model.ask(QUESTION, album, max_new_tokens=12)
    assert answer(server, {"type": "image_url", "uuid": "album"}) == expected
    assert_same(downloaded(server, made.json()["id"], model, tmp_path), album)
    model.save(model.compress_video(clips[0]), tmp_path / "clip.voco")
    assert send(server, tmp_path / "clip.voco").json()["kind"] == "video"
    whole, rng = (tmp_path / "album.voco").read_bytes(), np.random.default_rng(0)
    others = [damage(rng, whole)[1] for _ in range(10)]
    others += [b"", whole[:-1], whole.replace(model.fingerprint.encode(), b"0" * len(model.fingerprint))]
    for bad in others:
        if bad != whole:
            refused = send(server, ("other.voco", bad))
            assert refused.status_code == 400, refused.text
            message = refused.json()["error"]["message"]
            assert message.startswith("other.voco: ") and "voco-serve" not in message


# ---- Lists and deletion --------------------------------------------------------------------------------------------


def test_lists_downloads_and_deletions(model, tmp_path):
    files = [tmp_path / f"{i}.png" for i in range(5)]
    for i, file in enumerate(files):
        shown(i).save(file)
    with running(model, store=str(tmp_path / "store")) as server:
        made = [send(server, file, names=[file.name]).json() for file in files]
        newest = made[::-1]
        assert get(server, "/v1/memories").json()["data"] == newest
        page = get(server, "/v1/memories", limit=2).json()
        assert page["data"] == newest[:2] and page["has_more"]
        assert (page["first_id"], page["last_id"]) == (newest[0]["id"], newest[1]["id"])
        page = get(server, "/v1/memories", limit=10, after=page["last_id"]).json()
        assert page["data"] == newest[2:] and not page["has_more"]
        for query in ({"limit": 0}, {"limit": 101}, {"limit": "ten"}, {"after": "\0"}, {"order": "asc"}):
            response = get(server, "/v1/memories", **query)
            assert response.status_code == 400 and next(iter(query)) in response.json()["error"]["message"]
        id = made[0]["id"]
        deleted = httpx.delete(f"{server.url}/v1/memories/{id}")
        assert deleted.json() == {"id": id, "object": "memory", "deleted": True}
        for response in (get(server, f"/v1/memories/{id}"), httpx.delete(f"{server.url}/v1/memories/{id}")):
            assert response.status_code == 404 and response.json()["error"]["code"] == "memory_not_found"
        by_name = {"messages": said("a", {"type": "image_url", "uuid": "0.png"})}
        assert httpx.post(f"{server.url}/v1/chat/completions", json=by_name).status_code == 404
        assert get(server, "/v1/memories").json()["data"] == newest[:-1]
        assert send(server, files[0]).json()["id"] == id  # made anew


def test_owners(model, clips, pictures, tmp_path):
    """With --isolate nobody sees, reads, cancels or deletes what is another's."""
    with running(model, keys=KEYS, isolate=True, store=str(tmp_path)) as server:
        mine, other = KEYS
        id = send(server, pictures[0], names=["mine"], key=mine).json()["id"]
        job = send(server, clips[1], key=mine).json()["id"]
        for path in (f"/v1/memories/{id}", f"/v1/jobs/{job}"):
            assert get(server, path, mine).is_success
            assert get(server, path, other).status_code == 404
            headers = {"Authorization": f"Bearer {other}"}
            assert httpx.delete(f"{server.url}{path}", headers=headers).status_code == 404
            for stranger in ("none", mine[:-1]):
                assert get(server, path, stranger).status_code == 401
        assert send(server, pictures[0], key="nobody").status_code == 401
        assert get(server, "/v1/memories", other).json()["data"] == []
        assert send(server, pictures[0], names=["theirs"], key=other).json()["name"] == "theirs"
        assert get(server, "/v1/memories", mine).json()["data"][-1]["name"] == "mine"


# ---- A store that outlives its server, and that servers share ------------------------------------------------------


def test_a_restart_finds_what_is_known(model, pictures, clips, tmp_path):
    """Without compressing it, also what chat alone has seen."""
    about = [pictures[0], {"type": "video_url", "video_url": {"url": data_uri(clips[0], "video/mp4")}}]
    with running(model, store=str(tmp_path)) as server:
        expected = answer(server, *about)
        assert metric(server, "compressed_images_total") == 9
    with running(model, store=str(tmp_path)) as server:
        assert answer(server, *about) == expected
        assert answer(server, {"type": "image_url", "uuid": hashlib.sha256(pictures[0].read_bytes()).hexdigest()})
        assert metric(server, "compressed_images_total") == 0
    with running(model) as server:  # with another store, or none on disk
        assert answer(server, *about) == expected
        assert metric(server, "compressed_images_total") == 9


class Process:
    """`python -m voco_jax serve`, as an operator starts it."""

    def __init__(self, run: Path, store: Path, log: Path):
        self.log = log
        options = ["--store", store, "--port", "0", "--rows", "1", "--context", "128", "--name", "tiny", "--grace", "5"]
        with open(log, "wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "voco_jax", "serve", "--run", run, *options], stdout=output, stderr=output,
                env=os.environ | {"JAX_PLATFORMS": "cpu", "TMPDIR": str(log.parent)},
            )  # fmt: skip

    def ready(self) -> "Process":
        until(lambda: self._port() or self.process.poll() is not None, "it does not listen", 300)
        assert self._port(), self.log.read_text()
        self.url = f"http://127.0.0.1:{self._port()}"
        until(lambda: get(self, "/ready").is_success, "it is not ready", 300)
        return self

    def _port(self) -> str:
        found = re.search(r"running on http://127.0.0.1:(\d+)", self.log.read_text())
        return found[1] if found else ""


def test_processes_share_a_store_and_one_is_killed(two_tokens_run, model, pictures, tmp_path):
    """What one was told to keep the other has; and every memory that was acknowledged outlives a kill -9."""
    store, large = tmp_path / "store", model.compress(pictures)[np.arange(8000) % 4]
    model.save(large, tmp_path / "large.voco")
    with contextlib.ExitStack() as stack:
        both = [Process(two_tokens_run, store, tmp_path / f"{i}.log") for i in range(2)]
        for one in both:
            stack.callback(one.process.wait)
            stack.callback(one.process.kill)
        first, second = (one.ready() for one in both)
        id = send(first, pictures[0], names=["shared"]).json()["id"]
        assert get(second, "/v1/memories").json()["data"][0]["id"] == id
        before = {id: downloaded(first, id, model, tmp_path)}
        how = dict(model="tiny", messages=said(QUESTION, {"type": "image_url", "uuid": "shared"}), max_tokens=12)
        url = f"{second.url}/v1/chat/completions"
        told = httpx.post(url, json=how, timeout=60).json()["choices"][0]["message"]["content"]
        assert told == model.ask(QUESTION, pictures[0], max_new_tokens=12)
        assert metric(second, "compressed_images_total") == 0

        acknowledged: list[tuple[str, Image.Image]] = []
        stop = threading.Event()

        def go_on(worker: int) -> None:
            i = worker
            while not stop.is_set():
                i += 4
                file = tmp_path / f"{i}.png"
                shown(i).save(file)
                with contextlib.suppress(httpx.TransportError):
                    response = send(first, file, names=[f"picture {i}"])
                    if response.status_code == 201:
                        acknowledged.append((response.json()["id"], file))
                        if i % 3 == 0:
                            before[response.json()["id"]] = downloaded(first, response.json()["id"], model, tmp_path)

        with ThreadPoolExecutor(4) as pool:
            working = [pool.submit(go_on, worker) for worker in range(4)]
            until(lambda: len(acknowledged) > 12, "uploads do not end", 120)
            # Large enough that it would still be written when the answer is there
            response = send(first, tmp_path / "large.voco")
            first.process.send_signal(signal.SIGKILL)
            first.process.wait()
            stop.set()
            for one in working:
                one.result()
        assert len(before) > 2 and response.status_code == 201
        before[response.json()["id"]] = large
        for id, bank in before.items():
            assert_same(downloaded(second, id, model, tmp_path), bank)
        for id, file in acknowledged:
            bank = downloaded(second, id, model, tmp_path)
            np.testing.assert_allclose(bank.keys, model.compress(file).keys, rtol=1e-4, atol=1e-5)
            name = {"type": "image_url", "uuid": f"picture {file.stem}"}
            body = {"messages": said("a", name), "max_tokens": 1}
            assert httpx.post(url, json=body, timeout=60).is_success
        second.process.terminate()
        second.process.wait(60)
        assert "Traceback" not in second.log.read_text()


# ---- Bodies --------------------------------------------------------------------------------------------------------


def raw(server, content: bytes, *, then_wait: float = 0) -> bytes:
    """What comes back of these bytes until the server closes the connection."""
    address = server.url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1])), timeout=60) as connection:
        connection.sendall(content)
        time.sleep(then_wait)
        received = b""
        while piece := connection.recv(1 << 16):
            received += piece
    return received


def is_well(server, pictures) -> bool:
    return send(server, pictures[0]).status_code == 201 and bool(answer(server, pictures[0]))


def test_a_web_page_of_others_cannot_upload(server, pictures):
    """Of an upload a browser does not ask the server first: it says where the page is from."""
    file = {"file": pictures[0].read_bytes()}
    for site, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 201), ("none", 201)):
        headers = {"Sec-Fetch-Site": site, "Origin": "https://example.com"}
        assert httpx.post(f"{server.url}/v1/memories", files=file, headers=headers).status_code == status


def test_limits_of_bodies(model, pictures, monkeypatch):
    """413 by the length that is told, and when so much has come; an endless upload ends; one that stops is given up."""
    monkeypatch.setattr(bodies, "_LINGER", 0.2)
    with running(model, body_bytes=1 << 16, upload_bytes=1 << 21, body_seconds=0.5) as server:
        multipart = {"Content-Type": "multipart/form-data; boundary=x"}
        head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'

        def pieces(count: float, first: bytes = b""):
            yield first
            sent = 0
            while sent < count:
                yield b"a" * 4096
                sent += 4096

        cases = [
            ("/v1/memories", dict(content=b"a" * (1 << 17)), 413),
            ("/v1/memories", dict(content=pieces(1 << 17)), 413),
            ("/v1/chat/completions", dict(content=b"a" * (1 << 17)), 413),
            ("/v1/chat/completions", dict(content=pieces(1 << 17)), 413),
            ("/v1/chat/completions", dict(content=b"a" * (1 << 17), headers=multipart), 415),
            ("/v1/chat/completions", dict(content=pieces(float("inf")), headers=multipart), 415),
            ("/v1/memories", dict(content=pieces(1 << 17, head), headers=multipart), 400),  # which has no end
            ("/v1/memories", dict(content=head + b"a" * (1 << 21), headers=multipart), 413),
            ("/v1/memories", dict(content=pieces(float("inf"), head), headers=multipart), 413),
            ("/v1/memories", dict(content=pieces(float("inf")), headers=multipart), 400),  # which has no boundary
        ]
        for path, body, status in cases:
            body = {"headers": {"Content-Type": "application/json"}} | body
            response = httpx.post(f"{server.url}{path}", timeout=60, **body)
            assert response.status_code == status, (path, status, response.text)
            assert response.json()["error"]["type"] == "invalid_request_error"
        slow = b"POST /v1/memories HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n" + (
            b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
        )
        received = raw(server, slow)
        assert received.startswith(b"HTTP/1.1 408 ") and b"connection: close" in received
        assert is_well(server, pictures)


def test_uploads_that_are_none(server, pictures):
    """What is mislabelled, hostile, or not multipart at all is refused with a line, and the server goes on."""
    boundary, good = "multipart/form-data; boundary=x", pictures[0].read_bytes()

    def body(*parts: tuple[str, bytes], end: bytes = b"--x--\r\n") -> bytes:
        return b"".join(b"--x\r\n" + head.encode() + b"\r\n\r\n" + content + b"\r\n" for head, content in parts) + end

    file = 'Content-Disposition: form-data; name="file"; filename="a.png"'
    name = 'Content-Disposition: form-data; name="name"'
    html = b"<!doctype html><script>alert(1)</script>"
    bad = [
        (boundary, b""), (boundary, b"{}"), (boundary, b"\xff" * 1000), (boundary, good), ("multipart/form-data", good),
        ("multipart/form-data; boundary=", good), (f"multipart/form-data; boundary={'x' * 5000}", good),
        (boundary, body((file, good), end=b"")), (boundary, body((file, good))[:-9]), (boundary, body()),
        (boundary, body((name, b"a"))), (boundary, body((file, good), (name, b"a"), (name, b"b"))),
        (boundary, body((name, b"\xff"), (file, good))), (boundary, body((name, b"a" * 5000), (file, good))),
        (boundary, body((name, b"a" * 1001), (file, good))), (boundary, body((name, b"0" * 64), (file, good))),
        (boundary, body(("X: " + "a" * 20_000, good))), (boundary, body(("nothing", good))),
        (boundary, body(('Content-Disposition: form-data; name="other"; filename="a"', good))),
        (boundary, body(('Content-Disposition: form-data; name="file"', good))),
        (boundary, body(('Content-Disposition: attachment; filename="a"', good))), (boundary, body(("", good))),
        (boundary, body((file, b""))), (boundary, body((file, html))), (boundary, body((file, b"%PDF-1.7"))),
        (boundary, body((f"{file}\r\nContent-Type: video/mp4", good))),
        (boundary, body((f"{file}\r\nContent-Type: text/html", good))),
        (boundary, body((f"{file}\r\nContent-Type: image/png", clip()[:2000]))),
        (boundary, body((file, png((8000, 8000))[:3000]))), (f"{boundary}; charset=idna", body((name, b"\xff.a"))),
        ("application/json", good), ("application/json", b'{"url": "data:image/png;base64,AAAA"}'),
        ("application/json", b'{"url": "file:///etc/passwd"}'), ("application/json", b'{"url": 3}'),
        ("application/json", b'{"url": "data:,x", "sampling": 3}'),
    ]  # fmt: skip
    known = get(server, "/v1/memories", limit=100).json()["data"]
    for content_type, content in bad:
        headers = {"Content-Type": content_type}
        response = httpx.post(f"{server.url}/v1/memories", content=content, headers=headers, timeout=60)
        assert response.status_code == 400, (content_type, content[:200], response.text)
        message = response.json()["error"]["message"]
        assert message and "\n" not in message and "voco-serve" not in message
    for content_type in ("", "text/plain", "multipart/mixed; boundary=x", "application/x-www-form-urlencoded"):
        for content in (body((file, good)), b'{"url": "data:,x"}'):
            headers = {"Content-Type": content_type}
            response = httpx.post(f"{server.url}/v1/memories", content=content, headers=headers, timeout=60)
            assert response.status_code == 415 and "application/json" in response.json()["error"]["message"]
    assert get(server, "/v1/memories", limit=100).json()["data"] == known
    for evil in ("../../evil.png", "/etc/passwd", "a\x1b[2J.png", "a" * 3000, "ä😀.png"):
        assert send(server, (evil, good)).status_code == 201
    many = [("file", (f"{i}.png", good)) for i in range(1001)]
    assert httpx.post(f"{server.url}/v1/memories", files=many, timeout=60).status_code == 400
    case = httpx.post(
        f"{server.url}/v1/memories",
        content=body((file, good)),
        headers={"Content-Type": boundary.title().replace("X", "x")},
    )
    assert case.status_code == 201
    assert is_well(server, pictures)


def test_uploads_do_not_stay(model, pictures, clips, tmp_path, monkeypatch):
    """Neither those that have ended, nor those of a server that was killed; one that another server reads stays."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with uploads.work_directory() as in_use:
        left, new, other = (tmp_path / name for name in ("voco-serve-left", "voco-serve-new", "other"))
        for directory in (in_use, left, new, other):
            directory.mkdir(exist_ok=True)
            (directory / "0").write_bytes(b"a")
            os.utime(directory, (0, 0) if directory != new else None)
        with running(model) as server:
            assert {*tmp_path.iterdir()} == {in_use, new, other} and (in_use / "0").exists()
            assert send(server, pictures[0]).status_code == 201
            assert send(server, ("a.png", b"none")).status_code == 400
            assert ended(server, send(server, *pictures[:2], clips[1]))["status"] == "done"
            assert downloaded(server, send(server, pictures[0]).json()["id"], model, tmp_path / "other")
            until(lambda: {*tmp_path.iterdir()} == {in_use, new, other}, "an upload stays")


# ---- A model without memories --------------------------------------------------------------------------------------


def test_a_model_without_memories(two_tokens_run, pictures, clips):
    """It has nothing to keep; questions about pictures and clips are answered as `ask` does."""
    model = Model(load_run(two_tokens_run, compressor="none"))
    with running(model) as server:
        for _ in range(2):
            assert answer(server, *pictures[:2]) == model.ask(QUESTION, pictures[:2], max_new_tokens=12)
        uri = {"type": "video_url", "video_url": {"url": data_uri(clips[1], "video/mp4")}}
        assert answer(server, uri) == model.ask(QUESTION, clips[1], max_new_tokens=12)
        assert metric(server, "compressed_images_total") == 10
        for response in (send(server, pictures[0]), get(server, "/v1/memories"), get(server, "/v1/memories/a")):
            assert response.status_code == 400 and "no memories" in response.json()["error"]["message"]
        body = {"messages": said("a", {"type": "image_url", "uuid": "a"})}
        assert httpx.post(f"{server.url}/v1/chat/completions", json=body).status_code == 400
        assert (
            httpx.post(f"{server.url}/v1/chat/completions", json={"messages": said("a"), "tokens": 1}).status_code
            == 400
        )
