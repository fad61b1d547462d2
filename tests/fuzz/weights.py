"""Files of weights, edited in their headers and damaged anywhere: safetensors and PyTorch's `.bin`.

What is read of a damaged file is compared with what the formats' own libraries read of it. Neither format can tell
that a name is another, nor safetensors that a value is: that is no fault here.
"""

import io
import json
import os
from pathlib import Path
import pickletools
import struct
import warnings
import zipfile

import numpy as np

from tests.fuzz.harness import Target
from tests.fuzz.mutations import damage, dumps, odd_json
from voco_jax.convert.torch_files import read_torch
from voco_jax.io.safetensors import read_safetensors

_SPECIAL = ("pipe", "device", "directory", "link to itself", "nothing")


def special(rng: np.random.Generator, file: Path) -> str:
    """Put what is no file, or none that is there, under a name; in words."""
    match what := str(rng.choice(_SPECIAL)):
        case "pipe":
            os.mkfifo(file)
        case "device":
            file.symlink_to(str(rng.choice(["/dev/zero", "/dev/tty", "/dev/null"])))
        case "directory":
            file.mkdir()
        case "link to itself":
            file.symlink_to(file)
    return what


def remove(file: Path) -> None:
    if file.is_dir() and not file.is_symlink():
        file.rmdir()
    else:
        file.unlink(missing_ok=True)


def values(tensors: dict) -> dict[str, tuple]:
    """What is in tensors of ours: shape, dtype and bytes by name."""
    arrays = {name: tensor.read() for name, tensor in tensors.items()}
    return {name: (array.shape, array.dtype.name, array.tobytes()) for name, array in arrays.items()}


def _torch_values(tensors: dict) -> dict[str, tuple]:
    """The same of PyTorch's."""
    import torch

    return {
        name: (tuple(x.shape), str(x.dtype).removeprefix("torch."), x.contiguous().view(torch.uint8).numpy().tobytes())
        if x.ndim
        else ((), str(x.dtype).removeprefix("torch."), x[None].view(torch.uint8).numpy().tobytes())
        for name, x in tensors.items()
    }


def _sound():
    """A few tensors of all the types that are read, a scalar and an empty one among them."""
    import torch

    torch.manual_seed(0)
    return {
        "model.layers.0.self_attn.q_proj.weight": torch.randn(8, 4),
        "model.layers.0.mlp.up_proj.weight": torch.randn(4, 8).half(),
        "model.norm.weight": torch.randn(8).bfloat16(),
        "position_ids": torch.arange(6)[None],
        "scale": torch.tensor(2.0),
        "empty": torch.zeros(0, 4),
        "wide": torch.randn(3, 2).double(),
    }


