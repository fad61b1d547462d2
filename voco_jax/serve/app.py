"""The HTTP routes: OpenAI's chat completions and models, memories and jobs, health and metrics."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
import contextlib
import dataclasses
import hashlib
import hmac
import logging
import os
import time
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import Request

from voco_jax.data.media import ANIMATION, VIDEO, kind_of
from voco_jax.errors import TryAgain, UserError
from voco_jax.infer.memory_file import SUFFIX, save_memory
from voco_jax.serve.answer import Update
from voco_jax.serve.bodies import BodyLimit, parse_json, validated
from voco_jax.serve.completions import Completion, error_of, too_late
from voco_jax.serve.errors import ApiError, bad
from voco_jax.serve.ids import is_id
from voco_jax.serve.jobs import Job, Jobs
from voco_jax.serve.media import Media, decode, fetch
from voco_jax.serve.metrics import Metrics
from voco_jax.serve.requests import ChatRequest, MemoryRequest
from voco_jax.serve.scheduler import Busy, Closed
from voco_jax.serve.service import Prepared, Seen, Service
from voco_jax.serve.store import Entry
from voco_jax.serve.uploads import is_multipart, read_upload, work_directory
from voco_jax.terminal import shortened

log = logging.getLogger(__name__)

Updates = AsyncGenerator[tuple[int, Update]]  # of choices, by their numbers

_LONGEST_PAGE = 100
_MEMORIES = "/v1/memories"
_UPLOADS = (_MEMORIES, "/gradio_api/upload")  # the other one is the page's


@dataclasses.dataclass(frozen=True)
class Access:
    """Who may ask. `keys`: any of these as `Authorization: Bearer KEY`; none: everybody. `isolated`: each key has
    memories of its own."""

    keys: tuple[str, ...] = ()
    isolated: bool = False

    def known(self, given: str) -> str | None:
        """The key that somebody gives, if it is one of these."""
        digest, found = _digest(given), None
        for key in self.keys:  # all are compared, and each in constant time
            if hmac.compare_digest(digest, _digest(key)):
                found = key
        return found

    def owner_of(self, key: str) -> str:
        """Whose memories who has this key asks about."""
        return hashlib.sha256(b"owner of memories:" + _digest(key)).hexdigest() if self.isolated else ""

    def owner(self, request: Request) -> str:
        """Whose memories a request is about; ApiError 401 for a stranger."""
        if not self.keys:
            return ""
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        key = self.known(given.strip())
        if kind.lower() != "bearer" or key is None:
            raise ApiError(
                401, "expected a known key as 'Authorization: Bearer KEY'", code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
        return self.owner_of(key)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


@dataclasses.dataclass
class Server:
    """What the routes share. `is_ready`: whether the programs are compiled."""

    service: Service
    name: str
    access: Access
    metrics: Metrics
    jobs: Jobs
    created: int
    log_prompts: bool = False
    cors_origins: tuple[str, ...] = ()
    preparing: int = 0  # requests whose pictures are being read, or their text
    is_ready: bool = False
    is_closing: bool = False


def make_app(
    server: Server, lifespan: Callable[[FastAPI], Any], most_bytes: int, most_upload_bytes: int, body_seconds: float
) -> FastAPI:  # fmt: skip
    """The application; `most_bytes` of a request's body, and of an upload, of which something comes every so many
    seconds."""
    app = FastAPI(
        title="voco_jax", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False, lifespan=lifespan
    )  # fmt: skip

    def most(path: str, content_type: str) -> int:
        return most_upload_bytes if path in _UPLOADS and is_multipart(content_type) else most_bytes

    app.add_middleware(BodyLimit, most_bytes=most, seconds=body_seconds)
    _add_errors(app)
    _add_health(app, server)
    _add_chat(app, server)
    _add_memories(app, server)
    return app


# ---- Errors ----------------------------------------------------------------------------------------------------------


def api_error(error: Exception) -> ApiError:
    """What a client is told of any error."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Busy):
        after = {"Retry-After": str(max(1, round(error.retry_after)))}
        return ApiError(429, str(error), code="server_busy", headers=after)
    if isinstance(error, Closed):
        return ApiError(503, "the server is being stopped", code="server_closed", headers={"Retry-After": "5"})
    if isinstance(error, TryAgain):
        return ApiError(503, str(error), headers={"Retry-After": "5"})
    if isinstance(error, UserError):
        return bad(str(error))
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        name = str(first["loc"][-1])
        return bad(f"{name}: {first['msg']}", name)
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {}))
    log.error("a request has failed", exc_info=error)
    return ApiError(500, "the server could not answer this request")


async def _respond(request: Request, error: Exception) -> Response:
    told = api_error(error)
    return JSONResponse(told.body, told.status, told.headers)


def _add_errors(app: FastAPI) -> None:
    for kind in (ApiError, Busy, Closed, UserError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _respond)


# ---- Health ----------------------------------------------------------------------------------------------------------


