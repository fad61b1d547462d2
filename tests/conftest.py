import ctypes
import gc
import importlib.metadata
import json
import os
from pathlib import Path
import platform
import re
import resource
import shutil
import sys

# Before jax is imported. Most of a test's time is compilation, and nothing here runs long enough to repay optimizing.
_FLAGS = ["--xla_backend_optimization_level=0"]
if importlib.metadata.version("jaxlib").startswith("0.10."):  # a quarter of the time; later ones have no such flag
    _FLAGS += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS]).strip()
os.environ["MPLBACKEND"] = "Agg"
# What one test, process or run of the tests has compiled, the others load
COMPILED = Path(__file__).parents[1] / ".pytest_cache" / "compiled"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(COMPILED))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
# Read by workers and by the processes that tests start
EVERY_PROCESS = Path(__file__).parent / "helpers" / "every_process"
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(EVERY_PROCESS), os.environ.get("PYTHONPATH")]))

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from tests.helpers import tiny  # noqa: E402
from tests.helpers.every_process import sitecustomize  # noqa: E402, F401 (for this process, which has begun)
from tests.helpers.shared import make_once  # noqa: E402
from voco_jax.data.tokenizer import load_tokenizer, train_tokenizer  # noqa: E402
from voco_jax.parallel.chips import topology_devices  # noqa: E402
from voco_jax.parallel.mesh import AXES  # noqa: E402
from voco_jax.train.loop import train  # noqa: E402

TESTS = Path(__file__).parent
DATA = TESTS / "fixtures"
# Files that take longest begin first, so that the workers end together
LONGEST = [
    "parallel/test_watch",
    "parallel/test_meshes",
    "parallel/test_mesh_steps",
    "train/test_training_processes",
    "train/test_kills",
    "train/test_overfit",
    "train/test_evaluation",
    "infer/test_compress",
    "infer/test_video_memory",
    "eval/test_lmms",
    "models/test_two_streams",
    "models/test_cache",
    "models/test_lora",
    "checkpoint/test_checkpoint",
    "checkpoint/test_going_on",
    "convert/test_convert",
    "convert/test_convert_errors",
    "train/test_training",
    "test_api",
]


def pytest_configure(config: pytest.Config) -> None:
    """Programs of earlier code go, where they are many: no worker has begun yet."""
    if not hasattr(config, "workerinput") and sum(file.stat().st_size for file in COMPILED.glob("*")) > 2**30:
        shutil.rmtree(COMPILED)


# ---- What is collected, and in which order -----------------------------------------------------------------------


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Modules that are marked `peer` as a whole import what `make test` does not install: where `-m` leaves peers out,
    they are not imported."""
    if not re.search(r"not .*\bpeer\b", config.getoption("markexpr")) or collection_path.suffix != ".py":
        return None
    return bool(re.search(r"^pytestmark = pytest\.mark\.peer$", collection_path.read_text(), re.MULTILINE)) or None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"tests/{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(str(item.path.relative_to(TESTS.parent)), len(order)))
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        for item in items:
            if item.get_closest_marker("tpu_compile"):
                item.add_marker(pytest.mark.skip("libtpu has no build for this machine"))


# ---- Memory ------------------------------------------------------------------------------------------------------


def pytest_collection_finish() -> None:
    """What has been imported stays: collections need not look through it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _few_programs():
    """A process keeps every program that it compiles: gigabytes, by the end of the tests. glibc keeps what is freed
    too, until it is told to return it: without that, every later test would find too much and trace its programs again.
    """
    yield
    for free in (lambda: None, jax.clear_caches):
        if resident_bytes() > 1.25 * 2**30:
            free()
            gc.collect()
            _return_freed_memory()


def _return_freed_memory() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim:
        trim(0)


def resident_bytes() -> int:
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else 0


_PEAKS: dict[str, int] = {}


def pytest_sessionfinish(session: pytest.Session) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["peak"] = peak
    else:
        _PEAKS["pytest"] = peak


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    if "peak" in getattr(node, "workeroutput", {}):
        _PEAKS[node.gateway.id] = node.workeroutput["peak"]


def pytest_terminal_summary(terminalreporter) -> None:
    peaks = ", ".join(f"{name} {peak / 2**30:.2f} GiB" for name, peak in sorted(_PEAKS.items()))
    terminalreporter.write_line(f"memory at its peak: {peaks}")


# ---- What tests share --------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def llama_tokenizer():
    """A real 32,000-piece sentencepiece tokenizer of Llama's kind, with `<voco>` added."""
    return load_tokenizer(DATA / "llama_tokenizer")


@pytest.fixture(scope="session")
def small_tokenizer():
    """Trained here: one token a word."""
    return train_tokenizer(["USER: what is it? ASSISTANT: a red cat\n"] * 9, vocab_size=400)


@pytest.fixture(scope="session")
def picture() -> Path:
    return DATA / "reference" / "chelsea.png"


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> Path:
    """A directory as training leaves it. Tests must not write into it."""
    return make_once(tmp_path_factory, "tiny", lambda directory: train(tiny.config(directory)))


@pytest.fixture(scope="session")
def two_tokens_run(tmp_path_factory) -> Path:
    """With two tokens a picture. Tests must not write into it."""
    changes = dict(model__num_voco_tokens=2, train__steps=3, train__checkpoint_every=3)
    return make_once(tmp_path_factory, "two_tokens", lambda directory: train(tiny.config(directory, **changes)))


@pytest.fixture(scope="session")
def tiles_run(two_tokens_run, tmp_path_factory) -> Path:
    """The run of two tokens as if it had been trained on pictures in 2 × 2 tiles. Tests must not write into it."""

    def make(directory: Path) -> None:
        shutil.copytree(two_tokens_run, directory)
        config = json.loads((directory / "config.json").read_text())
        config["data"] |= dict(image_grid=2, images_per_pack=5)
        (directory / "config.json").write_text(json.dumps(config))

    return make_once(tmp_path_factory, "tiles", make)


@pytest.fixture(scope="session")
def tpu_mesh() -> jax.sharding.Mesh:
    """Four v5e chips that are not there, along fsdp."""
    _, devices = topology_devices("v5e:2x2")
    return jax.sharding.Mesh(np.array(devices).reshape(1, 4, 1, 1), AXES)
