from pathlib import Path

import pytest

import voco_jax


@pytest.fixture(scope="session")
def run(two_tokens_run) -> Path:
    return two_tokens_run


@pytest.fixture(scope="session")
def model(run):
    return voco_jax.load(run)
