"""What a model keeps of images, cached by their content: a benchmark asks about the same images many times.

Images are told apart by what the model is given of them (the pixels of the square), whether they come as files, PIL
images or a video's frames. The newest are kept on the host, up to a limit, and all of them on disk where a directory is
given: memory files, good for the model that made them alone.
"""

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
import dataclasses
import hashlib
import itertools
import os
from pathlib import Path
import warnings

import numpy as np

from voco_jax.data.images import PictureLike
from voco_jax.data.records import BadRecord, Clip, Encoded, Frames, Picture
from voco_jax.data.video import FrameSampling
from voco_jax.errors import UserError
from voco_jax.infer.image_encoder import ImageEncoder
from voco_jax.infer.memory import Embeddings, EncodedImages, Item, MemoryBank, check_tokens, join, join_images
from voco_jax.infer.memory_file import SUFFIX, MemoryFile, save_memory

HOST_BYTES = 4 << 30
_VIDEO = (Clip, Frames)
_VIDEOS_AHEAD = 4  # that are decoded together
_LEAST_NEW = 32  # memories that are worth a file of their own; fewer wait for others

Medium = PictureLike | Clip | Frames  # a picture, or a video's frames


@dataclasses.dataclass(frozen=True)
class _Found:
    """The images of a picture or video: their keys, and what is said of each."""

    keys: list[str]
    items: list[Item]


