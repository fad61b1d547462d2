"""GGUF files, edited key by key and tensor by tensor and damaged anywhere: what the converter makes of them.

The format has no checksums: that a number, a word or a weight is another one cannot be told. All else can: types,
counts, lengths, where the tensors lie, and what must fit together.
"""

import dataclasses
import json
from pathlib import Path
import struct

import gguf
import numpy as np

from tests.fuzz.harness import Target
from tests.fuzz.mutations import damage
from tests.fuzz.weights import remove, special, values
from voco_jax.convert.gguf_files import gguf_tokenizer
from voco_jax.convert.inspect import problems_of
from voco_jax.convert.sources import open_parts
from voco_jax.errors import UserError

_Kind = gguf.GGUFValueType
_NUMBERS = {
    _Kind.UINT8: "<B", _Kind.INT8: "<b", _Kind.UINT16: "<H", _Kind.INT16: "<h", _Kind.UINT32: "<I", _Kind.INT32: "<i",
    _Kind.FLOAT32: "<f", _Kind.BOOL: "<?", _Kind.UINT64: "<Q", _Kind.INT64: "<q", _Kind.FLOAT64: "<d",
}  # fmt: skip
_HUGE = (2**16, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)


def _text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def payload_of(kind: int, value) -> bytes:
    """A value's bytes; lists are arrays of (their items' type, the items)."""
    if kind == _Kind.STRING:
        return _text(value if isinstance(value, bytes) else value.encode())
    if kind == _Kind.ARRAY:
        of, items = value
        return struct.pack("<IQ", of, len(items)) + b"".join(payload_of(of, item) for item in items)
    return struct.pack(_NUMBERS[kind], value)


@dataclasses.dataclass
class _File:
    """`keys`: (name, type, payload); `tensors`: (name, dimensions, type, data); None for what follows from them."""

    keys: list[tuple[bytes, int, bytes]]
    tensors: list[tuple[bytes, list[int], int, bytes]]
    version: int = 3
    num_keys: int | None = None
    num_tensors: int | None = None
    offsets: dict[int, int] = dataclasses.field(default_factory=dict)  # by the tensor's number, where it is another
    dimensions: dict[int, int] = dataclasses.field(default_factory=dict)

    def write(self, free: list[tuple[int, int]] | None = None) -> bytes:
        """The file; to `free` is added where in it begin and end numbers, words and weights that may be others."""
        counts = [self.num_tensors, self.num_keys]
        counts = [len(x) if n is None else n for n, x in zip(counts, (self.tensors, self.keys), strict=True)]
        data = bytearray(b"GGUF" + struct.pack("<IQQ", self.version, *counts))
        for name, kind, payload in self.keys:
            data += _text(name) + struct.pack("<I", kind)
            if free is not None:
                free += [(len(data) + a, len(data) + b) for a, b in _free(name.decode(), kind, payload)]
            data += payload
        place = 0
        for i, (name, dimensions, kind, content) in enumerate(self.tensors):
            data += _text(name) + struct.pack("<I", self.dimensions.get(i, len(dimensions)))
            data += b"".join(struct.pack("<Q", n % 2**64) for n in dimensions)
            data += struct.pack("<IQ", kind, self.offsets.get(i, place) % 2**64)
            place += len(content) + -len(content) % 32
        data += bytes(-len(data) % 32)
        if free is not None:
            free.append((len(data), len(data) + place))
        for *_, content in self.tensors:
            data += content + bytes(-len(content) % 32)
        return bytes(data)


def _free(key: str, kind: int, payload: bytes) -> list[tuple[int, int]]:
    """Of a value's bytes, those of numbers and words that nothing else in a file contradicts."""
    if kind == _Kind.STRING:
        return [(8, len(payload))]
    if kind == _Kind.ARRAY:
        of, count = struct.unpack_from("<IQ", payload)
        if of != _Kind.STRING:
            return [(12, len(payload))]
        places, at = [], 12
        for _ in range(count):
            (length,) = struct.unpack_from("<Q", payload, at)
            places.append((at + 8, at + 8 + length))
            at += 8 + length
        return places
    lone = ("context_length", "epsilon", "freq_base", "vocab_size", "file_type", "token_id")
    return [(0, len(payload))] if key.endswith(lone) else []


