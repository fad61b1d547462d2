"""What the page does with the service: it keeps pictures, lists them, asks about them, and stops."""

import asyncio
import base64
from collections.abc import AsyncGenerator, Callable, Coroutine
import contextlib
import dataclasses
import io
import logging
import time
from typing import Any

from flax import nnx
import jax
from PIL import Image

from voco_jax.data.video import FrameSampling
from voco_jax.infer.engine import Engine
from voco_jax.infer.memory import Embeddings
from voco_jax.serve.answer import Update
from voco_jax.serve.app import Server, kind_of_upload, timed
from voco_jax.serve.completions import error_of
from voco_jax.serve.lru import Lru
from voco_jax.serve.media import Media, check_picture, check_video, decode
from voco_jax.serve.page_view import NAMED, Shown, Uncompressed
from voco_jax.serve.requests import ChatRequest
from voco_jax.serve.service import Prepared

log = logging.getLogger(__name__)

_ALBUM = 60  # pictures that the album shows
_VIEWS = 32 << 20  # bytes of views that are kept: the store itself has no pictures

Tell = Callable[[Any], None]


@dataclasses.dataclass(frozen=True)
class Chat:
    """What a browser's tab has: the pictures that are asked about, and (question, answer) so far."""

    pictures: tuple[Shown, ...] = ()
    turns: tuple[tuple[str, str], ...] = ()

    @property
    def last_answer(self) -> str:
        return self.turns[-1][1] if self.turns else ""

    def asked(self, question: str) -> "Chat":
        return dataclasses.replace(self, turns=(*self.turns, (question, "")))

    def answered(self, text: str) -> "Chat":
        """With more of the last answer."""
        *before, (question, said) = self.turns
        return dataclasses.replace(self, turns=(*before, (question, said + text)))

    def request(self, earlier: bool, tokens: int | str | None) -> ChatRequest:
        """For an answer to the last question, which is told of those before only with `earlier`."""
        *before, (question, _) = self.turns
        said: list[dict[str, Any]] = [
            {"role": role, "content": text} for turn in before if earlier and turn[1]
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]  # fmt: skip
        said.append({"role": "user", "content": question})
        about = [
            {"type": f"{'video' if one.kind == 'video' else 'image'}_url", "uuid": one.id} for one in self.pictures
        ]
        said[0] |= {"content": [*about, {"type": "text", "text": said[0]["content"]}]}
        return ChatRequest.model_validate({"messages": said, "tokens": tokens})


class Stopped(Exception):
    """By who asked."""


