from pathlib import Path

import pytest

from tests.helpers import tiny
from tests.helpers.shared import make_once
import voco_jax
from voco_jax.train.loop import train


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """A run with two tokens a picture. Tests must not write into it."""
    changes = dict(model__num_voco_tokens=2, train__steps=3, train__checkpoint_every=3)
    return make_once(tmp_path_factory, "two_tokens", lambda directory: train(tiny.config(directory, **changes)))


@pytest.fixture(scope="session")
def model(run):
    return voco_jax.load(run)
