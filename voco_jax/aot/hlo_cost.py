"""What a compiled TPU step should cost, from its HLO text: an estimate, nothing is run.

Method: add up libtpu's `estimated_cycles`, with every loop multiplied out.

    A, the upper end: all estimated cycles as they stand;
    B, the lower end: the same, but no op without a matmul takes longer than HBM needs for what it reads and writes.

Both include splash attention at its minimum (below), because its custom calls carry no cycles. On two published runs
of another project, 16B on v5e-256 and 32B on v5p-128, the measured step lay between B and A.

**What is counted.** Instructions that the device executes one after the other: the entry computation's, loop bodies' ×
their turns. A fusion counts by its own cycles, never by its inside's.
`x-start`/`x-done` pairs (copies, slices, collectives) run beside the others and carry no cycles: bytes only. An
`async-start` or `call-start` that wraps a whole computation is walked like a call, so that cycles found there are in A
and B (no overlap assumed). On tpu7x the collectives are such calls, which the SparseCores run.

libtpu gives some copies and transposes for tpu7x the largest number of 64 bits, which is none: they count as long as
HBM needs, in A and B (a matmul, as long as the matrix units).

**Conditionals.** The dearest branch counts.

**Matmul FLOPs** come from shapes, 2 × multiply-adds, and serve as a check: dots, and the convolutions into which XLA
turns them on TPU. Padding counts nothing, as a window's tap that falls on it is not a product.

**Splash attention.** The scope `splash_f{visits}x{bq}x{bkv}_b{visits}x{bq}x{bkv}` gives the blocks that a head visits,
forward and backward. A visit costs 2 matmuls forward, 3 in the dq kernel, 4 in the dkv kernel, 5 where one kernel does
the whole backward pass; each is 2·bq·bkv·head_dim FLOPs, times the heads and rows of the q operand. Every one of these
matmuls has head_dim as the contraction or as the output's width, so head_dim is rounded up to the matrix unit's (256
on v6e and tpu7x). The softmax is not in this minimum.

**Collectives.** Bytes that a device sends a step around a ring of n: all-gather and reduce-scatter (n−1)/n of the whole
array, all-reduce twice that, all-to-all (n−1)/n of the device's own, collective-permute its operand. Time: these bytes
over the chip's whole ICI bandwidth. It is a lower bound: a ring along one axis of the torus uses two of its links. It
holds where a chip is two devices: a ring passes through both, and only one of them sends to another chip. The time
is not in A or B: the compiler gives these no cycles. What is synchronous, with nothing running beside it, is exposed
and lengthens the step; the rest does where it takes longer than the compute beside it.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
import math
import re

from voco_jax.aot import hlo
from voco_jax.aot.hlo import Computation, Frame, HLOError, Instruction, Module
from voco_jax.aot.hlo_flops import matmul_flops
from voco_jax.parallel.chips import Chip

CLASSES = ("matmul", "attention", "collectives", "the rest")
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute", "ragged-all-to-all")
SPLASH = re.compile(r"splash_f(\d+)x(\d+)x(\d+)_b(\d+)x(\d+)x(\d+)")
CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
NO_CYCLES = 2**63 - 1  # stands there where libtpu has no estimate
SCAFFOLDING = re.compile(
    r"while|body|cond|closed_call|eval_jaxpr|checkpoint|shard_map|branch_\d+_fun|jit\((?!silu).*\)|pallas_call|vmap\(.*\)"
)
# Ops that do no work of their own, or work on scalars; what else has no cycles is named as left out.
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "partition-id", "replica-id", "after-all"),
    *("opt-barrier", "domain", "add-dependency"),
}
FREE_TARGETS = {
    *("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound"),
    *("PrepareAsyncCallStart", "PrepareAsyncCallDone"),
}


@dataclass(frozen=True)
class Op:
    """One instruction's share of a step."""

    label: str  # op_name, shortened
    source: str  # 'llama.py:88'
    kind: str  # of CLASSES
    count: float  # times a step
    cycles: float  # each time
    roofline: float  # cycles that HBM needs for its operands and results; matmuls and attention: infinite
    flops: float
    collective: str = ""  # kind of a collective
    collective_bytes: float = 0  # sent by a device
    synchronous: bool = False  # a collective beside which nothing runs
    copied_bytes: float = 0  # moved asynchronously between HBM and VMEM
    unknown: str = ""  # what it is, where it works and no one says how long


@dataclass(frozen=True)
class Collective:
    kind: str
    count: float  # a step
    bytes: float  # that a device sends a step
    seconds: float  # at the speed of all links
    exposed_seconds: float  # those of the synchronous ones, which nothing hides


@dataclass(frozen=True)
class Dear:
    """Ops of one line of the program, by what they cost over the ideal."""

    label: str
    source: str
    kind: str
    seconds: float  # at estimate A
    excess_seconds: float  # over FLOPs at the matrix units' peak for matmuls, over zero for all else


