"""Continuous batching: answers to requests that come at any time, decoded together in the rows of one cache.

A request takes a row as soon as one is free, its prompt is read beside the rows that are being decoded, and the row is
free again when its answer has ended. What a row gets does not depend on the rows beside it. Rows keep what they have
read: a prompt that begins as one of them does (the system text, an earlier turn) takes that from there, and reads the
rest alone.

The cache has one of a few sizes (rows × places), so that few programs are compiled; it grows and shrinks with what is
asked. `ContinuousBatch` is for one thread.
"""

from collections import OrderedDict
from collections.abc import Sequence
import dataclasses

import numpy as np

from voco_jax.data.conversations import Sample
from voco_jax.errors import UserError
from voco_jax.infer.continuous_programs import RowState, programs_of
from voco_jax.infer.engine import GREEDY, Engine, Visual
from voco_jax.infer.generate import Sampling, SamplingState
from voco_jax.infer.memory import EncodedImages, MemoryBank
from voco_jax.models.compressors import KEYS_AND_VALUES
from voco_jax.models.voco import Cache, Memory
from voco_jax.parallel.mesh import ROWS, axis_size

ROW_SIZES = (1, 4, 16, 64, 256)  # rows of the cache, and prompts that are read together
PIECES = (16, 64, 256)  # tokens of a prompt that are read at once, where keys and values of images are there already;
LONG_PIECES = (64, 256, 1024)  # where images are tokens of the prompt. A longer prompt is read in several pieces
LEAST_PLACES = 128  # of a row; twice as many where a request needs more
IMAGES = (4, 32, 256)  # images of prompts that are read together: padded to one of these, or to a multiple of the last
STEPS = 8  # tokens a row that are decoded at once
TOP = 20  # likeliest tokens that are told, where some are asked for
SHRINK_AFTER = 64  # calls of `decode` for which a smaller cache would have done
_NUMBERS = 1 << 16  # images that are told apart by `_content`, the newest


@dataclasses.dataclass(frozen=True, eq=False)
class Ask:
    """A prompt to be answered in a row.

    `sample` is encoded for `tokens` visual tokens an image; `images` are what it is about, in its order, each with a
    key: what has one key is the same. Rows share what they have read with requests of the same `owner` alone.
    `stream` is the number of the random stream that it draws from. `top`: whether the likeliest tokens are told.
    """

    sample: Sample
    images: tuple[tuple[str, EncodedImages], ...]
    tokens: int
    max_new_tokens: int
    sampling: Sampling = GREEDY
    stream: int = 0
    top: bool = False
    owner: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """Tokens of an answer, [N] in order: ids (the stop token too), log-probabilities (nats), and the `TOP` likeliest
    tokens of each place with theirs, [N, TOP], or [N, 0] where nobody asked for them."""

    ids: np.ndarray
    log_probabilities: np.ndarray
    top_ids: np.ndarray
    top_log_probabilities: np.ndarray


@dataclasses.dataclass(eq=False)
class Row:
    """A row of the cache: what it has read, a number a place, whose it is, and what it answers (None: it is free)."""

    places: np.ndarray
    owner: str = ""
    ask: Ask | None = None
    last: int = 0  # of the answer's tokens, which is not in the cache yet
    is_read: bool = True  # the whole prompt
    used: int = 0  # when: the number of the request


@dataclasses.dataclass
class _Reading:
    """Prompts that are being read, in a cache of their own rows; `texts` are the places of theirs still to be read."""

    rows: list[Row]
    texts: list[np.ndarray]
    cache: Cache
    visual: Visual
    starts: list[int]  # the first of each prompt's images in `visual`


