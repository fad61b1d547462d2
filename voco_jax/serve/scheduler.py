"""The thread that has the devices: it compresses images and answers requests, a little of each in turn.

Whoever asks is told through callbacks, which are called in this thread and must be quick. Waiting requests are bounded:
more of them are `Busy`. Images of questions are compressed before those of uploads, so that a large upload does not
hold up answers.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
import dataclasses
import logging
import threading
import time
from typing import Protocol

import numpy as np

from voco_jax.infer.continuous import Ask, ContinuousBatch, Row, Step
from voco_jax.infer.image_encoder import ImageEncoder
from voco_jax.infer.memory import EncodedImages, Item, join_images
from voco_jax.serve.answer import Answer, Update

log = logging.getLogger(__name__)

TOGETHER = (1, 4, 16)  # images that are compressed at once
_FAILED = Update(finish="error", error="the server could not compute this answer")


class Busy(Exception):
    """So many requests wait already; `retry_after` seconds from now there may be room."""

    def __init__(self, retry_after: float):
        super().__init__("the server is busy: too many requests wait")
        self.retry_after = retry_after


class Closed(Exception):
    """The server is being stopped, and takes no new requests."""


class Watcher(Protocol):
    """What is told of the work, for metrics."""

    def decoded(self, tokens: int, seconds: float) -> None: ...
    def compressed(self, images: int, seconds: float) -> None: ...


@dataclasses.dataclass(eq=False)
class Ticket:
    """A request that waits or is being answered. `tell` gets its updates, the last with `finish`."""

    ask: Ask
    answer: Answer
    tell: Callable[[Update], None]
    deadline: float | None  # of time.monotonic()
    row: Row | None = None
    cancelled: bool = False
    done: bool = False


@dataclasses.dataclass(eq=False)
class _Images:
    """Images of one request: some of them may be compressed before others."""

    squares: list[np.ndarray]
    future: Future
    done: list[EncodedImages] = dataclasses.field(default_factory=list)


class Scheduler:
    """Owns a `ContinuousBatch`; `submit`, `cancel` and `compress` may be called in any thread.

    `most_waiting` requests wait at most, and as many images (of uploads `most_uploads`).
    """

    def __init__(
        self, images: ImageEncoder, batch: ContinuousBatch, *, most_waiting: int = 256, most_uploads: int = 4096,
        watcher: Watcher | None = None,
    ):  # fmt: skip
        self._encoder, self.batch, self._watcher = images, batch, watcher
        self._most_waiting, self._most_uploads = most_waiting, most_uploads
        self._changed = threading.Condition()
        self._waiting: deque[Ticket] = deque()
        self._images: deque[_Images] = deque()
        self._uploads: deque[_Images] = deque()
        self._running: dict[Row, Ticket] = {}
        self._closing: float | None = None  # until when requests go on
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._warm_up: Future | None = None
        self._seconds_per_answer = 1.0  # a guess, for who is sent away
        self.failure: BaseException | None = None  # why the thread has ended

    # ---- For other threads -------------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def close(self, seconds: float) -> None:
        """Take no new requests, and let those that are there go on for so long at most."""
        with self._changed:
            self._closing = time.monotonic() + seconds
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join(seconds + 10)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Requests that wait for a row."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that are being answered."""
        return len(self._running)

    def warm_up(self) -> None:
        """Compile what most requests need; others wait meanwhile."""
        done = Future[None]()
        with self._changed:
            self._warm_up = done
            self._changed.notify()
        done.result()

    def check_room(self, requests: int = 1) -> None:
        """Raise Busy or Closed where so many requests would not be taken."""
        with self._changed:
            self._check(requests)

    def submit(
        self, asks: Sequence[Ask], tell: Callable[[int, Update], None], *, until: Sequence[str] = (),
        deadline: float | None = None,
    ) -> list[Ticket]:  # fmt: skip
        """Have all of these answered, or raise Busy or Closed; `tell` is given the number of the ask too.

        UserError for one that no row has room for.
        """
        for ask in asks:
            self.batch.check(ask)
        tickets = [
            Ticket(ask, Answer(self._encoder.engine, until), lambda update, i=i: tell(i, update), deadline)  # type: ignore[misc]
            for i, ask in enumerate(asks)
        ]
        with self._changed:
            self._check(len(tickets))
            self._waiting += tickets
            self._changed.notify()
        return tickets

    def _check(self, requests: int) -> None:
        if self._closing is not None or self.failure is not None:
            raise Closed
        if len(self._waiting) + requests > self._most_waiting:
            rounds = 1 + len(self._waiting) / self.batch.most_rows
            raise Busy(max(1.0, rounds * self._seconds_per_answer))

    def cancel(self, ticket: Ticket) -> None:
        """Nobody waits for the answer any more."""
        with self._changed:
            ticket.cancelled = True
            self._changed.notify()

    def compress(self, squares: Sequence[np.ndarray], *, is_upload: bool = False) -> "Future[EncodedImages]":
        """Encode images as `ImageProcessor.squares` gives them; raises Busy or Closed."""
        work = _Images(list(squares), Future())
        with self._changed:
            if self._closing is not None or self.failure is not None:
                raise Closed
            queue, most = (
                (self._uploads, self._most_uploads) if is_upload else (self._images, 16 * self._most_waiting)
            )  # fmt: skip
            if queue and sum(len(one.squares) for one in queue) + len(work.squares) > most:
                raise Busy(self._seconds_per_answer)
            queue.append(work)
            self._changed.notify()
        return work.future

    # ---- The thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    while not self._has_work() and self._closing is None:
                        self._changed.wait()
                    if self._closing is not None and (not self._has_work() or time.monotonic() > self._closing):
                        break
                self._once()
        except BaseException as error:  # nothing is lost silently: all that wait are told, and /health says so
            self.failure = error
            log.exception("the scheduler has failed")
        finally:
            self._end_all("the server was stopped" if self.failure is None else "the server has failed")

    def _has_work(self) -> bool:
        return bool(self._warm_up or self._waiting or self._images or self._uploads or self._running)

    def _once(self) -> None:
        """A little of everything: images, a piece of prompts, a few tokens."""
        if self._warm_up is not None and not self._running:  # it uses the rows
            self._compile(self._warm_up)
        self._drop_those_who_left()
        if self._images:
            self._compress(self._images)
        elif self._uploads:
            self._compress(self._uploads)
        if not (self._waiting or self._running):
            return
        try:
            self._answer()
        except Exception:  # of the program or the devices: these requests fail, and the next begin anew
            log.exception("answers have failed")
            for ticket in [*self._running.values()]:
                self._finish(ticket, _FAILED)
            self._running.clear()
            self.batch = self.batch.anew()

    def _compile(self, done: Future) -> None:
        self._warm_up = None
        try:
            side = self._encoder.processor.size
            for count in TOGETHER:
                self._encoder.encode_pixels([np.zeros((side, side, 3), np.uint8)] * count, [Item("")] * count, count)
            for tokens in (8, 40):
                self.batch.warm_up(tokens)
            done.set_result(None)
        except BaseException as error:
            done.set_exception(error)
            raise

    def _answer(self) -> None:
        batch = self.batch
        if self._waiting and batch.free and not batch.is_reading:
            with self._changed:
                first = [ticket for ticket, _ in zip(self._waiting, range(batch.free), strict=False)]
            try:
                rows = batch.admit([ticket.ask for ticket in first])
            except Exception:  # or they would be tried again for ever
                with self._changed:
                    self._waiting = deque(ticket for ticket in self._waiting if ticket not in first)
                for ticket in first:
                    self._finish(ticket, _FAILED)
                raise
            with self._changed:
                for row in rows:
                    ticket = self._waiting.popleft()
                    ticket.row = row
                    self._running[row] = ticket
        if batch.is_reading:
            self._tell(batch.read_on())
        began = time.monotonic()
        steps = batch.decode(hurry=bool(self._waiting))
        if self._watcher and steps:
            self._watcher.decoded(sum(len(step.ids) for _, step in steps), time.monotonic() - began)
        self._tell(steps)

    def _tell(self, steps: Sequence[tuple[Row, Step]]) -> None:
        for row, step in steps:
            ticket = self._running.get(row)
            if ticket is None:
                continue
            update = ticket.answer.add(step, ticket.ask.max_new_tokens)
            if update.finish:
                del self._running[row]
                self.batch.release(row)
                self._finish(ticket, update)
            elif update.text or update.tokens:
                self._say(ticket, update)

    def _drop_those_who_left(self) -> None:
        now = time.monotonic()
        with self._changed:
            late = [t for t in self._waiting if t.cancelled or (t.deadline is not None and now > t.deadline)]
            if late:
                self._waiting = deque(t for t in self._waiting if t not in late)
        running = [t for t in self._running.values() if t.cancelled or (t.deadline is not None and now > t.deadline)]
        for ticket in running:
            assert ticket.row is not None
            del self._running[ticket.row]
            self.batch.release(ticket.row)
        for ticket in [*late, *running]:
            error = "" if ticket.cancelled else "the deadline has passed"
            self._finish(ticket, Update(finish="cancelled" if ticket.cancelled else "deadline", error=error))

    def _compress(self, queue: deque[_Images]) -> None:
        """As many images as go together, of one request or several."""
        with self._changed:
            taken: list[tuple[_Images, int]] = []
            room = TOGETHER[-1]
            while queue and room:
                work = queue[0]
                if not (work.squares and _is_wanted(work.future)):
                    queue.popleft()
                    continue
                count = min(room, len(work.squares))
                taken.append((work, count))
                room -= count
                if count < len(work.squares):
                    break
                queue.popleft()
        if not taken:
            return
        squares = [square for work, count in taken for square in work.squares[:count]]
        size = next(n for n in TOGETHER if n >= len(squares))
        began = time.monotonic()
        try:
            padded = [*squares, *squares[:1] * (size - len(squares))]
            encoded = self._encoder.encode_pixels(padded, [Item("")] * size, size)
            at = 0
            for work, count in taken:
                work.done.append(encoded[at : at + count])
                at += count
                del work.squares[:count]
                if not work.squares:
                    work.future.set_result(join_images(work.done))
        except Exception as error:
            log.exception("images could not be compressed")
            with self._changed:
                for work, _ in taken:
                    if work in queue:
                        queue.remove(work)
            for work, _ in taken:
                if not work.future.done():
                    work.future.set_exception(error)
            return
        if self._watcher:
            self._watcher.compressed(len(squares), time.monotonic() - began)

    def _finish(self, ticket: Ticket, update: Update) -> None:
        ticket.done = True
        self._seconds_per_answer = 0.9 * self._seconds_per_answer + 0.1 * ticket.answer.seconds
        self._say(ticket, update)

    def _say(self, ticket: Ticket, update: Update) -> None:
        try:
            ticket.tell(update)
        except Exception:
            log.exception("a callback has failed")

    def _end_all(self, why: str) -> None:
        with self._changed:
            self._closing = self._closing or time.monotonic()
            tickets = [*self._waiting, *self._running.values()]
            works = [*self._images, *self._uploads]
            for queue in (self._waiting, self._images, self._uploads):
                queue.clear()
            self._running.clear()
        for ticket in tickets:
            self._finish(ticket, Update(finish="error", error=why))
        for work in works:
            if _is_wanted(work.future):
                work.future.set_exception(Closed(why))


def _is_wanted(future: Future) -> bool:
    """Whether nobody has cancelled it; from then on nobody can."""
    return future.running() or future.set_running_or_notify_cancel()
