"""Rows of the embedding and the head for tokens that a checkpoint does not have yet, and rows that only pad them."""

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
    padded_rows: int = 0,
    tokens: Collection[int] | None = None,
) -> np.ndarray:
    """[vocabulary, D] with `num_rows` rows; new are those at the end and those that `fresh` names.

    `init`: 'mean', each is the mean of the rows that tokens have: of the ids in `tokens` (None: all), but for new rows
    and rows of zeros, which nobody trained; 'normal', drawn with this standard deviation.
    `padded_rows`: zeros follow, up to so many rows.
    """
    fresh = sorted({*fresh, *range(len(values), num_rows)})
    padded_rows = max(padded_rows, num_rows)
    if not fresh and padded_rows == len(values):
        return values
    if not fresh:
        new = values[:0]
    elif init == "mean":
        known = np.zeros(len(values), bool)
        known[sorted(i for i in (range(len(values)) if tokens is None else tokens) if i < len(values))] = True
        known[[i for i in fresh if i < len(values)]] = False
        known &= values.any(axis=1)
        new = np.add.reduce(values, axis=0, dtype=np.float32, where=known[:, None]) / max(1, known.sum())
    else:
        new = std * np.random.default_rng(seed).normal(size=(len(fresh), values.shape[1]))
    result = np.zeros((padded_rows, values.shape[1]), values.dtype)
    result[: len(values)] = values
    result[fresh] = new.astype(values.dtype)
    return result


def true_shape(path: str, theirs: tuple[int, ...], vocab_size: int) -> tuple[int, ...]:
    """A tensor's shape in their layout, without rows of padding."""
    return (vocab_size, *theirs[1:]) if path in VOCABULARY else theirs


def without_padding(path: str, theirs: np.ndarray, vocab_size: int) -> np.ndarray:
    """A tensor in their layout, without rows of padding."""
    return theirs[:vocab_size] if path in VOCABULARY else theirs
