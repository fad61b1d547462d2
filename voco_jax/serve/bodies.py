"""Bodies of requests: how long they and their pauses may be, JSON, and what is said of one that is not as expected."""

import asyncio
from collections.abc import Callable
import contextlib
import json
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from voco_jax.serve.errors import ApiError, bad
from voco_jax.terminal import shortened

M = TypeVar("M", bound=BaseModel)

_LINGER = 2.0  # seconds for which what comes after an answer is thrown away, for a client that reads when it has sent


class BodyLimit:
    """Refuses bodies that are longer than `most_bytes(path, content type)` (413), told by their length or when so much
    has come, and those of which nothing comes for `seconds` (408): what reads the body gets an ApiError.

    Whoever is answered before the whole body has come is told that the connection is closed then.
    """

    def __init__(self, app: ASGIApp, most_bytes: Callable[[str, str], int], seconds: float):
        self._app, self._most, self._seconds = app, most_bytes, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        most = self._most(scope["path"], headers.get("content-type", ""))
        length = headers.get("content-length", "0")
        too_long = ApiError(413, f"body: expected at most {most} bytes", code="request_too_large")
        got, is_whole = 0, length == "0" and "transfer-encoding" not in headers

        async def counted() -> Message:
            nonlocal got, is_whole
            if not is_whole and length.isdigit() and int(length[:20]) > most:
                raise too_long
            try:
                async with asyncio.timeout(None if is_whole else self._seconds):
                    message = await receive()
            except TimeoutError:
                raise ApiError(408, f"body: expected more of it within {self._seconds:g} s") from None
            got += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if got > most:
                raise too_long
            return message

        async def sent(message: Message) -> None:
            if is_whole:
                await send(message)
            elif message["type"] == "http.response.start":
                await send({**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]})
            elif message.get("more_body") or "expect" in headers:
                await send(message)
            else:
                await send({**message, "more_body": True})
                await linger()
                await send({"type": "http.response.body"})

        async def linger() -> None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LINGER):
                    while (await receive()).get("more_body"):
                        pass

        await self._app(scope, counted, sent)


async def parse_json(request: Request) -> Any:
    """The body's JSON; ApiError 400 for what is not strictly JSON in UTF-8, and 415 for what is not said to be JSON: so
    a web page of others cannot have a browser send it."""
    content_type = request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() != "application/json":
        found = shortened(content_type) if content_type else "none"
        raise ApiError(415, f"expected the content type application/json, found {found}")
    try:
        body = await request.body()
    except ClientDisconnect:
        raise ApiError(499, "the client went away") from None
    try:
        text = body.decode()
        found = json.loads(text, parse_constant=_no_constant)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(found, ensure_ascii=False).encode()  # half of a letter
    except RecursionError:
        raise bad("body: the JSON is nested too deeply") from None
    except UnicodeError:
        raise bad("body: expected JSON in UTF-8") from None
    except ValueError as error:
        raise bad(f"body: expected JSON: {error}") from None
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def validated(kind: type[M], body: Any) -> M:
    """The request that a body is; ApiError 400 with the first key that is wrong."""
    if not isinstance(body, dict):
        raise bad(f"body: expected an object, found {type(body).__name__}")
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        name = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "value_error" or not isinstance(first.get("input"), str | int | float | bool | None):
            raise bad(f"{name}: {message}" if name else message, name or None) from None
        raise bad(f"{name}: {message}; found {shortened(first.get('input'))}", name) from None
    except RecursionError:
        raise bad("body: the JSON is nested too deeply") from None
