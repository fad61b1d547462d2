"""Where a computation that is being traced will run."""

import jax


def platform() -> str:
    """'tpu', 'gpu' or 'cpu': that of the ambient mesh's devices, without a mesh that of the default backend.

    The two differ when a program is compiled for a TPU on a machine that has none.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
