"""Memories of pictures on the host: what was compressed once, to be read any number of times.

A `MemoryBank` holds images in an order (pictures, their tiles, a video's frames), each as the keys (before rotary
positions) and values of its K VoCo tokens at all layers, or as K embeddings. It can be cut, joined, read with fewer
tokens than it has, and stored in int8; `memory_file.py` puts it on disk.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
import hashlib
import json
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from voco_jax.data.images import MAX_PIXELS, MAX_SIDE, ImageProcessor
from voco_jax.errors import UserError
from voco_jax.models.compressors import EMBEDDINGS, KEYS_AND_VALUES
from voco_jax.models.voco import Memory, VoCoConfig
from voco_jax.terminal import count_of, printable

ARRAYS = {KEYS_AND_VALUES: ("keys", "values"), EMBEDDINGS: ("embeddings",)}  # of a bank, by its kind
AXES = {KEYS_AND_VALUES: "NKLGH", EMBEDDINGS: "NKD"}  # of each of them

Index = int | slice | Sequence[int] | np.ndarray  # one image, or several


@dataclasses.dataclass(frozen=True, slots=True)  # there may be millions
class Item:
    """What one memory is of: the picture's file (or any name), the SHA-256 of the file's bytes, for a frame of a video
    its time in seconds, and where pictures are looked at in tiles which of them it is, as `Picture.tile` names it."""

    source: str
    sha256: str = ""
    time: float | None = None
    tile: tuple[int, int, int] | None = None

    @property
    def is_frame(self) -> bool:
        return self.time is not None

    @property
    def identity(self) -> bytes:
        """What tells it from others, in 16 bytes."""
        time = None if self.time is None else float(self.time)
        fields = [self.source, self.sha256, time, *([] if self.tile is None else [self.tile])]
        return hashlib.blake2b(json.dumps(fields).encode(), digest_size=16).digest()


class PictureItems(NamedTuple):
    """The items of one picture (or frame) in a bank or a file: of its tiles in their order, or a single one. `first` is
    the place of the first."""

    first: int
    items: tuple[Item, ...]

    @property
    def places(self) -> slice:
        return slice(self.first, self.first + len(self.items))

    @property
    def identity(self) -> bytes:
        """What tells it from others, and from itself with fewer tiles: 16 bytes of each item."""
        return b"".join(item.identity for item in self.items)


def pictures_of(items: Iterable[Item]) -> Iterator[PictureItems]:
    """The pictures (and frames) that items are of. Tiles of one lie side by side, in the order of `tiles_of`."""
    first, together = 0, list[Item]()
    for item in items:
        if together and not _goes_on(together[-1], item):
            yield PictureItems(first, tuple(together))
            first, together = first + len(together), []
        together.append(item)
    if together:
        yield PictureItems(first, tuple(together))


def _goes_on(before: Item, item: Item) -> bool:
    """Whether it is a later tile of the picture that the one before is of."""
    if before.tile is None or item.tile is None or (before.source, before.sha256) != (item.source, item.sha256):
        return False
    (row, column, n), (next_row, next_column, next_n) = before.tile, item.tile
    return (n, row, column) < (next_n, next_row, next_column)


def with_tiles(items: tuple[Item, ...], tiles: Sequence[tuple[int, int, int]]) -> tuple[Item, ...]:
    """Items of a model that looks at pictures in these tiles, where they say nothing of it, as those of an earlier
    version: as many alike as there are tiles become these."""
    found, i = list(items), 0
    while i < len(found):
        alike = found[i : i + len(tiles)]
        named = len(alike) < len(tiles) or alike[0].is_frame or alike[0].tile is not None or len({*alike}) > 1
        if not named:
            found[i : i + len(tiles)] = [dataclasses.replace(alike[0], tile=tile) for tile in tiles]
        i += 1 if named else len(tiles)
    return tuple(found)


class _OfItems:
    """What a bank and embeddings know by their items."""

    items: tuple[Item, ...]

    def __getitem__(self, which: Index) -> Self:
        raise NotImplementedError

    @property
    def is_video(self) -> bool:
        """Whether all of it are frames."""
        return len(self.items) > 0 and all(item.is_frame for item in self.items)

    def pictures(self) -> list[Self]:
        """Each picture by itself, with all its tiles; each frame of a video."""
        return [self[one.places] for one in pictures_of(self.items)]


def size_of(num_bytes: int) -> str:
    """
    >>> size_of(2048), size_of(3 * 2**20)
    ('2.0 KiB', '3.0 MiB')
    """
    return f"{num_bytes / 2**20:.1f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:.1f} KiB"


@dataclasses.dataclass(frozen=True, repr=False)
class MemoryBank(_OfItems):
    """Memories of N images, K tokens each.

    `arrays` are what is kept, by name: "keys" and "values" [N, K, L, G, H], or "embeddings" [N, K, D], in the dtype
    that the model computes in, or int8; then `scales`, by the same names, are what they are multiplied with, float32
    without the last axis. `model` is the fingerprint of the model that made them and alone can read them.
    """

    arrays: dict[str, np.ndarray]
    items: tuple[Item, ...]
    model: str
    scales: dict[str, np.ndarray] | None = None

    def __post_init__(self):
        if tuple(self.arrays) not in ARRAYS.values():
            raise ValueError(f"expected arrays {' or '.join(map(str, ARRAYS.values()))}, found {tuple(self.arrays)}")
        if len(self.shape) != len(AXES[self.kind]) or len({array.shape for array in self.arrays.values()}) > 1:
            found = ", ".join(f"{name} {array.shape}" for name, array in self.arrays.items())
            raise ValueError(f"expected arrays [{', '.join(AXES[self.kind])}], found {found}")
        if len(self.items) != len(self):
            raise ValueError(f"{len(self.items)} items, {self.kind} {self.shape}")
        if len({array.dtype for array in self.arrays.values()}) > 1:
            raise ValueError(", ".join(f"{name} in {array.dtype}" for name, array in self.arrays.items()))
        scales = None if self.scales is None else {name: (x.shape, x.dtype) for name, x in self.scales.items()}
        expected = dict.fromkeys(self.arrays, (self.shape[:-1], np.float32)) if self.dtype == np.int8 else None
        if scales != expected:
            raise ValueError(f"scales {scales} of {self.kind} {self.shape} in {self.dtype}")

    def __repr__(self) -> str:
        tokens = count_of(self.num_tokens, "token")
        kind = f"{self.dtype.name} {self.kind}"
        return f"MemoryBank({_shown(self.items)}, {tokens} each, {kind}, {size_of(self.nbytes)})"

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, which: Index) -> "MemoryBank":
        """Some of the images."""
        chosen, items = _chosen(which, self.items)
        return self._changed(lambda array: array[chosen], items=items)

    def __add__(self, other: "MemoryBank") -> "MemoryBank":
        return join([self, other])

    @property
    def kind(self) -> str:
        """KEYS_AND_VALUES or EMBEDDINGS."""
        return next(kind for kind, names in ARRAYS.items() if names == tuple(self.arrays))

    @property
    def keys(self) -> np.ndarray:
        return self.arrays["keys"]

    @property
    def values(self) -> np.ndarray:
        return self.arrays["values"]

    @property
    def embeddings(self) -> np.ndarray:
        return self.arrays["embeddings"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of each array: [N, K, L, G, H] or [N, K, D]."""
        return next(iter(self.arrays.values())).shape

    @property
    def dtype(self) -> np.dtype:
        return next(iter(self.arrays.values())).dtype

    @property
    def num_tokens(self) -> int:
        """K"""
        return self.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (*self.arrays.values(), *(self.scales or {}).values()))

    def first_tokens(self, count: int | None) -> "MemoryBank":
        """Of every image the first `count` tokens: what compressing to so many would have given."""
        if count is None:
            return self
        check_tokens("tokens", count, self.num_tokens)
        return self._changed(lambda array: array[:, :count])

    def with_room(self, count: int) -> "MemoryBank":
        """With so many tokens of every picture: zeros after its own."""
        more = count - self.num_tokens
        return self if more <= 0 else self._changed(
            lambda array: np.pad(array, [(0, 0), (0, more)] + [(0, 0)] * (array.ndim - 2))
        )  # fmt: skip

    def copy(self) -> "MemoryBank":
        """In arrays of its own: it keeps no larger bank in memory that it was cut out of."""
        return self._changed(np.copy)

    def to_int8(self) -> "MemoryBank":
        """Rounded to int8, with a scale for each token, layer and head, or for each embedding: half of bfloat16's size,
        and 4 bytes a scale."""
        if self.scales is not None:
            return self
        rounded = {name: _quantize(array) for name, array in self.arrays.items()}
        arrays, scales = ({name: pair[i] for name, pair in rounded.items()} for i in range(2))
        return dataclasses.replace(self, arrays=arrays, scales=scales)

    def astype(self, dtype: np.typing.DTypeLike) -> "MemoryBank":
        """In another dtype; of int8 the numbers that it stands for."""
        if self.dtype == dtype:
            return self
        if dtype == np.int8:
            return self.to_int8()
        arrays = self.arrays
        if self.scales is not None:
            arrays = {name: array * self.scales[name][..., None] for name, array in arrays.items()}
        arrays = {name: array.astype(dtype) for name, array in arrays.items()}
        return dataclasses.replace(self, arrays=arrays, scales=None)

    def memory(self, places: int | None = None) -> Memory | jax.Array:
        """For the model: one row of all slots, keys and values [L, 1, places·K, G, H], or of all embeddings
        [1, places, K, D]; zeros after the last image."""
        places = len(self) if places is None else places
        bank = self if self.scales is None else self.astype(np.float32)
        room = [(0, places - len(self))] + [(0, 0)] * (len(self.shape) - 1)
        arrays = {name: np.pad(array, room) for name, array in bank.arrays.items()}
        return jnp.asarray(arrays["embeddings"][None]) if self.kind == EMBEDDINGS else _as_slots(**arrays)

    def _changed(self, change: Callable[[np.ndarray], np.ndarray], **fields: Any) -> "MemoryBank":
        """With the same done to all arrays and scales."""
        arrays = {name: change(array) for name, array in self.arrays.items()}
        scales = None if self.scales is None else {name: change(array) for name, array in self.scales.items()}
        return dataclasses.replace(self, arrays=arrays, scales=scales, **fields)


