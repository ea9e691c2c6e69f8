"""Bootstrap intervals."""

from __future__ import annotations

import numpy as np
from scipy import stats

_RESAMPLES = 2000


def bootstrap(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % percentile interval of the mean of each column, resampling rows (prompts). One row has no spread to show.

    Args:
        values: [prompts, columns], at least one row. The same prompts are drawn for every column.

    Returns:
        low and high, one number per column.
    """
    if len(values) < 2:
        return values[0], values[0]
    interval = stats.bootstrap(
        (values,), np.mean, axis=0, method="percentile", n_resamples=_RESAMPLES, batch=100, rng=np.random.default_rng(0)
    ).confidence_interval
    return interval.low, interval.high
