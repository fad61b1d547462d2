"""Albums to memory files: pictures, folders, lists and videos, compressed in batches; what is interrupted goes on.

Beside the file that is made, `<file>.parts/` holds a small memory file for each batch that is done; at the end they
become the one file, which replaces the old one, and the directory goes. Whatever moment it is killed at, the same
command compresses what is missing, and nothing twice.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
import contextlib
import dataclasses
import errno
import functools
import glob
import hashlib
import os
from pathlib import Path
import re
from typing import NamedTuple, NoReturn, cast

import numpy as np
from tqdm import tqdm

from voco_jax.data.endings import PICTURES, VIDEOS, has_ending
from voco_jax.data.media import is_video
from voco_jax.data.records import MISSING, UNREADABLE_VIDEO, BadRecord, Clip, Picture
from voco_jax.data.sources.roots import local_path, open_file, state
from voco_jax.data.video import FrameSampling, probe, read_frames, sample_times
from voco_jax.errors import TryAgain, UserError, cannot
from voco_jax.infer.image_encoder import ImageEncoder
from voco_jax.infer.memory import Item, MemoryBank, PictureItems, pictures_of
from voco_jax.infer.memory_file import MemoryFile, write_memory, writing
from voco_jax.io.files import read_text
from voco_jax.io.paths import AnyPath, as_path, files_below, in_bucket, matching

LISTS = (".txt", ".list")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A file to compress. One that was `named` has to be readable; of those that were found, the others are told."""

    path: AnyPath
    named: bool

    @functools.cached_property
    def is_video(self) -> bool:
        return is_video(self.path)


class Loaded(NamedTuple):
    """A picture in the run's tiles, or a frame: an item and a square for each of its images (None: it is known)."""

    items: list[Item]
    squares: list[np.ndarray] | None


class Job(NamedTuple):
    """A picture, or some frames of a video: how many, of how many images each, and what loads them."""

    entry: Entry
    pictures: int
    tiles: int
    load: Callable[[], list[Loaded]]


@dataclasses.dataclass
class Outcome:
    """Numbers of pictures and frames: compressed, there already, unreadable, and replaced by newer ones."""

    new: int = 0
    known: int = 0
    skipped: int = 0
    dropped: int = 0


def find_entries(arguments: Sequence[str]) -> list[Entry]:
    """Files of what is named: a picture, a video, a directory (with all below it), a pattern with `*`, or a list (a
    `.txt` with a path a line). In their order, each once. UserError where there is nothing."""
    found: dict[AnyPath, Entry] = {}
    for argument in arguments:
        path = as_path(local_path(argument))
        if path.is_dir():
            entries = [Entry(file, False) for file in files_below(path) if _is_known(file)]
        elif not in_bucket(path) and not path.exists() and glob.has_magic(argument):
            entries = [Entry(file, False) for file in matching(path)]
            entries = [entry for entry in entries if _is_known(entry.path)]
        elif path.suffix.lower() in LISTS:
            entries = [Entry(as_path(line), True) for line in _lines(path)]
        else:
            entries = [Entry(path, True)]
        if not entries:
            raise UserError(f"{argument}: expected pictures or videos, found none")
        for entry in entries:
            if entry.named and not entry.path.is_file():
                raise BadRecord(MISSING, f"{entry.path}: not found")
            found.setdefault(entry.path, entry)
    return list(found.values())


def compress_to_file(
    images: ImageEncoder,
    entries: Sequence[Entry],
    out: Path,
    *,
    tokens: int | None = None,
    int8: bool = False,
    sampling: FrameSampling | None = None,
    batch_size: int = 32,
    threads: int = 4,
    log: Callable[[str], None] = print,
    incomplete: bool = False,
) -> Outcome:
    """Compress what the file `out` does not hold yet, and add it. A picture of a run with tiles has a memory for each.

    An existing file keeps what it has, except pictures whose bytes have changed and videos of which other frames are
    asked for. It also decides the dtype and the `tokens` an image; a new file has all tokens, in the dtype of the
    computation, unless told otherwise. `incomplete`: of a video that is cut off, take the frames that are there.

    UserError for a file of another model, and for a picture that was named and cannot be read; what was done until
    then is kept. TryAgain where another process writes the file.
    """
    images.require_memories()
    try:
        Path(os.path.realpath(out)).parent.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: no path at all
        raise cannot(f"{out}: cannot be written", error) from None
    with writing(out, patience=0) as real, _parts(real) as directory:
        old = MemoryFile(real) if real.exists() else None
        parts = [_part(file) for file in sorted(directory.glob("*.voco"))]
        tokens, dtype = _form(images, [old, *parts], tokens, int8)
        have = {picture.identity for file in [old, *parts] if file is not None for picture in pictures_of(file.items)}
        sampling = sampling or images.sampling
        wanted = _Wanted(have, images, sampling, batch_size, incomplete)
        outcome = Outcome()
        jobs = wanted.jobs(entries)
        with tqdm(total=wanted.total, unit="picture", desc="compressing", mininterval=0.5) as bar:
            number = max((int(part.file.stem) + 1 for part in parts if part.file.stem.isdecimal()), default=0)
            for pictures, items, squares in _batches(jobs, batch_size, threads, outcome, bar, log):
                bank = cast(MemoryBank, images.encode_pixels(squares, items, batch_size)).first_tokens(tokens)
                file = directory / f"{number:06d}.voco"
                write_memory(file, [bank if dtype is None else bank.astype(dtype)])
                parts.append(_part(file))
                outcome.new, number = outcome.new + pictures, number + 1
                bar.update(pictures)
        if wanted.total and outcome.skipped == wanted.total:
            raise UserError(f"{out}: none of {wanted.total} pictures could be read")
        _write(real, old, parts, wanted, outcome)
    return outcome