class ImageCache:
    """Encoded images by their content; `directory` is for memories, not embeddings.

    `tokens` of each are read, of the K that are kept. Pictures are looked at in the tiles of the run's processor; where
    not `in_tiles`, they are such tiles already, or frames. `compressed` counts images that the model has been given.
    """

    def __init__(
        self, images: ImageEncoder, *, tokens: int | None = None, sampling: FrameSampling | None = None,
        host_bytes: int = HOST_BYTES, directory: str | os.PathLike | None = None, batch_size: int = 32,
        in_tiles: bool = True,
    ):  # fmt: skip
        if not (c := images.engine.config).has_compress_stream:
            for name, value in (("tokens", tokens), ("cache", directory)):
                if value is not None:
                    expected = f"has no memories (compressor {c.compressor!r}): expected none, found {value}"
                    raise UserError(f"{name}: {images.name} {expected}")
        check_tokens("tokens", tokens, images.num_voco_tokens)
        self.images, self.compressed = images, 0
        self._tokens, self._sampling, self._in_tiles = tokens, sampling or images.sampling, in_tiles
        self._host_bytes, self._batch_size = host_bytes, batch_size
        self._kept: OrderedDict[str, EncodedImages] = OrderedDict()  # one image each, the oldest first
        self._kept_bytes = 0
        self._files: dict[tuple, _Found] = {}  # by path, size and time of change
        self._directory = None if directory is None else _Directory(Path(directory), images.fingerprint)

    def encode(self, media: Sequence[Sequence[Medium]]) -> list[EncodedImages | BadRecord | None]:
        """The encoded images of each question's pictures and videos, in their order; None for a question without any.

        Questions about the same have the same object; BadRecord for those about what cannot be read.
        """
        at_hand: dict[str, EncodedImages] = {}  # of these questions: the limit does not touch them
        found = self._encode(media, at_hand)
        together: dict[tuple, EncodedImages] = {}
        given: list[EncodedImages | BadRecord | None] = []
        for of_question in media:
            all_found = [found[_identity(medium)] for medium in of_question]
            errors = [one for one in all_found if isinstance(one, BadRecord)]
            if errors:
                given.append(errors[0])
                continue
            read = [one for one in all_found if isinstance(one, _Found)]
            keys = [key for one in read for key in one.keys]
            items = tuple(item for one in read for item in one.items)
            if keys and (*keys, items) not in together:
                together[*keys, items] = self._joined([at_hand[key] for key in keys], items)
            given.append(together.get((*keys, items)))
        return given

    def close(self) -> None:
        """Write what has not been written yet."""
        if self._directory is not None:
            self._directory.flush()

    # ---- Encoding ----------------------------------------------------------------------------------------------

    def _encode(
        self, media: Sequence[Sequence[Medium]], at_hand: dict[str, EncodedImages]
    ) -> dict[tuple, _Found | BadRecord]:  # fmt: skip
        """What each picture or video is, by its identity; its images are at hand then. Threads decode while nothing
        computes."""
        distinct = {_identity(medium): medium for of_question in media for medium in of_question}
        found: dict[tuple, _Found | BadRecord] = {}
        new: dict[str, np.ndarray] = {}
        waiting = list(distinct)
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            while waiting:
                # No more at once than memory has room for: a video may be hundreds of frames
                is_video, alike = next(
                    itertools.groupby(waiting, lambda identity: isinstance(distinct[identity], _VIDEO))
                )
                together = list(itertools.islice(alike, _VIDEOS_AHEAD if is_video else 2 * self._batch_size))
                waiting = waiting[len(together) :]
                read = pool.map(self._try_to_read, [distinct[identity] for identity in together])
                for identity, (one, squares) in zip(together, read, strict=True):
                    found[identity] = one
                    for key in one.keys if isinstance(one, _Found) else ():
                        if key in at_hand or key in new or self._fetch(key, at_hand):
                            continue
                        if key not in squares:  # it was kept when the file was known again, and is no longer
                            _, squares = self._read(distinct[identity], anew=True)
                        new[key] = squares[key]
                self._compress(new, at_hand, len(new) - len(new) % self._batch_size)
        self._compress(new, at_hand, len(new))
        return found

    def _try_to_read(self, medium: Medium) -> tuple[_Found | BadRecord, dict[str, np.ndarray]]:
        try:
            return self._read(medium)
        except BadRecord as error:
            return error, {}

    def _read(self, medium: Medium, anew: bool = False) -> tuple[_Found, dict[str, np.ndarray]]:
        """Its images, and their squares by key; none where a file is known and what is in it kept."""
        file = medium.file if isinstance(medium, Encoded) else medium if isinstance(medium, str | os.PathLike) else None
        stamp = None if file is None else _stamp(file)
        if stamp is not None and isinstance(medium, Picture):
            stamp = (*stamp, medium.tile)
        if not anew and stamp in self._files and all(map(self._has, self._files[stamp].keys)):
            return self._files[stamp], {}
        if isinstance(medium, _VIDEO):
            times, frames = self.images.frames(medium, self._sampling, self._batch_size)
            squares = list(frames)
            items = [Item(str(medium), time=float(time)) for time in times]
        elif self._in_tiles:
            squares = self.images.processor.squares(medium)
            items = self.images.items_of(medium, "" if file is None else str(file))
        else:
            squares, items = [self.images.square(medium)], [Item("" if file is None else str(file))]
        keys = [hashlib.sha256(np.ascontiguousarray(square).data).hexdigest() for square in squares]
        found = _Found(keys, items)
        if stamp is not None:
            self._files[stamp] = found
        return found, dict(zip(keys, squares, strict=True))

    # ---- Keeping -----------------------------------------------------------------------------------------------

    def _has(self, key: str) -> bool:
        return key in self._kept or (self._directory is not None and key in self._directory)

    def _fetch(self, key: str, at_hand: dict[str, EncodedImages]) -> bool:
        """Whether a picture has been seen before; it is at hand then."""
        if key in self._kept:
            self._kept.move_to_end(key)
            at_hand[key] = self._kept[key]
            return True
        bank = None if self._directory is None else self._directory.read(key)
        if bank is None:
            return False
        self._keep(key, bank, at_hand)
        return True

    def _compress(self, new: dict[str, np.ndarray], at_hand: dict[str, EncodedImages], count: int) -> None:
        """The first so many of the new ones, which are then no longer new."""
        if not count:
            return
        keys = list(new)[:count]
        squares, items = [new.pop(key) for key in keys], [Item(key) for key in keys]
        encoded = self.images.encode_pixels(squares, items, self._batch_size)
        if isinstance(encoded, Embeddings):  # on the devices there is room for those alone that are asked about
            encoded = dataclasses.replace(encoded, features=np.asarray(encoded.features))
        self.compressed += len(keys)
        for i, key in enumerate(keys):
            one = _copied(encoded[i])
            self._keep(key, one, at_hand)
            if self._directory is not None and isinstance(one, MemoryBank):
                self._directory.add(key, one)

    def _keep(self, key: str, one: EncodedImages, at_hand: dict[str, EncodedImages]) -> None:
        at_hand[key] = self._kept[key] = one
        self._kept_bytes += _nbytes(one)
        while self._kept_bytes > self._host_bytes:
            _, oldest = self._kept.popitem(last=False)
            self._kept_bytes -= _nbytes(oldest)

    def _joined(self, parts: list[EncodedImages], items: tuple[Item, ...]) -> EncodedImages:
        joined = dataclasses.replace(join_images(parts), items=items)
        return joined if isinstance(joined, Embeddings) else joined.first_tokens(self._tokens)