@dataclass(frozen=True)
class Estimate:
    """A step on one device. Times in seconds; A is the upper estimate, B the lower (see the module)."""

    seconds_a: float
    seconds_b: float
    matmul_flops: float  # counted from shapes, attention kernels excluded
    attention_flops: float  # of splash kernels, by the blocks visited
    attention_seconds: float  # part of A and B
    classes_a: dict[str, float]  # seconds by class of ops
    classes_b: dict[str, float]
    collectives: tuple[Collective, ...]
    collective_seconds: float  # not part of A or B
    copied_bytes: float  # asynchronous copies between HBM and VMEM, not part of A or B
    copied_seconds: float  # at HBM's speed
    left_out: dict[str, float]  # what else carries no cycles: kind → times a step
    dearest: tuple[Dear, ...]  # costs over the ideal, largest first


def estimate(text: str, chip: Chip) -> Estimate:
    """The HLO text of a compiled step (`compiled.as_text()`) → Estimate. HLOError for what cannot be read."""
    module = hlo.parse(text)
    ops = _Walk(module, chip).ops(Frame(module.entry))

    def seconds(cycles: Iterable[float]) -> float:
        return sum(cycles) / chip.clock_hz

    def by_class(cost) -> dict[str, float]:
        return {kind: seconds(op.count * cost(op) for op in ops if op.kind == kind) for kind in CLASSES}

    classes_a = by_class(lambda op: op.cycles)
    classes_b = by_class(lambda op: min(op.cycles, op.roofline))
    groups = defaultdict(list)
    for op in ops:
        groups[op.label, op.source, op.kind].append(op)
    dearest = [
        Dear(
            *key,
            seconds=seconds(op.count * op.cycles for op in group),
            excess_seconds=seconds(op.count * (op.cycles - op.flops / chip.flops_per_cycle) for op in group),
        )
        for key, group in groups.items()
        if key[2] != "attention" and any(op.cycles for op in group)  # attention is at its minimum already
    ]
    left_out: dict[str, float] = defaultdict(float)
    for op in ops:
        if op.unknown:
            left_out[op.unknown] += op.count
    copied = sum(op.count * op.copied_bytes for op in ops)
    collectives = tuple(
        _sum_of(kind, sent, chip) for kind in COLLECTIVES if (sent := [op for op in ops if op.collective == kind])
    )
    return Estimate(
        seconds_a=sum(classes_a.values()),
        seconds_b=sum(classes_b.values()),
        matmul_flops=sum(op.count * op.flops for op in ops if op.kind == "matmul"),
        attention_flops=sum(op.count * op.flops for op in ops if op.kind == "attention"),
        attention_seconds=classes_a["attention"],
        classes_a=classes_a,
        classes_b=classes_b,
        collectives=collectives,
        collective_seconds=sum(collective.seconds for collective in collectives),
        copied_bytes=copied,
        copied_seconds=copied / chip.hbm_bandwidth,
        left_out=dict(left_out),
        dearest=tuple(sorted(dearest, key=lambda dear: -dear.excess_seconds)),
    )


def _sum_of(kind: str, ops: list[Op], chip: Chip) -> Collective:
    sent = [op.count * op.collective_bytes for op in ops]
    exposed = [each for op, each in zip(ops, sent, strict=True) if op.synchronous]
    return Collective(
        kind,
        count=sum(op.count for op in ops),
        bytes=sum(sent),
        seconds=sum(sent) / chip.ici_bandwidth,
        exposed_seconds=sum(exposed) / chip.ici_bandwidth,
    )


