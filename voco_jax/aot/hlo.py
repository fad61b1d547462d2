"""Compiled HLO text, read: computations, instructions, shapes, and how often each loop turns.

Written against what libtpu prints for scheduled modules (`compiled.as_text()`). Reading 10 MB takes about a second.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
import math
import re

BITS = {"pred": 8, "token": 0, "opaque": 0}  # bits of an element; of all others the name tells
ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
OPCODE = re.compile(r" ([a-z][\w\-]*)\(")
BRACKET = re.compile(r"[()]")
NAME = re.compile(r"%([^\s,(){}]+)")
END = re.compile(r"\}(, execution_thread=\S*)?")  # of a computation; the SparseCores of a v5p have threads of their own
MAX_TURNS = 1_000_000


class HLOError(ValueError):
    """HLO text that this module cannot read. Guessing would make the estimate wrong without a word."""


@dataclass(frozen=True, slots=True)
class Array:
    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """Without the padding of its layout."""
        bits = BITS.get(self.dtype)
        if bits is None:
            digits = re.search(r"\d+", self.dtype)
            if digits is None:
                raise HLOError(f"element type {self.dtype!r} is unknown")
            bits = int(digits[0])
        return self.size * bits / 8


@dataclass(slots=True)
class Instruction:
    name: str
    opcode: str
    shape: str  # as printed, layouts included
    operands: tuple[str, ...]
    literal: str  # what is between the parentheses: a constant's value, a parameter's number
    attributes: str

    @property
    def arrays(self) -> list[Array]:
        """The shape's arrays, those of a tuple one after the other."""
        return [
            Array(dtype, tuple(map(int, dims.split(","))) if dims else ()) for dtype, dims in ARRAY.findall(self.shape)
        ]

    @property
    def bytes(self) -> float:
        return sum(array.bytes for array in self.arrays)

    def called(self, *attributes: str) -> list[str]:
        """Names of the computations in `calls=%f`, `branch_computations={%f, %g}` …, of the first one there is."""
        for attribute in attributes:
            match = re.search(rf"\b{attribute}=(?:\{{([^}}]*)\}}|%([^\s,]+))", self.attributes)
            if match:
                return NAME.findall(match[1]) if match[1] is not None else [match[2]]
        return []

    @property
    def index(self) -> int:
        """Of a get-tuple-element."""
        return int(attribute(r"\bindex=(\d+)", self)[1])

    @property
    def op_name(self) -> str:
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""


def attribute(pattern: str, instruction: Instruction) -> re.Match[str]:
    """What an instruction's attributes say of a pattern; HLOError where they do not."""
    match = re.search(pattern, instruction.attributes)
    if match is None:
        raise HLOError(
            f"{instruction.opcode} {instruction.name}: expected {pattern} in {instruction.attributes!r:.200}"
        )
    return match


@dataclass
class Computation:
    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: Instruction = field(init=False)

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(i.literal): i for i in self.instructions.values() if i.opcode == "parameter"}

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = {}
        for instruction in self.instructions.values():
            for operand in instruction.operands:
                users.setdefault(operand, []).append(instruction)
        return users

    def operands(self, instruction: Instruction) -> list[Instruction]:
        return [self.instructions[name] for name in instruction.operands]

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())


@dataclass
class Module:
    computations: dict[str, Computation]
    entry: Computation
    num_partitions: int
    sources: Mapping[str, str]  # stack frame → 'llama.py:88'

    def source(self, instruction: Instruction) -> str:
        """File and line that an instruction comes from, '' where the text does not say."""
        match = re.search(r"stack_frame_id=(\d+)", instruction.attributes)
        return self.sources.get(match[1], "") if match else ""


def parse(text: str) -> Module:
    """HLO text to a Module; HLOError for other text."""
    computations: dict[str, Computation] = {}
    entry = current = None
    for line in _logical_lines(text):
        if current is None:
            if line.endswith("{") and (match := re.match(r"(ENTRY )?%?([^\s(]+) \(", line)):
                current = computations[match[2]] = Computation(match[2])
                entry = current if match[1] else entry
        elif END.fullmatch(line):
            current = None
        else:
            instruction, is_root = _parse_instruction(line)
            current.instructions[instruction.name] = instruction
            if is_root:
                current.root = instruction
    if entry is None:
        raise HLOError("no ENTRY computation in the HLO text")
    partitions = re.search(r"\bnum_partitions=(\d+)", text[:100_000])
    return Module(computations, entry, int(partitions[1]) if partitions else 1, _sources(text))


