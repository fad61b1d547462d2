"""The server's memories, by the content that they were made of, in three levels: the devices, the host, and a directory
or a bucket that several servers may share (`store_directory.py`).

    store = MemoryStore(model.fingerprint, KEYS_AND_VALUES, directory="store")
    id = picture_id(square)
    if (memory := store.on_device(id)) is None:
        store.put(id, compress(square))
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
import contextlib
import os
import threading
import time
from typing import NamedTuple

import jax
import numpy as np

from voco_jax.errors import UserError
from voco_jax.infer.memory import MemoryBank, size_of
from voco_jax.models.voco import Memory
from voco_jax.serve.ids import is_id
from voco_jax.serve.lru import Lru
from voco_jax.serve.store_directory import Entry, Record, StoreDirectory

HOST_BYTES = 4 << 30
DEVICE_BYTES = 1 << 30
WAITING_BYTES = 256 << 20
KINDS = ("picture", "video", "album")
_LONGEST_NAME = 1000  # characters
_RETRY_AFTER = 10.0  # seconds
_LISTS, _LISTED_FOR = 4, 60.0  # lists whose next pages may be asked for, and seconds for which they may

Key = tuple[str, str]  # owner and id
OnDevice = Memory | jax.Array


def check_name(name: str) -> None:
    """UserError for a name that no memory can be given."""
    if is_id(name.lower()):
        raise UserError(f"name: expected another name than 64 hex digits, which are an id; found {name}")
    if len(name) > _LONGEST_NAME:
        raise UserError(f"name: expected at most {_LONGEST_NAME} characters, found {len(name)}")


class Usage(NamedTuple):
    """What a level holds."""

    memories: int
    bytes: int


class _Held(NamedTuple):
    """On the host. `record` is of what the directory does not have yet."""

    bank: MemoryBank
    record: Record | None


class MemoryStore:
    """Memories of one model (`model`: its fingerprint; `kind`: the kind of memory that it reads), for any threads.

    Each level drops what was used last the longest time ago. `host_bytes` are beside what waits to be written, which is
    never dropped: about `waiting_bytes`, after which `put` writes itself. `disk_bytes` limit the memory files of all
    models in `directory`; the host drops what another server has deleted there. Without a directory the host is all.

    `owner` is whose memories are meant; others' are as if they were not there. `on_event(level, what)` is called with
    "device", "host" or "disk" and "hit", "miss" or "evicted", and of "disk" also "written" and "error".

    Where the directory or the bucket refuses, `get` and `on_device` find nothing, and a line says why; what was to be
    written behind stays on the host, and is tried again. `find`, `delete`, `entries` and a durable `put` raise
    UserError then (TryAgain for an outage).
    """

    def __init__(
        self, model: str, kind: str, *, directory: str | os.PathLike | None = None, host_bytes: int = HOST_BYTES,
        device_bytes: int = DEVICE_BYTES, disk_bytes: int | None = None, waiting_bytes: int = WAITING_BYTES,
        on_event: Callable[[str, str], object] = lambda level, what: None,
    ):  # fmt: skip
        self._model, self._kind, self._event = model, kind, on_event
        self._disk = None if directory is None else StoreDirectory(directory, model, kind, disk_bytes)
        self._changed = threading.Condition()  # its lock is of all that follows
        self._host: Lru[Key, _Held] = Lru(host_bytes)
        self._devices: Lru[Key, OnDevice] = Lru(device_bytes)
        self._waiting: Lru[Key, None] = Lru(waiting_bytes)  # on the host, to be written
        self._busy: set[Key] = set()  # of which a thread writes or deletes the files
        self._lists: OrderedDict[str, tuple[float, list[str]]] = OrderedDict()  # by owner: when, and the ids
        self._deletions, self.errors = 0, 0
        self._retry: float | None = None  # when to try again what could not be written
        self._closing, self._untidy = False, self._disk is not None
        if self._disk is not None:
            threading.Thread(target=self._write_behind, args=(self._disk,), name="store", daemon=True).start()

    # ---- Reading ---------------------------------------------------------------------------------------------------

    def get(self, id: str, owner: str = "") -> MemoryBank | None:
        """A memory from the host, or from the directory, checked; None where there is none that can be read."""
        key = owner, id
        with self._changed:
            held = self._host.get(key)
        if held is not None and self._still_there(key, held):
            self._event("host", "hit")
            return held.bank
        self._event("host", "miss")
        if self._disk is None or not is_id(id):
            return None
        bank = self._disk.read(owner, id)
        self._event("disk", "miss" if bank is None else "hit")
        if bank is not None:
            with self._changed:
                if key not in self._host:  # where another thread may have put it, with a record
                    self._host.put(key, _Held(bank, None), bank.nbytes)
            self._trim()
        return bank

    def on_device(self, id: str, owner: str = "") -> OnDevice | None:
        """What the model reads of a memory (`MemoryBank.memory()`), on the devices; None as `get`."""
        key = owner, id
        with self._changed:
            arrays, held, deletions = self._devices.get(key), self._host.peek(key), self._deletions
        if arrays is not None and self._still_there(key, held):
            self._event("device", "hit")
            return arrays
        self._event("device", "miss")
        if (bank := self.get(id, owner)) is None:
            return None
        arrays = bank.memory()
        with self._changed:
            if self._deletions == deletions:  # else it may have been this one, and no directory says so
                self._devices.put(key, arrays, sum(array.nbytes for array in jax.tree.leaves(arrays)))
        self._trim()
        return arrays

    def find(self, name_or_id: str, owner: str = "") -> str | None:
        """The id of a memory, by its id; by the SHA-256 of the file that it was made of, or by a name that was given to
        it, and there the newest."""
        label = f"name:{name_or_id}"
        if is_id(id := name_or_id.lower()):
            key, label = (owner, id), f"file:{id}"
            with self._changed:
                held = self._host.peek(key)
            if (held is not None and held.record is not None) or (self._disk and self._disk.has(owner, id)):
                return id
        with self._changed:
            found = [(record.labels[label], record.id) for record in self._unwritten(owner) if label in record.labels]
        if self._disk is not None and (written := self._disk.find(owner, label)) is not None:
            found.append(written)
        return max(found)[1] if found else None

    def entries(self, owner: str = "", *, after: str = "", limit: int = 20) -> tuple[list[Entry], bool]:
        """A page of the list of memories, the newest first, and whether there are more. `after` is the id that the page
        before ended with; it may have been deleted since, if this store gave that page within the last minute.

        UserError for an `after` that is not known.
        """
        with self._changed:
            since, ids = self._lists.get(owner, (0.0, []))
        if not after or after not in ids or time.monotonic() - since > _LISTED_FOR:
            ids = self._list(owner)
            if after and after not in ids:
                raise UserError(f"after: expected the id of a memory, found {after[:100]!r}")
        found: list[Entry] = []
        for id in ids[ids.index(after) + 1 :] if after else ids:
            if (record := self._record(owner, id)) is not None:
                found.append(record.entry)
                if len(found) > limit:
                    break
        return found[:limit], len(found) > limit

    # ---- Writing ---------------------------------------------------------------------------------------------------

    def put(
        self, id: str, bank: MemoryBank, *, name: str = "", sha256: str = "", kind: str = "picture", owner: str = "",
        durable: bool = False,
    ) -> Entry:  # fmt: skip
        """Keep a memory; one that is there already gets the name, if one is given. `sha256`: of the file that it was
        made of, as the server has read it, to be found by.

        It is on the host at once. With a directory it is written behind; or, `durable`, before this returns, to stay
        also where the machine loses power. UserError where a durable one cannot be kept, for a name that nobody can be
        allowed (another's id or hash), and for another model's memory.
        """
        record = self._new_record(id, bank, name, sha256, kind)
        key, bank = (owner, id), _own(bank)
        with self._changed:
            if (before := self._host.peek(key)) is not None and before.record is not None:
                record = record.after(before.record)
            self._host.put(key, _Held(bank, record), bank.nbytes)
            if self._disk is not None:
                self._waiting.put(key, None, bank.nbytes)
                self._changed.notify_all()
            behind = self._waiting.bytes > self._waiting.limit or self._closing
        self._trim()
        if self._disk is not None and durable:
            record = self._write(self._disk, key, bank, record, durable=True)
        elif self._disk is not None and behind:
            self._try_to_write(self._disk, key)
        return record.entry

    def delete(self, id: str, owner: str = "") -> bool:
        """Delete a memory at all levels; whether it was there."""
        key = owner, id
        if not is_id(id):
            return False
        with self._alone(key):
            there = self._disk is not None and self._disk.delete(owner, id)
            with self._changed:
                held = self._host.pop(key)
                self._devices.pop(key)
                self._waiting.pop(key)
                self._deletions += 1
                self._changed.notify_all()
        return there or (held is not None and held.record is not None)

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until all is written and the directory has been brought to its limit; whether all is, within `timeout`
        seconds."""
        with self._changed:
            if self._retry is not None and not self._closing:
                self._retry = 0.0
                self._changed.notify_all()
            idle = self._changed.wait_for(lambda: not self._waiting and not self._untidy and not self._retries, timeout)
            return idle and (self._disk is None or all(held.record is None for _, held in self._host.items()))

    def close(self, timeout: float | None = None) -> bool:
        """`flush`, and write nothing behind any more: a later `put` writes before it returns."""
        done = self.flush(timeout)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        return done

    # ---- For /metrics ----------------------------------------------------------------------------------------------

    def usage(self) -> dict[str, Usage]:
        """By level: "device", "host", "waiting" (of the host, what is to be written), and "disk": of all models in the
        directory, as far as this process knows."""
        with self._changed:
            levels: dict[str, Lru] = {"device": self._devices, "host": self._host, "waiting": self._waiting}
            usage = {level: Usage(len(lru), lru.bytes) for level, lru in levels.items()}
        return usage | {"disk": Usage(0, 0) if self._disk is None else Usage(self._disk.count, self._disk.bytes)}

    # ---- Inside ----------------------------------------------------------------------------------------------------

    def _new_record(self, id: str, bank: MemoryBank, name: str, sha256: str, kind: str) -> Record:
        if not is_id(id) or kind not in KINDS or (sha256 and not is_id(sha256)):
            raise ValueError(f"expected an id, a kind of {KINDS} and a SHA-256; found {id!r}, {kind!r}, {sha256!r}")
        check_name(name)
        for what, expected, found in (("model", self._model, bank.model), ("kind", self._kind, bank.kind)):
            if expected != found:
                raise UserError(f"memory: expected {what} {expected}, found {found}; compress the pictures again")
        if self._disk is None and bank.nbytes > self._host.limit:
            raise UserError(
                f"memory: expected at most {size_of(self._host.limit)}, which the host keeps; "
                f"found {size_of(bank.nbytes)}"
            )
        now = time.time_ns()
        labels = {f"{what}:{text}": now for what, text in (("file", sha256), ("name", name)) if text}
        return Record(id, kind, now, bank.nbytes, len(bank), bank.num_tokens, labels)

    def _still_there(self, key: Key, held: _Held | None) -> bool:
        """Whether what the host or a device has is still in the directory, if it has been; else they drop it."""
        if self._disk is None or (held is not None and held.record is not None) or self._disk.touch(*key):
            return True
        with self._changed:
            self._devices.pop(key)
            if (held := self._host.peek(key)) is not None and held.record is None:
                self._host.pop(key)
        return False

    def _trim(self) -> None:
        with self._changed:
            host = self._host.trim(self._waiting, self._waiting.bytes)
            devices = self._devices.trim()
        for level, dropped in (("host", host), ("device", devices)):
            for _ in dropped:
                self._event(level, "evicted")

    def _unwritten(self, owner: str) -> Iterator[Record]:
        return (held.record for key, held in self._host.items() if held.record is not None and key[0] == owner)

    def _list(self, owner: str) -> list[str]:
        """Ids, the newest first; they are kept for the next pages."""
        with self._changed:
            made = {record.id: record.made for record in self._unwritten(owner)}
        if self._disk is not None:
            made |= {id: made for made, id in self._disk.ids(owner)}
        ids = sorted(made, key=lambda id: (made[id], id), reverse=True)
        with self._changed:
            self._lists.pop(owner, None)
            self._lists[owner] = time.monotonic(), ids
            if len(self._lists) > _LISTS:
                self._lists.popitem(last=False)
        return ids

    def _record(self, owner: str, id: str) -> Record | None:
        with self._changed:
            held = self._host.peek((owner, id))
        if held is not None and held.record is not None:
            return held.record
        return None if self._disk is None else self._disk.record(owner, id)

    # ---- Writing behind --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _alone(self, key: Key) -> Iterator[None]:
        """No other thread writes or deletes a memory's files within this block."""
        with self._changed:
            self._changed.wait_for(lambda: key not in self._busy)
            self._busy.add(key)
        try:
            yield
        finally:
            with self._changed:
                self._busy.remove(key)
                self._changed.notify_all()

    def _write(
        self, disk: StoreDirectory, key: Key, bank: MemoryBank, record: Record, durable: bool = False
    ) -> Record:  # fmt: skip
        with self._alone(key):
            with self._changed:
                held = self._host.peek(key)
            if held is not None and held.record is not None:
                bank, record = held.bank, held.record  # another thread may have given it more names
            elif not durable:
                return record  # another thread has written or deleted it
            try:
                record = disk.write(key[0], record, bank, durable)
            except Exception:
                self._wrote(disk, key, held, "error")
                raise
            self._wrote(disk, key, held, "written")
        return record

    def _wrote(self, disk: StoreDirectory, key: Key, written: _Held | None, what: str) -> None:
        with self._changed:
            if what == "error":
                self.errors += 1
                self._retry = time.monotonic() + _RETRY_AFTER
            if (held := self._host.peek(key)) is not None and held is written:  # else it has a new name meanwhile
                self._waiting.pop(key)
                if what == "written":
                    self._host.change(key, _Held(held.bank, None))
            self._untidy = self._untidy or disk.is_due
            self._changed.notify_all()
        self._trim()
        self._event("disk", what)

    def _try_to_write(self, disk: StoreDirectory, key: Key) -> None:
        """Behind: nobody waits for it, and what the directory refuses stays on the host."""
        with self._changed:
            held = self._host.peek(key)
            if held is None or held.record is None:
                self._waiting.pop(key)
                return
        try:
            self._write(disk, key, held.bank, held.record)
        except Exception as error:  # of whatever kind: the server goes on
            disk.log("write", f"{error}; the memory stays on the host ({self.errors} times so far)")

    @property
    def _retries(self) -> bool:
        return self._retry is not None and self._retry <= time.monotonic()

    def _write_behind(self, disk: StoreDirectory) -> None:
        """The thread that writes."""
        while True:
            with self._changed:
                while not (self._waiting or self._untidy or self._retries or self._closing):
                    self._changed.wait(None if self._retry is None else self._retry - time.monotonic())
                if self._retries:
                    self._queue_again()
                untidy, key = self._untidy, next(iter(self._waiting), None)
            if untidy:
                self._tidy(disk)
            elif key is not None:
                self._try_to_write(disk, key)
            elif self._closing:
                return

    def _queue_again(self) -> None:
        """What could not be written; where it is more than may wait, the rest when these are written."""
        self._retry = None
        for key, held in self._host.items():
            if held.record is not None and key not in self._waiting:
                if self._waiting.bytes >= self._waiting.limit:
                    self._retry = 0.0
                    break
                self._waiting.put(key, None, held.bank.nbytes)
        self._changed.notify_all()

    def _tidy(self, disk: StoreDirectory) -> None:
        try:
            disk.tidy(lambda: self._event("disk", "evicted"))
        except Exception as error:  # of whatever kind: it will be tried again
            disk.log("tidy", str(error))
        with self._changed:
            self._untidy = False
            self._changed.notify_all()


def _own(bank: MemoryBank) -> MemoryBank:
    """In arrays that keep no larger ones in memory which they were cut out of."""
    arrays = [*bank.arrays.values(), *(bank.scales or {}).values()]
    bases = [array.base for array in arrays]
    cut = any(isinstance(base, np.ndarray) and base.nbytes > a.nbytes for a, base in zip(arrays, bases, strict=True))
    return bank.copy() if cut else bank
