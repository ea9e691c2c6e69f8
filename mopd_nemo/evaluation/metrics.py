"""Metrics over repeated samples of each problem."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from math import comb
from statistics import fmean

import numpy as np
from scipy import stats

NUM_RESAMPLES = 2000


def mean_at_k(num_correct: Sequence[int], k: int) -> float:
    """Mean accuracy over k samples of each problem: mean@k."""
    return fmean(c / k for c in num_correct)


def pass_at_k(num_correct: int, num_samples: int, k: int) -> float:
    """Unbiased chance that at least one of k samples is right: 1 - C(n-c, k) / C(n, k).

    Args:
        num_correct: c, right samples among n.
        num_samples: n, at least k.
    """
    if k > num_samples:
        raise ValueError(f"pass@{k} needs at least {k} samples, got {num_samples}")
    return 1.0 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def majority_at_k(answers: Sequence[Sequence[Hashable | None]], correct: Sequence[Sequence[bool]]) -> float:
    """Fraction of problems whose most frequent answer is right.

    Ties go to the answer that was given first; a sample without an answer (None) does not vote.
    """
    won = []
    for given, right in zip(answers, correct, strict=True):
        votes = Counter(answer for answer in given if answer is not None)
        winner = votes.most_common(1)[0][0] if votes else None
        won.append(winner is not None and right[list(given).index(winner)])
    return fmean(won)


def bootstrap(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % percentile interval of the mean of each column, resampling rows: problems or prompts.

    Args:
        values: [problems, columns], at least one row. The same problems are drawn for every column.

    Returns:
        low and high, one number per column. One row has no spread to show.
    """
    if len(values) < 2:
        return values[0], values[0]
    interval = stats.bootstrap(
        (values,), np.mean, axis=0, n_resamples=NUM_RESAMPLES, batch=100, method="percentile", rng=0
    ).confidence_interval
    return interval.low, interval.high


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float]:
    """`bootstrap` of one column."""
    low, high = bootstrap(np.array(values, dtype=float)[:, None])
    return float(low[0]), float(high[0])
