"""What the server does with a request, whatever protocol it came by: pictures and clips to memories, messages to
prompts, prompts to answers."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
import dataclasses
import hashlib
import secrets
import time
from typing import Any, cast

import numpy as np

from voco_jax.api import Model
from voco_jax.data.records import BadRecord
from voco_jax.data.turns import IMAGE, Part
from voco_jax.data.video import FrameSampling, format_time
from voco_jax.errors import UserError
from voco_jax.infer.auto_tokens import AUTO, AutoTokens, confidence_of
from voco_jax.infer.continuous import Ask
from voco_jax.infer.generate import Sampling
from voco_jax.infer.memory import EncodedImages, Item, MemoryBank, check_tokens, join_images
from voco_jax.infer.memory_file import MemoryFile
from voco_jax.serve import requests
from voco_jax.serve.answer import Token, Update
from voco_jax.serve.errors import ApiError, bad
from voco_jax.serve.ids import picture_id, upload_id, video_id
from voco_jax.serve.lru import Lru
from voco_jax.serve.media import Checked, Media, MediaLimits, check_picture, check_video, decode, fetch
from voco_jax.serve.scheduler import TOGETHER, Scheduler
from voco_jax.serve.store import Entry, MemoryStore, check_name

MOST_MEDIA = 64  # pictures and clips of a request

Progress = Callable[[int, int], None]  # is told how many images are done, and of how many


@dataclasses.dataclass(eq=False)
class _Making:
    """A picture or clip that is being compressed, and who wants to know how far it is."""

    listeners: list[Progress] = dataclasses.field(default_factory=list)
    task: asyncio.Task[EncodedImages] = dataclasses.field(init=False)

    def tell(self, done: int, total: int) -> None:
        for listener in self.listeners:
            listener(done, total)


@dataclasses.dataclass(frozen=True)
class Seen:
    """A picture or a clip: its images encoded, and whether they were there already."""

    id: str
    encoded: EncodedImages
    is_known: bool
    entry: Entry | None = None


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A request's prompt, ready to be answered: one `Ask` a choice. `images` are their bytes."""

    asks: list[Ask]
    until: tuple[str, ...]
    auto: AutoTokens | None
    prompt_tokens: int
    cached_tokens: int  # places of images that were known
    memory_bytes: int


