"""bfloat16 FLOP/s of the devices that jax names, dense: what MFU is a share of.

TPUs: "Peak compute per chip (BF16)" of Google's pages on each generation (cloud.google.com/tpu/docs). NVIDIA: the
"BFLOAT16 Tensor Core" figure of each data sheet (nvidia.com/data-center), halved where it is given "with sparsity".
"""

from collections.abc import Iterable
import re

import jax

from voco_jax.parallel.chips import CHIPS

# By `device_kind`: of a jax device as it mostly is, and its TensorCores. That is a chip, or half of one (TPU7x).
TPUS = {
    "TPU v4": (275e12, 2),
    "TPU v5 lite": (CHIPS["v5e"].peak_flops, 1),
    "TPU v5e": (CHIPS["v5e"].peak_flops, 1),
    "TPU v5": (CHIPS["v5p"].peak_flops, 2),
    "TPU v5p": (CHIPS["v5p"].peak_flops, 2),
    "TPU v6 lite": (CHIPS["v6e"].peak_flops, 1),
    "TPU v6e": (CHIPS["v6e"].peak_flops, 1),
    "TPU7x": (CHIPS["tpu7x"].peak_flops, 1),
}

# By words of `device_kind`, which goes on with memory and socket ("NVIDIA H100 80GB HBM3"); the first that matches.
GPUS = (
    (r"\bA10\b", 125e12),
    (r"\bA40\b", 149.7e12),
    (r"\bA100\b", 312e12),
    (r"\bH100 NVL\b|\bH200 NVL\b", 1671e12 / 2),
    (r"\bH100 PCIe\b", 1513e12 / 2),
    (r"\b(H100|H200|GH200)\b", 1979e12 / 2),
    (r"\bL4\b", 242e12 / 2),
    (r"\bL40S\b", 733e12 / 2),
    (r"\bB200\b", 4500e12 / 2),
    (r"\bGB200\b", 5000e12 / 2),
)


def peak_flops(devices: Iterable[jax.Device]) -> float | None:
    """bfloat16 FLOP/s of some jax devices together; None where one of them is not in the tables, as any CPU."""
    total = 0.0
    for device in devices:
        peak = _peak(device)
        if peak is None:
            return None
        total += peak
    return total


def _peak(device: jax.Device) -> float | None:
    kind = device.device_kind
    if kind in TPUS:
        peak, cores = TPUS[kind]
        # TensorCores of this device, as libtpu says: a v4 or v5p chip may also be split into two devices
        return peak * (getattr(device, "num_cores", None) or cores) / cores
    if not kind.startswith("NVIDIA"):
        return None
    return next((peak for words, peak in GPUS if re.search(words, kind)), None)
