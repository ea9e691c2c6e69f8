"""Metrics over repeated samples of each problem."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Hashable, Sequence
from functools import lru_cache
from math import comb
from statistics import fmean

import numpy as np

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
    """Fraction of problems whose most frequent answer is right. Ties go to the answer that was given first; a sample
    without an answer (None) does not vote.
    """
    won = []
    for given, right in zip(answers, correct, strict=True):
        votes = Counter(answer for answer in given if answer is not None)
        winner = votes.most_common(1)[0][0] if votes else None
        won.append(winner is not None and right[list(given).index(winner)])
    return fmean(won)


def bootstrap_interval(
    values: Sequence[float], *, level: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean, resampling problems.

    Args:
        values: one number per problem.
    """
    rng = random.Random(seed)
    means = sorted(fmean(rng.choices(values, k=len(values))) for _ in range(num_resamples))
    tail = (1.0 - level) / 2.0
    return means[int(tail * num_resamples)], means[min(int((1.0 - tail) * num_resamples), num_resamples - 1)]


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
    return rng.multinomial(num_rows, np.full(num_rows, 1.0 / num_rows), size=NUM_RESAMPLES).astype(np.float32)