def _logical_lines(text: str) -> Iterator[str]:
    """Lines; an instruction whose attributes hold line breaks (a Mosaic kernel's metadata) is one."""
    pending = None
    for line in text.splitlines():
        if line.startswith(("  %", "  ROOT ")):
            if pending is not None:
                yield pending
            pending = line
        elif pending is None:
            yield line
        elif END.fullmatch(line):
            yield pending
            yield line
            pending = None
        else:
            pending += line


def _parse_instruction(line: str) -> tuple[Instruction, bool]:
    left, _, right = line.partition(" = ")
    match = OPCODE.search(right)
    if match is None:
        raise HLOError(f"expected an instruction, found {line[:120]!r}")
    start = end = match.end()
    depth = 1
    while depth:
        next_bracket = BRACKET.search(right, end)
        if next_bracket is None:
            raise HLOError(f"parentheses do not match: {line[:120]!r}")
        depth += 1 if next_bracket[0] == "(" else -1
        end = next_bracket.end()
    inside = right[start : end - 1]
    is_root = left.startswith("  ROOT ")
    return (
        Instruction(
            name=left.removeprefix("  ROOT").strip().removeprefix("%"),
            opcode=match[1],
            shape=right[: match.start()],
            operands=tuple(NAME.findall(inside)) if "%" in inside else (),
            literal=inside,
            attributes=right[end:],
        ),
        is_root,
    )


def _sources(text: str) -> dict[str, str]:
    """The tables FileNames, FileLocations and StackFrames before the first computation."""

    def table(title: str) -> dict[str, str]:
        match = re.search(rf"^{title}\n((?:\d+ .*\n)+)", text, re.MULTILINE)
        return dict(line.split(" ", 1) for line in match[1].splitlines()) if match else {}

    def number(key: str, row: str) -> str:
        match = re.search(rf"\b{key}=(\d+)", row)
        return match[1] if match else ""

    files, locations = table("FileNames"), table("FileLocations")
    sources = {}
    for frame, row in table("StackFrames").items():
        location = locations.get(number("file_location_id", row), "")
        file = files.get(number("file_name_id", location), "").strip('"').rsplit("/", 1)[-1]
        if file:
            sources[frame] = f"{file}:{number('line', location)}"
    return sources


@dataclass(frozen=True)
class Frame:
    """A computation and the instruction that calls it, so that what comes in from outside can be looked up there."""

    computation: Computation
    caller: Instruction | None = None
    outer: "Frame | None" = None
    state: Mapping[int, int] = field(default_factory=dict)  # carried values, where the caller is a loop being counted


ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "maximum": max,
    "minimum": min,
    "and": lambda a, b: a & b,
}
COMPARE = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
}
TRANSPARENT = {"copy", "bitcast", "convert", "reshape", "copy-start", "copy-done", "bitcast-convert"}


class Unknown(Exception):
    """A value that does not follow from the text."""


def trip_count(module: Module, loop: Instruction, frame: Frame) -> int:
    """How many turns a while loop in `frame` takes: only its counters are computed.

    The condition names the carried values it depends on; their initial values come from outside, through any number of
    enclosing loops, and their next ones from the body. HLOError where one of these is not in the text.
    """
    body = module.computations[loop.called("body")[0]]
    condition = module.computations[loop.called("condition")[0]]
    initial = frame.computation.instructions[loop.operands[0]]
    try:
        state = {}
        needed = [_carried(condition, condition.root)]
        while needed:
            for index in needed.pop():
                if index not in state and not _is_invariant(body, index):
                    state[index] = _element(module, initial, index, frame)
                    needed.append(_carried(body, _root_element(body, index)))
        turns = 0
        while _value(module, condition.root, Frame(condition, loop, frame, state)):
            inside = Frame(body, loop, frame, state)
            state = {index: _value(module, _root_element(body, index), inside) for index in state}
            turns += 1
            if turns > MAX_TURNS:
                raise Unknown("it does not end")
    except Unknown as error:
        raise HLOError(f"loop {loop.name} ({loop.op_name}): its bound cannot be read: {error}") from None
    return turns


