"""Memories of pictures on the host: what was compressed once, to be read any number of times.

A `MemoryBank` holds pictures (or a video's frames) in an order, each as the keys (before rotary positions) and values
of its K VoCo tokens at all layers. It can be cut, joined, read with fewer tokens than it has, and stored in int8;
`memory_file.py` puts it on disk.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np

from voco_jax.data.images import MAX_PIXELS, MAX_SIDE, ImageProcessor
from voco_jax.errors import UserError
from voco_jax.models.voco import Memory, VoCoConfig
from voco_jax.terminal import count_of, printable

Index = int | slice | Sequence[int] | np.ndarray  # one picture, or several


@dataclasses.dataclass(frozen=True, slots=True)  # there may be millions
class Item:
    """What one memory is of: the picture's file (or any name), the SHA-256 of the file's bytes, and for a frame of a
    video its time in seconds."""

    source: str
    sha256: str = ""
    time: float | None = None

    @property
    def is_frame(self) -> bool:
        return self.time is not None

    @property
    def identity(self) -> bytes:
        """What tells it from others, in 16 bytes."""
        time = None if self.time is None else float(self.time)
        fields = json.dumps([self.source, self.sha256, time]).encode()
        return hashlib.blake2b(fields, digest_size=16).digest()


def size_of(num_bytes: int) -> str:
    """
    >>> size_of(2048), size_of(3 * 2**20)
    ('2.0 KiB', '3.0 MiB')
    """
    return f"{num_bytes / 2**20:.1f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:.1f} KiB"


@dataclasses.dataclass(frozen=True, repr=False)
class MemoryBank:
    """Memories of N pictures, K tokens each.

    keys, values: [N, K, L, G, H] in the dtype that the model computes in, or int8; then `scales` are what they are
    multiplied with, float32 [2, N, K, L, G]. `model` is the fingerprint of the model that made them and alone can read
    them.
    """

    keys: np.ndarray
    values: np.ndarray
    items: tuple[Item, ...]
    model: str
    scales: np.ndarray | None = None

    def __post_init__(self):
        if len(self.keys) != len(self.items) or self.keys.shape != self.values.shape:
            raise ValueError(f"{len(self.items)} items, keys {self.keys.shape}, values {self.values.shape}")
        if self.keys.dtype != self.values.dtype:
            raise ValueError(f"keys in {self.keys.dtype}, values in {self.values.dtype}")
        scales = None if self.scales is None else (self.scales.shape, self.scales.dtype)
        expected = ((2, *self.keys.shape[:4]), np.float32) if self.keys.dtype == np.int8 else None
        if scales != expected:
            raise ValueError(f"scales {scales} of keys {self.keys.shape} in {self.keys.dtype}")

    def __repr__(self) -> str:
        tokens = count_of(self.num_tokens, "token")
        return f"MemoryBank({_shown(self.items)}, {tokens} each, {self.keys.dtype.name}, {size_of(self.nbytes)})"

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, which: Index) -> "MemoryBank":
        """Some of the pictures."""
        chosen, items = _chosen(which, self.items)
        scales = None if self.scales is None else self.scales[:, chosen]
        return dataclasses.replace(self, keys=self.keys[chosen], values=self.values[chosen], items=items, scales=scales)

    def __add__(self, other: "MemoryBank") -> "MemoryBank":
        return join([self, other])

    @property
    def num_tokens(self) -> int:
        """K"""
        return self.keys.shape[1]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes + (0 if self.scales is None else self.scales.nbytes)

    @property
    def is_video(self) -> bool:
        """Whether all of it are frames."""
        return len(self) > 0 and all(item.is_frame for item in self.items)

    def first_tokens(self, count: int | None) -> "MemoryBank":
        """Of every picture the first `count` tokens: what compressing to so many would have given."""
        if count is None:
            return self
        check_tokens("tokens", count, self.num_tokens)
        scales = None if self.scales is None else self.scales[:, :, :count]
        return dataclasses.replace(self, keys=self.keys[:, :count], values=self.values[:, :count], scales=scales)

    def to_int8(self) -> "MemoryBank":
        """Rounded to int8, with a scale for each token, layer and head: half of bfloat16's size, and 4 bytes a head."""
        if self.scales is not None:
            return self
        rounded, scales = zip(*map(_quantize, (self.keys, self.values)), strict=True)
        return dataclasses.replace(self, keys=rounded[0], values=rounded[1], scales=np.stack(scales))

    def astype(self, dtype: np.typing.DTypeLike) -> "MemoryBank":
        """In another dtype; of int8 the numbers that it stands for."""
        if self.keys.dtype == dtype:
            return self
        if dtype == np.int8:
            return self.to_int8()
        keys, values = self.keys, self.values
        if self.scales is not None:
            keys, values = (x * s[..., None] for x, s in zip((keys, values), self.scales, strict=True))
        return dataclasses.replace(self, keys=keys.astype(dtype), values=values.astype(dtype), scales=None)

    def memory(self, places: int | None = None) -> Memory:
        """For the model: one row of all slots, keys and values [L, 1, places·K, G, H]; zeros after the last picture."""
        places = len(self) if places is None else places
        bank = self if self.scales is None else self.astype(np.float32)
        room = [(0, places - len(self))] + [(0, 0)] * 4
        return _as_slots(np.pad(bank.keys, room), np.pad(bank.values, room))