def from_memory(memory: Memory | jax.Array, num_tokens: int, items: Sequence[Item], model: str) -> MemoryBank:
    """The first images of a model's memory, [L, B, I·K, G, H] or embeddings [B, I, K, D], B·I of them in the order of
    the items."""
    arrays = jax.device_get(memory)
    if isinstance(memory, Memory):
        named = {name: _as_pictures(x, num_tokens) for name, x in zip(Memory._fields, arrays, strict=True)}
    else:
        named = {"embeddings": np.ascontiguousarray(arrays.reshape(-1, *arrays.shape[2:]))}
    return MemoryBank({name: x[: len(items)] for name, x in named.items()}, tuple(items), model)


def join(banks: Iterable[MemoryBank]) -> MemoryBank:
    """One bank of several, in their order; UserError where they do not go together."""
    banks = list(banks)
    if not banks:
        raise UserError("memories: expected at least one, found none")
    first = banks[0]
    for bank in banks[1:]:
        for what, there, found in (
            ("kind", first.kind, bank.kind),
            ("model", first.model, bank.model),
            ("tokens an image", first.num_tokens, bank.num_tokens),
            ("shape of a token", first.shape[2:], bank.shape[2:]),
            ("dtype", first.dtype.name, bank.dtype.name),
        ):
            if there != found:
                raise UserError(f"memories: expected the same {what}, found {there} and {found}")

    def joined(of_banks: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        return {name: np.concatenate([arrays[name] for arrays in of_banks]) for name in of_banks[0]}

    scales = [bank.scales for bank in banks if bank.scales is not None]
    items = tuple(item for bank in banks for item in bank.items)
    return MemoryBank(joined([b.arrays for b in banks]), items, first.model, joined(scales) if scales else None)


@dataclasses.dataclass(frozen=True, repr=False)
class Embeddings(_OfItems):
    """What a model without VoCo compression keeps of N images: their embeddings [N, P, D], on the devices."""

    features: jax.Array | np.ndarray
    items: tuple[Item, ...]

    def __repr__(self) -> str:
        return f"Embeddings({_shown(self.items)}, {self.features.shape[1]} each, {self.features.dtype})"

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, which: Index) -> "Embeddings":
        chosen, items = _chosen(which, self.items)
        return Embeddings(self.features[np.arange(len(self))[chosen]], items)


