import numpy as np
import pytest

from voco_jax.data.conversations import Sample
from voco_jax.data.packing import pack_row, truncate
from voco_jax.errors import UserError


def sample(tokens, labels, slot_index=()):
    slot_index = [*slot_index] + [-1] * (len(tokens) - len(slot_index))
    return Sample(np.array(tokens), np.array(labels, bool), np.array(slot_index), num_images=1)


A = sample([9, 9, 5, 6, 7], [0, 0, 0, 1, 1], slot_index=[0, 1])
B = sample([9, 9, 8], [1, 0, 1], slot_index=[0, 1])


def test_a_row_literally():
    row = pack_row([A, B], 10, first_slot=[0, 2])
    assert row.tokens.tolist() == [9, 9, 5, 6, 7, 9, 9, 8, 0, 0]
    assert row.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 0]
    assert row.segment_ids.tolist() == [1, 1, 1, 1, 1, 2, 2, 2, 0, 0]
    assert row.slot_index.tolist() == [0, 1, -1, -1, -1, 2, 3, -1, -1, -1]
    assert row.targets.tolist() == [9, 5, 6, 7, 0, 9, 8, 0, 0, 0]
    assert row.weights.tolist() == [0, 0, 1, 1, 0, 0, 1, 0, 0, 0]  # never from one sample to the next


def test_no_room():
    with pytest.raises(UserError, match="row: 2 samples of 8 tokens do not fit into 7"):
        pack_row([A, B], 7)


def test_text_is_cut_from_the_end():
    cut = truncate(A, 4)
    assert (
        cut.tokens.tolist() == [9, 9, 5, 6]
        and cut.labels.tolist() == [0, 0, 0, 1]
        and cut.slot_index.tolist() == [0, 1, -1, -1]
    )
    assert truncate(A, 5) is A


def test_an_image_is_never_cut():
    late = sample([4, 5, 9, 9, 6], [0, 1, 0, 0, 1], slot_index=[-1, -1, 0, 1])
    assert truncate(late, 4) is not None
    assert truncate(late, 3) is None  # between the two tokens of the image
    assert truncate(A, 3) is None  # no label left
