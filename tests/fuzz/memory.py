"""Memory files: `voco_jax/infer/memory_file.py`, versions 1 to 4, and the command that lists, checks and joins."""

from collections.abc import Callable
import contextlib
import io
import itertools
import json
import os
from pathlib import Path
import struct
import zlib

import ml_dtypes
import numpy as np

from tests.fuzz.harness import Target
from tests.fuzz.mutations import damage, dumps, odd_json, odd_value
from voco_jax import memory as command
from voco_jax.data.video import format_time
from voco_jax.infer.memory import ARRAYS, AXES, Item, MemoryBank
from voco_jax.infer.memory_file import MemoryFile, load_memory, save_memory
from voco_jax.infer.memory_format import (
    OF_MEMORIES,
    VERSION,
    WITH_TILES,
    Layout,
    begun,
    checksums,
    header,
    line_of,
    tensors_of,
)
from voco_jax.terminal import printable

FIXTURES = Path(__file__).parents[1] / "fixtures"
_MODEL = "0123456789abcdef" * 2
_KINDS = {
    "damaged": 0.4, "odd header": 0.15, "odd items": 0.1, "odd and all recomputed": 0.13, "odd shape": 0.08,
    "exchanged": 0.1, "bomb": 0.02, "special": 0.02,
}  # fmt: skip


class Parts:
    """A memory file taken apart, to be put together with checksums that are right again."""

    def __init__(self, data: bytes):
        length = struct.unpack("<Q", data[:8])[0]
        self.header = json.loads(data[8 : 8 + length])
        self.tensors = {
            name: bytearray(data[8 + length + tensor["data_offsets"][0] : 8 + length + tensor["data_offsets"][1]])
            for name, tensor in self.header.items()
            if name != "__metadata__"
        }
        self.version = self.header["__metadata__"]["version"]
        self.names = [name for name in ("keys", "values", "embeddings") if name in self.header]

    @property
    def items(self) -> list:
        if self.version == "1":
            return json.loads(self.header["__metadata__"]["items"])
        return [json.loads(line) for line in self.tensors["items"].splitlines()]

    @items.setter
    def items(self, items: list) -> None:
        if self.version == "1":
            self.header["__metadata__"]["items"] = dumps(items).decode(errors="replace")
        else:
            self.lines = [dumps(item) + b"\n" for item in items]

    @property
    def lines(self) -> list[bytes]:
        return self.tensors["items"].splitlines(keepends=True)

    @lines.setter
    def lines(self, lines: list[bytes]) -> None:
        self.tensors["items"] = bytearray(b"".join(lines))
        self.header["items"]["shape"] = [len(self.tensors["items"])]

    def swap(self, name: str, i: int, j: int) -> None:
        """Two pictures' parts of a tensor."""
        tensor, num = self.tensors[name], self.header[name]["shape"][0]
        size = len(tensor) // num
        a, b = slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size)
        tensor[a], tensor[b] = tensor[b], tensor[a]

    def together(self, offsets: bool = True) -> bytes:
        """The bytes, with the checksums of items and header (and the offsets) as they have to be."""
        end = 0
        for name, tensor in self.tensors.items():
            if offsets:
                self.header[name]["data_offsets"] = [end, end + len(tensor)]
            end += len(tensor)
        metadata = self.header.get("__metadata__")
        if isinstance(metadata, dict):
            if self.version != "1" and "items" in metadata:
                metadata["items"] = f"{zlib.crc32(self.tensors['items']):08x}"
            metadata.pop("checksum", None)
            metadata["checksum"] = f"{zlib.crc32(dumps(self.header)):08x}"
        return _framed(dumps(self.header)) + b"".join(self.tensors.values())


def _framed(text: bytes) -> bytes:
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def forged(bank: MemoryBank, lines: list[bytes]) -> bytes:
    """A file of these lines of items, right in all its checksums."""
    text = b"".join(lines)
    layout = Layout(bank.shape, bank.dtype, len(text), bank.kind)
    tensors = tensors_of(bank)
    tensors["checksums"] = checksums(tensors, begun(layout, bank.model, lines))
    version = VERSION if all(item.tile is None for item in bank.items) else WITH_TILES
    return header(layout, bank.model, text, version) + b"".join(array.tobytes() for array in tensors.values()) + text


