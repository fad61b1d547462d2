"""The device mesh: always the same four axes, set around a program with `jax.set_mesh(mesh)`.

    data     copies of the parameters, each with rows of its own
    fsdp     rows of their own too; parameters and optimizer state are spread over it and gathered layer by layer
    frame    one row's images (a video's frames) are spread over it; parameters as over fsdp
    tensor   heads, MLP width and vocabulary are spread over it

Code asks for the ambient mesh. Without one there is one device, and these functions do nothing.
"""

from collections.abc import Mapping, Sequence
import math

import jax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
import numpy as np

from voco_jax.errors import UserError
from voco_jax.outages import first_line

AXES = ("data", "fsdp", "frame", "tensor")
ROWS = ("data", "fsdp")  # read rows, and the images of a row
IMAGES = ("data", "fsdp", "frame")  # compress rows
PARAMS = ("fsdp", "frame")  # what parameters are spread over, and gathered from before they are used


def find_devices() -> list[jax.Device]:
    """All devices, those of other processes too; UserError where jax finds none, or none that is free."""
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # jax asserts that a platform asked for has a device
        platforms = jax.config.values["jax_platforms"]
        reason = first_line(error) if str(error) else f"jax finds none (JAX_PLATFORMS is {platforms!r})"
        raise UserError(f"devices: {reason}; JAX_PLATFORMS=cpu takes the CPU") from error


def make_mesh(mesh: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `config.mesh` over all devices, or those given; UserError where the sizes do not multiply up.

    One axis may be -1: as many as the others leave. Neighbours in the tensor axis are neighbours on the chip network,
    then those of the frame axis: theirs is the most frequent traffic.
    """
    devices = find_devices() if devices is None else devices
    sizes = [mesh[axis] for axis in AXES]
    rest = len(devices) // max(1, math.prod(size for size in sizes if size > 0))
    sizes = [rest if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices):
        given = ", ".join(f"{axis} {mesh[axis]}" for axis in AXES)
        raise UserError(
            f"config.mesh: expected sizes whose product is {len(devices)}, the devices there are; found {given}"
        )
    return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def axis_size(*axes: str) -> int:
    """Devices along the axes of the ambient mesh together; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in axes)


def axis_keys(axes: str | tuple[str, ...]) -> str:
    """The config keys of axes, for messages: 'mesh.data × mesh.fsdp'."""
    return " × ".join(f"mesh.{axis}" for axis in ((axes,) if isinstance(axes, str) else axes))


def constrain(x: jax.Array, *spec: str | tuple[str, ...] | None) -> jax.Array:
    """`x` laid out over the ambient mesh as the partition spec says (axes left out: on every device)."""
    return x if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(x, P(*spec))
