"""Images and videos to what the model keeps of them: memories, or embeddings without VoCo compression."""

from collections.abc import Iterable, Iterator, Sequence
import dataclasses
import itertools
import os
from typing import cast

import jax
import numpy as np

from voco_jax.data.images import ImageProcessor, PictureLike, is_picture
from voco_jax.data.records import Clip, Frames, Picture
from voco_jax.data.sources.roots import local_path
from voco_jax.data.video import FrameSampling, probe, read_frames, sample_times
from voco_jax.errors import UserError
from voco_jax.infer.engine import Engine, bucket
from voco_jax.infer.memory import (
    Embeddings,
    EncodedImages,
    Item,
    MemoryBank,
    from_memory,
    join_images,
    with_tiles,
)
from voco_jax.io.paths import as_path
from voco_jax.models.compressors import KEYS_AND_VALUES
from voco_jax.models.voco import Memory
from voco_jax.parallel.mesh import IMAGES, axis_size

# Compiled once for all runs with one processor
_normalize = jax.jit(ImageProcessor.normalize, static_argnums=0)


class ImageEncoder:
    """An engine with the image processor of its run.

    `sampling` says which frames of a video are taken. `fingerprint` identifies the model: its memories carry it, and
    those of other models are refused. `name` is for messages.
    """

    def __init__(
        self, engine: Engine, processor: ImageProcessor, sampling: FrameSampling, fingerprint: str, name: str
    ):  # fmt: skip
        self.engine, self.processor, self.sampling = engine, processor, sampling
        self.fingerprint, self.name = fingerprint, name

    @property
    def num_voco_tokens(self) -> int:
        """K, the most tokens that a memory can have."""
        return self.engine.config.num_voco_tokens

    @property
    def memory_kind(self) -> str:
        """What a memory is: KEYS_AND_VALUES or EMBEDDINGS; '' without VoCo tokens."""
        return self.engine.config.memory_kind

    def encode_images(
        self, pictures: PictureLike | Iterable[PictureLike], *, batch_size: int = 32
    ) -> EncodedImages:  # fmt: skip
        """Of one image or several: files, bytes, PIL images or arrays (see `data.images.load_image`). Each becomes as
        many as the processor has `tiles`.

        BadRecord (a UserError) names an image that cannot be read.
        """
        several = [cast(PictureLike, pictures)] if is_picture(pictures) else cast(Iterable[PictureLike], pictures)
        local = [local_path(p) if isinstance(p, str) else p for p in several]
        items = [item for p in local for item in self.items_of(p)]
        squares = (square for p in local for square in self.processor.squares(p))
        return self.encode_pixels(squares, items, batch_size)

    def items_of(self, picture: PictureLike, source: str | None = None, sha256: str = "") -> list[Item]:
        """Of an image's memories, one for each of `processor.squares`: as many as the processor has `tiles`. `source`:
        its name, where it has no path or another one."""
        named = isinstance(picture, str | os.PathLike | Picture)
        source = (str(picture) if named else "") if source is None else source
        tile = picture.tile if isinstance(picture, Picture) else None
        tiles = (tile,) if tile is not None or self.processor.grid == 1 else self.processor.tiles
        return [Item(source, sha256, tile=tile) for tile in tiles]

    def encode_video(
        self, video: str | os.PathLike, *, sampling: FrameSampling | None = None, batch_size: int = 32,
        incomplete: bool = False,
    ) -> EncodedImages:  # fmt: skip
        """Of a video's frames, with their times. BadRecord for a file that is cut off, unless `incomplete`: then of the
        frames that are there."""
        clip = Clip(file=as_path(local_path(os.fspath(video))), incomplete=incomplete)
        times, squares = self.frames(clip, sampling, batch_size)
        return self.encode_pixels(squares, [Item(str(video), time=float(time)) for time in times], batch_size)

    def frames(
        self, video: Clip | Frames, sampling: FrameSampling | None = None, batch_size: int = 32
    ) -> tuple[np.ndarray, Iterator[np.ndarray]]:
        """Seconds at which frames are taken, and the squares of these, decoded `batch_size` at a time."""
        times = sample_times(probe(video), sampling or self.sampling)
        return times, (
            self.processor.square(frame)
            for start in range(0, len(times), batch_size)
            for frame in read_frames(video, times[start : start + batch_size])
        )

    def encode_pixels(
        self, squares: Iterable[np.ndarray], items: Sequence[Item], batch_size: int = 32
    ) -> EncodedImages:  # fmt: skip
        """Of images as `square` returns them, uint8 [size, size, 3], one for each item."""
        remaining = iter(squares)
        encoded: list[EncodedImages] = []
        while batch := list(itertools.islice(remaining, batch_size)):
            encoded.append(self._encode_batch(batch, min(batch_size, bucket(len(batch), 1))))
        if not encoded:
            raise UserError("images: expected at least one, found none")
        return dataclasses.replace(join_images(encoded), items=tuple(items))

    def square(self, picture: PictureLike) -> np.ndarray:
        """An image as the model takes it, uint8 [size, size, 3]. BadRecord for one that cannot be read."""
        return self.processor.square(self.processor.load(picture))

    def _encode_batch(self, squares: list[np.ndarray], size: int) -> EncodedImages:
        with self.engine.on_mesh():
            together = axis_size(*IMAGES)
            size = -(-max(size, len(squares)) // together) * together
            pixels = np.zeros((size, *squares[0].shape), np.uint8)
            pixels[: len(squares)] = squares
            frames = axis_size("frame")  # images of a row are spread over it
            pixels = pixels.reshape(size // frames, frames, *pixels.shape[1:])
            visual, items = self.engine.encode_images(_normalize(self.processor, pixels)), (Item(""),) * len(squares)
            if self.engine.config.has_compress_stream:
                return from_memory(visual, self.num_voco_tokens, items, self.fingerprint)
            assert not isinstance(visual, Memory)
            return Embeddings(visual.reshape(-1, *visual.shape[2:])[: len(squares)], items)

    def require_memories(self) -> None:
        """UserError for a model without VoCo tokens."""
        if not (c := self.engine.config).has_compress_stream:
            expected = "expected 'voco' or 'voco_embedding'"
            raise UserError(f"{self.name}: a model with compressor {c.compressor!r} has no memories: {expected}")

    def checked(self, images: EncodedImages) -> EncodedImages:
        """Encoded images of this model, whose items say which tiles they are; UserError for another's."""
        c = self.engine.config
        kind = MemoryBank if c.has_compress_stream else Embeddings
        if not isinstance(images, kind):
            found = f"found {type(images).__name__}"
            raise UserError(f"images: expected {kind.__name__} (compressor {c.compressor!r}), {found}")
        if self.processor.grid > 1:
            images = dataclasses.replace(images, items=with_tiles(images.items, self.processor.tiles))
        if isinstance(images, Embeddings):
            return images
        name = f"memory of {images.items[0].source}" if len(images) else "memory"
        if images.kind != c.memory_kind:
            expected = f"expected {c.memory_kind}, which a model with compressor {c.compressor!r} reads"
            raise UserError(f"{name}: {expected}; found {images.kind}")
        if images.model != self.fingerprint:
            raise UserError(f"{name}: expected one of this model ({self.fingerprint}), found {images.model}")
        tokens, *shape = images.shape[1:]
        expected_shape, axes = [c.llama.hidden_size], "hidden size"
        if c.memory_kind == KEYS_AND_VALUES:
            expected_shape = [c.llama.num_hidden_layers, c.llama.num_key_value_heads, c.llama.head_dim]
            axes = "layers, heads, head size"
        if shape != expected_shape or not 1 <= tokens <= self.num_voco_tokens:
            raise UserError(
                f"{name}: expected 1 to {self.num_voco_tokens} tokens of {expected_shape} ({axes}), "
                f"found {tokens} of {shape}"
            )
        return images