class _Directory:
    """Memory files whose items are named by their pictures' keys. A damaged one is left out, and what it held is
    compressed again; those of other models stay for these."""

    def __init__(self, path: Path, model: str):
        self._path, self._model = path, model
        path.mkdir(parents=True, exist_ok=True)
        self._places: dict[str, tuple[MemoryFile, int]] = {}
        self._waiting: dict[str, MemoryBank] = {}
        for file in sorted(path.glob(f"*{SUFFIX}")):
            try:
                memories = MemoryFile(file)
                if memories.model == model:
                    self._add(memories)
            except UserError as error:
                warnings.warn(f"cache: left out: {error}", stacklevel=2)

    def __contains__(self, key: str) -> bool:
        return key in self._places or key in self._waiting

    def read(self, key: str) -> MemoryBank | None:
        if key in self._waiting or key not in self._places:
            return self._waiting.get(key)
        memories, place = self._places[key]
        try:
            return memories.read([place])
        except UserError as error:
            warnings.warn(f"cache: left out: {error}", stacklevel=2)
            self._places = {k: at for k, at in self._places.items() if at[0] is not memories}
            return None

    def add(self, key: str, one: MemoryBank) -> None:
        self._waiting[key] = one
        if len(self._waiting) >= _LEAST_NEW:
            self.flush()

    def flush(self) -> None:
        if not self._waiting:
            return
        # Named by what it holds: processes that write at once do not meet
        name = hashlib.sha256("".join([self._model, *self._waiting]).encode()).hexdigest()[:24]
        file = self._path / f"{name}{SUFFIX}"
        save_memory(file, join(list(self._waiting.values())))
        self._add(MemoryFile(file))
        self._waiting = {}

    def _add(self, memories: MemoryFile) -> None:
        memories.close()  # there may be thousands
        self._places |= {item.source: (memories, i) for i, item in enumerate(memories.items)}


def _identity(medium: Medium) -> tuple:
    if isinstance(medium, Encoded):
        return (type(medium), str(medium.file), medium.data, medium.tile if isinstance(medium, Picture) else None)
    return ("file", os.fspath(medium)) if isinstance(medium, str | os.PathLike) else ("object", id(medium))


def _stamp(file: str | os.PathLike) -> tuple | None:
    """What changes where a file does; None where there is none (who reads it will say so)."""
    try:
        status = os.stat(file)
    except (OSError, ValueError):
        return None
    return os.path.abspath(file), status.st_size, status.st_mtime_ns


def _copied(one: EncodedImages) -> EncodedImages:
    """One picture without the batch that it was part of."""
    if isinstance(one, Embeddings):
        return dataclasses.replace(one, features=one.features.copy())
    return one.copy()


def _nbytes(one: EncodedImages) -> int:
    return one.features.nbytes if isinstance(one, Embeddings) else one.nbytes