def _add_health(app: FastAPI, server: Server) -> None:
    @app.get("/health")
    async def health() -> Response:
        """Whether the process works at all."""
        alive = server.service.scheduler.failure is None
        return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    @app.get("/ready")
    async def ready() -> Response:
        """Whether it takes requests: its programs are compiled, and it is not being stopped."""
        takes = server.is_ready and not server.is_closing and server.service.scheduler.failure is None
        return JSONResponse({"status": "ready" if takes else "not ready"}, 200 if takes else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def model() -> dict:
        return {"id": server.name, "object": "model", "created": server.created, "owned_by": "voco_jax"}

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        server.access.owner(request)
        return JSONResponse({"object": "list", "data": [model()]})

    @app.get("/v1/models/{name:path}")
    async def one_model(request: Request, name: str) -> Response:
        server.access.owner(request)
        _check_model(server, name)
        return JSONResponse(model())


def _check_model(server: Server, name: str | None) -> None:
    if name not in (None, server.name):
        message = f"model: expected {server.name!r}, found {name[:100]!r}"
        raise ApiError(404, message, param="model", code="model_not_found")


# ---- Chat ------------------------------------------------------------------------------------------------------------


def _add_chat(app: FastAPI, server: Server) -> None:
    service, metrics = server.service, server.metrics
    route = "/v1/chat/completions"

    @app.post(route)
    async def chat(request: Request) -> Response:
        try:
            response = await answer(request)
        except Exception as error:
            told = api_error(error)
            metrics.answered(route, told.status)
            return JSONResponse(told.body, told.status, told.headers)
        metrics.answered(route, response.status_code)
        return response

    async def prepare(request: Request, owner: str) -> tuple[ChatRequest, Prepared]:
        asked = validated(ChatRequest, await parse_json(request))
        _check_model(server, asked.model)
        if server.log_prompts:
            log.info("asked: %s", [m.content if isinstance(m.content, str) else "…" for m in asked.messages])
        try:
            async with asyncio.timeout(service.defaults.seconds):
                prepared = await _while_connected(request, service.prepare(asked, owner))
        except TimeoutError:
            raise too_late() from None
        return asked, prepared

    async def answer(request: Request) -> Response:
        began = time.monotonic()
        owner = server.access.owner(request)
        service.scheduler.check_room(server.preparing + 1)
        server.preparing += 1
        try:
            asked, prepared = await prepare(request, owner)
        finally:
            server.preparing -= 1
        metrics.prompt(prepared.prompt_tokens, prepared.cached_tokens)
        completion = Completion(asked, prepared, service.model.engine, server.name, service.model.fingerprint)
        updates = timed(service.answers(prepared, began + service.defaults.seconds), metrics, began)
        headers = {"X-Voco-Memory-Bytes": str(prepared.memory_bytes)}
        if not asked.stream:
            whole = await _while_connected(request, _whole(updates, completion, prepared))
            return JSONResponse(whole, headers=headers)
        first = await _while_connected(request, anext(updates))  # an error before it has a status of its own
        if (error := error_of(first[1])) is not None:
            await updates.aclose()
            raise error
        events = completion.events(_again(first, updates), api_error)
        return StreamingResponse(_counted(events, metrics), media_type="text/event-stream", headers=headers)


async def _whole(
    updates: Updates, completion: Completion, prepared: Prepared
) -> dict:  # fmt: skip
    choices: dict[int, list[Update]] = {i: [] for i in range(len(prepared.asks))}
    async with contextlib.aclosing(updates):
        async for i, update in updates:
            if (error := error_of(update)) is not None:
                raise error
            completion.add(update)
            choices[i].append(update)
    return completion.whole(choices)


async def _again(first: tuple[int, Update], rest: Updates) -> Updates:
    async with contextlib.aclosing(rest):
        yield first
        async for one in rest:
            yield one


async def _counted(events: AsyncGenerator[str], metrics: Metrics) -> AsyncGenerator[str]:
    async with contextlib.aclosing(events):
        try:
            async for event in events:
                yield event
        except (asyncio.CancelledError, GeneratorExit):
            metrics.cancelled()
            raise


async def timed(
    updates: Updates, metrics: Metrics, began: float
) -> Updates:  # fmt: skip
    first: float | None = None
    tokens = 0
    async with contextlib.aclosing(updates):
        async for i, update in updates:
            now = time.monotonic()
            if first is None:
                first = now
                metrics.first_token(now - began)
            else:
                tokens += len(update.log_probabilities)
            yield i, update
    if first is not None and tokens:
        metrics.per_token((time.monotonic() - first) / tokens)


async def _while_connected(request: Request, work: Awaitable[Any]) -> Any:
    """What the work gives; it is cancelled where the client goes away. The request's body must have been read."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client went away")
        return task.result()
    finally:
        for one in (task, gone):
            if not one.done():
                one.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await one


# ---- Memories --------------------------------------------------------------------------------------------------------


def _described(entry: Entry) -> dict:
    return {"object": "memory", **entry._asdict()}


def _described_job(job: Job) -> dict:
    return {
        "id": job.id, "object": "job", "status": job.status, "created": job.created,
        "progress": {"done": job.done, "total": job.total}, "memories": [_described(entry) for entry in job.memories],
        "error": {"message": job.error} if job.error else None,
    }  # fmt: skip


def _add_memories(app: FastAPI, server: Server) -> None:
    service = server.service

    @app.post(_MEMORIES)
    async def make(request: Request) -> Response:
        """A picture's memory (201), or a job (202) for a clip or several files."""
        owner = server.access.owner(request)
        service.require_store()
        service.scheduler.check_room(0)
        _check_site(request, server)
        with contextlib.ExitStack() as files:
            if is_multipart(request.headers.get("content-type", "")):
                found = await read_upload(request, files.enter_context(work_directory()))
            else:
                asked = validated(MemoryRequest, await parse_json(request))
                found = [(await fetch(asked.url, service.limits, video=True), asked.name or "")]
            kinds = [await decode(kind_of_upload, media) for media, _ in found]
            if len(found) == 1 and kinds[0] != "video":
                return JSONResponse(_described(await keep_one(*found[0], kinds[0], owner)), 201)
            kept = contextlib.ExitStack()

            async def work(job: Job) -> None:
                with kept:
                    job.progress(0, len(found))
                    for i, ((media, name), kind) in enumerate(zip(found, kinds, strict=True)):
                        progress = job.progress if len(found) == 1 else _nothing
                        job.memories.append(await keep_one(media, name, kind, owner, progress))
                        if len(found) > 1:
                            job.progress(i + 1, len(found))

            job = server.jobs.start(owner, work)
            kept.enter_context(files.pop_all())
        return JSONResponse(_described_job(job), 202, {"Location": f"/v1/jobs/{job.id}"})

    async def keep_one(
        media: Media, name: str, kind: str, owner: str, progress: Callable[[int, int], None] = lambda *_: None
    ) -> Entry:  # fmt: skip
        if kind == "memory":
            return await service.take_file(media, owner, name)
        seen: Seen = await service.see(
            media, owner, video=kind == "video", name=name, is_upload=True, progress=progress
        )  # fmt: skip
        assert seen.entry is not None
        return seen.entry

    @app.get(_MEMORIES)
    async def listed(request: Request, limit: int = 20, after: str = "") -> Response:
        owner, store = server.access.owner(request), service.require_store()
        if unknown := set(request.query_params) - {"limit", "after"}:
            raise bad(f"{shortened(min(unknown))}: expected limit or after")
        if not 1 <= limit <= _LONGEST_PAGE:
            raise bad(f"limit: expected 1 … {_LONGEST_PAGE}, found {limit}", "limit")
        entries, more = await asyncio.to_thread(store.entries, owner, after=after, limit=limit)
        data = [_described(entry) for entry in entries]
        ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
        return JSONResponse({"object": "list", "data": data, "has_more": more, **ends})

    @app.get("/v1/memories/{id}")
    async def download(request: Request, id: str) -> Response:
        """The memory file, as `voco compress` writes them."""
        owner, store = server.access.owner(request), service.require_store()
        bank = await asyncio.to_thread(store.get, id, owner) if is_id(id) else None
        if bank is None:
            raise _no_memory(id)
        with contextlib.ExitStack() as files:
            file = files.enter_context(work_directory()) / f"{id}{SUFFIX}"
            await asyncio.to_thread(save_memory, file, bank)
            sent = BackgroundTask(files.pop_all().close)
        return FileResponse(file, media_type="application/octet-stream", filename=file.name, background=sent)

    @app.delete("/v1/memories/{id}")
    async def delete(request: Request, id: str) -> Response:
        owner, store = server.access.owner(request), service.require_store()
        if not (is_id(id) and await asyncio.to_thread(store.delete, id, owner)):
            raise _no_memory(id)
        return JSONResponse({"id": id, "object": "memory", "deleted": True})

    @app.get("/v1/jobs/{id}")
    async def job(request: Request, id: str) -> Response:
        return JSONResponse(_described_job(server.jobs.find(id, server.access.owner(request))))

    @app.delete("/v1/jobs/{id}")
    async def cancel(request: Request, id: str) -> Response:
        job = server.jobs.find(id, server.access.owner(request))
        if job.task is not None:
            job.task.cancel()
        return JSONResponse(_described_job(job))


def _check_site(request: Request, server: Server) -> None:
    """ApiError 403 for what a browser sends for a web page of others: of uploads it does not ask first."""
    site, origin = request.headers.get("sec-fetch-site", "none"), request.headers.get("origin", "")
    if site not in ("none", "same-origin") and origin not in server.cors_origins:
        raise ApiError(403, "web pages of other hosts may not upload (--cors-origins)")


def _no_memory(id: str) -> ApiError:
    return ApiError(404, f"no memory has the id {id[:100]!r}", code="memory_not_found")


def _nothing(done: int, total: int) -> None:
    pass


def kind_of_upload(media: Media) -> str:
    """'memory' (a `.voco` file), 'video' or 'picture': by its bytes."""
    if media.file is not None and os.path.splitext(media.name)[1].lower() == SUFFIX:
        return "memory"
    kind = kind_of(media)
    is_clip = kind == VIDEO or (kind == ANIMATION and not media.label.startswith("image/"))
    return "video" if is_clip else "picture"