def _part(file: Path) -> MemoryFile:
    """Without a descriptor: there may be thousands."""
    part = MemoryFile(file)
    part.close()
    return part


def _write(real: Path, old: MemoryFile | None, parts: list[MemoryFile], wanted: "_Wanted", outcome: Outcome) -> None:
    """The one file of the old one and the parts; untouched where nothing has changed."""
    taken: list[tuple[MemoryFile, list[int]]] = []
    seen: set = set()
    for file in [old, *parts]:
        if file is None:
            continue
        which: list[int] = []
        for picture in pictures_of(file.items):
            key, source = picture.identity, picture.items[0].source
            # The parts of a run that was killed when it had just made the file. In that itself all stay: what came from
            # Python as arrays has no names to be told apart by
            if file is not old and key in seen:
                continue
            if source in wanted.keys and key not in wanted.keys[source]:  # also one that lacks tiles
                outcome.dropped += file is old
                continue
            seen.add(key)
            which += range(len(file))[picture.places]
        taken.append((file, which))
    if old is None or outcome.dropped or any(which for file, which in taken if file is not old):
        write_memory(real, [(file, which) for file, which in taken if which])


class _Wanted:
    """What the entries come to: identities of pictures and frames by source, and the jobs that load them."""

    def __init__(self, have: set[bytes], images: ImageEncoder, sampling: FrameSampling, chunk: int, incomplete: bool):
        self._have, self._images, self._sampling, self._chunk = have, images, sampling, chunk
        self._incomplete = incomplete
        self.keys: dict[str, set] = {}
        self.total = 0

    def jobs(self, entries: Sequence[Entry]) -> list[Job]:
        """Of all entries, in their order."""
        jobs: list[Job] = []
        for entry in entries:
            if not entry.is_video:
                tiles = len(self._images.processor.tiles)
                jobs.append(Job(entry, 1, tiles, functools.partial(self._picture, entry)))
                continue
            try:
                jobs += self._frames(entry)
            except BadRecord as error:
                if entry.named:
                    raise
                jobs.append(Job(entry, 1, 1, functools.partial(_raise, error)))
        self.total = sum(job.pictures for job in jobs)
        return jobs

    def _picture(self, entry: Entry) -> list[Loaded]:
        with open_file(entry.path, whole=True) as stream:
            data = stream.read()
        picture, source = Picture(data=data, name=str(entry.path)), str(entry.path)
        items = self._images.items_of(picture, source, hashlib.sha256(data).hexdigest())
        key = PictureItems(0, tuple(items)).identity
        squares = None if key in self._have else self._images.processor.squares(picture)
        self.keys[source] = {key}  # only now: where it cannot be read the old one is not replaced
        return [Loaded(items, squares)]

    def _frames(self, entry: Entry) -> Iterator[Job]:
        clip, source = Clip(file=entry.path, incomplete=self._incomplete), str(entry.path)
        opened = state(entry.path)

        def check() -> None:
            # It is opened several times, hours apart: SHA-256, times and frames have to be of one clip
            if state(entry.path) != opened:
                message = f"{entry.path}: the clip was replaced or written into while it was read"
                raise TryAgain(message) if entry.named else BadRecord(UNREADABLE_VIDEO, message)

        times = sample_times(probe(clip), self._sampling)
        with open_file(entry.path) as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]  # no readinto in BinaryIO
        check()
        items = [Item(source, sha256, float(time)) for time in times]
        time_of = dict(zip(items, times.tolist(), strict=True))
        self.keys[source] = {item.identity for item in items}

        def load(some: list[Item]) -> list[Loaded]:
            new = [item for item in some if item.identity not in self._have]
            frames = read_frames(clip, [time_of[item] for item in new]) if new else []
            squares = {item: [self._images.processor.square(frame)] for item, frame in zip(new, frames, strict=True)}
            check()
            return [Loaded([item], squares.get(item)) for item in some]

        for start in range(0, len(items), self._chunk):
            some = items[start : start + self._chunk]
            yield Job(entry, len(some), 1, functools.partial(load, some))


