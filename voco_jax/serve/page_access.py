"""Who may open the page, and which of Gradio's many paths are there at all.

With API keys the page asks for one, and gives a cookie for it that is worth nothing elsewhere: a signature by the key,
and until when it is valid. So any server with the same keys takes it, and none keeps a list of sessions.
"""

import asyncio
from collections.abc import Callable
import hashlib
import hmac
import re
import time
from urllib.parse import parse_qs

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Match, NoMatchFound
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from voco_jax.serve.app import Access
from voco_jax.serve.errors import ApiError
from voco_jax.serve.page_view import login_page

SECONDS = 12 * 3600  # that a cookie is valid
OWNER = "voco_owner"  # of the scope of a request that was let in: whose memories it is about
_MOST_FORM = 4096  # bytes of a posted key
# What the page needs. Gradio has more, which fetch URLs, serve files or talk to Hugging Face.
_PATHS = re.compile(
    r"/|/(login|logout|config|theme\.css|favicon\.ico)|/(static|assets)/.+"
    r"|/gradio_api/(startup-events|upload|upload_progress|cancel|reset|queue/(join|data)|heartbeat/\w+)"
)
_HEARTBEAT = "/gradio_api/heartbeat/"
_HEADERS = {
    # Scripts of Gradio's own make functions of texts; nothing is loaded from elsewhere, or sent there
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class PageRoute(BaseRoute):
    """The page's paths, after all of the API's: what neither has is not found, as it is without the page."""

    def __init__(self, app: ASGIApp):
        self._app = app

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        there = scope["type"] == "http" and _PATHS.fullmatch(scope["path"])
        return (Match.FULL if there else Match.NONE), {}

    def url_path_for(self, name: str, /, **path_params: object):
        raise NoMatchFound(name, path_params)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


class Gate:
    """Lets requests through to the page, an ASGI application, from whoever may see it. Streams that would go on for as
    long as the page is open end when `is_closing`."""

    def __init__(self, page: ASGIApp, access: Access, is_closing: Callable[[], bool]):
        self._page, self._access, self._is_closing = page, access, is_closing
        # Cookies are those of a host, whichever of its ports: each server has a name of its own
        self._cookie = f"voco_{hashlib.sha256(repr(access.keys).encode()).hexdigest()[:12]}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        request = Request(scope, receive)
        key = self._key(request.cookies.get(self._cookie, ""))
        if request.method != "GET" and request.headers.get("sec-fetch-site", "same-origin") != "same-origin":
            response: Response = JSONResponse({"detail": "expected a request of the page itself"}, 403)
        elif scope["path"] in ("/login", "/logout"):
            response = await self._session(request)
        elif key is not None:
            scope[OWNER] = self._access.owner_of(key)
            await self._serve(scope, receive, guarded)
            return
        elif scope["path"] == "/":
            response = HTMLResponse(login_page(), 401)
        else:
            response = JSONResponse({"detail": "Your session has ended. Load the page again."}, 401)
        await response(scope, receive, guarded)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        last: Message = {}
        refused: ApiError | None = None

        async def noted(message: Message) -> None:
            nonlocal last
            last = message
            await send(message)

        async def received() -> Message:
            nonlocal refused
            try:
                return await receive()
            except ApiError as error:  # of a body that is too long or too slow; Gradio would take it for a fault
                refused = error
                work.cancel()
                return await asyncio.Future()

        work = asyncio.ensure_future(self._page(scope, received, noted))
        is_endless = scope["path"].startswith(_HEARTBEAT)
        try:
            while not work.done():
                await asyncio.wait({work}, timeout=0.5 if is_endless else None)
                if is_endless and self._is_closing():
                    break
        finally:
            work.cancel()
            await asyncio.wait({work})
        if refused is not None and not last:
            await JSONResponse({"detail": refused.message}, refused.status)(scope, receive, send)
        elif not work.cancelled():
            work.result()
        elif last.get("more_body"):
            await send({"type": "http.response.body", "body": b""})

    async def _session(self, request: Request) -> Response:
        """Begin one with the key that was posted, or end it."""
        away = RedirectResponse("/", 303)
        if request.method != "POST":
            return away
        if request.url.path == "/logout":
            away.delete_cookie(self._cookie)
            return away
        key = self._access.known(await _posted_key(request))
        if key is None:
            return HTMLResponse(login_page("This key is not known here."), 401)
        until = int(time.time()) + SECONDS
        away.set_cookie(
            self._cookie, f"{until}.{_signature(key, until)}", SECONDS, httponly=True, samesite="lax",
            secure=request.url.scheme == "https",
        )  # fmt: skip
        return away

    def _key(self, cookie: str) -> str | None:
        """The key that a cookie was given for; '' where there are no keys, None for a stranger."""
        if not self._access.keys:
            return ""
        text, _, signature = cookie.partition(".")
        if not re.fullmatch(r"[0-9]{1,12}", text) or int(text) < time.time():
            return None
        found = None
        for key in self._access.keys:  # all are compared, and each in constant time
            if hmac.compare_digest(_signature(key, int(text)).encode(), signature.encode()):
                found = key
        return found


def _signature(key: str, until: int) -> str:
    return hmac.new(key.encode(), f"the page of voco serve, until {until}".encode(), hashlib.sha256).hexdigest()


async def _posted_key(request: Request) -> str:
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > _MOST_FORM:
            return ""
    return parse_qs(body.decode(errors="replace")).get("key", [""])[0].strip()
