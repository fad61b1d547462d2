"""PyTorch's `*.bin` checkpoints, read without PyTorch and without running any code in them.

Such a file is a zip archive. A pickle in it describes the tensors; their values are uncompressed members, each with a
checksum. Python's unpickler can run code, so it is not used: this module interprets the few pickle operations that
build a dictionary of tensors, and refuses all others. https://docs.python.org/3/library/pickletools.html
"""

from collections.abc import Callable
import dataclasses
import io
import math
from pathlib import Path
import pickletools
import struct
from typing import Any, NamedTuple
import zipfile
import zlib

import numpy as np

from voco_jax.errors import UserError
from voco_jax.io.files import SourceFile, readable
from voco_jax.io.tensors import BFLOAT16, Tensor, check_shape, raw_tensor

_STORAGES = {
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": BFLOAT16,
    "DoubleStorage": np.dtype(np.float64),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
}
_DICT, _TENSOR, _PARAMETER = (
    "collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter",
)  # fmt: skip
_GLOBALS = {_DICT, _TENSOR, _PARAMETER, *(f"torch {name}" for name in _STORAGES)}

# Limits far above real files: 5,000 tensors need 250,000 operations and one megabyte
_LONGEST_PICKLE = 2**24  # bytes
_MOST_OPERATIONS = 500_000
_MOST_TENSORS = 2**16
_LONGEST_NAME = 1000  # characters
_LONGEST_DIRECTORY = 2**23  # bytes of the archive's list of members


def read_torch(path: Path) -> dict[str, Tensor]:
    """Tensors by name. UserError for a damaged file, and for anything in it but tensors of plain numbers."""
    file = SourceFile(path)
    try:
        members = _members(file)
        pickles = [name for name in members if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"expected one data.pkl in it, found {len(pickles)}")
        prefix = pickles[0].removesuffix("data.pkl")
        order = members.get(f"{prefix}byteorder")
        if order is not None and _content(file, order, 100) != b"little":
            raise ValueError("expected the byte order 'little'")
        state = _Machine(file, prefix, members).run(_content(file, members[pickles[0]], _LONGEST_PICKLE))
    except _DAMAGE as error:
        raise UserError(f"{path}: not a PyTorch checkpoint that can be read safely: {error}") from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: expected a dictionary of tensors, found {type(state).__name__}")
    if not all(isinstance(name, str) for name in state):
        raise UserError(f"{path}: expected names of tensors, found a number")
    return state


# Errors that reading a damaged archive or pickle may raise (UnicodeDecodeError is a ValueError)
_DAMAGE = (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError, EOFError)


# ---- The archive ---------------------------------------------------------------------------------------------------


class _Member(NamedTuple):
    """Where a member's bytes are. `crc` is 0 where PyTorch was told to write no checksums."""

    begin: int
    size: int
    crc: int


class _Archive:
    """A stream for `zipfile` that limits the size of the archive's directory, which `zipfile` reads at once."""

    def __init__(self, stream):
        self.seek, self.tell, self._read = stream.seek, stream.tell, stream.read

    def read(self, size: int = _LONGEST_DIRECTORY) -> bytes:
        if not 0 <= size <= _LONGEST_DIRECTORY:
            raise zipfile.BadZipFile(f"its directory has {size} bytes, expected at most {_LONGEST_DIRECTORY}")
        return self._read(size)


def _members(file: SourceFile) -> dict[str, _Member]:
    """Members by name. ValueError where two overlap or have one name, and for compressed or encrypted ones."""
    if file.read(0, min(4, file.size)) == b"\x80\x02\x8a\x0a":
        raise ValueError("it has the format of PyTorch before 1.6; load and save it with a later one")
    members, last = {}, 0
    with readable(file.path), zipfile.ZipFile(_Archive(file.stream)) as archive:
        for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
            name = info.filename
            if name in members:
                raise ValueError(f"{name} is there twice")
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 0x1 or info.compress_size != info.file_size:
                raise ValueError(f"{name} is compressed or encrypted")
            if not last <= info.header_offset <= file.size - 30:
                raise ValueError(f"{name} overlaps another member, or is not in the file")
            # The bytes begin after the member's own header, which may be longer than the directory says
            signature, flags, name_length, extra_length = struct.unpack(
                "<4s2xH18xHH", file.read(info.header_offset, 30)
            )
            begin = info.header_offset + 30 + name_length + extra_length
            stored = file.read(info.header_offset + 30, name_length) if begin <= file.size else b""
            if signature != b"PK\3\4" or flags & 0x1 or stored != name.encode("utf-8" if flags & 0x800 else "cp437"):
                raise ValueError(f"{name}: the archive's directory says something else than the member itself")
            last = begin + info.file_size
            if last > archive.start_dir:
                raise ValueError(f"{name} reaches beyond the members of the archive")
            members[name] = _Member(begin, info.file_size, info.CRC)
    return members