class _Walk:
    def __init__(self, module: Module, chip: Chip):
        self.module, self.chip = module, chip

    def ops(self, frame: Frame) -> list[Op]:
        """Everything that one execution of the frame's computation costs."""
        ops = []
        for instruction in frame.computation:
            if instruction.opcode == "while":
                turns = hlo.trip_count(self.module, instruction, frame)
                body = self.module.computations[instruction.called("body")[0]]
                ops += _scaled(self.ops(Frame(body, instruction, frame)), turns)
            elif instruction.opcode == "conditional":
                ops += self.conditional(instruction, frame)
            elif instruction.opcode in ("call", "call-start", "async-start"):
                called = self.module.computations[instruction.called("to_apply", "calls", "called_computations")[0]]
                inside = self.ops(Frame(called, instruction, frame))
                ops += inside if instruction.opcode == "call" else [replace(op, synchronous=False) for op in inside]
            elif instruction.opcode not in FREE:
                ops += self.op(instruction, frame.computation)
        return ops

    def conditional(self, instruction: Instruction, frame: Frame) -> list[Op]:
        branches = [self.module.computations[name] for name in hlo.branches(instruction)]
        costs = [self.ops(Frame(branch, instruction, frame)) for branch in branches]
        return max(costs, key=lambda ops: sum(op.count * op.cycles for op in ops))

    def op(self, instruction: Instruction, computation: Computation) -> list[Op]:
        opcode = instruction.opcode
        op_name = instruction.op_name
        inside = [(instruction, computation)]
        if opcode == "fusion":
            inside = list(self.inside(self.module.computations[instruction.called("calls")[0]]))
        found = CYCLES.search(instruction.attributes)
        op = Op(
            label=shorten(op_name) or opcode,
            source=self.module.source(instruction),
            kind="the rest",
            count=1,
            cycles=float(found[1]) if found else 0.0,
            roofline=math.inf,
            flops=sum(matmul_flops(part, of) for part, of in inside),
        )
        no_cycles = found is not None and int(found[1]) == NO_CYCLES
        sent = [part for part in inside if self.is_sent(*part)]
        ops = [self.collective(op, instruction, *part) for part in sent]
        if op.flops:
            cycles = op.flops / self.chip.flops_per_cycle if no_cycles else op.cycles
            return [*ops, replace(op, kind="matmul", cycles=cycles)]
        if found:
            bytes_moved = self.bytes_moved(instruction, computation)
            roofline = bytes_moved / self.chip.hbm_bandwidth * self.chip.clock_hz
            cycles = roofline if no_cycles else op.cycles
            return [*ops, replace(op, cycles=cycles, roofline=roofline, kind="collectives" if sent else "the rest")]
        if sent or opcode.endswith(("-done", "-update")):
            return ops
        if opcode.endswith("-start"):  # of a copy or slice
            return [replace(op, copied_bytes=_bytes_copied(instruction))]
        if any(_base(part.opcode) in COLLECTIVES for part, _ in inside):
            return []  # the rest of a collective that was counted where it started
        if opcode == "custom-call":
            target = hlo.attribute(r'custom_call_target="([^"]*)"', instruction)[1]
            if (scope := SPLASH.search(op_name)) and target == "tpu_custom_call":
                return [self.splash(op, instruction, computation, scope)]
            if target in FREE_TARGETS:
                return []
            return [replace(op, unknown=f"custom call {instruction.name.split('.')[0]} ({target})")]
        if all(array.size <= 1024 for array in instruction.arrays):
            return []  # a scalar or as good as one
        return [replace(op, unknown=opcode)]

    def inside(self, computation: Computation):
        """(instruction, computation) of a fused computation and those fused into it."""
        for instruction in computation:
            yield instruction, computation
            if instruction.opcode == "fusion":
                yield from self.inside(self.module.computations[instruction.called("calls")[0]])

    def is_sent(self, instruction: Instruction, computation: Computation) -> bool:
        """A collective, at the one place where it is to be counted.

        libtpu spreads an asynchronous one over several fusions, each of which repeats it: the first has flag_start −1
        and hands it to the custom call AsyncCollectiveStart, the last to AsyncCollectiveDone.
        """
        if instruction.opcode.endswith("-done") or _base(instruction.opcode) not in COLLECTIVES:
            return False
        flag = re.search(r'"flag_start":"(-?\d+)"', instruction.attributes)
        users = computation.users.get(instruction.name, ())
        is_last = any('custom_call_target="AsyncCollectiveDone"' in user.attributes for user in users)
        return not is_last and (flag is None or flag[1] == "-1")

    def collective(self, op: Op, outer: Instruction, instruction: Instruction, computation: Computation) -> Op:
        kind = _base(instruction.opcode)
        local = sum(operand.bytes for operand in computation.operands(instruction))
        n = group_size(instruction, self.module.num_partitions)
        if "all-reduce-scatter" in outer.attributes or "AllReduceScatter" in outer.attributes:
            kind = "reduce-scatter"  # an all-reduce of which each device keeps its slice, as one
        sent = {
            "all-gather": local * (n - 1),
            "reduce-scatter": local * (n - 1) / n,
            "all-reduce": 2 * local * (n - 1) / n,
            "all-to-all": local * (n - 1) / n,
        }.get(kind, local)
        users = computation.users.get(instruction.name, ())
        starts = instruction.opcode.endswith("-start") or any("AsyncCollectiveStart" in u.attributes for u in users)
        return replace(
            op,
            kind="collectives",
            cycles=0.0,
            flops=0.0,
            collective=kind,
            collective_bytes=sent,
            synchronous=not starts,
        )

    def splash(self, op: Op, instruction: Instruction, computation: Computation, scope: re.Match[str]) -> Op:
        arrays = [array for operand in computation.operands(instruction) for array in operand.arrays]
        q = next((array for array in arrays if array.dtype in ("bf16", "f32") and len(array.dims) >= 3), None)
        if q is None:
            raise HLOError(f"splash kernel {instruction.name}: no query among its operands")
        kernel = instruction.op_name.rsplit("splash_m", 1)[-1]  # 'ha_fwd_…', 'qa_dkv_…'
        fwd, fwd_q, fwd_kv, bwd, bwd_q, bwd_kv = map(int, scope.groups())
        visits, block = (fwd, fwd_q * fwd_kv) if "_fwd" in kernel else (bwd, bwd_q * bwd_kv)
        if "_fwd" in kernel:
            matmuls = 2
        elif "_dq" in kernel:
            matmuls = 3
        elif "_dkv" in kernel:
            # The one kernel for all of the backward pass gives dq too, a part for each kv block.
            matmuls = 5 if any(len(array.dims) == len(q.dims) + 1 for array in instruction.arrays) else 4
        else:
            raise HLOError(f"splash kernel {instruction.name} ({instruction.op_name}): neither fwd, dq nor dkv")
        heads, head_dim = math.prod(q.dims[:-2]), q.dims[-1]
        flops = heads * visits * matmuls * 2 * block * head_dim
        padded = math.ceil(head_dim / self.chip.mxu_width) * self.chip.mxu_width
        return replace(op, kind="attention", flops=flops, cycles=flops * padded / head_dim / self.chip.flops_per_cycle)

    def bytes_moved(self, instruction: Instruction, computation: Computation) -> float:
        """Bytes that an op reads and writes, as if all came from HBM and went there.

        Of an operand that a fusion only slices, the slices; of an array updated in place, the update.
        """
        if instruction.opcode == "dynamic-slice":
            return 2 * instruction.bytes
        if instruction.opcode == "dynamic-update-slice":
            return 2 * computation.operands(instruction)[1].bytes
        if instruction.opcode != "fusion":
            return instruction.bytes + sum(operand.bytes for operand in computation.operands(instruction))
        fused = self.module.computations[instruction.called("calls")[0]]
        read = sum(self.bytes_read(parameter, fused) for parameter in fused.parameters.values())
        roots = fused.operands(fused.root) if fused.root.opcode == "tuple" else [fused.root]
        return read + sum(_bytes_written(root, fused) for root in roots)

    def bytes_read(self, value: Instruction, fused: Computation) -> float:
        total = 0.0
        for user in fused.users.get(value.name, ()):
            if user.opcode in ("bitcast", "reshape"):
                total += self.bytes_read(user, fused)
            elif user.opcode in ("dynamic-slice", "slice"):
                total += user.bytes
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
                continue
            elif user.opcode == "fusion":
                nested = self.module.computations[user.called("calls")[0]]
                indices = [i for i, name in enumerate(user.operands) if name == value.name]
                total += sum(self.bytes_read(nested.parameters[i], nested) for i in indices)
            else:
                return value.bytes
        return min(total, value.bytes)


