import numpy as np
import pytest
from scipy import stats

from mopd_nemo.evaluation.metrics import bootstrap


def test_agrees_with_scipy() -> None:
    values = np.random.default_rng(1).normal(size=(200, 2)) + np.array([0.0, 5.0])
    theirs = stats.bootstrap((values,), np.mean, axis=0, method="percentile", n_resamples=9999, rng=0)
    low, high = bootstrap(values)
    assert low == pytest.approx(theirs.confidence_interval.low, abs=0.01)
    assert high == pytest.approx(theirs.confidence_interval.high, abs=0.01)


def test_same_rows_same_interval_and_one_row_has_no_spread() -> None:
    values = np.array([[1.0], [2.0], [4.0]])
    assert bootstrap(values) == bootstrap(values.copy())
    low, high = bootstrap(values[:1])
    assert low[0] == high[0] == 1.0


def test_columns_are_resampled_together() -> None:
    values = np.random.default_rng(2).normal(size=(50, 1))
    low, high = bootstrap(np.hstack([values, 2 * values]))
    assert (low[1], high[1]) == pytest.approx((2 * low[0], 2 * high[0]))
