"""Bodies of requests: how long they may be, JSON, and what is said of one that is not as expected."""

import json
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from voco_jax.serve.errors import ApiError, bad
from voco_jax.terminal import shortened

M = TypeVar("M", bound=BaseModel)


class _TooLong(Exception):
    pass


class BodyLimit:
    """Refuses longer bodies with status 413: by their length, or when so much has come. Uploads (multipart/form-data)
    have a limit of their own."""

    def __init__(self, app: ASGIApp, most_bytes: int, most_upload_bytes: int):
        self._app, self._most, self._most_upload = app, most_bytes, most_upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        is_upload = headers.get(b"content-type", b"").startswith(b"multipart/form-data")
        most = self._most_upload if is_upload else self._most
        length = headers.get(b"content-length", b"")
        got, has_begun = 0, False

        async def counted() -> Message:
            nonlocal got
            message = await receive()
            got += len(message.get("body", b""))
            if got > most:
                raise _TooLong
            return message

        async def sent(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        error = ApiError(413, f"body: expected at most {most} bytes", code="request_too_large")
        response = JSONResponse(error.body, error.status, {"Connection": "close"})
        if length.isdigit() and int(length[:20]) > most:
            await response(scope, receive, send)
            return
        try:
            await self._app(scope, counted, sent)
        except _TooLong:
            if not has_begun:
                await response(scope, receive, send)


async def parse_json(request: Request) -> Any:
    """The body's JSON; ApiError 400 for what is not strictly JSON in UTF-8."""
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
