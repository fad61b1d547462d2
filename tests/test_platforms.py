"""What jax is told of a machine before it looks for devices; machines are directories with their /dev and /sys."""

import importlib.machinery
import importlib.util
import os
import subprocess
import sys

import pytest

from voco_jax import platforms
from voco_jax.platforms import GPU_FLAGS, set_defaults


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """What becomes of the environment on a machine with these files, where these packages are installed."""

    def defaults(files=(), packages=("libtpu",), **environment):
        for file in files:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text("")
        found = importlib.machinery.ModuleSpec("libtpu", None) if "libtpu" in packages else None
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: found if name == "libtpu" else None)
        monkeypatch.setattr(platforms, "_plugins", lambda: [name for name in packages if name != "libtpu"])
        set_defaults(environment, tmp_path)
        return environment

    return defaults


CUDA, NVIDIA = ("libtpu", "xla_cuda13"), ["dev/nvidia0", "dev/nvidiactl"]


def test_a_machine_without_a_tpu_is_not_searched_for_one(machine):
    assert machine() == {"JAX_PLATFORMS": "cpu"}
    assert machine(packages=()) == {}
    assert machine(packages=("libtpu", "metal_plugin")) == {}
    assert machine(packages=CUDA) == {}  # jax says what is wrong with the GPU


@pytest.mark.parametrize("file", ["dev/accel0", "dev/vfio/0"])
def test_a_tpu_is_found_by_jax(machine, file):
    assert machine([file]) == {}


@pytest.mark.parametrize(
    "vendor, kind, is_tpu",
    [("0x1ae0", "0x120000", True), ("0x1ae0", "0xff0000", True), ("0x1ae0", "0x020000", False),
     ("0x1ae0", "0x010802", False), ("0x10de", "0x120000", False), ("0x1ae0", None, False)],
)  # fmt: skip
def test_a_tpu_is_a_device_of_googles_but_not_every_one_is(machine, tmp_path, vendor, kind, is_tpu):
    """Network cards and disks of Google's cloud have the same vendor; a container may hide what a device is."""
    device = tmp_path / "sys/bus/pci/devices/0000:00:05.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text(f"{vendor}\n")
    if kind is not None:
        (device / "class").write_text(f"{kind}\n")
    assert machine() == ({} if is_tpu else {"JAX_PLATFORMS": "cpu"})


@pytest.mark.parametrize("variable", ["TPU_NAME", "TPU_WORKER_HOSTNAMES", "JAX_FORCE_TPU_INIT", "JAX_PLATFORMS"])
def test_what_the_environment_says_stays(machine, variable):
    assert machine(**{variable: "x"}) == {variable: "x"}


def test_gpu_flags_are_for_gpus(machine):
    assert machine(NVIDIA, ("xla_cuda13",)) == {"XLA_FLAGS": " ".join(GPU_FLAGS)}
    assert machine(NVIDIA, CUDA) == {"XLA_FLAGS": " ".join(GPU_FLAGS), "JAX_PLATFORMS": "cuda,cpu"}
    assert machine(NVIDIA, CUDA, JAX_PLATFORMS="cpu") == {"JAX_PLATFORMS": "cpu"}
    assert machine(NVIDIA, ()) == {}


def test_a_gpu_flag_that_is_given_stays(machine):
    given = "--xla_gpu_autotune_level=4 --xla_dump_to=/tmp/dump"
    flags = machine(NVIDIA, CUDA, JAX_PLATFORMS="cuda", XLA_FLAGS=given)["XLA_FLAGS"]
    assert flags.split() == [*given.split(), GPU_FLAGS[0], GPU_FLAGS[2]]


def python(code, **variables):
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment | variables, capture_output=True, text=True, check=False
    )


def test_xla_knows_the_gpu_flags():
    done = python("import jax; jax.devices()", JAX_PLATFORMS="cpu", XLA_FLAGS=" ".join(GPU_FLAGS))
    assert done.returncode == 0, done.stderr  # it ends the process for one that it does not know
    assert python("import jax; jax.devices()", JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_gpu_no_flag=1").returncode != 0


@pytest.mark.tpu_compile
@pytest.mark.parametrize("first", ["voco_jax", "jax"])
def test_libtpu_is_silent_where_there_is_no_tpu(first):
    second = {"voco_jax": "jax", "jax": "voco_jax"}[first]
    done = python(f"import {first}, {second}; import jax; print(jax.devices()[0].platform)")
    assert (done.returncode, done.stdout, done.stderr) == (0, "cpu\n", "")
