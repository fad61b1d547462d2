"""The two sides of `benchmarks/step_time.py` train the same model."""

import dataclasses

import pytest

from benchmarks.llava_pair import SMALL, Ours, Peer, largest_difference

pytestmark = pytest.mark.peer

# Rows of 295 tokens: long enough for attention in blocks
TINY = dataclasses.replace(
    SMALL, vocabulary=300, hidden=32, mlp=48, heads=2, layers=2, vision_hidden=24, vision_mlp=32, vision_heads=2,
    vision_layers=2, picture=196, turns=1,
)  # fmt: skip


def test_losses_agree():
    """Before the first update and after some: weights, batch, gradients, clipping and AdamW are the same."""
    ours, theirs = ([side.step() for _ in range(5)] for side in (Ours(TINY, unroll=False), Peer(TINY, "foreach")))
    assert largest_difference(ours, theirs) < 1e-5
    assert len(set(theirs[1:])) == 4 and theirs[4] < theirs[1] - 0.01  # it learns, from the second step on