def _root_element(computation: Computation, index: int) -> Instruction:
    if computation.root.opcode != "tuple":
        raise Unknown(f"root of {computation.name} is a {computation.root.opcode}")
    return computation.instructions[computation.root.operands[index]]


def _is_invariant(body: Computation, index: int) -> bool:
    """The loop hands this value on as it came in."""
    instruction = _root_element(body, index)
    while instruction.opcode in TRANSPARENT:
        instruction = body.instructions[instruction.operands[0]]
    if instruction.opcode != "get-tuple-element" or instruction.index != index:
        return False
    return body.instructions[instruction.operands[0]].opcode == "parameter"


def _carried(computation: Computation, instruction: Instruction) -> set[int]:
    """Indices of the loop's carried values that an instruction of its condition or body depends on."""
    seen: set[str] = set()
    found: set[int] = set()
    stack = [instruction]
    while stack:
        at = stack.pop()
        if at.name in seen:
            continue
        seen.add(at.name)
        operands = computation.operands(at)
        if at.opcode == "get-tuple-element" and operands[0].opcode == "parameter":
            found.add(at.index)
        else:
            stack.extend(operands)
    return found


def _value(module: Module, instruction: Instruction, frame: Frame) -> int:
    """An integer scalar, wherever it comes from."""
    operands = frame.computation.operands(instruction)
    opcode = instruction.opcode

    def of(operand: Instruction) -> int:
        return _value(module, operand, frame)

    if opcode == "constant":
        if not re.fullmatch(r"-?\d+|true|false", instruction.literal):
            raise Unknown(f"constant {instruction.name} is no integer")
        return (
            {"true": 1, "false": 0}[instruction.literal] if instruction.literal.isalpha() else int(instruction.literal)
        )
    if opcode in TRANSPARENT:
        return of(operands[0])
    if opcode in ARITHMETIC:
        return ARITHMETIC[opcode](*map(of, operands))
    if opcode == "compare":
        return COMPARE[attribute(r"direction=(\w+)", instruction)[1]](*map(of, operands))
    if opcode == "get-tuple-element":
        return _element(module, operands[0], instruction.index, frame)
    if opcode in ("fusion", "call"):
        called = module.computations[instruction.called("calls", "to_apply")[0]]
        return _value(module, called.root, Frame(called, instruction, frame))
    caller, outer = frame.caller, frame.outer
    if opcode == "parameter" and caller and outer and caller.opcode in ("fusion", "call"):
        return _value(module, outer.computation.instructions[caller.operands[int(instruction.literal)]], outer)
    raise Unknown(f"{opcode} {instruction.name}")


def _element(module: Module, whole: Instruction, index: int, frame: Frame) -> int:
    """Element `index` of a tuple."""
    if whole.opcode == "tuple":
        return _value(module, frame.computation.instructions[whole.operands[index]], frame)
    caller, outer = frame.caller, frame.outer
    if whole.opcode == "parameter" and caller and outer:
        if caller.opcode == "while":
            if index in frame.state:
                return frame.state[index]
            if _is_invariant(module.computations[caller.called("body")[0]], index):
                return _element(module, outer.computation.instructions[caller.operands[0]], index, outer)
            raise Unknown(f"value {index} of loop {caller.name} varies")
        if caller.opcode == "conditional":
            branch = branches(caller).index(frame.computation.name)
            return _element(module, outer.computation.instructions[caller.operands[1 + branch]], index, outer)
        if caller.opcode in ("fusion", "call"):
            operand = outer.computation.instructions[caller.operands[int(whole.literal)]]
            return _element(module, operand, index, outer)
    if whole.opcode == "while" and _is_invariant(module.computations[whole.called("body")[0]], index):
        return _element(module, frame.computation.instructions[whole.operands[0]], index, frame)
    raise Unknown(f"element {index} of {whole.opcode} {whole.name}")


def branches(conditional: Instruction) -> list[str]:
    """Computations of a conditional, the first taken where its predicate is true or 0."""
    return conditional.called("branch_computations") or [
        *conditional.called("true_computation"),
        *conditional.called("false_computation"),
    ]
