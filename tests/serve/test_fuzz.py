"""Malformed requests: each is refused, and the next good one is answered."""

from collections.abc import Callable, Iterator
import contextlib
import copy
import json
import socket

import numpy as np
import pytest

from tests.fuzz.mutations import damage
from tests.serve.conftest import data_uri, part, running, said, until
from voco_jax.serve.service import Defaults

COUNT, SEED = 1000, 0
CHAT, MEMORIES = "/v1/chat/completions", "/v1/memories"
JSON, MULTIPART = "application/json", "multipart/form-data; boundary=x"

# In place of any value
VALUES = [
    None, True, -1, 0, 1.5, 10**18, -(10**30), 10**400, float("nan"), float("inf"), "", "0", "\0", "\ud800",
    "\x1b[2J\r\n\u202e", "a" * 5000, "data:image/png;base64,AAAA", "data:,", "../../etc/passwd", "http://[::1", [], {},
    [[]], [None], {"": None}, {"a": {"b": []}}, {"type": "text"}, {"url": {}},
]  # fmt: skip
IDS = [
    "..", "../../../etc/passwd", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "%00", "a%00.voco", "%ff%fe", "%", "%zz", "a" * 5000,
    "0" * 63, "0" * 65, "G" * 64, "0" * 64 + "%0a", "0" * 64 + ".voco", "job_", "*", "~", "a b", "é", "a?limit=1", "//",
]  # fmt: skip
HEADERS = [
    "Content-Length: -1", "Content-Length: 1, 2", "Content-Length: 99999999999999999999", "Content-Length: a",
    "Transfer-Encoding: gzip", "Transfer-Encoding: chunked", "Host: a", "Host", ": a", "A\0: b", "A: \0b", "é: a",
    f"A: {'a' * 70_000}", "Upgrade: websocket", "Authorization: Basic \xff", "Content-Encoding: gzip", " a: b",
]  # fmt: skip


def request(
    method: str, path: str, body: bytes = b"", content_type: str = JSON, *more: str, length: int | None = None
) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: a", "Connection: close", f"Content-Type: {content_type}", *more]
    lines.append(f"Content-Length: {len(body) if length is None else length}")
    return "\r\n".join(lines).encode("latin-1", "replace") + b"\r\n\r\n" + body


def places(value: object, path: tuple = ()) -> Iterator[tuple]:
    """Of all values within one, keys and indices."""
    yield path
    for key, one in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(one, (*path, key))


def mutated(rng: np.random.Generator, body: dict) -> bytes:
    """With a few values changed, taken out, added or nested deeply; or bytes damaged."""
    body = copy.deepcopy(body)
    for _ in range(rng.integers(1, 4)):
        if not (found := [path for path in places(body) if path]):
            break  # nothing is left
        *path, last = found[rng.integers(len(found))]
        within = body
        for key in path:
            within = within[key]
        value = copy.deepcopy(VALUES[rng.integers(len(VALUES))])
        match rng.integers(6):
            case 0 if isinstance(within, dict):
                del within[last]
            case 1 if isinstance(within, dict):
                within[str(rng.choice(["a", "", "uuid", "url", "tokens", "n", "top_k", "stop", "\x00"]))] = value
            case 2:
                within[last] = [within[last]] * rng.integers(2, 20)
            case 3:
                for _ in range(rng.integers(1, 100)):
                    within[last] = {"a": within[last]} if rng.integers(2) else [within[last]]
            case _:
                within[last] = value
    text = json.dumps(body).encode()
    match rng.integers(12):
        case 0:
            return text[: rng.integers(len(text))]
        case 1:
            return damage(rng, text)[1]
        case 2:
            return json.dumps(body).encode(str(rng.choice(["utf-16", "utf-32", "utf-8-sig"])))
        case 3:
            return rng.choice([b"[", b'{"a":']) * 50_000
    return text