EncodedImages = MemoryBank | Embeddings


def _chosen(which: Index, items: tuple[Item, ...]) -> tuple[slice | np.ndarray, tuple[Item, ...]]:
    """Indices into an array, and the items at these."""
    if isinstance(which, int | np.integer):
        if not -len(items) <= which < len(items):
            raise IndexError(f"image {which} of {len(items)}")
        which = slice(int(which), int(which) + 1 or None)
    if isinstance(which, slice):
        return which, items[which]
    indices = np.asarray(which, np.intp)
    return indices, tuple(items[i] for i in indices.tolist())


def check_tokens(name: str, count: int | None, there: int) -> None:
    """UserError unless so many tokens of each image (None: all) can be read of those that are there."""
    if count is not None and not 1 <= count <= there:
        has = "is only 1 token" if there == 1 else f"are {there} tokens"
        raise UserError(f"{name} {count}: there {has} per image")


def join_images(images: Sequence[EncodedImages]) -> EncodedImages:
    """One of several of the same kind, in their order. Memories of different dtypes, as a CPU and a GPU make them, or
    int8, in float32."""
    embeddings = [one for one in images if isinstance(one, Embeddings)]
    if not embeddings:
        banks = [one for one in images if isinstance(one, MemoryBank)]
        alike = len({bank.dtype for bank in banks}) == 1
        return join(banks if alike else [bank.astype(np.float32) for bank in banks])
    arrays = [one.features for one in embeddings]
    concatenate = np.concatenate if all(isinstance(array, np.ndarray) for array in arrays) else jnp.concatenate
    return Embeddings(concatenate(arrays), tuple(item for one in embeddings for item in one.items))


