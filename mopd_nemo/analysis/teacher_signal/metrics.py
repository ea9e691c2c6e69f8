"""The six metrics of appendix A for one prompt. NaN where a metric is not defined.

They rest on SciPy's `rankdata`, not on its tests: those also compute p-values, which cost 50 times the statistic here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

METRICS = ("spearman", "kendall", "pairwise_accuracy", "auc", "point_biserial", "brier")
LABELS = {
    "spearman": "Spearman",
    "kendall": "Kendall (no ties)",
    "pairwise_accuracy": "pairwise accuracy",
    "auc": "success AUC",
    "point_biserial": "point-biserial",
    "brier": "Brier (lower is better)",
}
LOWER_IS_BETTER = ("brier",)
CHANCE = {"spearman": 0.0, "kendall": 0.0, "pairwise_accuracy": 0.5, "auc": 0.5, "point_biserial": 0.0}
"""What scores without information give. The Brier score has no such value: every score is below 0, so every
pseudo-probability is below one half, whatever the teacher thinks."""

NAN = float("nan")
Array = NDArray[np.float64]


def prompt_metrics(scores: Sequence[float], rewards: Sequence[float], success: Sequence[bool]) -> dict[str, float]:
    """All metrics over the responses of one prompt; those with a score that is not finite are left out.

    Args:
        scores: the teacher's mean token log-probability of each response (nats).
        rewards: what the verifier gave.
        success: reward at least τ.
    """
    values = np.asarray(scores, dtype=float)
    keep = np.isfinite(values)
    values, given = values[keep], np.asarray(rewards, dtype=float)[keep]
    won = np.asarray(success, dtype=bool)[keep]
    return {
        "spearman": pearson(stats.rankdata(values), stats.rankdata(given)),
        "kendall": kendall(values, given),
        "pairwise_accuracy": pairwise_accuracy(values, given),
        "auc": auc(values, won),
        "point_biserial": pearson(values, won.astype(float)),
        "brier": float(np.mean((special.expit(values) - won) ** 2)) if len(values) else NAN,
    }


def kendall(scores: Array, rewards: Array) -> float:
    """(C - D) / (C + D) over pairs that are tied in neither (Goodman and Kruskal's gamma, not SciPy's tau-b)."""
    agreement = _pair_signs(scores) * _pair_signs(rewards)
    untied = np.count_nonzero(agreement)
    return float(agreement.sum() / untied) if untied else NAN


def pairwise_accuracy(scores: Array, rewards: Array) -> float:
    """Fraction of unequal-reward pairs that the scores order rightly; a tie of scores is not right."""
    rewarded = _pair_signs(rewards)
    unequal = rewarded != 0
    return float(np.mean(_pair_signs(scores)[unequal] == rewarded[unequal])) if unequal.any() else NAN


def auc(scores: Array, success: NDArray[np.bool_]) -> float:
    """Probability that a success scores above a failure, ties half: Mann-Whitney's U over its largest value."""
    positive, negative = int(success.sum()), int((~success).sum())
    if not positive or not negative:
        return NAN
    u = stats.rankdata(scores)[success].sum() - positive * (positive + 1) / 2
    return float(u / (positive * negative))


def pearson(x: Array, y: Array) -> float:
    """Linear correlation."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return NAN
    return float(np.corrcoef(x, y)[0, 1])


def _pair_signs(values: Array) -> Array:
    """Sign of the difference of every unordered pair."""
    first, second = np.triu_indices(len(values), k=1)
    return np.sign(values[first] - values[second])