def _content(file: SourceFile, member: _Member, most: int) -> bytes:
    if member.size > most:
        raise ValueError(f"expected at most {most} bytes of description, found {member.size}")
    content = file.read(member.begin, member.size)
    if member.crc and zlib.crc32(content) != member.crc:
        raise ValueError("its description is damaged: another checksum")
    return content


class _Storage:
    """The values that tensors are views of: one member of the archive. Reading a tensor verifies its checksum."""

    def __init__(self, file: SourceFile, key: str, dtype: np.dtype, member: _Member):
        self.file, self.key, self.dtype, self.member = file, key, dtype, member
        self.size = member.size // dtype.itemsize
        self._sound = not member.crc

    def check(self, content: memoryview | None = None) -> None:
        """UserError where the checksum is another; `content`: all bytes, if they are in memory already."""
        if self._sound:
            return
        crc = 0
        if content is not None:
            crc = zlib.crc32(content)
        else:
            step = 2**24
            for at in range(0, self.member.size, step):
                part = self.file.read(self.member.begin + at, min(step, self.member.size - at))
                crc = zlib.crc32(part, crc)
        if crc != self.member.crc:
            raise UserError(f"{self.file.path}: storage {self.key}: damaged: another checksum than was written")
        self._sound = True

    def tensor(self, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
        reach = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) if math.prod(shape) else 0
        if max(reach, math.prod(shape)) + offset > self.size:  # strides of 0 could repeat values without end
            raise ValueError(f"a tensor of shape {shape} reaches beyond its storage")
        begin = self.member.begin + offset * self.dtype.itemsize
        row_major = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        contiguous = all(a == b for n, a, b in zip(shape, strides, row_major, strict=True) if n > 1)
        whole = contiguous and math.prod(shape) == self.size
        flat = raw_tensor(
            self.file,
            begin,
            shape if contiguous else (reach,),
            self.dtype,
            self.check if whole else lambda _: self.check(),
        )
        if contiguous:
            return flat

        def read() -> np.ndarray:
            steps = tuple(stride * self.dtype.itemsize for stride in strides)
            return np.ascontiguousarray(np.lib.stride_tricks.as_strided(flat.read(), shape, steps))

        return dataclasses.replace(flat, shape=shape, read=read)


# ---- The pickle ----------------------------------------------------------------------------------------------------


class _Global(str):
    """The name `module name` of a class or function in the pickle; one of `_GLOBALS`."""