class MemoryFiles(Target):
    count = 5000

    def make(self, directory: Path) -> None:
        rng = np.random.default_rng(0)
        items = [Item(f"album/{i}.png", f"{i:064x}", i / 2 if i % 2 else None) for i in range(5)]
        items[3] = Item("n\xe4me\udcff\n\x1b[2J.png")
        tiles = [*items[:2], *(Item("album/t.png", "0" * 64, tile=tile) for tile in ((0, 0, 1), (0, 0, 2), (1, 1, 2)))]
        keys, values, embeddings = rng.normal(size=(3, 5, 3, 8)).astype(np.float32)
        kinds = {
            "keys and values": {"keys": keys.reshape(5, 3, 2, 1, 4), "values": values.reshape(5, 3, 2, 1, 4)},
            "embeddings": {"embeddings": embeddings},
        }
        self._banks, self._sound = {}, {}
        for dtype in (np.float32, ml_dtypes.bfloat16, np.int8):
            name = np.dtype(dtype).name
            files = {f"version {version}, {name}": FIXTURES / f"memory_v{version}" / f"{name}.voco" for version in "12"}
            for version, kind in itertools.product("34", kinds):
                files[f"version {version}, {name} {kind}"] = file = directory / f"{version} {name} {kind}.voco"
                bank = MemoryBank(kinds[kind], tuple(items if version == "3" else tiles), _MODEL)
                save_memory(file, bank.astype(dtype))
            for name, file in files.items():
                self._banks[name], self._sound[name] = load_memory(file), file.read_bytes()
        self._file = directory / "case.voco"

    def needs(self) -> int:
        try:
            status = self._file.stat()
            return min(status.st_size, status.st_blocks * 512)
        except OSError:
            return 0

    def case(self, rng: np.random.Generator, directory: Path) -> tuple[str, Callable[[], str | None]]:
        self._file = file = directory / "case.voco"
        if file.is_dir():
            file.rmdir()
        file.unlink(missing_ok=True)
        kind = str(rng.choice(list(_KINDS), p=list(_KINDS.values())))
        name = str(rng.choice(list(self._sound)))
        data = self._sound[name]
        tells = True  # whether a checksum or a size says that something is wrong
        if kind == "damaged":
            what, data = damage(rng, data)
        elif kind == "odd header":
            parts = Parts(data)
            what, parts.header = odd_json(rng, parts.header)
            data = parts.together(offsets=False)
            tells = not name.startswith("version 1")  # whose model and items may be any
        elif kind == "odd items":
            parts = Parts(data)
            what, parts.items = odd_json(rng, parts.items)
            data = parts.together()
            tells = not name.startswith("version 1")
        elif kind == "odd and all recomputed":
            name = str(rng.choice([name for name in self._sound if name[:9] in ("version 3", "version 4")]))
            bank = self._banks[name]
            lines = list(map(line_of, bank.items))
            i = int(rng.integers(len(lines)))
            if rng.random() < 0.5:
                what, value = odd_json(rng, json.loads(lines[i]))
                lines[i] = dumps(value) + b"\n"
            else:
                what, lines[i] = damage(rng, lines[i])
            data, tells = forged(bank, lines), False
        elif kind == "odd shape" and rng.random() < 0.5:
            what = self._odd_layout(rng, file)
            data, tells = None, False
        elif kind == "odd shape":
            what, data = self._odd_shape(rng, data)
        elif kind == "exchanged":
            what, data = self._exchanged(rng, name, data)
        elif kind == "bomb":
            what = self._bomb(rng, file)
        else:
            what = self._special(rng, file)
        if kind not in ("bomb", "special") and data is not None:
            file.write_bytes(data)
        how = str(rng.choice(["load", "pieces", "few", "list", "check", "merge"]))
        bank = self._banks[name] if tells and data != self._sound[name] else None
        return f"{kind}: {name}: {what}; {how}", lambda: self._read(file, how, bank, kind == "damaged")

    def _odd_layout(self, rng, file: Path) -> str:
        """Sizes that a header can have, with as much room, but for what the room would hold."""
        sizes = [1, 1, 1, 2, 3, 1000, 2**20] if rng.random() < 0.7 else [0, 1, 2**31, 10**12, 10**18, 2**63 - 1, 2**64]
        kind = str(rng.choice(list(ARRAYS)))
        shape = tuple(int(sizes[i]) for i in rng.integers(len(sizes), size=len(AXES[kind])))
        shape = (0 if rng.random() < 0.3 else min(shape[0], 1000), *shape[1:])
        dtype = list(OF_MEMORIES.values())[rng.integers(len(OF_MEMORIES))]
        text = b'{"source": ""}\n' * shape[0]
        layout = Layout(shape, dtype, len(text), kind)
        head = header(layout, _MODEL, text)
        size = len(head) + layout.size
        with open(file, "wb") as stream:
            stream.write(head)
            if size < 1 << 42:
                stream.truncate(size)
                stream.seek(size - len(text))
                stream.write(text)
        return f"{shape} {dtype}, {size} bytes"

    def _odd_shape(self, rng, data: bytes) -> tuple[str, bytes]:
        parts = Parts(data)
        shape = list(parts.header[parts.names[0]]["shape"])
        sizes = [0, 1, -1, 2, 10**18, 2**31, 2**62, 2**64, 10**30, True, 1.5, float("inf"), float("nan"), None, "2", []]
        for _ in range(int(rng.integers(1, 4))):
            match rng.choice(["size", "size", "fewer", "more", "value"]):
                case "size" if shape:
                    shape[rng.integers(len(shape))] = sizes[rng.integers(len(sizes))]
                case "fewer" if shape:
                    shape.pop()
                case "more":
                    shape.append(sizes[rng.integers(len(sizes))])
                case "value":
                    shape = [odd_value(rng)]
        shape = shape[0] if rng.random() < 0.1 and shape else shape
        for name, tensor in parts.header.items():
            if name in parts.names:
                tensor["shape"] = shape
            elif name.endswith("_scales") and isinstance(shape, list):
                tensor["shape"] = shape[:-1]
            elif name == "checksums" and isinstance(shape, list):
                tensor["shape"] = shape[:2]
        if isinstance(shape, list) and len(shape) > 2:
            parts.header["__metadata__"]["tokens"] = str(shape[1])[:50]
            if parts.names[0] == "keys":
                parts.header["__metadata__"]["layers"] = str(shape[2])[:50]
        if rng.random() < 0.5:  # nothing to hold
            for name in parts.tensors:
                parts.tensors[name] = bytearray()
            if parts.version == "1":
                parts.items = []
            else:
                parts.lines = []
        return f"{str(shape)[:60]}", parts.together()

    def _exchanged(self, rng, name: str, data: bytes) -> tuple[str, bytes]:
        parts = Parts(data)
        num = parts.header[parts.names[0]]["shape"][0]
        i, j = map(int, rng.choice(num, 2, replace=False))
        ways = ["one tensor", "all but checksums"]
        if not name.startswith("version 1"):
            ways += ["tensors", "items", "model", "tokens", "dtype", "shape"]
        way = str(rng.choice(ways))
        if way == "one tensor":
            parts.swap(parts.names[0], i, j)
        elif way == "all but checksums":
            for tensor in parts.tensors.keys() - {"checksums", "items"}:
                parts.swap(tensor, i, j)
        elif way == "tensors":
            for tensor in parts.tensors.keys() - {"items"}:
                parts.swap(tensor, i, j)
        elif way == "items":
            lines = parts.lines
            lines[i], lines[j] = lines[j], lines[i]
            parts.lines = lines
        elif way == "model":
            parts.header["__metadata__"]["model"] = _MODEL[::-1]
        elif way == "tokens":  # two of one picture, with their checksums
            for tensor in parts.tensors.keys() - {"items"}:
                part = parts.tensors[tensor]
                size = len(part) // (num * parts.header[parts.names[0]]["shape"][1])
                part[:size], part[size : 2 * size] = part[size : 2 * size], part[:size]
        elif way == "dtype":
            for tensor in parts.names:
                parts.header[tensor]["dtype"] = {"F32": "F32", "BF16": "F16", "I8": "I8"}[parts.header[tensor]["dtype"]]
        else:
            for tensor in parts.names:
                *of_picture, groups, size = parts.header[tensor]["shape"]
                parts.header[tensor]["shape"] = [*of_picture, groups * 2, size // 2]
                if (scales := f"{tensor}_scales") in parts.header:
                    parts.header[scales]["shape"][-1] *= 2
                    parts.tensors[scales] *= 2
        return f"{way} of {i} and {j}", parts.together()

    def _bomb(self, rng, file: Path) -> str:
        """Items of up to 256 MiB, and holes of up to a tebibyte, with checksums that are right (but for the holes')."""
        what = str(rng.choice(["[],", "{},", "1,", "[", '\\"', '{\\"source\\": ', "\n", "{}\n", "x", "hole"]))
        pieces = int(rng.choice([1, 32, 256] if what != "hole" else [256, 1 << 20]))
        piece = b"" if what == "hole" else what.encode() * ((1 << 20) // len(what))
        size = pieces * (len(piece) or 1 << 20)
        version = str(rng.choice(["1", "2"]))  # later ones are read as 2 is
        parts = Parts(self._sound[f"version {version}, float32"])
        metadata = parts.header["__metadata__"]
        metadata.pop("checksum")

        def checksum(before: bytes) -> int:
            sum_ = zlib.crc32(before)
            for _ in range(pieces if piece else 0):
                sum_ = zlib.crc32(piece, sum_)
            return sum_

        with open(file, "wb") as stream:
            tensors = b"".join(tensor for name, tensor in parts.tensors.items() if name != "items")
            if version == "1":
                metadata["items"] = "[]"
                before, after = dumps(parts.header).split(b'[]"')
                before += b"["
                sum_ = zlib.crc32(b']"' + after, checksum(before))
                after = b']", "checksum": "%08x"' % sum_ + after
                after += b" " * (-(len(before) + size + len(after)) % 8)
                stream.write(struct.pack("<Q", len(before) + size + len(after)) + before)
            else:
                begin = len(tensors)
                parts.header["items"] |= {"shape": [size], "data_offsets": [begin, begin + size]}
                metadata["items"] = f"{checksum(b''):08x}"
                metadata["checksum"] = f"{zlib.crc32(dumps(parts.header)):08x}"
                stream.write(_framed(dumps(parts.header)) + tensors)
                after, tensors = b"", b""
            if piece:
                for _ in range(pieces):
                    stream.write(piece)
            else:
                stream.truncate(stream.tell() + size)
                stream.seek(0, os.SEEK_END)
            stream.write(after + tensors)
        return f"{size} bytes of {what!r}, version {version}"

    def _special(self, rng, file: Path) -> str:
        what = str(rng.choice(["pipe", "device", "directory", "nothing", "loop", "other", "empty"]))
        if what == "pipe":
            os.mkfifo(file)
        elif what == "device":
            file.symlink_to(str(rng.choice(["/dev/zero", "/dev/tty", "/dev/null"])))
        elif what == "directory":
            file.mkdir()
        elif what == "loop":
            file.symlink_to(file)
        elif what in ("other", "empty"):
            file.write_bytes(b"" if what == "empty" else rng.bytes(int(rng.integers(1, 2000))))
        return what

    def _read(self, file: Path, how: str, sound: MemoryBank | None, damaged: bool) -> str | None:
        """What was read although it is not what was written. Of a file whose checksums must tell, `sound` is what was
        written: a part may be read that is as it was, but not all."""
        if how in ("list", "check"):
            with contextlib.redirect_stdout(io.StringIO()) as said:
                command.show(file, how)
            lines = said.getvalue().splitlines()
            if not all(map(str.isprintable, lines)):
                return f"not printable: {lines!r:.500}"
            if sound is None or how == "list" and (lines[1:] == _listed(sound) or not damaged):
                return None  # memories alone are bound to what they are of, and `list` reads none
            return "read as if nothing were wrong"
        tokens = None
        if how == "load":
            bank = load_memory(file)
        elif how == "pieces":
            opened = MemoryFile(file)
            for _ in opened.pieces(range(len(opened))):
                pass
            bank = opened.read(range(len(opened)))
        elif how == "few":
            opened = MemoryFile(file)
            tokens = 1
            bank = opened.read(range(min(2, len(opened))), tokens)
        else:
            out = file.with_name("out.voco")
            out.unlink(missing_ok=True)
            command.merge([file, file], out)
            bank = load_memory(out)
        for item in bank.items:
            if not isinstance(item.source, str) or not isinstance(item.sha256, str):
                return f"an item of other types: {item!r:.200}"
            if item.tile is not None and not all(isinstance(number, int) for number in item.tile):
                return f"a tile that is none: {item!r:.200}"
            if item.time is not None and not (isinstance(item.time, float) and np.isfinite(item.time)):
                return f"a time that is none: {item!r:.200}"
        if sound is None or how == "few" and _same(bank, sound[:2].first_tokens(1)):
            return None
        return "read as if nothing were wrong"


def _listed(bank: MemoryBank) -> list[str]:
    lines = []
    for first, *others in (one.items for one in bank.pictures()):
        about = "" if first.time is None else f"  {format_time(first.time)}"
        about += f"  {1 + len(others)} tiles" if others else ""
        lines.append(printable(f"  {first.source}{about}  {first.sha256[:12]}"))
    return lines


def _same(a: MemoryBank, b: MemoryBank) -> bool:
    return a.items == b.items and a.model == b.model and a.dtype == b.dtype and a.kind == b.kind and all(
        x.tobytes() == y.tobytes() for x, y in zip(tensors_of(a).values(), tensors_of(b).values(), strict=True)
    )  # fmt: skip
