import os
from pathlib import Path
import tempfile

# Before jax is imported. Most of a test's time is compilation, and nothing here runs long enough to repay optimizing.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
os.environ["MPLBACKEND"] = "Agg"

import jax  # noqa: E402

# After jax is imported, so for the processes that tests start: many of them are the same training started again.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="voco_jax_compiled_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from tests.helpers import tiny
from voco_jax.data.tokenizer import load_tokenizer, train_tokenizer  # noqa: E402
from voco_jax.parallel.chips import topology_devices  # noqa: E402
from voco_jax.parallel.mesh import AXES  # noqa: E402
from voco_jax.train.loop import train  # noqa: E402

DATA = Path(__file__).parent / "fixtures"


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
    return train(tiny.config(tmp_path_factory.mktemp("runs") / "tiny"))


@pytest.fixture(scope="session")
def tpu_mesh() -> jax.sharding.Mesh:
    """Four v5e chips that are not there, along fsdp."""
    _, devices = topology_devices("v5e:2x2")
    return jax.sharding.Mesh(np.array(devices).reshape(1, 4, 1, 1), AXES)
