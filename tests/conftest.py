from pathlib import Path

import pytest

from voco_jax.data.tokenizer import load_tokenizer

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def llama_tokenizer():
    """A real 32,000-piece sentencepiece tokenizer of Llama's kind, with `<voco>` added."""
    return load_tokenizer(DATA / "llama_tokenizer")
