"""TPU chips in numbers, and a topology's devices for compiling where there is no TPU.

Peaks, HBM's speed and links are those of Google's pages on each generation (cloud.google.com/tpu/docs), HBM's size is
what libtpu's own messages say of it. Links count in one direction: half of what a page calls bidirectional. The clock
is what the peak and the matrix units make it: 131,072 FLOP a cycle × 1.50 GHz = 197 TFLOP/s (v5e), 262,144 × 1.75
(v5p), 524,288 × 1.75 (v6e), 524,288 × 2.20 (a device of tpu7x, Ironwood). v4 is not in the table: nothing here was
checked on it.
"""

from dataclasses import dataclass
import importlib.util
import math
import os
import re

from voco_jax.errors import UserError


@dataclass(frozen=True)
class Chip:
    """One kind of TPU chip, as the compiler sees it.

    A chip is one device of jax's (the two cores of a v5p are one), or two, each with half of the chip's HBM (tpu7x).
    Numbers are a device's, where nothing else is said.
    """

    name: str  # 'v5e'
    devices_per_chip: int
    hbm_bytes: float  # that a program may use, by the compiler; a little less than is there
    peak_flops: float  # bfloat16 FLOP/s
    clock_hz: float
    flops_per_cycle: int  # of all matrix units together
    mxu_width: int  # rows and columns of a matrix unit: a smaller contraction or output leaves the rest idle
    hbm_bandwidth: float  # bytes/s
    ici_bandwidth: float  # bytes/s that a chip sends, all links together
    dimensions: int  # of the torus
    accelerator_type: str  # TPU_ACCELERATOR_TYPE, {} is the number of cores as the name counts them
    cores_per_chip: int  # in that name
    chips_per_host: tuple[int, int, int]


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v5e",
            devices_per_chip=1,
            hbm_bytes=15.75 * 2**30,
            peak_flops=197e12,
            clock_hz=1.50e9,
            flops_per_cycle=131_072,
            mxu_width=128,
            hbm_bandwidth=819e9,
            ici_bandwidth=200e9,
            dimensions=2,
            accelerator_type="v5litepod-{}",
            cores_per_chip=1,
            chips_per_host=(2, 2, 1),
        ),
        Chip(
            name="v5p",
            devices_per_chip=1,
            hbm_bytes=95.74 * 2**30,
            peak_flops=459e12,
            clock_hz=1.75e9,
            flops_per_cycle=262_144,
            mxu_width=128,
            hbm_bandwidth=2765e9,
            ici_bandwidth=600e9,
            dimensions=3,
            accelerator_type="v5p-{}",
            cores_per_chip=2,
            chips_per_host=(2, 2, 1),
        ),
        Chip(
            name="v6e",
            devices_per_chip=1,
            hbm_bytes=31.25 * 2**30,
            peak_flops=918e12,
            clock_hz=1.75e9,
            flops_per_cycle=524_288,
            mxu_width=256,
            hbm_bandwidth=1640e9,
            ici_bandwidth=448e9,
            dimensions=2,
            accelerator_type="v6e-{}",
            cores_per_chip=1,
            chips_per_host=(2, 2, 1),
        ),
        Chip(
            name="tpu7x",
            devices_per_chip=2,
            hbm_bytes=94.75 * 2**30,
            peak_flops=2307e12 / 2,
            clock_hz=2.20e9,
            flops_per_cycle=524_288,
            mxu_width=256,
            hbm_bandwidth=7380e9 / 2,
            ici_bandwidth=600e9,
            dimensions=3,
            accelerator_type="tpu7x-{}",
            cores_per_chip=2,
            chips_per_host=(2, 2, 1),
        ),
    )
}


def parse_topology(topology: str) -> tuple[Chip, tuple[int, ...]]:
    """('v5e:8x8') → (the chip, (8, 8)); UserError lists the forms there are."""
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", topology)
    chip = CHIPS.get(match[1]) if match else None
    shape = tuple(map(int, match[2].split("x"))) if match else ()
    if chip is None or len(shape) != chip.dimensions or math.prod(shape) == 0:
        known = f"a chip of {', '.join(CHIPS)} and a shape, for example v5e:2x2, v5e:16x16 or v5p:2x2x4"
        raise UserError(f"--topology: expected {known}; found {topology!r}")
    return chip, shape


def topology_devices(topology: str) -> tuple[Chip, list]:
    """The chip, and the devices of a topology such as 'v5e:8x8': they compile and do not run. No TPU is needed.

    Call it before jax is first used in the process: what libtpu reads from the environment is set here, and jax is
    told to stay off real accelerators. Raises UserError where the name is not a topology or libtpu is not installed.
    """
    chip, shape = parse_topology(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "libtpu, the TPU compiler, is not installed (it needs no TPU): pip install -e '.[tpu]' "
            "brings jax[tpu] with the libtpu of the installed jax"
        )
    os.environ.update(
        TPU_ACCELERATOR_TYPE=chip.accelerator_type.format(math.prod(shape) * chip.cores_per_chip),
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_SKIP_MDS_QUERY="1",  # no metadata server is asked what this machine is
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # compiling takes no chip: several processes may
        # libtpu 0.0.42 overflows its usual stacks on whole steps for tpu7x. Of a flag given twice the last holds
        LIBTPU_INIT_ARGS=f"--fibers_default_thread_stack_size={2**22} {os.environ.get('LIBTPU_INIT_ARGS', '')}".strip(),
        JAX_PLATFORMS="cpu",
    )
    import jax  # not at the top: the environment comes first
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")  # where jax was imported before
    # A slice smaller than a host is one host of that size.
    bounds = tuple(min(a, b) for a, b in zip((*shape, 1)[:3], chip.chips_per_host, strict=True))
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, chips_per_host_bounds=bounds, num_slices=1
        )
    except Exception as error:  # jaxlib raises its own kinds, with libtpu's words
        raise UserError(f"--topology={topology}: {str(error).splitlines()[0]}") from error
    return chip, list(description.devices)