@dataclasses.dataclass(frozen=True)
class Defaults:
    """Of what requests leave open. `seconds` is how long a request may take."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    seconds: float = 300.0


class Service:
    """A model, its scheduler and its store of memories (None for a model without memories)."""

    def __init__(
        self, model: Model, scheduler: Scheduler, store: MemoryStore | None, limits: MediaLimits,
        defaults: Defaults = Defaults(), embedding_bytes: int = 1 << 30,
    ):  # fmt: skip
        self.model, self.scheduler, self.store = model, scheduler, store
        self.limits, self.defaults = limits, defaults
        self._embeddings: Lru[tuple[str, str], EncodedImages] = Lru(embedding_bytes)
        self._making: dict[tuple[str, str], _Making] = {}
        self._tokenizer = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    # ---- Pictures and clips ------------------------------------------------------------------------------------

    @property
    def embedding_bytes(self) -> int:
        """Held on the host, of a model without memories."""
        return self._embeddings.bytes

    def require_store(self) -> MemoryStore:
        if self.store is None:
            raise bad(f"this model (compressor {self.model.config.compressor}) has no memories to keep")
        return self.store

    async def remembered(self, name: str, owner: str) -> Seen:
        """A memory by its name or id, ApiError 404 where there is none; of a model without memories the embeddings of a
        picture, by its id, while they are held."""
        if (embeddings := self._embeddings.get((owner, name))) is not None:
            return Seen(name, embeddings, True)
        store = self.require_store()
        id = await asyncio.to_thread(store.find, name, owner)
        bank = None if id is None else await asyncio.to_thread(store.get, id, owner)
        if id is None or bank is None:
            raise ApiError(
                404, f"uuid: no memory has the name or id {name[:100]!r}: send the picture", param="uuid",
                code="memory_not_found",
            )  # fmt: skip
        return Seen(id, bank, True)

    async def see(
        self, media: Media, owner: str, *, video: bool, name: str = "", is_upload: bool = False,
        sampling: FrameSampling | None = None, progress: Progress = lambda done, total: None,
    ) -> Seen:  # fmt: skip
        """A picture, or a clip, compressed unless it is known. With a store it is kept there, an upload on disk before
        this returns. MediaError for what is not one, Busy where too many wait."""
        sampling = sampling or self.model.image_encoder.sampling
        sha256 = await asyncio.to_thread(_sha256, media)
        is_kept = bool(name) or is_upload
        checked: Checked | None = None
        if video:
            id = video_id(sha256, sampling)
        else:
            checked = await decode(check_picture, media, self.model.run.processor)
            id = picture_id(*checked.squares)
        if name.lower() in (id, sha256):  # it is found by these in any case
            name = ""
        check_name(name)
        known = await asyncio.to_thread(self._known, id, owner)
        if known is None:
            key = (owner, id)
            made = await self._once(
                key, progress,
                lambda tell: self._make(key, media, checked, sampling, sha256, name, is_upload, tell),
            )  # fmt: skip
        else:
            made = known
        entry = None
        if self.store is not None and is_kept:
            entry = await asyncio.to_thread(
                self.store.put, id, cast(MemoryBank, made), name=name, sha256=sha256, owner=owner, durable=is_upload,
                kind="video" if video else "picture",
            )  # fmt: skip
        return Seen(id, made, known is not None, entry)

    async def _once(
        self, key: tuple[str, str], progress: Progress, make: Callable[[Progress], Coroutine[Any, Any, EncodedImages]]
    ) -> EncodedImages:  # fmt: skip
        """What `make` gives, made once for all who ask for it meanwhile; it is cancelled when nobody waits any more."""
        making = self._making.get(key)
        is_first = making is None
        if making is None:
            making = self._making[key] = _Making()
            making.task = asyncio.create_task(make(making.tell))
            making.task.add_done_callback(lambda _: self._made(key, making))
        making.listeners.append(progress)
        try:
            return await asyncio.shield(making.task)
        finally:
            making.listeners.remove(progress)
            if not making.listeners:
                self._made(key, making)
                making.task.cancel()
            if is_first:  # its file is read until then
                await asyncio.wait([making.task])

    def _made(self, key: tuple[str, str], making: "_Making") -> None:
        if self._making.get(key) is making:
            del self._making[key]

    def _known(self, id: str, owner: str) -> EncodedImages | None:
        return self._embeddings.get((owner, id)) if self.store is None else self.store.get(id, owner)

    async def _make(
        self, key: tuple[str, str], media: Media, checked: Checked | None, sampling: FrameSampling, sha256: str,
        name: str, is_upload: bool, progress: Progress,
    ) -> EncodedImages:  # fmt: skip
        """Compress, and keep it."""
        video = checked is None
        if checked is None:
            checked = await decode(check_video, media, self.model.run.processor, sampling, self.limits)
        squares, parts = list(checked.squares), []
        progress(0, len(squares))
        for start in range(0, len(squares), TOGETHER[-1]):
            some = squares[start : start + TOGETHER[-1]]
            parts.append(await asyncio.wrap_future(self.scheduler.compress(some, is_upload=is_upload)))
            progress(start + len(some), len(squares))
        source = name or media.name
        if checked.times is None:
            items = self.model.image_encoder.items_of(source, sha256=sha256)
        else:
            items = [Item(source, sha256, time) for time in checked.times.tolist()]
        encoded = dataclasses.replace(join_images(parts), items=tuple(items))
        if isinstance(encoded, MemoryBank):
            encoded = dataclasses.replace(encoded, model=self.model.fingerprint)
        owner, id = key
        if self.store is not None:
            await asyncio.to_thread(
                self.store.put, id, cast(MemoryBank, encoded), sha256=sha256, owner=owner,
                kind="video" if video else "picture",
            )  # fmt: skip
        else:
            assert not isinstance(encoded, MemoryBank)
            encoded = dataclasses.replace(encoded, features=np.asarray(encoded.features))
            self._embeddings.put(key, encoded, encoded.features.nbytes)
            self._embeddings.trim()
        return encoded

    async def take_file(self, media: Media, owner: str, name: str) -> Entry:
        """Keep the memories of a `.voco` file, checked as on disk, as one memory. UserError for one that is damaged, or
        another model's."""
        store = self.require_store()

        def read() -> Entry:
            sha256 = _sha256(media)
            assert media.file is not None
            try:
                with MemoryFile(media.file) as memories:
                    bank = memories.read(model=self.model.fingerprint, kind=self.model.config.memory_kind)
                bank = cast(MemoryBank, self.model.image_encoder.checked(bank))
            except UserError as error:
                raise bad(str(error).replace(str(media.file), media.name)) from None
            kind = "video" if bank.is_video else "album"
            return store.put(upload_id(sha256), bank, name=name, sha256=sha256, kind=kind, owner=owner, durable=True)

        return await asyncio.to_thread(read)

    # ---- Prompts -----------------------------------------------------------------------------------------------

    async def prepare(self, request: requests.ChatRequest, owner: str) -> Prepared:
        """The prompt of a chat request; ApiError for one that cannot be answered."""
        self._check_room(request.n)
        parts = [
            part for message in request.messages if not isinstance(message.content, str) for part in message.content
            if not isinstance(part, requests.Text)
        ]  # fmt: skip
        if len(parts) > MOST_MEDIA:
            raise bad(f"messages: expected at most {MOST_MEDIA} pictures and clips, found {len(parts)}", "messages")
        # Those of one request that fail are all told to stop
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._see_part(part, owner)) for part in parts]
        except BaseExceptionGroup as errors:
            raise _first(errors) from None
        seen = [task.result() for task in tasks]
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._tokenizer, self._prompt, request, parts, seen, owner)

    async def _see_part(self, part, owner: str) -> Seen:
        given: str = part.type
        content, is_video = getattr(part, given), given != "image_url"
        if content is None:
            if part.uuid is None:
                raise bad(f"messages: expected {given} or uuid, found none", given)
            return await self.remembered(part.uuid, owner)
        url = content.url if given != "input_video" else _as_data_uri(content)
        media = await fetch(url, self.limits, video=is_video)
        return await self.see(media, owner, video=is_video, name=part.uuid or "")

    def _check_room(self, count: int) -> None:
        self.scheduler.check_room(count)

    def _prompt(
        self, request: requests.ChatRequest, parts: Sequence[object], seen: Sequence[Seen], owner: str
    ) -> Prepared:  # fmt: skip
        images = tuple((one.id, one.encoded) for one in seen)
        tokens, auto = self._tokens(request, [encoded for _, encoded in images])
        engine = self.model.engine.for_tokens(tokens) if self.store is not None else self.model.engine
        turns = self._turns(request.messages, {id(p): one for p, one in zip(parts, seen, strict=True)}, engine.encoder)
        try:
            sample = engine.encoder.encode(turns, sum(len(encoded) for _, encoded in images))
        except BadRecord as error:
            raise bad(f"messages: {error}", "messages") from None
        new = request.max_completion_tokens or request.max_tokens
        room = self.scheduler.batch.most_places - len(sample)
        new = min(self.defaults.max_new_tokens, max(1, room)) if new is None else new
        temperature = self.defaults.temperature if request.temperature is None else request.temperature
        seed = secrets.randbits(32) if request.seed is None else request.seed % 2**32
        top_p = 1.0 if request.top_p is None else request.top_p
        top_k = min(request.top_k or 0, self.model.config.llama.vocab_size)
        sampling = Sampling(temperature, top_k, top_p, seed if temperature else 0)
        ask = Ask(sample, images, tokens, new, sampling, 0, bool(request.top_logprobs), owner)
        asks = [dataclasses.replace(ask, stream=i) for i in range(request.n)]
        try:
            self.scheduler.batch.check(ask)
        except UserError as error:
            raise bad(str(error), "messages", "context_length_exceeded") from None
        slots = np.divmod(sample.slot_index[sample.slot_index >= 0], tokens)[0]
        is_known = np.array([one.is_known for one in seen for _ in range(len(one.encoded))] or [False])
        return Prepared(
            asks, request.until, auto, len(sample), int(is_known[slots].sum()),
            sum(encoded.nbytes for _, encoded in images if isinstance(encoded, MemoryBank)),
        )  # fmt: skip

    def _tokens(
        self, request: requests.ChatRequest, images: Sequence[EncodedImages]
    ) -> tuple[int, AutoTokens | None]:  # fmt: skip
        """How many tokens of each image are read, or all and the rule that chooses them."""
        there = self.model.run.encoder.num_visual_tokens
        if request.tokens is not None and self.store is None:
            raise bad("tokens: this model has no memories, of which some tokens could be read", "tokens")
        there = min([one.num_tokens for one in images if isinstance(one, MemoryBank)], default=there)
        try:
            if request.tokens == AUTO:
                return there, self.model.auto_tokens() if images else None
            check_tokens("tokens", cast("int | None", request.tokens), there)
        except UserError as error:
            raise bad(str(error), "tokens") from None
        return cast(int, request.tokens or there), None

    def _turns(self, messages: Sequence[requests.Message], seen: dict[int, Seen], encoder) -> list[dict]:
        """A conversation as training lays it out: images of a message before its text, or with `data.image_position`
        'text' where they stand."""
        turns: list[dict] = []
        for i, message in enumerate(messages):
            if message.role in ("system", "developer"):
                if turns and turns[-1]["from"] != "system":
                    raise bad(f"messages[{i}]: expected the {message.role} message first", "messages")
                text = _only_text(message, i)
                if turns:
                    turns[0]["value"] += f"\n{text}"
                elif text.strip():
                    turns.append({"from": "system", "value": text})
            elif message.role == "assistant":
                turns.append({"from": "gpt", "value": (_only_text(message, i),)})
            else:
                turns.append({"from": "human", "value": self._said(message, seen, encoder)})
        if not turns or turns[-1]["from"] != "human":
            raise bad("messages: expected a user message last", "messages")
        if turns[0]["from"] == "system" and not encoder.template.with_system:
            raise bad("messages: the chat template of this model has no place for a system message", "messages")
        return _merged(turns)

    def _said(self, message: requests.Message, seen: dict[int, Seen], encoder) -> tuple[Part, ...]:
        content = message.content
        parts = [requests.Text(type="text", text=content)] if isinstance(content, str) else content
        if encoder.image_position == "text":
            said: list[Part] = []
            for part in parts:
                if isinstance(part, requests.Text):
                    said.append(f"\n{part.text}" if said and said[-1] is IMAGE else part.text)
                else:
                    said += self._marks(seen[id(part)].encoded)
            return tuple(said)
        text = "\n".join(part.text for part in parts if isinstance(part, requests.Text))
        about = [seen[id(part)].encoded for part in parts if not isinstance(part, requests.Text)]
        if not any(one.is_video for one in about):
            return tuple(encoder.question(text, sum(map(len, about))))
        return (*(mark for one in about for mark in self._marks(one)), f"\n{text}")

    def _marks(self, encoded: EncodedImages) -> list[Part]:
        """The places of its images; of a clip's frames after their times, where the run was trained so."""
        if not (encoded.is_video and self.model.engine.timestamps):
            return [IMAGE] * len(encoded)
        return [part for item in encoded.items for part in (f"{format_time(item.time or 0)} ", IMAGE)]

    # ---- Answers -----------------------------------------------------------------------------------------------

    async def answers(self, prepared: Prepared) -> AsyncGenerator[tuple[int, Update]]:
        """What is new of each choice, by its number, until all have ended. Who stops listening frees their rows."""
        deadline = time.monotonic() + self.defaults.seconds
        if prepared.auto is not None:
            for i, ask in enumerate(prepared.asks):
                yield i, await self._auto(ask, prepared, deadline)
            return
        async for i, update in self._answers(prepared.asks, prepared.until, deadline):
            yield i, update

    async def _answers(
        self, asks: Sequence[Ask], until: Sequence[str], deadline: float
    ) -> AsyncGenerator[tuple[int, Update]]:  # fmt: skip
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Update]]()

        def tell(i: int, update: Update) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, (i, update))

        tickets = self.scheduler.submit(asks, tell, until=until, deadline=deadline)
        try:
            left = len(tickets)
            while left:
                i, update = await queue.get()
                left -= bool(update.finish)
                yield i, update
        finally:
            for ticket in tickets:
                if not ticket.done:
                    self.scheduler.cancel(ticket)

    async def _auto(self, ask: Ask, prepared: Prepared, deadline: float) -> Update:
        """The whole answer, with as many tokens of each memory as it needs to be sure (`infer/auto_tokens.py`)."""
        auto = cast(AutoTokens, prepared.auto)
        update = Update()
        for tokens in auto.steps(ask.tokens):
            cut = dataclasses.replace(ask, sample=ask.sample.first_tokens(ask.tokens, tokens), tokens=tokens)
            text = ""
            told: list[Token] = []
            sure: list[float] = []
            async for _, update in self._answers([cut], prepared.until, deadline):
                text += update.text
                told += update.tokens
                sure += update.log_probabilities
            update = Update(text, tuple(told), update.finish, update.error, tuple(sure), tokens)
            if update.finish not in ("stop", "length") or confidence_of(np.array(sure)) >= auto.confidence:
                break
        return update


def _sha256(media: Media) -> str:
    if media.data is not None:
        return hashlib.sha256(media.data).hexdigest()
    assert media.file is not None
    with open(media.file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _first(errors: BaseExceptionGroup) -> BaseException:
    """The first error in a group of groups."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _as_data_uri(content: requests.VideoData) -> str:
    if content.data[:5].lower() == "data:":
        return content.data
    return f"data:{'video/' + content.format if content.format else ''};base64,{content.data}"


def _only_text(message: requests.Message, i: int) -> str:
    if isinstance(message.content, str):
        return message.content
    if any(not isinstance(part, requests.Text) for part in message.content):
        raise bad(f"messages[{i}]: expected pictures and clips in user messages alone", "messages")
    return "\n".join(part.text for part in message.content if isinstance(part, requests.Text))


def _merged(turns: list[dict]) -> list[dict]:
    """Neighbours by the same role as one turn."""
    merged: list[dict] = []
    for turn in turns:
        if merged and merged[-1]["from"] == turn["from"] and turn["from"] != "system":
            merged[-1] = turn | {"value": (*merged[-1]["value"], "\n", *turn["value"])}
        else:
            merged.append(turn)
    return merged