class Safetensors(Target):
    count = 2000

    def make(self, directory: Path) -> None:
        import safetensors.torch

        self.data = safetensors.torch.save(_sound(), {"format": "pt"})
        length = struct.unpack("<Q", self.data[:8])[0]
        self.header, self.body = json.loads(self.data[8 : 8 + length]), self.data[8 + length :]

    def case(self, rng, directory):
        file = directory / "model.safetensors"
        remove(file)
        kind = str(rng.choice(["edited", "doubled", "damaged", "bomb", "special"], p=[0.45, 0.05, 0.45, 0.03, 0.02]))
        data = b""
        if kind == "edited":
            what, header = odd_json(rng, self.header)
            if rng.random() < 0.3:
                what, header = "more edits", odd_json(rng, odd_json(rng, header)[1])[1]
            data = self._file(dumps(header))
        elif kind == "doubled":
            name = str(rng.choice(list(self.header)))
            what, text = f"{name} twice", dumps(self.header)
            data = self._file(text[:-1] + b"," + dumps({name: self.header[name]})[1:])
        elif kind == "damaged":
            what, data = damage(rng, self.data)
        elif kind == "bomb":
            what = str(rng.choice(["{},", "[],", '"x",', "1,", '{"a":{"b":[]}},', "[" * 50 + "]" * 50 + ","]))
            text = b'{"x": [' + what.encode() * (int(rng.choice([2**22, 2**23 - 100, 2**26])) // len(what)) + b"0]}"
            data = self._file(text)
        else:
            what = special(rng, file)
        if data:
            file.write_bytes(data)
        return f"{kind}: {what}", lambda: self._read(file, data)

    def _file(self, text: bytes) -> bytes:
        return struct.pack("<Q", len(text)) + text + self.body

    def _read(self, file: Path, data: bytes) -> str | None:
        import safetensors.torch

        found = values(read_safetensors(file))
        try:
            expected = _torch_values(safetensors.torch.load(data))
        except Exception as error:  # whatever it is, the library does not read this file
            return f"the library refuses it: {error}"
        return None if found == expected else "the library reads other values"


class Torch(Target):
    count = 2000

    # Operations that hostile pickles would have carried out, and values that nobody expects
    _CHUNKS = (
        b"cposix\nsystem\n", b"cbuiltins\neval\n", b"ctorch\nFloatStorage\n", b"ccollections\nOrderedDict\n",
        b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_parameter\n", b"cnumpy\nndarray\n", b"R",
        b"b",
        b"s", b"u", b"a", b"e", b"t", b"\x85", b"\x86", b"\x87", b"(", b"0", b"1", b"2", b"N", b"\x88", b"\x89", b"}",
        b"]", b")", b"Q", b".", b"\x81", b"\x92", b"\x93", b"\x94", b"q\x00", b"h\x00", b"h\xff",
        b"r\xff\xff\xff\x7f", b"j\xff\xff\xff\x7f", b"K\x05", b"J\xff\xff\xff\xff", b"J\xff\xff\xff\x7f",
        b"G" + struct.pack(">d", float("nan")), b"G" + struct.pack(">d", float("inf")), b"G" + struct.pack(">d", 2.0),
        b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"\x8a\xff" + b"\x7f" * 255, b"X\x03\x00\x00\x00a\nb",
        b"X\x01\x00\x00\x000", b"X\xff\xff\xff\x7f", b"\x8d" + b"\xff" * 7 + b"\x7f", b"I1\n", b"L1L\n", b"V\\u0000\n",
        b"Pstorage\n", b"ioperator\nadd\n", b"o", b"d", b"l", b"\x8f", b"\x95" + b"\xff" * 8, b"\x80\x7f", b"\x82\x01",
        b"\x96" + b"\xff" * 7 + b"\x7f", b"h\x00h\x00\x86q\x00" * 60,
    )  # fmt: skip

    def make(self, directory: Path) -> None:
        import torch

        kept, module = _sound(), torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
        whole = torch.arange(24.0).reshape(4, 6)
        states = [kept, module.state_dict(), {"state_dict": module.state_dict(), "epoch": 3, "lr": [0.1, 0.2]}]
        states += [dict(module.named_parameters()), {"a": whole, "b": whole.T, "c": whole[1:, ::2]}]
        self.files, self.values = [], []
        for i, state in enumerate(states):
            for protocol in (2, 4):
                written = io.BytesIO()
                torch.save(state, written, pickle_protocol=protocol)
                self.files.append(written.getvalue())
                self.values.append(_torch_values({k: v.detach() for k, v in state.get("state_dict", state).items()}))
            if not i:
                torch.save(state, written := io.BytesIO(), _use_new_zipfile_serialization=False)
                self.legacy = written.getvalue()

    def case(self, rng, directory):
        file = directory / "pytorch_model.bin"
        remove(file)
        kinds = ["edited", "damaged pickle", "archive", "damaged", "bomb", "special"]
        kind = str(rng.choice(kinds, p=[0.4, 0.1, 0.1, 0.35, 0.03, 0.02]))
        at = int(rng.integers(len(self.files)))
        data = self.files[at]
        if kind == "edited":
            what, data = self._edited(rng, data)
        elif kind == "damaged pickle":
            pickled = self._pickle(data)
            what, pickled = damage(rng, pickled)
            data = self._archive(data, pickled)
        elif kind == "archive":
            what, data = self._other_archive(rng, data)
        elif kind == "damaged":
            what, data = damage(rng, data if rng.random() < 0.98 else self.legacy)
        elif kind == "bomb":
            what, data = self._bomb(rng, data)
        else:
            data, what = b"", special(rng, file)
        if data:
            file.write_bytes(data)
        sound = self.values[at] if kind == "damaged" else None
        return f"{kind}: {what}", lambda: self._read(file, data, sound)

    def _pickle(self, data: bytes) -> bytes:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))

    def _archive(self, data: bytes, pickled: bytes, *, compression=zipfile.ZIP_STORED, change=None) -> bytes:
        """The same archive with another pickle."""
        written = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(written, "w") as new, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that are there twice
            for info in old.infolist():
                is_pickle = info.filename.endswith("data.pkl")
                content = pickled if is_pickle else old.read(info)
                for name in [info.filename] if change is None else change(info.filename):
                    new.writestr(name, content, compression if is_pickle else zipfile.ZIP_STORED)
        return written.getvalue()

    def _edited(self, rng, data: bytes) -> tuple[str, bytes]:
        """One to three operations removed, doubled, exchanged, or another's put in their place."""
        pickled = self._pickle(data)
        places = [at for _, _, at in pickletools.genops(pickled)]
        chunks = [pickled[a:b] for a, b in zip(places, [*places[1:], len(pickled)], strict=True)]
        edits = []
        for _ in range(int(rng.choice([1, 1, 1, 2, 3]))):
            at, other = (int(rng.integers(1, len(chunks))) for _ in range(2))
            edit = str(rng.choice(["remove", "double", "exchange", "replace", "replace", "insert", "insert"]))
            edits.append(f"{edit} {chunks[at][:20]!r} at {at}")
            chunk = self._CHUNKS[rng.integers(len(self._CHUNKS))]
            match edit:
                case "remove":
                    chunks[at] = b""
                case "double":
                    chunks[at] *= 2
                case "exchange":
                    chunks[at], chunks[other] = chunks[other], chunks[at]
                case "replace":
                    chunks[at] = chunk
                case "insert":
                    chunks[at] = chunk + chunks[at]
        return ", ".join(edits), self._archive(data, b"".join(chunks))

    def _other_archive(self, rng, data: bytes) -> tuple[str, bytes]:
        pickled = self._pickle(data)
        match what := str(rng.choice(["twice", "elsewhere", "compressed", "flags", "directory", "offset", "no sum"])):
            case "twice":
                return what, self._archive(data, pickled, change=lambda name: [name] * (1 + (rng.random() < 0.3)))
            case "elsewhere":
                place = str(rng.choice(["/etc/", "../", "", "x/", "\0", "é/"]))
                return what, self._archive(data, pickled, change=lambda name: [place + name])
            case "compressed":
                return what, self._archive(data, pickled, compression=zipfile.ZIP_DEFLATED)
            case "directory":
                return what, self._archive(data, pickled, change=lambda name: [name, name.split("/")[0] + "/"])
        # A field of the directory or of a member's own header: flags, sum, sizes, lengths, offset
        changed, mark = bytearray(data), bytes(rng.choice([b"PK\1\2", b"PK\3\4", b"PK\5\6", b"PK\6\6"]))
        places = [i for i in range(len(data)) if data.startswith(mark, i)] or [0]
        at = places[rng.integers(len(places))] + int(rng.integers(4, 46))
        number = int(rng.choice([0, 1, 8, 99, 255, 2**16 - 1, 2**32 - 1]))
        changed[at : at + 2] = (number % 2**16).to_bytes(2, "little")
        return f"{number} at {at}", bytes(changed)

    def _bomb(self, rng, data: bytes) -> tuple[str, bytes]:
        bombs = {
            "dictionaries": b"}", "lists": b"]", "marks": b"(", "texts": b"X\0\0\0\0", "floats": b"G" + b"x" * 8,
            "memo": b"\x94", "tuples": b"h\x00h\x00\x86q\x00", "numbers": b"\x8a\x04abcd",
            "storages": b"ctorch\nFloatStorage\n",
            "far memo": b"r\0\0\0\x7f", "of far memo": b"r\0\0\0\x30}", "nested": b"\x85", "appended": b"Na",
        }  # fmt: skip
        what = str(rng.choice(list(bombs)))
        begin = b"\x80\x02]q\x00" if what in ("memo", "tuples", "far memo", "nested", "appended") else b"\x80\x02"
        length = int(rng.choice([2**20, 2**24 - 100, 2**26]))
        pickled = begin + bombs[what] * (length // len(bombs[what])) + b"."
        compression = zipfile.ZIP_DEFLATED if rng.random() < 0.5 else zipfile.ZIP_STORED
        return f"{what}, {length} bytes", self._archive(data, pickled, compression=compression)

    def _read(self, file: Path, data: bytes, sound: dict[str, tuple] | None) -> str | None:
        """`sound`: what it held before bytes of it were damaged, which the archive's checksums tell."""
        import torch

        found = values(read_torch(file))
        if sound is not None:
            return None if found == sound else "other values than were written"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                state = torch.load(io.BytesIO(data), weights_only=True)
        except Exception:  # whatever it is, PyTorch does not read this file, as none of a later protocol
            return None
        state = state["state_dict"] if isinstance(state.get("state_dict"), dict) else state
        return None if found == _torch_values(state) else "PyTorch reads other values"
