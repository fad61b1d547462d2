"""Rows of the vocabulary in `verify`: what a conversion adds is no difference, another row of a token is one."""

from pathlib import Path

import numpy as np

from voco_jax.convert.verify import Side, verify
from voco_jax.convert.vocabulary import EMBEDDING

ROWS = np.arange(1, 13, dtype=np.float32).reshape(6, 2)
WORDS = {0: "<s>", 1: "a", 2: "b", 3: "c"}


def side(rows: np.ndarray, tokens: dict[int, str] | None) -> Side:
    return Side(Path("x"), {}, {(EMBEDDING, None): rows.shape}, lambda key: rows, tokens)


def test_rows_at_the_end():
    few = side(ROWS[:4], WORDS)
    for token, note in ("<voco>", "<voco>; padding"), ("<image>", "<image>; padding"):
        result = verify(few, side(ROWS, WORDS | {4: token}))
        assert result.equal and result.notes == [
            f"{EMBEDDING}: 4 and 6 rows, the first 4 compared; the others are of {note}"
        ]
    assert verify(
        side(ROWS[:4], WORDS | {4: "d"}), side(ROWS[:5], WORDS | {4: "d"})
    ).equal  # lacked a row for its token
    for other in side(ROWS, WORDS | {4: "d"}), side(ROWS, None):
        result = verify(few, other)
        assert not result.equal and "(--allow-more-rows, if the others are of added tokens)" in result.problems[0]
        assert verify(few, other, allow_more_rows=True).equal


def test_a_padding_row_that_became_a_token():
    padded, filled = ROWS.copy(), ROWS.copy()
    padded[4] = 0
    result = verify(side(padded, WORDS), side(filled, WORDS | {4: "<voco>"}))
    assert result.equal and result.identical == 1
    assert result.notes == [f"{EMBEDDING}: row 4 differs: <voco> in one, no token in the other"]
    both = [side(rows, WORDS | {4: "<voco>"}) for rows in (padded, filled)]
    assert not verify(*both).equal  # a trained row that changed
    assert not verify(side(padded, WORDS), side(filled, WORDS | {4: "d"})).equal
    assert not verify(side(padded, WORDS), side(filled, None)).equal
    filled[2] += 1
    assert not verify(side(padded, WORDS), side(filled, WORDS | {4: "<voco>"})).equal