def _batches(
    jobs: Sequence[Job], batch_size: int, threads: int, outcome: Outcome, bar: tqdm, log: Callable[[str], None]
) -> Iterator[tuple[int, list[Item], list[np.ndarray]]]:  # fmt: skip
    """How many new pictures, their items and squares: as many as `batch_size` images have room for (but one at least),
    with all their tiles. Loaded ahead by threads, in the jobs' order."""
    pictures, items, squares = 0, list[Item](), list[np.ndarray]()
    most = max((job.tiles for job in jobs), default=1)
    with ThreadPoolExecutor(threads) as pool:
        coming: deque[tuple[Job, Future]] = deque()
        waiting = iter(jobs)
        try:
            while True:
                # As many ahead as fill the next batch while one computes
                ahead = sum(job.pictures * job.tiles for job, _ in coming)
                while ahead < 2 * batch_size and (job := next(waiting, None)) is not None:
                    ahead += job.pictures * job.tiles
                    coming.append((job, pool.submit(job.load)))
                if not coming:
                    break
                job, future = coming.popleft()
                try:
                    loaded = future.result()
                except BadRecord as error:
                    if job.entry.named:
                        raise
                    outcome.skipped += job.pictures
                    bar.update(job.pictures)
                    log(f"left out: {error}")
                    continue
                for of_picture in loaded:
                    if of_picture.squares is None:
                        outcome.known += 1
                        bar.update(1)
                        continue
                    pictures += 1
                    items += of_picture.items
                    squares += of_picture.squares
                    if len(items) + most > batch_size:
                        yield pictures, items, squares
                        pictures, items, squares = 0, [], []
            if items:
                yield pictures, items, squares
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _form(
    images: ImageEncoder, files: Sequence[MemoryFile | None], tokens: int | None, int8: bool
) -> tuple[int | None, np.dtype | None]:  # fmt: skip
    """Tokens an image and dtype, as the files that are there have them, else as asked for (None: as computed)."""
    dtype = np.dtype(np.int8) if int8 else None
    for file in files:
        if file is None:
            continue
        file.check_model(images.fingerprint, images.memory_kind, "give another --out, or delete this file first")
        if tokens is not None and tokens != file.num_tokens:
            raise UserError(f"{file.file}: holds {file.num_tokens} tokens an image, expected the {tokens} asked for")
        if int8 and file.dtype != np.int8:
            raise UserError(f"{file.file}: holds {file.dtype.name}, expected the int8 asked for")
        tokens, dtype = file.num_tokens, file.dtype
    return tokens, dtype


# What is made in the directory of parts, by earlier versions too
_OF_PARTS = re.compile(r"\d{6,}\.voco|\.\d{6,}\.voco\.((\d+\.)?new|lock)|lock")


@contextlib.contextmanager
def _parts(real: Path) -> Iterator[Path]:
    """The directory of a locked file's parts; they go when all has gone well, and it with them where it is empty then.
    UserError where the path is something else, or other files lie there."""
    directory = Path(f"{real}.parts")
    try:
        directory.mkdir(exist_ok=True)
    except FileExistsError:
        raise UserError(f"{directory}: expected a directory, found a file") from None
    if directory.is_symlink():
        raise UserError(f"{directory}: expected a directory, found a link")
    for path in directory.iterdir():
        if not _OF_PARTS.fullmatch(path.name) or path.is_dir():
            found = f"found {path.name}; move it away, or choose another --out"
            raise UserError(f"{directory}: expected the parts of an interrupted compress and nothing else, {found}")
    try:
        yield directory
    except BaseException:
        if not any(directory.glob("*.voco")):
            _remove_parts(directory)
        raise
    _remove_parts(directory)


def _remove_parts(directory: Path) -> None:
    for path in list(directory.iterdir()):
        if _OF_PARTS.fullmatch(path.name):
            path.unlink()
    try:
        directory.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # others have put something there meanwhile
            raise


def _is_known(file: Path) -> bool:
    return has_ending(file, PICTURES + VIDEOS) and not file.name.startswith(".")


def _lines(file: Path) -> list[str]:
    try:
        lines = read_text(file).splitlines()
    except OSError as error:
        raise cannot(f"{file}: the list cannot be read", error) from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: expected a list of files, found no text") from None
    return [line.strip() for line in lines if line.strip()]


def _raise(error: Exception) -> NoReturn:
    raise error
