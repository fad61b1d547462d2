"""Peaks by the names that jax gives devices."""

from types import SimpleNamespace

import jax
import pytest

from voco_jax.parallel.chips import CHIPS
from voco_jax.parallel.peaks import peak_flops


def device(kind, **attributes):
    return SimpleNamespace(device_kind=kind, **attributes)


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("TPU v4", 275), ("TPU v5 lite", 197), ("TPU v5e", 197), ("TPU v5", 459), ("TPU v5p", 459),
        ("TPU v6 lite", 918), ("TPU v6e", 918), ("TPU7x", 1153.5),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100-PCIE-40GB", 312), ("NVIDIA A10G", None), ("NVIDIA A10", 125),
        ("NVIDIA H100 80GB HBM3", 989.5), ("NVIDIA H100 PCIe", 756.5), ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.5), ("NVIDIA GH200 480GB", 989.5), ("NVIDIA L4", 121), ("NVIDIA L40S", 366.5),
        ("NVIDIA B200", 2250), ("NVIDIA GB200", 2500), ("Tesla T4", None), ("cpu", None), ("TPU v9", None),
    ],
)  # fmt: skip
def test_a_kind(kind, tera):
    assert peak_flops([device(kind)]) == (tera and pytest.approx(tera * 1e12))


def test_many_devices():
    assert peak_flops([device("TPU v5 lite")] * 8) == 8 * 197e12
    assert peak_flops([device("TPU v5 lite"), device("cpu")]) is None
    assert peak_flops(jax.devices()) is None  # a CPU


def test_a_chip_that_is_split():
    """libtpu says how many TensorCores a device has; v4 and v5p chips have two, which mostly are one device."""
    assert peak_flops([device("TPU v4", num_cores=2)]) == 275e12
    assert peak_flops([device("TPU v4", num_cores=1)] * 2) == 275e12
    assert peak_flops([device("TPU7x", num_cores=1)] * 2) == 2307e12


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_the_clock_is_what_the_peak_makes_it(chip):
    assert chip.flops_per_cycle * chip.clock_hz == pytest.approx(chip.peak_flops, rel=0.003)