def sound_file() -> _File:
    """A model of two layers, in several types, with a byte-pair tokenizer."""
    from tests.helpers.tokenizer_kinds import byte_level

    rng = np.random.default_rng(0)
    state = json.loads(byte_level().to_str())["model"]
    tokens = [token.encode() for token in sorted(state["vocab"], key=state["vocab"].get)]
    types = [3 if token in (b"<s>", b"</s>") else 1 for token in tokens]
    pairs = [" ".join(pair).encode() for pair in state["merges"]]
    keys = [
        ("general.architecture", _Kind.STRING, "llama"),
        ("general.name", _Kind.STRING, "a model"),
        ("general.file_type", _Kind.UINT32, 7),
        ("llama.context_length", _Kind.UINT32, 256),
        ("llama.embedding_length", _Kind.UINT32, 32),
        ("llama.block_count", _Kind.UINT32, 2),
        ("llama.feed_forward_length", _Kind.UINT32, 64),
        ("llama.attention.head_count", _Kind.UINT32, 4),
        ("llama.attention.head_count_kv", _Kind.UINT32, 2),
        ("llama.attention.layer_norm_rms_epsilon", _Kind.FLOAT32, 1e-5),
        ("llama.rope.freq_base", _Kind.FLOAT32, 50000.0),
        ("llama.rope.dimension_count", _Kind.UINT32, 8),
        ("llama.vocab_size", _Kind.UINT32, len(tokens)),
        ("tokenizer.ggml.model", _Kind.STRING, "gpt2"),
        ("tokenizer.ggml.pre", _Kind.STRING, "smollm"),
        ("tokenizer.ggml.tokens", _Kind.ARRAY, (_Kind.STRING, tokens)),
        ("tokenizer.ggml.token_type", _Kind.ARRAY, (_Kind.INT32, types)),
        ("tokenizer.ggml.merges", _Kind.ARRAY, (_Kind.STRING, pairs)),
        ("tokenizer.ggml.bos_token_id", _Kind.UINT32, tokens.index(b"<s>")),
        ("tokenizer.ggml.eos_token_id", _Kind.UINT32, tokens.index(b"</s>")),
        ("tokenizer.ggml.add_bos_token", _Kind.BOOL, True),
    ]
    Q = gguf.GGMLQuantizationType
    shapes = {"token_embd": (len(tokens), 32, Q.F16), "output_norm": (32, Q.F32), "output": (len(tokens), 32, Q.Q8_0)}
    for i in range(2):
        shapes |= {f"blk.{i}.attn_norm": (32, Q.F32), f"blk.{i}.ffn_norm": (32, Q.F32)}
        shapes |= {f"blk.{i}.attn_q": (32, 32, Q.Q4_0), f"blk.{i}.attn_k": (16, 32, Q.Q8_0)}
        shapes |= {f"blk.{i}.attn_v": (16, 32, Q.F16), f"blk.{i}.attn_output": (32, 32, Q.BF16)}
        shapes |= {f"blk.{i}.ffn_gate": (64, 32, Q.Q5_1), f"blk.{i}.ffn_up": (64, 32, Q.F32)}
        shapes |= {f"blk.{i}.ffn_down": (32, 64, Q.Q4_1)}
    tensors = []
    for name, (*shape, kind) in shapes.items():
        content = gguf.quants.quantize(rng.normal(size=shape).astype(np.float32), kind).tobytes()
        tensors.append((f"{name}.weight".encode(), shape[::-1], int(kind), content))
    return _File([(name.encode(), int(kind), payload_of(kind, value)) for name, kind, value in keys], tensors)


