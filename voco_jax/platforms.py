"""What jax should know of this machine before it looks for devices: called once, when voco_jax is imported.

Everything here is a default: what the environment says already stays.
"""

from collections.abc import MutableMapping
import importlib.metadata
import importlib.util
import os
from pathlib import Path
import sys

# On an NVIDIA GPU. Matrix products by cuBLAS, whose algorithms are tried without checks, and no Triton variants of
# fusions. With XLA's own values a decoding step of 8 of the 7B's layers took 4.15 ms for 2.42 on an H100 (jax 0.11.2),
# and compiling it 20 s for 3.5.
GPU_FLAGS = (
    "--xla_gpu_enable_triton_gemm=false",
    "--xla_gpu_autotune_level=2",
    "--xla_gpu_experimental_enable_fusion_autotuner=false",
)

# Any of them says that somebody has a TPU in mind, whatever this machine shows. (libtpu itself sets TPU_LIBRARY_PATH.)
_TPU_VARIABLES = (
    "TPU_NAME", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES",
    "CLOUD_TPU_TASK_ID", "JAX_FORCE_TPU_INIT",
)  # fmt: skip


def set_defaults(environment: MutableMapping[str, str] = os.environ, root: Path = Path("/")) -> None:
    """Flags for NVIDIA GPUs where there is one; no search for a TPU where libtpu is installed and there is none.

    jax would load libtpu, which prints lines of warnings and looks for a TPU in vain. `root` is where /dev and /sys
    are. A flag that XLA_FLAGS names, and a JAX_PLATFORMS that is set, stay as they are.
    """
    platforms = environment.get("JAX_PLATFORMS", "")
    plugins = _plugins()
    has_gpu = any("cuda" in plugin for plugin in plugins) and _any(root, "dev/nvidia[0-9]*", "dev/nvidiactl", "dev/dxg")
    if has_gpu and (not platforms or any(name in ("cuda", "gpu") for name in platforms.split(","))):
        given = environment.get("XLA_FLAGS", "")
        named = {flag.split("=")[0] for flag in given.split()}
        environment["XLA_FLAGS"] = " ".join([given, *(f for f in GPU_FLAGS if f.split("=")[0] not in named)]).strip()
    if platforms or importlib.util.find_spec("libtpu") is None or _may_have_tpu(environment, root):
        return
    if not plugins:  # with a plugin, which devices there are is for jax to find out
        _choose("cpu", environment)
    elif has_gpu and all("cuda" in plugin for plugin in plugins):
        _choose("cuda,cpu", environment)


def _choose(platforms: str, environment: MutableMapping[str, str]) -> None:
    environment["JAX_PLATFORMS"] = platforms
    if environment is os.environ and "jax" in sys.modules and not sys.modules["jax"].config.jax_platforms:
        sys.modules["jax"].config.update("jax_platforms", platforms)  # jax has read its environment already


def _may_have_tpu(environment: MutableMapping[str, str], root: Path) -> bool:
    """A TPU's device files, a PCI device that may be one, or a variable that only a TPU's machine has."""
    if any(name in environment for name in _TPU_VARIABLES) or _any(root, "dev/accel*", "dev/vfio/[0-9]*"):
        return True
    return any(_is_accelerator(device) for device in (root / "sys/bus/pci/devices").glob("*"))


def _is_accelerator(device: Path) -> bool:
    """Whether a PCI device is Google's, and neither of the others that every machine of their cloud has: a disk and a
    network card."""
    try:
        vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
    except OSError:  # a container may hide it: then jax would not see it either
        return False
    return vendor == "0x1ae0" and not kind.startswith(("0x01", "0x02"))


def _any(root: Path, *patterns: str) -> bool:
    return any(True for pattern in patterns for _ in root.glob(pattern))


def _plugins() -> list[str]:
    """Packages that bring jax another platform than CPU and TPU, such as `xla_cuda13`."""
    spec = importlib.util.find_spec("jax_plugins")
    places = [] if spec is None else spec.submodule_search_locations or []
    names = {entry.name for place in places for entry in Path(place).iterdir() if entry.is_dir()} - {"__pycache__"}
    return sorted(names | {point.name for point in importlib.metadata.entry_points(group="jax_plugins")})
