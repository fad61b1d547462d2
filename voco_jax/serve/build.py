"""The whole server of a model, as an ASGI application: for `voco serve`, and for who runs it in another way (Ray Serve,
gunicorn)."""

import asyncio
import contextlib
import dataclasses
import functools
import logging
import threading
import time

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse

from voco_jax.api import Model
from voco_jax.errors import UserError
from voco_jax.infer.continuous import ContinuousBatch
from voco_jax.serve.app import Access, Server, make_app
from voco_jax.serve.jobs import Jobs
from voco_jax.serve.limits import MediaLimits
from voco_jax.serve.metrics import Metrics
from voco_jax.serve.page_access import Gate, PageRoute
from voco_jax.serve.scheduler import Scheduler
from voco_jax.serve.service import Defaults, Service
from voco_jax.serve.store import MemoryStore
from voco_jax.serve.uploads import delete_leftovers

log = logging.getLogger(__name__)

NO_PAGE = "The page needs Gradio: pip install 'voco_jax[ui]'. The API is at /v1."
PAGE_OFF = "The page is off. The API is at /v1."


@dataclasses.dataclass(frozen=True)
class Options:
    """`name` is the model's for clients ('': its run directory's). `store`: a directory or gs://…, None: memories are
    kept on the host alone. `rows` requests are answered at once, each with `context` tokens at most, and `max_waiting`
    wait. `body_bytes` of a request's body are taken, and `upload_bytes` of an upload; more of it comes every
    `body_seconds`. `grace`: seconds for the rest when the server is stopped. `page`: at `/`, where Gradio is installed.
    Sizes are in bytes."""

    name: str = ""
    keys: tuple[str, ...] = ()
    isolate: bool = False
    limits: MediaLimits = MediaLimits()
    defaults: Defaults = Defaults()
    store: str | None = None
    store_bytes: int = 20 << 30
    host_bytes: int = 4 << 30
    device_bytes: int = 1 << 30
    rows: int = 16
    context: int = 4096
    max_waiting: int = 256
    body_bytes: int = 150 << 20
    upload_bytes: int = 2 << 30
    body_seconds: float = 60.0
    cors_origins: tuple[str, ...] = ()
    log_prompts: bool = False
    warm_up: bool = True
    grace: float = 30.0
    page: bool = False


def make_server(model: Model, options: Options = Options()) -> FastAPI:
    """The application. Its lifespan starts and stops the scheduler; `app.state.server` is what its routes share."""
    metrics = Metrics()
    batch = ContinuousBatch(
        model.engine, most_rows=options.rows, most_places=options.context, device_bytes=options.device_bytes
    )  # fmt: skip
    scheduler = Scheduler(model.image_encoder, batch, most_waiting=options.max_waiting, watcher=metrics)
    service = Service(
        model, scheduler, _store_of(model, options, metrics), options.limits, options.defaults, options.host_bytes
    )  # fmt: skip
    server = Server(
        service, options.name or model.run.directory.name or "voco", Access(options.keys, options.isolate), metrics,
        Jobs(), int(time.time()), options.log_prompts, options.cors_origins,
    )  # fmt: skip
    _watch(metrics, service)
    page = _page_of(server) if options.page else None

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI):
        await asyncio.to_thread(delete_leftovers)
        scheduler.start()
        threading.Thread(target=_warm_up, args=(server, options.warm_up), name="warm-up", daemon=True).start()
        async with contextlib.nullcontext() if page is None else page.router.lifespan_context(page):
            yield
        server.is_closing = True
        await server.jobs.close()
        await asyncio.to_thread(scheduler.close, options.grace)
        if service.store is not None and not await asyncio.to_thread(service.store.close, options.grace):
            log.error("memories could not all be written to %s", options.store)

    app = make_app(server, lifespan, options.body_bytes, options.upload_bytes, options.body_seconds)
    app.state.server = server
    _add_page(app, server, page, NO_PAGE if options.page else PAGE_OFF)
    if options.cors_origins:
        from fastapi.middleware.cors import CORSMiddleware

        origins = list(options.cors_origins)
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    return app


def _page_of(server: Server) -> FastAPI | None:
    """None where Gradio is not installed."""
    try:
        from voco_jax.serve.page import make_page
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        return None
    return make_page(server)


def _add_page(app: FastAPI, server: Server, page: FastAPI | None, instead: str) -> None:
    if page is not None:
        app.router.routes.append(PageRoute(Gate(page, server.access, lambda: server.is_closing)))
        return

    @app.get("/")
    async def no_page() -> PlainTextResponse:
        return PlainTextResponse(f"{instead}\n")


def _store_of(model: Model, options: Options, metrics: Metrics) -> MemoryStore | None:
    if model.config.has_compress_stream:
        return MemoryStore(
            model.fingerprint, model.config.memory_kind, directory=options.store, host_bytes=options.host_bytes,
            disk_bytes=options.store_bytes, on_event=metrics.memory_event,
        )  # fmt: skip
    if options.store is not None:
        raise UserError(f"--store: a model with compressor {model.config.compressor!r} has no memories to keep")
    return None


def _warm_up(server: Server, compile_first: bool) -> None:
    began = time.monotonic()
    try:
        if compile_first:
            server.service.scheduler.warm_up()
    except Exception:
        return  # the scheduler has said why, and /health says that it has failed
    server.is_ready = True
    log.info("ready after %.1f s", time.monotonic() - began)


def _watch(metrics: Metrics, service: Service) -> None:
    scheduler, store = service.scheduler, service.store
    metrics.watch("running", "requests that are being answered", lambda: scheduler.running)
    metrics.watch("waiting", "requests that wait for a row", lambda: scheduler.waiting)
    metrics.watch("cache_bytes", "of the cache on the devices", lambda: scheduler.batch.cache_bytes)
    what = "of memories, or of embeddings where the model has no memories, by level"
    metrics.watch("held_bytes", what, lambda: scheduler.batch.image_bytes, level="device")
    if store is None:
        metrics.watch("held_bytes", what, lambda: service.embedding_bytes, level="host")
        return
    for level in ("host", "waiting", "disk"):
        metrics.watch("held_bytes", what, functools.partial(_held_bytes, store, level), level=level)


def _held_bytes(store: MemoryStore, level: str) -> float:
    return store.usage()[level].bytes