class _Machine:
    """Interprets a pickle that builds dictionaries, lists, tuples, texts, numbers and tensors.

    Nothing named in the pickle is called: `reduce` does itself what the three functions in state dicts do.
    """

    def __init__(self, file: SourceFile, prefix: str, members: dict[str, _Member]):
        self._file, self._prefix, self._members = file, prefix, members
        self._stack: list = []
        self._marked: list[list] = []  # the stacks below each MARK
        self._memo: dict[int, object] = {}
        self._storages: dict[str, tuple] = {}
        self._num_tensors = 0

    def run(self, pickled: bytes) -> object:
        """The value that the pickle describes. ValueError for an unknown operation or wrong operands."""
        stream = io.BytesIO(pickled)
        for count, (operation, argument, _) in enumerate(pickletools.genops(stream)):
            if count > _MOST_OPERATIONS:
                raise ValueError(f"expected at most {_MOST_OPERATIONS} operations")
            if operation.name == "STOP":
                if stream.tell() != len(pickled) or len(self._stack) != 1 or self._marked:
                    raise ValueError("the description ends too early")
                return self._stack[0]
            perform = _OPERATIONS.get(operation.name)
            if perform is None:
                raise ValueError(f"operation {operation.name} is not among those that make a state dict")
            perform(self, argument)
        raise ValueError("the description does not end")

    def push(self, value: object) -> None:
        self._stack.append(value)

    def pop(self, *kinds: type):
        """The last value on the stack, which must have exactly one of these types."""
        if not self._stack:
            raise ValueError("an operation has too few values")
        value = self._stack.pop()
        if kinds and type(value) not in kinds:
            expected = " or ".join(kind.__name__.lstrip("_") for kind in kinds)
            raise ValueError(f"expected {expected}, found {type(value).__name__}")
        return value

    def pop_mark(self) -> list:
        """The values since the last MARK."""
        if not self._marked:
            raise ValueError("an operation without its MARK")
        values, self._stack = self._stack, self._marked.pop()
        return values

    def mark(self, _) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def tuple_of(self, count: int) -> None:
        self.push(tuple(reversed([self.pop() for _ in range(count)])))

    def append(self, values: list) -> None:
        target = self.pop(list)
        target.extend(values)
        self.push(target)

    def set_items(self, values: list) -> None:
        target = self.pop(dict)
        if len(values) % 2:
            raise ValueError("a name without a value")
        for name, value in zip(values[::2], values[1::2], strict=True):
            if type(name) not in (str, int) or len(str(name)) > _LONGEST_NAME:
                raise ValueError(f"expected a name of at most {_LONGEST_NAME} characters, found another key")
            if name in target:
                raise ValueError(f"{name} doubled")
            target[name] = value
        self.push(target)

    def pair(self) -> list:
        value, name = self.pop(), self.pop()
        return [name, value]

    def build(self, _) -> None:
        """Attributes of a dictionary (`_metadata`), which are dropped."""
        self.pop(dict)
        self.push(self.pop(dict))

    def memoize(self, index: int) -> None:
        self._memo[index] = self.pop()
        self.push(self._memo[index])

    def recall(self, index: int) -> None:
        if index not in self._memo:
            raise ValueError(f"there is no value {index}")
        self.push(self._memo[index])

    def find(self, name: str) -> None:
        if name not in _GLOBALS:
            name = name.replace(" ", ".")[:_LONGEST_NAME]
            raise ValueError(f"{name} is not among the things a state dict is made of")
        self.push(_Global(name))

    def find_by_stack(self, _) -> None:
        name, module = self.pop(str), self.pop(str)
        self.find(f"{module} {name}")

    def reduce(self, _) -> None:
        arguments, function = self.pop(tuple), self.pop(_Global)
        if function == _DICT and not arguments:
            self.push({})
        elif function == _PARAMETER and list(map(type, arguments)) == [Tensor, bool, dict]:
            self.push(arguments[0])
        elif function == _TENSOR and len(arguments) in (6, 7) and isinstance(arguments[0], _Storage):
            storage, offset, shape, strides, *_ = arguments
            if type(offset) is not int or offset < 0 or type(shape) is not tuple or type(strides) is not tuple:
                raise ValueError("a tensor whose offset, shape or strides have another type")
            shape, strides = check_shape(shape), check_shape(strides)
            if len(shape) != len(strides):
                raise ValueError(f"a tensor of shape {shape} and strides {strides}")
            self._num_tensors += 1
            if self._num_tensors > _MOST_TENSORS:
                raise ValueError(f"expected at most {_MOST_TENSORS} tensors")
            self.push(storage.tensor(offset, shape, strides))
        else:
            raise ValueError(f"{function.replace(' ', '.')} of other things than a state dict is made of")

    def storage(self, _) -> None:
        """A storage by its persistent id: ('storage', type, key, device, number of values)."""
        found = self.pop(tuple)
        if [*map(type, found)] != [str, _Global, str, str, int] or found[0] != "storage":
            raise ValueError("a persistent id of another form than a storage has")
        kind, key, size = found[1].removeprefix("torch "), found[2], found[4]
        if kind not in _STORAGES or len(key) > _LONGEST_NAME:
            raise ValueError("a persistent id of another form than a storage has")
        if key not in self._storages:
            member, dtype = self._members.get(f"{self._prefix}data/{key}"), _STORAGES[kind]
            if member is None or member.size != size * dtype.itemsize:
                found = "none" if member is None else f"{member.size} bytes"
                raise ValueError(f"storage {key}: expected {size} values of {dtype}, found {found}")
            self._storages[key] = (kind, size), _Storage(self._file, key, dtype, member)
        known, storage = self._storages[key]
        if known != (kind, size):
            raise ValueError(f"storage {key} is described twice, and not alike")
        self.push(storage)


_OPERATIONS: dict[str, Callable[[_Machine, Any], None]] = {  # Any: the argument's type depends on the operation
    **dict.fromkeys(("PROTO", "FRAME"), lambda machine, _: None),
    **dict.fromkeys(
        ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
        _Machine.push,
    ),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "MARK": _Machine.mark,
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_mark())),
    "APPEND": lambda machine, _: machine.append([machine.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.pop_mark()),
    "SETITEM": lambda machine, _: machine.set_items(machine.pair()),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_mark()),
    "BUILD": _Machine.build,
    "BINPUT": _Machine.memoize,
    "LONG_BINPUT": _Machine.memoize,
    "MEMOIZE": lambda machine, _: machine.memoize(len(machine._memo)),
    "BINGET": _Machine.recall,
    "LONG_BINGET": _Machine.recall,
    "GLOBAL": _Machine.find,
    "STACK_GLOBAL": _Machine.find_by_stack,
    "REDUCE": _Machine.reduce,
    "BINPERSID": _Machine.storage,
}
