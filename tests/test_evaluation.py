from itertools import combinations, product
from statistics import fmean

import numpy as np
import pytest

from mopd_nemo.config import UserError
from mopd_nemo.evaluation import (
    best_with_replacement,
    bootstrap,
    bootstrap_interval,
    majority_at_k,
    mean_at_k,
    paper_metrics,
    pass_at_k,
    score,
)
from mopd_nemo.types import Message, Outcome, Problem, Rollout, RolloutGroup, Verdict


@pytest.mark.parametrize("n", [1, 4, 8])
def test_pass_at_k_equals_counting_all_subsets(n: int) -> None:
    for c in range(n + 1):
        flags = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            counted = fmean(any(subset) for subset in combinations(flags, k))
            assert pass_at_k(c, n, k) == pytest.approx(counted)


def test_one_success_of_eight_is_a_full_pass_at_eight() -> None:
    assert pass_at_k(1, 8, 8) == 1.0  # a bootstrap with replacement would say 0.656


def test_best_with_replacement_is_the_mean_over_all_draws() -> None:
    assert best_with_replacement([1.0] + [0.0] * 7, 8) == pytest.approx(1 - (7 / 8) ** 8)
    scores = [0.2, 1.0, 0.5, 0.5]
    assert best_with_replacement(scores, 3) == pytest.approx(fmean(max(drawn) for drawn in product(scores, repeat=3)))


def judged(*verdicts: Verdict) -> RolloutGroup:
    problem = Problem("p", (Message(role="user", content="?"),), None, "code")
    return RolloutGroup(problem, tuple(Rollout((1,), "", True, (0.0,)) for _ in verdicts), verdicts)


def test_the_paper_counts_tests_and_draws_with_replacement() -> None:
    """A program of 4 tests that passes 3 is wrong here and scores 0.75 there; one without a program scores 0."""
    right = Verdict(1.0, Outcome.CORRECT, details={"tests": 4, "passed": 4})
    almost = Verdict(0.0, Outcome.WRONG, details={"tests": 4, "passed": 3, "failed_test": 0, "tests_run": 4})
    none, undecided = Verdict(0.0, Outcome.BAD_FORMAT), Verdict(None, Outcome.VERIFIER_ERROR)
    metrics = paper_metrics([judged(right, almost), judged(almost, none), judged(undecided, right)], 2)
    assert metrics["paper/mean@2"] == pytest.approx(fmean([0.875, 0.375, 0.5]))
    assert metrics["paper/pass@2"] == pytest.approx(fmean([0.9375, 0.5625, 0.75]))


def test_a_program_stopped_early_has_no_share_of_tests() -> None:
    with pytest.raises(UserError, match=r"program for p was stopped .*: set verifier.code.all_tests=true"):
        score(False, {"tests": 4, "passed": 1, "tests_run": 2}, "p")


def test_pass_at_k_needs_k_samples() -> None:
    with pytest.raises(ValueError, match="at least 9 samples"):
        pass_at_k(1, 8, 9)


def test_mean_at_k() -> None:
    assert mean_at_k([0, 4, 8], 8) == pytest.approx(0.5)


def test_majority_votes_by_answer_and_abstentions_do_not_count() -> None:
    answers = [["2", "3", "2", None], [None, None, None, "5"], ["1", "1", "4", "4"], [None, None]]
    correct = [[True, False, True, False], [False, False, False, True], [False, False, True, True], [False, False]]
    assert majority_at_k(answers, correct) == pytest.approx(0.5)


def test_interval_holds_the_mean_and_shrinks_with_problems() -> None:
    values = [0.0, 1.0] * 50
    low, high = bootstrap_interval(values)
    assert 0.38 < low < 0.5 < high < 0.62
    wide = bootstrap_interval(values[:10])
    assert wide[1] - wide[0] > high - low
    assert bootstrap_interval(values) == (low, high)


def test_interval_of_many_rows_is_the_normal_one() -> None:
    values = np.random.default_rng(1).normal(size=(400, 2)) + np.array([0.0, 5.0])
    half = 1.96 * values.std(axis=0) / 20
    low, high = bootstrap(values)
    assert low == pytest.approx(values.mean(axis=0) - half, abs=0.02)
    assert high == pytest.approx(values.mean(axis=0) + half, abs=0.02)


def test_same_rows_same_interval_and_one_row_has_no_spread() -> None:
    values = np.array([[1.0], [2.0], [4.0]])
    assert bootstrap(values) == bootstrap(values.copy())
    low, high = bootstrap(values[:1])
    assert low[0] == high[0] == 1.0


def test_columns_are_resampled_together() -> None:
    values = np.random.default_rng(2).normal(size=(50, 1))
    low, high = bootstrap(np.hstack([values, 2 * values]))
    assert (low[1], high[1]) == pytest.approx((2 * low[0], 2 * high[0]))
