"""Bootstrap intervals."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

_RESAMPLES = 2000


def bootstrap(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % percentile interval of the mean of each column, resampling rows (prompts). One row has no spread to show.

    A resample is the number of times that each row was drawn, so all of them are one matrix product.

    Args:
        values: [prompts, columns], at least one row. The same prompts are drawn for every column.

    Returns:
        low and high, one number per column.
    """
    means = _draws(len(values)) @ values / len(values)
    low, high = np.percentile(means, (2.5, 97.5), axis=0)
    return low, high


@lru_cache(maxsize=2)
def _draws(num_rows: int) -> np.ndarray:
    """[resamples, rows]: how often each row is drawn. Seeded: the same number of rows, the same draws."""
    rng = np.random.default_rng(0)
    return rng.multinomial(num_rows, np.full(num_rows, 1.0 / num_rows), size=_RESAMPLES).astype(np.float32)