class GGUF(Target):
    count = 2000

    def make(self, directory: Path) -> None:
        self.sound = sound_file()
        self.free = []
        self.data = self.sound.write(self.free)
        (directory / "sound.gguf").write_bytes(self.data)
        self.content = self._content(directory / "sound.gguf")

    def case(self, rng, directory):
        file = directory / "x.gguf"
        remove(file)
        kind = str(
            rng.choice(["key", "tensor", "count", "damaged", "bomb", "special"], p=[0.3, 0.2, 0.05, 0.4, 0.03, 0.02])
        )
        data, may_differ = b"", False
        if kind in ("key", "tensor", "count"):
            changed = dataclasses.replace(
                self.sound, keys=[*self.sound.keys], tensors=[*self.sound.tensors], offsets={}, dimensions={}
            )
            what, may_differ = getattr(self, f"_{kind}")(rng, changed)
            data = changed.write()
        elif kind == "damaged":
            # Two thirds in the header, of which a file is otherwise a small part
            end = len(self.data) if rng.random() < 0.3 else self.free[-1][0]
            what, data = damage(rng, self.data[:end])
            data += self.data[end:]
            may_differ = self._only_free(data)
        elif kind == "bomb":
            what, data = self._bomb(rng)
        else:
            what = special(rng, file)
        if data:
            file.write_bytes(data)
        return f"{kind}: {what}", lambda: self._read(file, may_differ)

    def _only_free(self, data: bytes) -> bool:
        """Whether only numbers, words and weights differ that nothing contradicts."""
        if len(data) != len(self.data):
            return False
        places = np.flatnonzero(np.frombuffer(data, np.uint8) != np.frombuffer(self.data, np.uint8))
        return all(any(a <= place < b for a, b in self.free) for place in places.tolist())

    def _key(self, rng, file: _File) -> tuple[str, bool]:
        """One key edited; and whether the file may then be another sound one."""
        at = int(rng.integers(len(file.keys)))
        name, kind, payload = file.keys[at]
        edits = ["removed", "doubled", "type", "number", "text", "count", "shorter", "nested", "name", "length", "more"]
        what = str(rng.choice(edits))
        may_differ = False
        match what:
            case "removed":
                del file.keys[at]
                may_differ = True
            case "doubled":
                file.keys.insert(int(rng.integers(len(file.keys))), file.keys[at])
            case "type":
                kind = int(rng.choice([*range(14), 255, 2**31]))
                if kind in _NUMBERS and file.keys[at][1] in _NUMBERS:
                    (value,) = struct.unpack(_NUMBERS[file.keys[at][1]], payload)
                    payload = payload_of(kind, float(value) if _NUMBERS[kind] in ("<f", "<d") else int(value) % 128)
                    may_differ = name.endswith((b"context_length", b"vocab_size", b"token_id"))
            case "number" if kind in _NUMBERS:
                kind = int(rng.choice([_Kind.UINT32, _Kind.INT32, _Kind.UINT64, _Kind.FLOAT32, _Kind.FLOAT64]))
                numbers = [0, 1, 3, 2**16, 2**31 - 1]
                if kind in (_Kind.FLOAT32, _Kind.FLOAT64):
                    numbers = [0.0, -1.0, float("nan"), float("inf"), 1e30, 2.0]
                elif kind == _Kind.UINT64:
                    numbers = [2**31, 2**64 - 1]
                elif kind == _Kind.INT32:
                    numbers = [-1, -(2**31)]
                payload = payload_of(kind, numbers[rng.integers(len(numbers))])
                may_differ = bool(_free(name.decode(), kind, payload))
            case "text":
                texts = [b"", b"\xff\xfe", b"\x1b[2J\n", b"llama", b"x" * 100_000, b"\0", "\u202e".encode(), b"gpt2"]
                kind, payload = int(_Kind.STRING), _text(texts[rng.integers(len(texts))])
                may_differ = name in (b"general.name", b"tokenizer.ggml.add_bos_token")
            case "count" if kind == _Kind.ARRAY:
                of, count = struct.unpack_from("<IQ", payload)
                counts = [0, count - 1, count + 1, *_HUGE]
                payload = struct.pack("<IQ", of, counts[rng.integers(len(counts))]) + payload[12:]
            case "shorter" if kind == _Kind.ARRAY:
                of, count = struct.unpack_from("<IQ", payload)
                payload = payload_of(kind, (of, []))
                may_differ = name.endswith(b"merges")
            case "nested":
                depth, kind = int(rng.choice([1, 2, 1000])), int(_Kind.ARRAY)
                payload = struct.pack("<IQ", _Kind.ARRAY, 1) * depth + struct.pack("<IQI", _Kind.UINT32, 1, 1)
            case "name":
                names = [b"", b"\x1b[31m", b"a" * 70_000, "é".encode(), name[:-1] + b"~", b"~" + name[1:], name + b" "]
                name = names[rng.integers(len(names))]
            case "length" if kind == _Kind.STRING:
                payload = struct.pack("<Q", int(rng.choice([2**31, 2**40, 2**62]))) + payload[8:]
            case _:
                keys = [
                    "general.alignment",
                    "llama.rope.scaling.factor",
                    "llama.attention.key_length",
                    "llama.of_tomorrow",
                ]
                name, kind = str(rng.choice(keys)).encode(), int(_Kind.UINT32)
                payload = payload_of(kind, int(rng.choice([0, 1, 3, 64, 2**20, 2**31])))
                file.keys.append(file.keys[at])
        if what not in ("removed", "doubled"):
            file.keys[at] = name, kind, payload
        return f"{what} {name[:60]!r} {kind} {payload[:16]!r}", may_differ

    def _tensor(self, rng, file: _File) -> tuple[str, bool]:
        """As `_key`."""
        at, other = (int(rng.integers(len(file.tensors))) for _ in range(2))
        name, dimensions, kind, content = file.tensors[at]
        what = str(
            rng.choice(["offset", "dimensions", "number", "type", "name", "removed", "doubled", "order", "rows"])
        )
        match what:
            case "offset":
                place = sum(len(t[3]) + -len(t[3]) % 32 for t in file.tensors[:at])
                file.offsets[at] = place + int(rng.choice([-32, -1, 1, 32, 64, -place, 2**31, 2**62]))
            case "dimensions":
                dimensions = [*dimensions]
                sizes = [0, 1, 2**31, 2**32, 2**63, 2**64 - 1, dimensions[0] * 2, dimensions[0] // 2]
                dimensions[rng.integers(len(dimensions))] = sizes[rng.integers(len(sizes))]
            case "number":
                file.dimensions[at] = int(rng.choice([0, 1, 3, 4, 5, 2**31]))
            case "type":
                kind = int(rng.choice([*range(45), 255, 2**31]))
            case "name":
                names = [
                    b"", b"x" * 64, b"blk.0", b"blk.0.a.b.c.weight", b"..", b"blk.0.attn_q", b"blk.99.attn_q.weight",
                    b"blk.00.attn_q.weight", b"blk.-1.attn_q.weight", b"model.norm.weight", b"\x1b[2J", name + b".x",
                    file.tensors[other][0], b"rope_freqs.weight", b"blk." + b"9" * 50 + b".attn_q.weight",
                ]  # fmt: skip
                name = names[rng.integers(len(names))]
            case "removed":
                file.tensors.pop(at)
            case "doubled":
                file.tensors.insert(other, file.tensors[at])
            case "order":  # they lie in another order than they are described in
                file.offsets[at], file.offsets[other] = 32, 0
            case "rows":
                rows = len(content) // dimensions[-1] if len(dimensions) == 2 else 4
                dimensions, content = [*dimensions[:-1], dimensions[-1] - 1], content[:-rows]
        if what not in ("removed", "doubled"):
            file.tensors[at] = name, dimensions, kind, content
        tied = what == "removed" and name == b"output.weight"
        return f"{what} of {name[:60]!r}: {dimensions}, {kind}, {file.offsets}, {file.dimensions}", tied

    def _count(self, rng, file: _File) -> tuple[str, bool]:
        what = str(rng.choice(["num_keys", "num_tensors", "version"]))
        counts = [0, 1, 2, len(file.keys) - 1, len(file.keys) + 1, len(file.tensors) - 1, len(file.tensors) + 1, *_HUGE]
        number = (
            int(rng.choice([0, 1, 4, 3 << 24, 2**32 - 1])) if what == "version" else counts[rng.integers(len(counts))]
        )
        setattr(file, what, number)
        return f"{what} {number}", False

    def _bomb(self, rng) -> tuple[str, bytes]:
        size = int(rng.choice([2**22, 2**26 - 4096, 2**27]))
        what = str(rng.choice(["texts", "short texts", "bytes", "numbers", "keys", "flags"]))
        changed = dataclasses.replace(self.sound, keys=[*self.sound.keys])
        if what == "keys":
            changed.keys += [(b"a.%x" % i, int(_Kind.UINT8), b"\0") for i in range(min(size // 20, 2**17))]
        else:
            of, item = {
                "texts": (_Kind.STRING, _text(b"")), "short texts": (_Kind.STRING, _text(b"ab")),
                "bytes": (_Kind.UINT8, b"\xff"), "numbers": (_Kind.FLOAT64, b"abcdefgh"), "flags": (_Kind.BOOL, b"\1"),
            }[what]  # fmt: skip
            count = size // len(item)
            name = bytes(rng.choice([b"general.tags", b"tokenizer.ggml.tokens", b"tokenizer.ggml.merges"]))
            changed.keys = [key for key in changed.keys if key[0] != name]
            changed.keys.append((name, int(_Kind.ARRAY), struct.pack("<IQ", of, count) + item * count))
        if rng.random() < 0.5:
            changed.tensors = []
        return f"{what}, {size} bytes", changed.write()

    def _content(self, file: Path) -> tuple:
        """Everything that the converter takes from a file."""
        source = open_parts(file)
        if problems := problems_of(source):
            raise UserError(f"{file}: {problems[0]}")
        tokenizer = gguf_tokenizer(file)
        return (
            source.llama,
            values({str(key): tensor for key, tensor in source.tensors.items()}),
            tokenizer.backend_tokenizer.to_str(),
            tokenizer.special_tokens_map,
        )

    def _read(self, file: Path, may_differ: bool) -> str | None:
        found = self._content(file)
        if may_differ or found == self.content:
            return None
        names = ("dimensions", "tensors", "tokenizer", "special tokens")
        differ = [name for name, a, b in zip(names, found, self.content, strict=True) if a != b]
        return f"other {', '.join(differ)} than were written"