class Cases:
    """Requests that are not good, of a seed."""

    def __init__(self, seed: int, picture):
        self.rng, self.file = np.random.default_rng(seed), picture.read_bytes()
        options = dict(model="tiny", max_tokens=2, temperature=0.5, top_p=0.9, seed=1, stop=["x"], n=1, logprobs=True)
        known = said("what?", part(picture, uuid="it"))
        answered = [*known, {"role": "assistant", "content": "a", "refusal": None}, *said("and?")]
        self.bodies = [
            (CHAT, {"messages": known} | options),
            (CHAT, {"messages": answered, "tools": [], "top_logprobs": 2} | options),
            (CHAT, {"messages": said("a"), "stream": True, "stream_options": {"include_usage": True}, "tokens": 1}),
            (MEMORIES, {"url": data_uri(picture), "name": "it"}),
        ]  # fmt: skip
        kinds: list[tuple[Callable[[], bytes], float]] = [
            (self.json, 0.5), (self.upload, 0.2), (self.path, 0.15), (self.headers, 0.1), (self.type, 0.04),
            (self.cut, 0.01),
        ]  # fmt: skip
        self.kinds, self.shares = zip(*kinds, strict=True)

    def next(self) -> tuple[str, bytes]:
        kind = self.kinds[self.rng.choice(len(self.kinds), p=self.shares)]
        return kind.__name__, kind()

    def _any(self, choices):
        return choices[self.rng.integers(len(choices))]

    def json(self) -> bytes:
        path, body = self._any(self.bodies)
        return request("POST", path, mutated(self.rng, body))

    def upload(self) -> bytes:
        head = (
            b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
        )
        name = b'\r\n--x\r\nContent-Disposition: form-data; name="name"\r\n\r\nit\r\n--x--\r\n'
        content_type, parts = MULTIPART, [head, self.file, name]
        for _ in range(self.rng.integers(1, 3)):
            which = self.rng.integers(4)
            if which == 3:
                more = ["", f"; {'boundary=x' * 9}", "; boundary=", '; boundary="', "; boundary=xy", "x; boundary=x"]
                content_type = f"multipart/form-data{self._any(more)}"
            else:
                parts[which] = damage(self.rng, parts[which])[1]
        return request("POST", MEMORIES, b"".join(parts), content_type)

    def path(self) -> bytes:
        directory = self._any([MEMORIES, "/v1/jobs", "/v1/models", "/v1", ""])
        method = self._any(
            ["GET", "DELETE", "PUT", "POST", "HEAD", "OPTIONS", "TRACE", "PATCH", "get", "A" * 300, "\xe9"]
        )
        path = self._any(
            [f"{directory}/{self._any(IDS)}", self._any(IDS), f"http://a{directory}/b", f"{directory}?a=\x00"]
        )
        return request(method, path)

    def headers(self) -> bytes:
        path, body = self._any(self.bodies)
        return request("POST", path, mutated(self.rng, body), JSON, self._any(HEADERS))

    def type(self) -> bytes:
        path, body = self._any(self.bodies)
        types = [
            "",
            "text/plain",
            "image/png",
            "application/x-www-form-urlencoded",
            "application/jsonl",
            "\xe9",
            MULTIPART,
        ]
        return request("POST", path, json.dumps(body).encode(), self._any(types))

    def cut(self) -> bytes:
        """Less comes than is told."""
        path, body = self._any(self.bodies)
        text = json.dumps(body).encode()
        return request("POST", path, text[: self.rng.integers(len(text))], length=len(text))


def answered(url: str, content: bytes) -> tuple[int, bytes]:
    """The status and the body that come back, until the server closes the connection."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        received = b""
        with contextlib.suppress(ConnectionError):  # it has answered before it has read all
            connection.sendall(content)
        with contextlib.suppress(ConnectionError):
            while piece := connection.recv(1 << 16):
                received += piece
    assert received, content[:1000]
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


@pytest.mark.parametrize("key", ["temperature", "top_p", "top_k", "seed", "max_tokens", "n", "top_logprobs", "tokens"])
def test_numbers_beyond_all_limits(server, key):
    """Of which a float or an int32 would be made."""
    for value in (10**400, -(10**400), 10**18, -(10**18), 1e308, -1e308):
        body = {"messages": said("what?"), "max_tokens": 2, "temperature": 1, "logprobs": True} | {key: value}
        status, said_of_it = answered(server.url, request("POST", CHAT, json.dumps(body).encode()))
        is_good = isinstance(value, int) and (key == "seed" or (key == "top_k" and value > 0))
        assert status == (200 if is_good else 400), (value, said_of_it)


def test_malformed_requests(model, pictures, tmp_path, caplog):
    """1,000 of a seed are answered 4xx, but for those that are good by chance, which are answered; never 5xx, and none
    hangs. Between them good ones are answered right."""
    cases, statuses = Cases(SEED, pictures[0]), []
    options = dict(rows=4, context=256, defaults=Defaults(max_new_tokens=4), body_seconds=0.3)
    with running(model, store=str(tmp_path), **options) as server:
        expected = model.ask("what?", pictures[0], max_new_tokens=4)
        good = request("POST", CHAT, json.dumps({"messages": said("what?", pictures[0])}).encode())
        for i in range(COUNT):
            kind, content = cases.next()
            status, body = answered(server.url, content)
            assert 400 <= status < 500 or status in (200, 201, 202), (i, kind, content[:1000], status, body)
            statuses.append(status)
            if i % 10 == 0:
                status, body = answered(server.url, good)
                assert status == 200, (i, content, status, body)
                assert json.loads(body)["choices"][0]["message"]["content"] == expected
        until(lambda: server.scheduler.running == server.scheduler.waiting == 0, "something is left behind")
        assert not server.server.service._making
    assert sum(status >= 400 for status in statuses) > 0.9 * COUNT
    assert {*statuses} >= {400, 404, 405, 408, 415} and not [one for one in caplog.records if one.levelname == "ERROR"]
