"""Who gets to the page, and to which of its paths; and the server without it."""

import asyncio
import sys
import time

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse

from tests.serve.conftest import running
from voco_jax.serve import page_access
from voco_jax.serve.app import Access
from voco_jax.serve.bodies import BodyLimit
from voco_jax.serve.page_access import OWNER, SECONDS, Gate, PageRoute

KEYS = ("the key of the first one", "the key of the second")


async def _page(scope, receive, send) -> None:
    """In place of Gradio's."""
    if "heartbeat" not in scope["path"]:
        await Request(scope, receive).body()
        await PlainTextResponse(f"{scope['path']} {scope[OWNER]}")(scope, receive, send)
        return

    async def alive():
        while True:
            yield "alive\n"
            await asyncio.sleep(60)

    await StreamingResponse(alive())(scope, receive, send)


def client(
    *keys: str, isolated: bool = False, is_closing=lambda: False, scheme: str = "http", most: int = 10_000
) -> httpx.AsyncClient:  # fmt: skip
    async def other(request: Request):
        return PlainTextResponse("the API's")

    app = Starlette()
    app.add_route("/config", other, methods=["PUT"])
    app.router.routes.append(PageRoute(Gate(_page, Access(keys, isolated), is_closing)))
    app.add_middleware(BodyLimit, most_bytes=lambda path, content_type: most, seconds=0.2)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=f"{scheme}://server")


async def log_in(page: httpx.AsyncClient, key: str) -> httpx.Response:
    return await page.post("/login", data={"key": key})


def test_without_keys_everybody_sees_it():
    async def check():
        page = client()
        for path in ("/", "/config", "/static/a.js", "/gradio_api/queue/join"):
            response = await page.get(path)
            assert response.text == f"{path} " and response.status_code == 200
            assert "default-src 'self'" in response.headers["content-security-policy"]
        # and nobody else's page makes a browser ask
        for site in ("cross-site", "same-site"):
            assert (await page.post("/gradio_api/upload", headers={"Sec-Fetch-Site": site})).status_code == 403
        assert (await page.post("/gradio_api/upload", headers={"Sec-Fetch-Site": "same-origin"})).status_code == 200

    asyncio.run(check())


@pytest.mark.parametrize(
    "path",
    ["/v1/models/x", "/gradio_api/file=/etc/passwd", "/gradio_api/proxy=http://x", "/gradio_api/info", "/docs",
     "/gradio_api/vibe-code/", "/gradio_api/queue/join/x", "/assets", "/config/x"],
)  # fmt: skip
def test_other_paths_are_not_its(path):
    assert asyncio.run(client().get(path)).status_code == 404


def test_a_key_opens_it(monkeypatch):
    async def check():
        page = client(*KEYS)
        form = await page.get("/")
        assert form.status_code == 401 and 'type="password"' in form.text
        assert "frame-ancestors 'none'" in form.headers["content-security-policy"]
        for path in ("/config", "/static/a.js", "/gradio_api/queue/data", "/gradio_api/heartbeat/x"):
            assert (await page.get(path)).status_code == 401
        for wrong in ("", "x", KEYS[0][:-1], "x" * 5000, KEYS[0] + "\n" + KEYS[1]):
            response = await log_in(page, wrong)
            assert response.status_code == 401 and "This key is not known here." in response.text and not page.cookies
        entered = await log_in(page, f" {KEYS[1]} ")
        assert entered.status_code == 303 and entered.headers["location"] == "/"
        assert "HttpOnly" in entered.headers["set-cookie"] and "Secure" not in entered.headers["set-cookie"]
        assert (await page.get("/")).text == "/ "
        # No other cookie does, and this one not for long
        ((name, value),) = page.cookies.items()
        until, signature = value.split(".")
        for other in (
            f"{int(until) + 1}.{signature}",
            f"{until}.",
            signature,
            f"{until}.{KEYS[0]}",
            f"-{until}.{signature}",
        ):
            page.cookies.set(name, other, domain="server.local", path="/")
            assert (await page.get("/config")).status_code == 401, other
        page.cookies.set(name, value, domain="server.local", path="/")
        assert (await page.get("/config")).status_code == 200
        now = time.time()
        monkeypatch.setattr(page_access.time, "time", lambda: now + SECONDS + 2)
        assert (await page.get("/config")).status_code == 401
        monkeypatch.undo()
        # Another server with the same keys takes it; one without that key does not
        for keys, status in ((KEYS, 200), (KEYS[:1], 401)):
            another = client(*keys)
            another.cookies.set(name, value, domain="server.local", path="/")
            assert (await another.get("/config")).status_code == status
        assert (await page.post("/logout")).status_code == 303
        assert (await page.get("/config")).status_code == 401
        assert "Secure" in (await log_in(client(*KEYS, scheme="https"), KEYS[0])).headers["set-cookie"]

    asyncio.run(check())


def test_owners_are_those_of_the_api():
    async def check():
        access = Access(KEYS, True)
        for key in KEYS:
            page = client(*KEYS, isolated=True)
            await log_in(page, key)
            headers = [(b"authorization", f"Bearer {key}".encode())]
            owner = access.owner(Request({"type": "http", "headers": headers}))
            assert owner and (await page.get("/config")).text == f"/config {owner}"

    asyncio.run(check())


def test_open_pages_hold_nothing_up():
    """A stream that never ends is over when the server closes."""
    closing = []

    async def check():
        asked = asyncio.ensure_future(client(is_closing=lambda: bool(closing)).get("/gradio_api/heartbeat/x"))
        await asyncio.sleep(0.7)
        assert not asked.done()
        closing.append(True)
        await asyncio.wait_for(asked, 20)

    asyncio.run(check())


def test_bodies_have_limits():
    """Of which the page says what the API does."""
    page = client(most=20)

    async def check(content):
        return await page.post("/gradio_api/upload", content=content)

    async def slow():
        yield b"a"
        await asyncio.sleep(60)

    assert asyncio.run(check(b"x" * 20)).status_code == 200
    for content, status, text in ((b"x" * 21, 413, "at most 20 bytes"), (slow(), 408, "more of it within 0.2 s")):
        response = asyncio.run(check(content))
        assert response.status_code == status and text in response.json()["detail"]


@pytest.mark.parametrize(
    ("asked", "text"), [(False, "The page is off. The API is at /v1.\n"), (True, "pip install 'voco_jax[ui]'")]
)
def test_a_server_without_the_page(model, asked, text, monkeypatch):
    """By an option, or because Gradio is not there."""
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "voco_jax.serve.page", raising=False)
    with running(model, page=asked) as server:
        response = httpx.get(server.url)
        assert response.status_code == 200 and text in response.text and response.text.count("\n") == 1
        assert httpx.get(f"{server.url}/config").status_code == 404
        assert httpx.post(server.url).status_code == 405