def from_memory(memory: Memory, num_tokens: int, items: Sequence[Item], model: str) -> MemoryBank:
    """The first pictures of a model's memory [L, B, I·K, G, H], B·I of them in the order of the items."""
    keys, values = (_as_pictures(x, num_tokens) for x in jax.device_get(memory))
    return MemoryBank(keys[: len(items)], values[: len(items)], tuple(items), model)


def join(banks: Iterable[MemoryBank]) -> MemoryBank:
    """One bank of several, in their order; UserError where they do not go together."""
    banks = list(banks)
    if not banks:
        raise UserError("memories: expected at least one, found none")
    for bank in banks[1:]:
        for what, there, found in (
            ("model", banks[0].model, bank.model),
            ("tokens a picture", banks[0].num_tokens, bank.num_tokens),
            ("layers and heads", banks[0].keys.shape[2:], bank.keys.shape[2:]),
            ("dtype", banks[0].keys.dtype.name, bank.keys.dtype.name),
        ):
            if there != found:
                raise UserError(f"memories: expected the same {what}, found {there} and {found}")
    scales = None if banks[0].scales is None else np.concatenate([bank.scales for bank in banks], axis=1)
    return MemoryBank(
        np.concatenate([bank.keys for bank in banks]),
        np.concatenate([bank.values for bank in banks]),
        tuple(item for bank in banks for item in bank.items),
        banks[0].model,
        scales,
    )


@dataclasses.dataclass(frozen=True, repr=False)
class Embeddings:
    """What a model without VoCo compression keeps of N pictures: their embeddings [N, P, D], on the devices."""

    features: jax.Array | np.ndarray
    items: tuple[Item, ...]

    def __repr__(self) -> str:
        return f"Embeddings({_shown(self.items)}, {self.features.shape[1]} each, {self.features.dtype})"

    def __len__(self) -> int:
        return len(self.items)

    @property
    def is_video(self) -> bool:
        return len(self) > 0 and all(item.is_frame for item in self.items)

    def __getitem__(self, which: Index) -> "Embeddings":
        chosen, items = _chosen(which, self.items)
        return Embeddings(self.features[np.arange(len(self))[chosen]], items)


EncodedImages = MemoryBank | Embeddings


def _chosen(which: Index, items: tuple[Item, ...]) -> tuple[slice | np.ndarray, tuple[Item, ...]]:
    """Indices into an array, and the items at these."""
    if isinstance(which, int | np.integer):
        if not -len(items) <= which < len(items):
            raise IndexError(f"picture {which} of {len(items)}")
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
        alike = len({bank.keys.dtype for bank in banks}) == 1
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


# Fields (ImageProcessor's, RopeScaling's) that came after the first memories were kept, with what held before. Those
# memories stay readable.
_ADDED_LATER = {
    "resize_to": (), "do_resize": True, "resample": "bicubic", "rescale_factor": 1 / 255, "pad_color": (),
    "transparency": "drop", "max_pixels": MAX_PIXELS, "max_side": MAX_SIDE,
    "rope_type": "llama3", "beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 1.0, "truncate": True,
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
    names = [printable(item.source) or "(no name)" for item in items[:3]] + ["…"] * (len(items) > 3)
    return f"{count_of(len(items), 'picture')}: {', '.join(names)}"


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