def _bytes_written(root: Instruction, fused: Computation) -> float:
    while root.opcode in ("bitcast", "reshape"):
        root = fused.instructions[root.operands[0]]
    if root.opcode == "dynamic-update-slice":
        return fused.instructions[root.operands[1]].bytes
    return root.bytes


def _bytes_copied(instruction: Instruction) -> float:
    """Bytes that `copy-start` or `slice-start` moves: (destination, source, context) and ((source), destination, …)."""
    arrays = instruction.arrays
    return min(arrays[0].bytes, arrays[1].bytes) if len(arrays) > 1 else arrays[0].bytes


def _scaled(ops: list[Op], factor: float) -> list[Op]:
    return [replace(op, count=op.count * factor) for op in ops]


def _base(opcode: str) -> str:
    return opcode.removesuffix("-start").removesuffix("-done")


def group_size(instruction: Instruction, num_partitions: int) -> int:
    """Devices that take part in a collective together, from any form in which `replica_groups` is printed."""
    text = instruction.attributes
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] *\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", match[1]))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return match[1].count(",") + 1
    return num_partitions  # {}: all


def shorten(op_name: str) -> str:
    """'jit(step)/transpose(jvp(VoCo))/while/body/…/dot_general' → 'bwd VoCo/dot_general'."""
    text = "/".join(part for part in op_name.split("/") if not SCAFFOLDING.fullmatch(part))
    text = re.sub(r"\.\d+$", "", SPLASH.sub("splash", text))
    text = re.sub(r"transpose\(jvp\((\w*)\)\)/?", lambda m: f"bwd {m[1]}/" if m[1] else "bwd ", text)
    text = re.sub(r"\bjvp\((\w*)\)/?", lambda m: f"fwd {m[1]}/" if m[1] else "fwd ", text)
    text = text.replace("rematted_computation/", "remat ").strip("/ ")
    return text if len(text) <= 60 else f"{text[:20]}…{text[-39:]}"
