"""Rows of the embedding and the head for tokens that a checkpoint does not have yet."""

from collections.abc import Collection, Sequence

import numpy as np

EMBEDDING, HEAD = "llama.embed_tokens.embedding", "llama.lm_head.kernel"
VOCABULARY = (HEAD, EMBEDDING)  # the parameters with a row for every token


def with_fresh_rows(
    values: np.ndarray,
    num_rows: int,
    fresh: Collection[int] = (),
    init: str = "mean",
    std: float = 0.0,
    seed: int | Sequence[int] = 0,
) -> np.ndarray:
    """[vocabulary, D] with `num_rows` rows; new are those at the end and those that `fresh` names.

    `init`: 'mean', each is the mean of the rows that are not new; 'normal', drawn with this standard deviation.
    """
    fresh = sorted({*fresh, *range(len(values), num_rows)})
    if not fresh:
        return values
    if init == "mean":
        overwritten = [i for i in fresh if i < len(values)]
        total = values.sum(axis=0, dtype=np.float32) - values[overwritten].sum(axis=0, dtype=np.float32)
        new = total / (len(values) - len(overwritten))
    else:
        new = std * np.random.default_rng(seed).normal(size=(len(fresh), values.shape[1]))
    result = np.empty((num_rows, values.shape[1]), values.dtype)
    result[: len(values)] = values
    result[fresh] = new.astype(values.dtype)
    return result
