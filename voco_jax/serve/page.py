"""The page at `/`, made with Gradio: pictures and clips are dropped, kept and asked about.

It works on the `Service` itself, not through the HTTP API: no API key is in the browser. Who may see it, and which
paths of Gradio there are, is `page_access.py`'s part. Nothing of it is loaded from or sent to anywhere else.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
import contextlib
import functools
import os
from pathlib import Path
import shutil
import tempfile
import time
from typing import Any

# Gradio reads these when it is imported
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

from fastapi import FastAPI  # noqa: E402
import gradio as gr  # noqa: E402
from gradio_client.utils import is_http_url_like  # noqa: E402

from voco_jax.serve import page_view as view  # noqa: E402
from voco_jax.serve.answer import Update  # noqa: E402
from voco_jax.serve.app import Server, api_error  # noqa: E402
from voco_jax.serve.media import Media  # noqa: E402
from voco_jax.serve.page_access import OWNER  # noqa: E402
from voco_jax.serve.page_view import Shown  # noqa: E402
from voco_jax.serve.page_work import Chat, Stopped, Work, facts  # noqa: E402
from voco_jax.serve.service import Prepared  # noqa: E402
from voco_jax.terminal import count_of  # noqa: E402

_ROUTE = "page"  # its name in /metrics
_KEPT_FOR = 3000.0  # seconds that an uploaded file stays
_EVERY = 0.05  # seconds between two looks at a growing answer: browsers are slower than models
_SELECT = """element.addEventListener('click', event => {
  const card = event.target.closest('[data-id]');
  if (card) trigger('select', {id: card.dataset.id});
})"""

# Gradio reads this whenever files come. Nobody else may look into it.
_FILES = os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="voco-page-")
_open: set[FastAPI] = set()  # pages of this process, which share a directory

Changes = dict[Any, Any]  # of Gradio's components


def make_page(server: Server) -> FastAPI:
    """The page as an ASGI application, whose lifespan is to be entered. It lets everybody in, as `OWNER` of the scope
    of a request."""
    blocks = _Page(server).blocks
    for block in blocks.blocks.values():  # a value that names a URL would be fetched, whichever component has it
        block.async_move_resource_to_block_cache = functools.partial(_of_this_machine, block)
    blocks.queue(default_concurrency_limit=None, api_open=False)  # the scheduler says how many are answered at once
    theme = gr.themes.Default(
        primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )  # fmt: skip
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=_with_files)
    return gr.mount_gradio_app(
        app, blocks, "/", footer_links=[], run_history=False,
        show_error=False, max_file_size=server.service.limits.max_video_bytes, ssr_mode=False, mcp_server=False,
        pwa=False, enable_monitoring=False, theme=theme, css=view.CSS,
    )  # fmt: skip


@contextlib.asynccontextmanager
async def _with_files(page: FastAPI) -> AsyncGenerator[None]:
    """Uploads stay for an hour at most: others may have sent the same file, so it is not deleted with its use."""
    _open.add(page)
    os.makedirs(_FILES, mode=0o700, exist_ok=True)
    tidying = asyncio.create_task(_tidy())
    try:
        yield
    finally:
        tidying.cancel()
        _open.remove(page)
        if not _open:
            shutil.rmtree(_FILES, ignore_errors=True)


async def _tidy() -> None:
    while True:
        await asyncio.sleep(_KEPT_FOR / 6)
        await asyncio.to_thread(delete_files, time.time() - _KEPT_FOR)


def delete_files(before: float) -> None:
    """Delete what came before that time (seconds since 1970)."""
    for directory, _, names in os.walk(_FILES, topdown=False):
        for delete, path in [*((os.unlink, os.path.join(directory, name)) for name in names), (os.rmdir, directory)]:
            with contextlib.suppress(OSError):  # gone already, or a directory with files in it
                if os.lstat(path).st_ctime < before and path != _FILES:
                    delete(path)


async def _of_this_machine(block: Any, file: str | Path | None) -> str | None:
    if file is not None and is_http_url_like(str(file)):
        raise gr.Error("expected a file that was uploaded")
    return await type(block).async_move_resource_to_block_cache(block, file)


class _Page:
    """Components, and what happens with them. Handlers run in the server's event loop, as the routes of the API do."""

    def __init__(self, server: Server):
        self._work = Work(server)
        self._has_store = self._work.store is not None
        self._may_choose = self._has_store and self._work.tokens > 1
        with gr.Blocks(title=f"{server.name} · voco_jax", analytics_enabled=False, fill_height=True) as self.blocks:
            self._lay_out()
            self._connect()

    # ---- Layout ------------------------------------------------------------------------------------------------

    def _lay_out(self) -> None:
        html = functools.partial(gr.HTML, apply_default_css=False)
        work = self._work
        leave = '<form method="post" action="logout"><button>Log out</button></form>'
        becomes = f"An image becomes {count_of(work.tokens, 'token')} instead of"
        html(
            f"<h1>{view.unformatted(work.server.name)}</h1><span>{becomes} "
            f"{work.uncompressed.places:,}. Compress it once, ask as often as you like.</span>"
            f"{leave if work.server.access.keys else ''}",
            elem_id="head",
        )
        self.chat = gr.State(Chat())
        self.timer = gr.Timer(1.0)
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=340):
                self.drop = gr.File(
                    label="Drop pictures or a clip", file_count="multiple", height=118, elem_id="drop"
                )  # fmt: skip
                self.came = html(elem_id="came")
                with gr.Column(elem_classes="voco-panel"):
                    self.chosen = html(view.chosen((), work.uncompressed), elem_id="chosen")
                    self.forget = gr.Button(
                        "Delete from the album", size="sm", visible=False, elem_classes="voco-small"
                    )
                with gr.Column(visible=self._has_store, elem_classes="voco-panel"):
                    with gr.Row(equal_height=True):
                        html("<h2>Album</h2>")
                        self.refresh = gr.Button("Refresh", size="sm", scale=0, elem_classes="voco-small")
                    self.album = html(js_on_load=_SELECT, elem_id="album")
            with gr.Column(scale=7, min_width=400):
                self.log = gr.Chatbot(
                    label="Conversation", height="calc(100vh - 264px)", min_height=260, buttons=[],
                    elem_id="log", allow_tags=False, feedback_options=None, latex_delimiters=[],
                    placeholder="Ask about what you have dropped or chosen.",
                )  # fmt: skip
                self.ready = html(elem_id="ready")
                self.told = html(elem_id="told")
                with gr.Row(equal_height=True):
                    self.question = gr.Textbox(
                        show_label=False, placeholder="Your question", container=False, scale=8, max_lines=4,
                        elem_id="question", autofocus=True,
                    )  # fmt: skip
                    self.send = gr.Button("Ask", variant="primary", scale=1, min_width=90)
                    self.stop = gr.Button("Stop", variant="stop", scale=1, min_width=90, visible=False)
                with gr.Row(equal_height=True, elem_id="how"):
                    self.tokens = gr.Slider(
                        1, max(2, work.tokens), work.tokens, step=1, label="Tokens read of an image", scale=6,
                        visible=self._may_choose, elem_id="tokens",
                    )  # fmt: skip
                    with gr.Column(scale=4, min_width=240):
                        self.auto = gr.Checkbox(
                            label="As few as a sure answer needs", container=False, visible=self._may_choose,
                            elem_id="auto",
                        )  # fmt: skip
                        talks = work.server.service.model.run.config.data.template not in ("bare", "plain")
                        self.earlier = gr.Checkbox(
                            talks, label="Read earlier questions too", container=False
                        )  # fmt: skip
                    self.anew = gr.Button(
                        "New conversation", size="sm", scale=0, min_width=140, elem_classes="voco-small"
                    )

    def _connect(self) -> None:
        def on(events: Sequence[Any], handler: Callable, inputs: Sequence[Any], outputs: Sequence[Any], **more) -> None:
            gr.on(
                events, handler, list(inputs), list(outputs), show_progress="hidden", api_visibility="private", **more
            )  # fmt: skip

        shown = [self.chat, self.chosen, self.forget, self.album, self.log, self.told, self.came]
        on([self.blocks.load, self.refresh.click], self._look, [self.chat], [self.album])
        on([self.timer.tick], self._wait_until_ready, [], [self.timer, self.ready])
        on([self.drop.upload], self._take, [self.drop, self.chat], [*shown, self.drop, self.stop])
        on([self.album.select], self._choose, [self.chat], shown)
        on([self.forget.click], self._forget, [self.chat], shown)
        asking = [self.question, self.chat, self.tokens, self.auto, self.earlier]
        answering = [self.log, self.chat, self.question, self.send, self.stop, self.told]
        on([self.question.submit, self.send.click], self._ask, asking, answering, trigger_mode="once")
        on([self.stop.click], self._stop, [], [self.told])
        on([self.anew.click, self.log.clear], self._begin_anew, [self.chat], [self.chat, self.log, self.told])

    # ---- Pictures ----------------------------------------------------------------------------------------------

    async def _wait_until_ready(self) -> Changes:
        if self._work.server.is_ready:
            return {self.timer: gr.Timer(active=False), self.ready: ""}
        return {self.ready: view.progress("The model is getting ready; answers wait for it")}

    async def _look(self, chat: Chat, request: gr.Request) -> Changes:
        return {self.album: await self._album(chat, _owner(request))}

    async def _album(self, chat: Chat, owner: str) -> str:
        try:
            pictures, more = await self._work.album(owner)
        except Exception as error:
            return view.problem(view.sentence(api_error(error)))
        return view.album(pictures, [one.id for one in chat.pictures], more)

    async def _take(self, files: list[str] | None, chat: Chat, request: gr.Request) -> AsyncGenerator[Changes]:
        """What was dropped: compressed, kept, and what is asked about from now on."""
        found: list[Shown] = []
        said: list[str] = []
        medias = [Media(Path(file), None, Path(file).name) for file in files or []]
        for i, media in enumerate(medias):
            steps = (i + 1, len(medias))
            yield {self.came: view.progress(f"Compressing {media.name}", *steps), self.stop: gr.Button(visible=True)}
            try:
                async with self._run(request, self._work.keep, media) as telling:
                    async for told in telling:
                        if isinstance(told, Shown):
                            found.append(told)
                        elif len(medias) == 1:
                            yield {self.came: view.progress(f"Compressing {media.name}", *told)}
            except Stopped:
                said.append(view.note("Stopped."))
                break
            except Exception as error:
                said.append(view.problem(view.sentence(api_error(error), media.name)))
        changes = await self._show(Chat(tuple(found)), _owner(request)) if found else {}  # else all stays as it is
        yield changes | {self.came: "".join(said), self.drop: None, self.stop: gr.Button(visible=False)}

    async def _show(self, chat: Chat, owner: str) -> Changes:
        """A new conversation about other pictures."""
        return {
            self.chat: chat, self.chosen: view.chosen(chat.pictures, self._work.uncompressed), self.log: [],
            self.told: "", self.came: "", self.album: await self._album(chat, owner),
            self.forget: gr.Button(visible=self._has_store and bool(chat.pictures)),
        }  # fmt: skip

    async def _choose(self, chat: Chat, event: gr.EventData, request: gr.Request) -> Changes:
        try:
            pictures, _ = await self._work.album(_owner(request))
        except Exception as error:
            return {self.came: view.problem(view.sentence(api_error(error)))}
        chosen = tuple(one for one in pictures if one.id == event._data.get("id"))
        return await self._show(Chat(chosen), _owner(request))

    async def _forget(self, chat: Chat, request: gr.Request) -> Changes:
        try:
            await self._work.forget(chat.pictures, _owner(request))
        except Exception as error:
            return {self.came: view.problem(view.sentence(api_error(error)))}
        return await self._show(Chat(), _owner(request))

    # ---- Questions ---------------------------------------------------------------------------------------------

    async def _ask(
        self, question: str, chat: Chat, tokens: int, auto: bool, earlier: bool, request: gr.Request
    ) -> AsyncGenerator[Changes]:  # fmt: skip
        if not question.strip():
            yield {self.told: view.note("Write a question first.")}
            return
        before, began, shown, places, last = chat, time.monotonic(), 0.0, (0, 0), Update()
        chat = chat.asked(question.strip())
        yield {
            self.log: _messages(chat), self.question: "", self.told: view.progress("Reading"),
            self.send: gr.Button(visible=False), self.stop: gr.Button(visible=True),
        }  # fmt: skip
        done: Changes = {self.send: gr.Button(visible=True), self.stop: gr.Button(visible=False)}
        try:
            asked = chat.request(earlier, ("auto" if auto else int(tokens)) if self._may_choose else None)
            async with self._run(request, self._work.answer, asked) as telling:
                async for told in telling:
                    if isinstance(told, Prepared):
                        places = self._work.places(told)
                        continue
                    last, chat = told, chat.answered(told.text)
                    if (now := time.monotonic()) > shown + _EVERY:
                        shown = now
                        yield {self.log: _messages(chat), self.chat: chat, self.told: view.progress("Answering")}
            status, done[self.told] = 200, view.note(facts(places, last, time.monotonic() - began))
        except Stopped:
            status, done[self.told] = 499, view.note("Stopped.")
        except Exception as error:
            problem = api_error(error)
            status, done[self.told] = problem.status, view.problem(view.sentence(problem))
            if not chat.last_answer:  # it may be asked again
                chat, done[self.question] = before, question
        self._work.server.metrics.answered(_ROUTE, status)
        yield done | {self.log: _messages(chat), self.chat: chat}

    async def _stop(self, request: gr.Request) -> Changes:
        self._work.stop(str(request.session_hash))
        return {self.told: view.note("Stopped.")}

    async def _begin_anew(self, chat: Chat) -> Changes:
        return {self.chat: Chat(chat.pictures), self.log: [], self.told: ""}

    def _run(self, request: gr.Request, work: Callable, about: object) -> contextlib.aclosing[AsyncGenerator[Any]]:
        telling = self._work.run(str(request.session_hash), functools.partial(work, about, _owner(request)))
        return contextlib.aclosing(telling)


def _owner(request: gr.Request) -> str:
    assert request.request is not None
    return request.request.scope[OWNER]


def _messages(chat: Chat) -> list[dict]:
    """For the eye: of an answer that has not begun a place."""
    return [
        {"role": role, "content": view.unformatted(text) or "…"} for turn in chat.turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]  # fmt: skip