def fingerprint(
    config: VoCoConfig, checksums: dict[str, int], processor: ImageProcessor, vocabulary: str = ""
) -> str:  # fmt: skip
    """Of a model, by all that a memory and its answers depend on: parameters, dimensions, what stands around an image,
    its pixels, and the tokenizer's vocabulary (its SHA-256).

    Where it computes and in which dtype is no part of it. Nor is the vocabulary where it is '', in a run of an earlier
    version, whose memories say nothing of it and stay readable.
    """
    described = {
        "params": checksums,
        "llama": _described(config.llama),
        "compressor": config.compressor,
        "vision": _described(config.vision),
        "prompt": [config.prefix_ids, config.suffix_ids, config.voco_token_id],
        "lora": None if config.lora is None else _described(config.lora),
        "pixels": _described(dataclasses.replace(processor, max_pixels=MAX_PIXELS, max_side=MAX_SIDE)),
    }
    if vocabulary:
        described["vocabulary"] = vocabulary
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32]


# Fields (of ImageProcessor, RopeScaling, LlamaConfig and ViTConfig) that came after the first memories were kept, with
# what held before. Those memories stay readable.
_ADDED_LATER = {
    "resize_to": (), "do_resize": True, "resample": "bicubic", "rescale_factor": 1 / 255, "pad_color": (),
    "transparency": "drop", "max_pixels": MAX_PIXELS, "max_side": MAX_SIDE, "grid": 1,
    "rope_type": "llama3", "beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 1.0, "truncate": True,
    "qkv_bias": False, "qk_norm": False, "sliding_window": 0,
    "further_layers": (), "class_token": True, "patch_bias": False, "pre_layernorm": True, "hidden_act": "quick_gelu",
}  # fmt: skip


def _described(config) -> dict:
    """A dataclass's fields, without those that say what held before they were there."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {
        name: _described(value) if dataclasses.is_dataclass(value) else value
        for name, value in fields.items()
        if name not in _ADDED_LATER or value != _ADDED_LATER[name]
    }


def _shown(items: Sequence[Item]) -> str:
    """How many, and the first few by name.

    >>> _shown([Item("a.png")]), _shown([Item(f"{i}.png") for i in range(9)])
    ('1 picture: a.png', '9 pictures: 0.png, 1.png, 2.png, …')
    """
    pictures = [one.items[0].source for one in pictures_of(items)]
    names = [printable(source) or "(no name)" for source in pictures[:3]] + ["…"] * (len(pictures) > 3)
    return f"{count_of_pictures(len(pictures), len(items))}: {', '.join(names)}"


def count_of_pictures(pictures: int, images: int) -> str:
    """
    >>> count_of_pictures(1, 1), count_of_pictures(2, 10)
    ('1 picture', '2 pictures as 10 images')
    """
    return count_of(pictures, "picture") + (f" as {count_of(images, 'image')}" if images != pictures else "")


@jax.jit
def _as_slots(keys, values) -> Memory:
    """[N, K, L, G, H] to [L, 1, N·K, G, H]."""
    n, k, layers, *head = keys.shape
    return Memory(*(x.reshape(n * k, layers, *head).swapaxes(0, 1)[:, None] for x in (keys, values)))


def _as_pictures(x: np.ndarray, num_tokens: int) -> np.ndarray:
    """[L, B, I·K, G, H] to [B·I, K, L, G, H]."""
    layers, _, _, *head = x.shape
    return np.ascontiguousarray(x.reshape(layers, -1, num_tokens, *head).transpose(1, 2, 0, 3, 4))


def _quantize(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 of the same shape, and scales without the last axis."""
    x = x.astype(np.float32)
    scale = np.abs(x).max(axis=-1) / 127
    scale = np.where(scale == 0, np.float32(1), scale)
    return np.round(x / scale[..., None]).astype(np.int8), scale
