"""Rows of the embedding and the head: new ones for added tokens, and padding."""

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
    """[vocabulary, D] with `num_rows` rows. Rows at the end, and those in `fresh`, are new.

    `init`: 'mean' of the old rows of `tokens` (None: of all), without rows of zeros, which nobody trained; or 'normal',
    random with standard deviation `std`. `padded_rows`: zeros follow, up to this number of rows.
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