class ContinuousBatch:
    """Rows of one cache, in which prompts are read and answers decoded. `most_rows` are used at once, each with at most
    `most_places` (0: as many as the model has positions).

    `device_bytes`: of images, kept on the devices for requests to come.
    """

    def __init__(self, engine: Engine, *, most_rows: int = 16, most_places: int = 0, device_bytes: int = 1 << 30):
        if most_rows < 1:
            raise UserError(f"rows: expected at least 1, found {most_rows}")
        self._engine, self.most_rows, self._device_bytes = engine, most_rows, device_bytes
        with engine.on_mesh():
            together = axis_size(*ROWS)
        self._sizes = sorted({-(-min(size, most_rows) // together) * together for size in ROW_SIZES})
        if self._sizes[-1] < most_rows:
            self._sizes.append(-(-most_rows // together) * together)
        limit = engine.config.llama.max_position_embeddings
        self.most_places = min(most_places or limit, limit)
        self._has_slots = engine.config.memory_kind == KEYS_AND_VALUES
        self._pieces = PIECES if self._has_slots else LONG_PIECES
        self._programs = programs_of(engine.graphdef)
        self._stop = np.array(engine.encoder.stop_ids, np.int32)
        self._images = _OnDevice(engine, device_bytes)
        self._numbers: OrderedDict[tuple[str, int], int] = OrderedDict()  # of images, by key, for `_content`
        self._next_number = self._requests = 0
        self._reading: _Reading | None = None
        self._unused = 0  # calls of `decode` for which a smaller cache would have done
        self._rows = [_empty_row() for _ in range(self._sizes[0])]
        self._places = min(LEAST_PLACES, self.most_places)
        with engine.on_mesh():
            self._state: RowState = self._programs.empty(*self.size, engine.parted)

    # ---- For the scheduler -------------------------------------------------------------------------------------

    @property
    def size(self) -> tuple[int, int]:
        """Rows and places of the cache."""
        return len(self._rows), self._places

    @property
    def free(self) -> int:
        """Requests for which there are rows."""
        return self.most_rows - sum(row.ask is not None for row in self._rows)

    @property
    def is_decoding(self) -> bool:
        return any(row.ask is not None and row.is_read for row in self._rows)

    @property
    def is_reading(self) -> bool:
        """Whether prompts are half read: `read_on` reads more of them."""
        return self._reading is not None

    @property
    def cache_bytes(self) -> int:
        """Of the rows' keys and values."""
        return sum(x.nbytes for x in self._state.cache)

    @property
    def image_bytes(self) -> int:
        """Of the images that are kept on the devices."""
        return self._images.nbytes

    def anew(self) -> "ContinuousBatch":
        """Another one, with nothing in it."""
        return ContinuousBatch(
            self._engine, most_rows=self.most_rows, most_places=self.most_places, device_bytes=self._device_bytes
        )

    def warm_up(self, tokens: int) -> None:
        """Compile what questions of so many tokens need, for each number of rows."""
        places = np.zeros(tokens, np.int32)
        sample = Sample(places, places.astype(bool), places - 1, 0)
        for count in self._sizes:
            rows = self.admit([Ask(sample, (), 1, 2)] * min(count, self.most_rows))
            while self.is_reading:
                self.read_on()
            self.decode()
            for row in rows:
                self.release(row)
        for row in self._rows:
            row.places = row.places[:0]

    def check(self, ask: Ask) -> None:
        """UserError for a request that no row has room for."""
        if len(ask.sample) + ask.max_new_tokens > self.most_places:
            raise UserError(
                f"question: expected at most {self.most_places} tokens with the answer, found {len(ask.sample)} and "
                f"{ask.max_new_tokens} for the answer"
            )

    def admit(self, asks: Sequence[Ask]) -> list[Row]:
        """Give the first of the requests a row each, as many as fit: `read_on` reads their prompts. Nothing where
        prompts are being read."""
        together = [] if self._reading else self._first_together(asks)
        if not together:
            return []
        self._resize(*map(max, self.size, self._needed(together)))
        begun = [self._alike(ask) for ask in together]
        index = self._padded([r for r, _ in begun])
        texts = [np.flatnonzero(self._is_text(ask)) for ask in together]
        texts = [text[text >= count] for text, (_, count) in zip(texts, begun, strict=True)]
        rows = [self._give_row(ask, *of_row) for ask, of_row in zip(together, begun, strict=True)]
        with self._engine.on_mesh():
            cache = self._programs.take(self._state.cache, index)
            visual, starts = self._images.gather([ask.images for ask in together])
            if isinstance(visual, Memory):
                slots = np.full((len(index), self._places), -1, np.int32)
                for i, (ask, start, (_, count)) in enumerate(zip(together, starts, begun, strict=True)):
                    slots[i, count : len(ask.sample)] = self._slot_index(ask, start)[count:]
                cache = self._programs.fill(self._engine.parted, cache, visual, slots)
        self._reading = _Reading(rows, texts, cache, visual, starts)
        return rows

    def read_on(self) -> list[tuple[Row, Step]]:
        """Read a piece of the prompts that were admitted: when all is read, the first token of each answer."""
        reading = self._reading
        assert reading is not None
        with self._engine.on_mesh():
            longest = self._pieces[-1]
            if any(len(text) > longest for text in reading.texts):  # then it is one
                piece, rest = np.split(reading.texts[0], [longest])
                _, reading.cache = self._extend(reading, [piece])
                reading.texts = [rest]
                return []
            logits, reading.cache = self._extend(reading, reading.texts)
            self._reading = None
            return self._put(reading, logits)

    def decode(self, *, hurry: bool = False) -> list[tuple[Row, Step]]:
        """A few tokens more of every answer that has not ended. `hurry`: until one ends."""
        active = [(r, row) for r, row in enumerate(self._rows) if row.ask is not None and row.is_read]
        asks = [row.ask for _, row in active if row.ask is not None]
        if not asks:
            return []
        with self._engine.on_mesh():
            self._state, given = self._programs.decode(
                any(ask.sampling.temperature for ask in asks), TOP if any(ask.top for ask in asks) else 0, STEPS,
                self._engine.parted, self._state, self._stop, np.bool_(hurry),
            )  # fmt: skip
            of_rows = self._on_host(given)
        found = []
        for r, row in active:
            count = int((of_rows[0][r] >= 0).sum())
            if not count:  # it had ended
                continue
            step = Step(*(x[r, :count] for x in of_rows))
            # The last of them is not in the cache; the last one before them is now
            row.places = np.concatenate([row.places, [row.last], step.ids[:-1]])
            row.last = int(step.ids[-1])
            found.append((row, step))
        self._shrink()
        return found

    def release(self, row: Row) -> None:
        """The row is free: its answer has ended, or nobody waits for it."""
        if row.ask is None:
            return
        row.ask = None
        r = self._rows.index(row)
        if row.is_read:
            with self._engine.on_mesh():
                self._state = self._programs.end(self._state, np.int32(r))
            return
        row.places = row.places[:0]  # nothing of it is in the cache
        if self._reading is not None and all(other.ask is None for other in self._reading.rows):
            self._reading = None

    # ---- Rows and their contents -------------------------------------------------------------------------------

    def _first_together(self, asks: Sequence[Ask]) -> list[Ask]:
        """Requests whose prompts are read at once: as many as there are rows and images for; or a long one."""
        together: list[Ask] = []
        images = 0
        for ask in asks[: self.free]:
            images += sum(len(one) for _, one in ask.images)
            is_long = int(self._is_text(ask).sum()) > self._pieces[-1]
            if together and (is_long or images > IMAGES[-1]):
                break
            together.append(ask)
            if is_long:
                break
        return together

    def _is_text(self, ask: Ask) -> np.ndarray:
        """Places whose tokens are read; keys and values stand at the others already."""
        slot_index = ask.sample.slot_index
        return slot_index < 0 if self._has_slots else np.ones(len(slot_index), bool)

    def _content(self, ask: Ask) -> np.ndarray:
        """int64 [n], what stands at each place of a prompt: a token, or below zero a token of an image."""
        numbers = [self._number(key, i) for key, one in ask.images for i in range(len(one))]
        slot_index = ask.sample.slot_index.astype(np.int64)
        image, token = np.divmod(slot_index, ask.tokens)
        of_image = np.array([*numbers, 0], np.int64)[np.where(slot_index < 0, -1, image)]
        most = self._engine.config.num_visual_tokens
        return np.where(slot_index < 0, ask.sample.tokens, -(of_image * most + token) - 1)

    def _number(self, key: str, i: int) -> int:
        number = self._numbers.pop((key, i), None)
        if number is None:
            number = self._next_number
            self._next_number += 1
        self._numbers[key, i] = number
        if len(self._numbers) > _NUMBERS:
            self._numbers.popitem(last=False)
        return number

    def _alike(self, ask: Ask) -> tuple[int, int]:
        """The row that has read most of a prompt's beginning, and how many places of it."""
        places = self._content(ask)
        last = int(np.flatnonzero(self._is_text(ask))[-1])  # this token is read in any case
        found = []
        for r, row in enumerate(self._rows):
            count = min(len(row.places), last) if row.owner == ask.owner and row.is_read else 0
            differs = np.flatnonzero(row.places[:count] != places[:count])
            found.append((int(differs[0]) if len(differs) else count, -r))
        alike, r = max(found)
        return -r, alike

    def _give_row(self, ask: Ask, like: int, alike: int) -> Row:
        """A free row: that which the prompt goes on, or the one that was used last the longest time ago."""
        free = [r for r, row in enumerate(self._rows) if row.ask is None]
        r = min(free, key=lambda r: self._rows[r].used)
        if like in free and 2 * alike > len(self._rows[like].places):
            r = like
        self._requests += 1
        row = self._rows[r] = Row(self._content(ask), ask.owner, ask, is_read=False, used=self._requests)
        return row

    # ---- Reading prompts ---------------------------------------------------------------------------------------

    def _padded(self, rows: Sequence[int]) -> np.ndarray:
        """Rows by number, and none, up to a number of rows for which there are programs."""
        count = next(size for size in self._sizes if size >= len(rows))
        return np.array([*rows, *[len(self._rows)] * (count - len(rows))], np.int32)

    def _slot_index(self, ask: Ask, start: int) -> np.ndarray:
        """int32 [n], of a prompt whose first image is number `start` of those that were gathered."""
        image, token = np.divmod(ask.sample.slot_index, ask.tokens)
        most = self._engine.config.num_visual_tokens
        return np.where(ask.sample.slot_index < 0, -1, (start + image) * most + token).astype(np.int32)

    def _extend(self, reading: _Reading, texts: Sequence[np.ndarray]) -> tuple:
        """Read these places of the prompts: logits after the last of each, and the cache."""
        shape = reading.cache.keys.shape[1], next(n for n in self._pieces if n >= max(map(len, texts)))
        tokens, positions, slot_index = (np.full(shape, filler, np.int32) for filler in (0, -1, -1))
        for i, (row, text) in enumerate(zip(reading.rows, texts, strict=True)):
            if row.ask is not None:
                tokens[i, : len(text)], positions[i, : len(text)] = row.ask.sample.tokens[text], text
                slot_index[i, : len(text)] = self._slot_index(row.ask, reading.starts[i])[text]
        visual = None if isinstance(reading.visual, Memory) else reading.visual
        return self._programs.extend(
            self._engine.parted, reading.cache, tokens, positions, None if visual is None else slot_index, visual
        )

    def _put(self, reading: _Reading, logits) -> list[tuple[Row, Step]]:
        """Put the prompts that have been read into their rows, and choose the first token of each answer."""
        rows = [(i, row, row.ask) for i, row in enumerate(reading.rows) if row.ask is not None]
        asks = [ask for _, _, ask in rows]
        count = len(logits)
        index, by_row = np.full(count, len(self._rows), np.int32), [asks[0]] * count
        for i, row, ask in rows:
            index[i], by_row[i] = self._rows.index(row), ask
        self._state, given = self._programs.put(
            any(ask.sampling.temperature for ask in asks), TOP if any(ask.top for ask in asks) else 0,
            self._state, index, reading.cache, logits, np.array([len(ask.sample) for ask in by_row], np.int32),
            np.array([ask.max_new_tokens for ask in by_row], np.int32), self._stop, _sampling_of(by_row),
        )  # fmt: skip
        of_rows = self._on_host(given)
        found = []
        for i, row, _ in rows:
            row.is_read, row.last = True, int(of_rows[0][i])
            found.append((row, Step(*(x[i : i + 1] for x in of_rows))))
        return found

    def _on_host(self, given: tuple) -> list[np.ndarray]:
        return [np.asarray(self._engine.whole(x)) for x in given]

    # ---- The cache's size --------------------------------------------------------------------------------------

    def _needed(self, asks: Sequence[Ask]) -> tuple[int, int]:
        """The size for these requests beside what is being answered."""
        together = [*(row.ask for row in self._rows if row.ask is not None), *asks]
        rows = next(size for size in self._sizes if size >= len(together))
        places = min(LEAST_PLACES, self.most_places)
        longest = max((len(ask.sample) + ask.max_new_tokens for ask in together), default=0)
        while places < longest:
            places = min(2 * places, self.most_places)
        return rows, places

    def _shrink(self) -> None:
        """To a smaller size, where one would have done for a while."""
        rows, places = self._needed([])
        self._unused = self._unused + 1 if (rows, places) != self.size else 0
        if self._unused > SHRINK_AFTER:
            self._resize(rows, places)

    def _resize(self, rows: int, places: int) -> None:
        if (rows, places) == self.size:
            return
        self._unused = 0
        # Those in use come first, then those that were used last
        order = sorted(self._rows, key=lambda row: (row.ask is None, -row.used))[:rows]
        index = [self._rows.index(row) for row in order] + [len(self._rows)] * (rows - len(order))
        with self._engine.on_mesh():
            self._state = self._programs.resize(places, self._state, np.array(index, np.int32))
            if self._reading is not None:
                self._reading.cache = self._programs.pad(places, self._reading.cache)
        self._rows = order + [_empty_row() for _ in range(rows - len(order))]
        self._places = places
        for row in self._rows:
            row.places = row.places[:places]


class _OnDevice:
    """Encoded images on the devices, by their keys: those that were used last, of at most so many bytes."""

    def __init__(self, engine: Engine, most_bytes: int):
        self._engine, self._most_bytes = engine, most_bytes
        self._programs = programs_of(engine.graphdef)
        self._kept: OrderedDict[str, tuple[Visual, int]] = OrderedDict()
        self.nbytes = 0

    def gather(self, of_prompts: Sequence[tuple[tuple[str, EncodedImages], ...]]) -> tuple[Visual, list[int]]:
        """Images of prompts in one row, with room for a few numbers of them; and where those of each prompt begin."""
        starts: list[int] = []
        begun: dict[tuple[str, ...], int] = {}  # prompts about the same share them
        in_order: list[tuple[str, EncodedImages]] = []
        count = 0
        for images in of_prompts:
            keys = tuple(key for key, _ in images)
            if keys not in begun:
                begun[keys] = count
                in_order += images
                count += sum(len(one) for _, one in images)
            starts.append(begun[keys])
        if not count:
            return None, starts
        room = next((n for n in IMAGES if n >= count), -(-count // IMAGES[-1]) * IMAGES[-1])
        visual: Visual = None
        at = 0
        for key, one in in_order:
            image = self._of(key, one)
            most = self._engine.config.num_visual_tokens
            if visual is None:
                visual = self._programs.room(self._engine.config.dtype, room * most, room, image)
            visual = self._programs.place(visual, image, np.int32(at * (most if isinstance(image, Memory) else 1)))
            at += len(one)
        return visual, starts

    def _of(self, key: str, one: EncodedImages) -> Visual:
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key][0]
        visual: Visual
        if isinstance(one, MemoryBank):
            one = one.with_room(self._engine.config.num_voco_tokens)
            visual, size = one.memory(), one.nbytes
        else:
            visual, size = self._programs.embeddings(one.features), one.features.nbytes
        self._kept[key] = visual, size
        self.nbytes += size
        while self.nbytes > self._most_bytes and len(self._kept) > 1:
            self.nbytes -= self._kept.popitem(last=False)[1][1]
        return visual


def _empty_row() -> Row:
    return Row(np.zeros(0, np.int64))


def _sampling_of(asks: Sequence[Ask]) -> SamplingState:
    how = [ask.sampling for ask in asks]
    return SamplingState(
        np.array([s.temperature for s in how], np.float32), np.array([s.top_k for s in how], np.int32),
        np.array([s.top_p for s in how], np.float32), np.array([s.seed for s in how], np.uint32),
        np.array([ask.stream for ask in asks], np.uint32),
    )  # fmt: skip