class Work:
    """Of a server's page. `owner` is whose memories are meant, `session` whose browser's tab asks."""

    def __init__(self, server: Server):
        self.server, self._service = server, server.service
        self.store = self._service.store
        self.tokens = self._service.model.run.encoder.num_visual_tokens
        self.uncompressed = uncompressed(self._service.model.engine)
        self._views: Lru[tuple[str, str], str] = Lru(_VIEWS)  # by owner and id
        self._running: set[tuple[str, asyncio.Task]] = set()

    async def run(self, session: str, work: Callable[[Tell], Coroutine[Any, Any, None]]) -> AsyncGenerator[Any]:
        """What `work` tells while it goes on; Stopped where `stop` was called. It ends when nobody listens any more."""
        queue = asyncio.Queue[Any]()
        task = asyncio.create_task(work(queue.put_nowait))
        task.add_done_callback(lambda _: queue.put_nowait(None))
        self._running.add((session, task))
        try:
            while (told := await queue.get()) is not None:
                yield told
            if task.cancelled():
                raise Stopped
            task.result()
        finally:
            task.cancel()
            self._running.discard((session, task))

    def stop(self, session: str) -> None:
        for whose, task in self._running:
            if whose == session:
                task.cancel()

    # ---- Pictures ----------------------------------------------------------------------------------------------

    async def keep(self, media: Media, owner: str, tell: Tell) -> None:
        """Compress what came, and keep it; `tell` is given how far it is, (done, total), and last what there is, a
        `Shown`."""
        service, kind = self._service, await decode(kind_of_upload, media)
        name = f"{NAMED}{media.name}" if self.store is not None else ""
        if kind == "memory":
            tell(Shown.of(await service.take_file(media, owner, name)))
            return
        seen = await service.see(
            media, owner, video=kind == "video", name=name, is_upload=self.store is not None,
            progress=lambda done, total: tell((done, total)),
        )  # fmt: skip
        if (owner, seen.id) not in self._views:
            await self._look_at(media, kind, (owner, seen.id))
        view = self._views.get((owner, seen.id)) or ""
        size = seen.encoded.features.nbytes if isinstance(seen.encoded, Embeddings) else seen.encoded.nbytes
        tell(Shown(seen.id, media.name, kind, len(seen.encoded), self.tokens, size, view, seen.is_known))

    async def _look_at(self, media: Media, kind: str, key: tuple[str, str]) -> None:
        """Keep what the model was shown, of a clip one frame, for as long as the server runs."""
        processor, limits = self._service.model.run.processor, self._service.limits
        if kind == "video":
            checked = await decode(check_video, media, processor, FrameSampling(num_frames=1), limits)
        else:
            checked = await decode(check_picture, media, processor)
        stream = io.BytesIO()
        Image.fromarray(checked.squares[0]).save(stream, "WEBP", quality=85)
        text = f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"
        self._views.put(key, text, len(text))
        self._views.trim()

    async def album(self, owner: str) -> tuple[list[Shown], bool]:
        """The newest pictures and clips of the store, and whether there are more."""
        if self.store is None:
            return [], False
        entries, more = await asyncio.to_thread(self.store.entries, owner, limit=_ALBUM)
        return [Shown.of(entry, self._views.get((owner, entry.id)) or "") for entry in entries], more

    async def forget(self, pictures: tuple[Shown, ...], owner: str) -> None:
        store = self._service.require_store()
        for one in pictures:
            await asyncio.to_thread(store.delete, one.id, owner)
            self._views.pop((owner, one.id))

    # ---- Questions ---------------------------------------------------------------------------------------------

    async def answer(self, asked: ChatRequest, owner: str, tell: Tell) -> None:
        """`tell` is given what was prepared, and all updates of the answer."""
        began, metrics = time.monotonic(), self.server.metrics
        if self.server.log_prompts:
            log.info("asked: %s", [m.content if isinstance(m.content, str) else "…" for m in asked.messages])
        prepared = await self._service.prepare(asked, owner)
        metrics.prompt(prepared.prompt_tokens, prepared.cached_tokens)
        tell(prepared)
        async with contextlib.aclosing(timed(self._service.answers(prepared), metrics, began)) as updates:
            async for _, update in updates:
                if (error := error_of(update)) is not None:
                    raise error
                tell(update)

    def places(self, prepared: Prepared) -> tuple[int, int]:
        """Of a prompt, and of the same without compression."""
        ask = prepared.asks[0]
        images = sum(len(encoded) for _, encoded in ask.images)
        return prepared.prompt_tokens, prepared.prompt_tokens + images * (self.uncompressed.places - ask.tokens)


def uncompressed(engine: Engine) -> Uncompressed:
    """What an image takes in this model without compression, counted as `benchmarks/efficiency.py` does: the cache of
    all features' places."""
    places = engine.config.vision.num_features
    cache = jax.eval_shape(lambda params: nnx.merge(engine.graphdef, params).empty_cache(1, places), engine.params)
    return Uncompressed(places, sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)))


def facts(places: tuple[int, int], last: Update, seconds: float) -> str:
    """What is said below an answer."""
    length, whole = places
    text = f"Answered in {seconds:.2f} s. The prompt had {length:,} tokens"
    text += f" instead of {whole:,}." if whole > length else "."
    if last.read_with:
        text += f" It read {last.read_with} of each image."
    if last.finish == "length":
        text += " The answer has as many tokens as it may have."
    return text
