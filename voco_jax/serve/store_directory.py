"""Memories in a directory or a bucket, which any number of servers read and write at once.

    DIR/<model>/<space>/memories/<2 hex>/<id>.voco   a memory file: whole or not there, and never of other content
    DIR/<model>/<space>/memories/<2 hex>/<id>.json   its record: what it may be asked for by, what it holds
    DIR/<model>/<space>/names/<2 hex>/<hash>/<id>    empty: this memory has the label of this hash; the newest counts

A space is what one owner sees, a model its fingerprint. Owners and labels stand in paths as SHA-256 alone. A memory is
there when its memory file is, which is written last and deleted first. Of this file the time of change says when the
memory was made, and the access time when it was last used; a bucket has only the first. There are no locks: no file is
written into, and who writes a memory that is there already writes the same.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import hashlib
import json
import os
from pathlib import Path
import re
import tempfile
import threading
import time
from typing import NamedTuple

from etils import epath

from voco_jax.errors import TryAgain, UserError, cannot
from voco_jax.infer.memory import MemoryBank, pictures_of
from voco_jax.infer.memory_file import SUFFIX, DamagedMemory, MemoryFile, load_memory, write_parts
from voco_jax.io.atomic import open_for_writing, replacing, sync, write_text
from voco_jax.io.json_files import read_object
from voco_jax.io.paths import AnyPath, as_path, bucket_errors, exists, in_bucket, listed_below
from voco_jax.terminal import log

MOST_LABELS = 8  # of a memory, and memories that a label remembers: the newest
LEFT_AFTER = 3600.0  # seconds after which what a writer has not finished is a killed one's
KNOWN_FOR = 10.0  # seconds for which a bucket is not asked again whether a memory is there
_ASIDE = ".damaged"
_RECORD_BYTES = 1 << 18
_MODEL = re.compile("[0-9A-Za-z_-]{1,64}")
_ID = "[0-9a-f]{64}"
_MEMORY = re.compile(rf"[^/]+/[^/]+/memories/[0-9a-f]{{2}}/{_ID}({SUFFIX}|{_ASIDE}|\.json)")
_TEMPORARY = re.compile(rf"[^/]+/[^/]+/(memories|names)/.*/\.{_ID}[.a-z]*\.[0-9a-f]{{8}}\.new")


class Entry(NamedTuple):
    """What a list says of a memory. created: seconds since 1970; bytes: of its arrays; tokens: of each image."""

    id: str
    name: str
    kind: str  # "picture", "video" or "album"
    created: int
    bytes: int
    images: int
    tokens: int


@dataclasses.dataclass(frozen=True)
class Record:
    """What is kept of a memory beside it. made: nanoseconds since 1970; labels: what it may be asked for by, and since
    when, the newest last."""

    id: str
    kind: str
    made: int
    bytes: int
    images: int
    tokens: int
    labels: dict[str, int]

    def after(self, earlier: "Record") -> "Record":
        """This one, with the labels of an earlier one of the same memory."""
        by_time = sorted((earlier.labels | self.labels).items(), key=lambda label: label[1])
        return dataclasses.replace(self, labels=dict(by_time[-MOST_LABELS:]))

    @property
    def entry(self) -> Entry:
        names = [label.removeprefix("name:") for label in self.labels if label.startswith("name:")]
        created = self.made // 10**9
        return Entry(self.id, names[-1] if names else "", self.kind, created, self.bytes, self.images, self.tokens)


class StoreDirectory:
    """The memories of one model. `limit` is for the bytes of all models' memory files in the directory; `bytes` and
    `count` are what was there when it was last looked through, and what this process has done since.

    UserError where the directory cannot be made, and where it refuses, except of `read` and `touch`: a memory that
    cannot be read is not there, and a line says why.
    """

    def __init__(self, directory: str | os.PathLike, model: str, kind: str, limit: int | None):
        if not _MODEL.fullmatch(model):
            raise ValueError(f"model: expected a fingerprint, found {model!r}")
        self._root: AnyPath = as_path(os.fspath(directory))
        self._model, self._kind, self._limit = model, kind, limit
        self._bucket = in_bucket(self._root)
        self._lock = threading.Lock()
        self._turns = [threading.RLock() for _ in range(1024)]  # of the threads that write or delete, by file
        self.bytes = self.count = self._since = 0
        self._seen: dict[AnyPath, float] = {}  # memories of a bucket that were there, and when
        self._synced: set[AnyPath] = set()  # directories
        self._logged: dict[str, float] = {}
        if not self._bucket:
            try:
                Path(self._root).mkdir(parents=True, exist_ok=True)
                self._root = Path(self._root).resolve(strict=True)
            except OSError as error:
                raise cannot(f"{directory}: the directory of the store cannot be made", error) from None

    # ---- Reading ---------------------------------------------------------------------------------------------------

    def read(self, owner: str, id: str) -> MemoryBank | None:
        """A memory, checked against its checksums; it is the one that was used last then."""
        file = self._file(owner, id)
        try:
            with _errors(file, "cannot be read"):
                bank = self._load(file)
        except UserError as error:
            if self._is_there(file, unknown=True):  # it was not deleted meanwhile
                self.log(str(file), str(error))
            return None
        if bank is None or self._bucket:
            self._saw(file, bank is not None)
        else:
            self.touch(owner, id)
        return bank

    def touch(self, owner: str, id: str) -> bool:
        """Whether a memory is there, or nothing says that it is gone; it is the one that was used last then."""
        file = self._file(owner, id)
        if self._bucket and time.monotonic() - self._seen.get(file, -KNOWN_FOR) < KNOWN_FOR:
            return True
        there = self._is_there(file, unknown=True)
        if there and not self._bucket:
            with contextlib.suppress(OSError):  # another user's file, or read-only: it grows old
                os.utime(file, ns=(time.time_ns(), os.lstat(file).st_mtime_ns), follow_symlinks=False)
        self._saw(file, there)
        return there

    def has(self, owner: str, id: str) -> bool:
        with _errors(self._root, "cannot be read"):
            return self._is_there(self._file(owner, id))

    def find(self, owner: str, label: str) -> tuple[int, str] | None:
        """The newest memory that has a label: since when, and its id."""
        with _errors(self._root, "cannot be read"):
            newest_first = self._labelled(self._names(owner, label))
            return next((found for found in newest_first if self._is_there(self._file(owner, found[1]))), None)

    def ids(self, owner: str) -> list[tuple[int, str]]:
        """(made, id) of all memories, the newest first."""
        found = []
        with _errors(self._root, "cannot be listed"):
            for file in listed_below(self._space(owner) / "memories", SUFFIX):
                if match := re.fullmatch(rf"../({_ID}){SUFFIX}", file.path):
                    found.append((file.made, match[1]))
        return sorted(found, reverse=True)

    def record(self, owner: str, id: str) -> Record | None:
        """Of a memory that is there; made from its memory file where it has none that can be read."""
        file = self._file(owner, id)
        if not self.has(owner, id):
            return None
        if (record := _read_record(file, id)) is not None:
            return record
        if (bank := self.read(owner, id)) is None:
            return None
        album = len([*pictures_of(bank.items)]) > 1
        try:
            made = 0 if self._bucket else os.stat(file).st_mtime_ns
        except FileNotFoundError:
            return None
        kind = "video" if bank.is_video else "album" if album else "picture"
        return Record(id, kind, made, bank.nbytes, len(bank), bank.num_tokens, {})

    # ---- Writing ---------------------------------------------------------------------------------------------------

    def write(self, owner: str, record: Record, bank: MemoryBank, durable: bool) -> Record:
        """Keep a memory, or give more labels to one that is there; the record that it has then. `durable`: what was
        there is checked first, and all of it is there after a loss of power too."""
        id, file = record.id, self._file(owner, record.id)
        with self._turn(file), _errors(file, "cannot be written"):
            there = self._is_there(file) and self.touch(owner, id)
            there = there and not (durable and self.read(owner, id) is None)
            if (old := _read_record(file, id)) is not None:
                if there and not durable and not record.labels:
                    return old
                record = dataclasses.replace(record.after(old), made=old.made if there else record.made)
            try:
                self._make(file.parent, durable)
                text = json.dumps(dataclasses.asdict(record))
                write_text(file.with_suffix(".json"), text, shared=True, synced=durable)
                self._label(owner, record, old, durable)
                if not there:
                    self._write(file, record, bank, durable)
                elif durable and not self._bucket:
                    try:
                        sync(Path(file))
                    except FileNotFoundError:  # deleted meanwhile, by another server or for the limit
                        return self.write(owner, record, bank, durable)
            except BaseException:
                with contextlib.suppress(OSError, UserError), bucket_errors(file):  # the first error is told
                    if not exists(file):
                        self._forget(file)
                raise
        return record

    def delete(self, owner: str, id: str) -> bool:
        """Whether it was there."""
        file = self._file(owner, id)
        with self._turn(file), _errors(file, "cannot be deleted"):
            return self._is_there(file) and self._remove(file)

    def log(self, about: str, line: str) -> None:
        """A line on standard error, once a minute about the same."""
        with self._lock:
            if (now := time.monotonic()) - self._logged.get(about, -60.0) < 60:
                return
            if len(self._logged) > 1000:
                self._logged.clear()
            self._logged[about] = now
        log(f"store: {line}")

    # ---- The limit -------------------------------------------------------------------------------------------------

    @property
    def is_due(self) -> bool:
        """Whether it is time for `tidy`. Other servers write too: after a sixteenth of the limit it is looked again."""
        return self._limit is not None and self._since > 0 and max(self.bytes, 16 * self._since) > self._limit

    def tidy(self, evicted: Callable[[], object]) -> None:
        """Look through the directory: count, delete what killed writers have left, and where there is more than the
        limit, delete those memories that were last used the longest time ago."""
        with self._lock:
            self._since = 0
        memories, beside, before, refused = [], set(), time.time_ns() - LEFT_AFTER * 10**9, []

        @contextlib.contextmanager
        def trying():
            try:
                with bucket_errors(self._root):
                    yield
            except FileNotFoundError:
                pass  # another server was first
            except (OSError, UserError) as error:
                refused.append(error)

        with _errors(self._root, "cannot be tidied"):
            for found in listed_below(self._root):
                kind = _MEMORY.fullmatch(found.path)
                if kind and kind[1] != ".json":
                    memories.append((found.used, found.size, found.path))
                elif kind and found.made < before:
                    beside.add(found.path.removesuffix(".json"))
                elif found.made < before and _TEMPORARY.fullmatch(found.path):
                    with trying():
                        (self._root / found.path).unlink()
            for path in beside.difference(path.rpartition(".")[0] for _, _, path in memories):
                with self._turn(file := self._root / f"{path}{SUFFIX}"), trying():
                    self._forget(file)
            with self._lock:
                self.bytes, self.count = sum(size for _, size, _ in memories), len(memories)
            limit = self.bytes if self._limit is None else self._limit
            wanted = (
                limit - limit // 16 if self.bytes > limit else limit
            )  # some room, or the next one would do it again
            for used, size, path in sorted(memories):
                if self.bytes <= wanted:
                    break
                file = self._root / path
                with self._turn(file), trying():
                    if (self._bucket or os.lstat(file).st_atime_ns <= used) and self._remove(file, size):
                        evicted()
            if refused:
                raise refused[0]

    def _add(self, size: int, count: int) -> None:
        with self._lock:
            self.bytes += size
            self.count += count
            self._since += max(0, size)

    # ---- Paths -----------------------------------------------------------------------------------------------------

    def _space(self, owner: str) -> AnyPath:
        return self._root / self._model / (_hash(owner) if owner else "shared")

    def _file(self, owner: str, id: str) -> AnyPath:
        return self._space(owner) / "memories" / id[:2] / f"{id}{SUFFIX}"

    def _names(self, owner: str, label: str) -> AnyPath:
        return _names(self._space(owner), label)

    def _turn(self, file: AnyPath) -> threading.RLock:
        """Held while a memory and what stands beside it are written or deleted, so that the one is with the other."""
        return self._turns[hash(file) % len(self._turns)]

    def _is_own(self, path: AnyPath) -> bool:
        """Whether no link is on the way."""
        return self._bucket or os.path.realpath(path) == str(path)

    def _is_there(self, file: AnyPath, unknown: bool | None = None) -> bool:
        """`unknown`: what to say where that cannot be known; None: raise the error."""
        try:
            with bucket_errors(file):
                return exists(file) and self._is_own(file)
        except (OSError, UserError):
            if unknown is None:
                raise
            return unknown

    def _make(self, directory: AnyPath, durable: bool) -> None:
        """A directory, where it is missing; `durable`: it is there after a loss of power too."""
        if self._bucket or directory == self._root:
            return
        if not self._is_own(directory):
            raise UserError(f"{directory}: expected a directory, found a link")
        if not os.path.isdir(directory) or (durable and directory not in self._synced):
            self._make(directory.parent, durable)
            directory.mkdir(exist_ok=True)
            if durable:
                sync(Path(directory.parent))
                self._synced.add(directory)

    # ---- Files -----------------------------------------------------------------------------------------------------

    def _load(self, file: AnyPath) -> MemoryBank | None:
        """A memory; None where it is not there, or damaged, and put aside then."""
        with contextlib.ExitStack() as stack:
            here = file
            try:
                if self._bucket:
                    copy = stack.enter_context(tempfile.NamedTemporaryFile(prefix="voco-"))
                    copy.write(file.read_bytes())
                    copy.flush()
                    here = Path(copy.name)
                elif not self._is_there(file):
                    return None
                return load_memory(here, self._model, kind=self._kind)
            except FileNotFoundError:
                return None
            except DamagedMemory as error:
                self.log(str(file), f"{str(error).replace(str(here), str(file))}; it goes aside as {_ASIDE}")
                self._put_aside(file)
                return None

    def _put_aside(self, file: AnyPath) -> None:
        aside = file.with_suffix(_ASIDE)
        if self._bucket:
            aside.write_bytes(file.read_bytes())
            file.unlink(missing_ok=True)
            return
        os.replace(file, aside)
        with contextlib.suppress(DamagedMemory):
            MemoryFile(aside).read()
            os.replace(aside, file)  # another server had put a whole one there meanwhile

    def _write(self, file: AnyPath, record: Record, bank: MemoryBank, durable: bool) -> None:
        with open_for_writing(file, shared=True, synced=durable) as stream:
            write_parts(stream, [bank])
            stream.flush()
            os.utime(stream.fileno(), ns=(time.time_ns(), record.made))
            size = stream.seek(0, os.SEEK_END)
        self._add(size, 1)
        self._saw(file, True)

    def _label(self, owner: str, record: Record, old: Record | None, durable: bool) -> None:
        """Write its labels, where they are not those of the `old` record."""
        before = {} if old is None else old.labels
        for label in before.keys() - record.labels.keys():  # more than it may have
            _unlabel(self._names(owner, label), record.id)
        for label, since in record.labels.items():
            if not durable and before.get(label) == since:
                continue
            names = self._names(owner, label)
            for again in (True, True, False):
                try:
                    self._make(names, durable)
                    with replacing(names / record.id, shared=True, synced=durable) as temporary:
                        temporary.touch()
                        os.utime(temporary, ns=(since, since))
                    break
                except FileNotFoundError:  # who deleted the last in a directory deleted it too
                    if not again:
                        raise
            for _, id in self._labelled(names)[MOST_LABELS:]:
                _unlabel(names, id)

    def _labelled(self, names: AnyPath) -> list[tuple[int, str]]:
        """Memories, there or not, that have a label, the newest first: since when, and their ids."""
        if not self._is_own(names):
            return []
        return sorted(((f.made, f.path) for f in listed_below(names) if re.fullmatch(_ID, f.path)), reverse=True)

    def _remove(self, file: AnyPath, size: int | None = None) -> bool:
        """Delete a memory with what stands beside it; whether it was there."""
        try:
            if size is None:
                size = epath.Path(file).stat().length if self._bucket else os.lstat(file).st_size
            file.unlink()
        except (FileNotFoundError, NotADirectoryError):
            return False
        self._saw(file, False)
        self._add(-size, -1)
        if file.suffix == SUFFIX or not exists(file.with_suffix(SUFFIX)):
            self._forget(file)
        return True

    def _forget(self, file: AnyPath) -> None:
        """Delete the record and the labels of a memory that is not there."""
        id = file.name.partition(".")[0]
        record = _read_record(file, id)
        for label in () if record is None else record.labels:
            _unlabel(_names(file.parent.parent.parent, label), id)
        file.with_suffix(".json").unlink(missing_ok=True)

    def _saw(self, file: AnyPath, there: bool) -> None:
        """In a bucket, which takes long to say it."""
        with self._lock:
            self._seen.pop(file, None)
            if there and self._bucket:
                if len(self._seen) > 100_000:
                    self._seen.clear()
                self._seen[file] = time.monotonic()


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _names(space: AnyPath, label: str) -> AnyPath:
    """The directory of a label."""
    hashed = _hash(label)
    return space / "names" / hashed[:2] / hashed


def _unlabel(names: AnyPath, id: str) -> None:
    """Take a label, and its directory with the last that has it, from a memory."""
    (names / id).unlink(missing_ok=True)
    if not in_bucket(names):
        with contextlib.suppress(OSError):  # others have it too
            os.rmdir(names)


def _read_record(file: AnyPath, id: str) -> Record | None:
    """The record beside a memory file; None where there is none that can be read. TryAgain of an outage."""
    try:
        record = Record(**read_object(file.with_suffix(".json"), most=_RECORD_BYTES))
        numbers = (record.made, record.bytes, record.images, record.tokens, *record.labels.values())
    except TryAgain:
        raise
    except (UserError, TypeError, AttributeError):
        return None
    whole = all(type(number) is int for number in numbers) and isinstance(record.kind, str) and record.id == id
    return record if whole else None


@contextlib.contextmanager
def _errors(path: AnyPath, what: str) -> Iterator[None]:
    """UserError for what a disk or a bucket refuses."""
    try:
        with bucket_errors(path):
            yield
    except OSError as error:
        raise cannot(f"{path}: {what}", error) from error
