"""Compiles a step for a TPU topology, and says whether it fits into HBM."""

import math
import re
import time
from typing import Any

import jax
from jax.sharding import Mesh
from jax.stages import Compiled

from voco_jax.aot.programs import Program
from voco_jax.errors import UserError
from voco_jax.models.config import model_error
from voco_jax.parallel.chips import Chip


class DoesNotFit(Exception):
    """HBM is too small, as the compiler says or by the sum of what it assigned."""

    def __init__(self, needed: float, available: float):
        super().__init__(needed, available)
        self.needed, self.available = needed, available  # bytes a device


def compile_step(
    program: Program, mesh: Mesh, chip: Chip, compiler_options: dict[str, str | bool] | None = None
) -> tuple[Compiled, float]:
    """Compile a Program for a mesh of a topology's devices: (compiled, seconds that it took).

    DoesNotFit where HBM is too small; UserError for what the model, its attention or the compiler cannot do.
    """
    start = time.monotonic()
    with jax.set_mesh(mesh):
        try:
            lowered = program.function.lower(*program.arguments)
        except ValueError as error:  # an attention adapter, or a compressor without what the step asks of it
            raise model_error(error) from error
        try:
            compiled = lowered.compile(compiler_options=compiler_options)
        except jax.errors.JaxRuntimeError as error:
            if (misfit := too_large(str(error))) is not None:
                raise misfit from error
            raise UserError(f"the TPU compiler: {str(error).strip().splitlines()[0]}") from error
    # libtpu compares temporaries alone with HBM where they are the most: what it compiles may still be too large.
    if (total := sum(hbm_bytes(compiled).values())) > chip.hbm_bytes:
        raise DoesNotFit(total, chip.hbm_bytes)
    return compiled, time.monotonic() - start


def hbm_bytes(compiled: Compiled) -> dict[str, int]:
    """Bytes of each device's HBM that a compiled step takes, by kind."""
    memory: Any = compiled.memory_analysis()  # the type depends on the backend
    return {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,  # not written over arguments
        "temporaries": memory.temp_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }


def too_large(message: str) -> DoesNotFit | None:
    """The HBM that a libtpu error asks for, if that is the error; its second wording leaves the arguments out."""
    match = re.search(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm", message) or re.search(
        r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)", message
    )
    if match is None:
        return None
    numbers, units = match.groups()[::2], match.groups()[1::2]
    return DoesNotFit(*(float(n) * 2 ** (10 * (1 + "KMGT".index(u))) for n, u in zip(numbers, units, strict=True)))


def argument_bytes(program: Program) -> int:
    """Bytes a device of a program's arguments: weights, optimizer state, batch."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(program.arguments)
    )
