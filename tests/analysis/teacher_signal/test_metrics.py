"""The six metrics against appendix A, written out pair by pair, against hand-computed cases and against SciPy."""

import math
import random

import numpy as np
import pytest
from scipy import stats

from mopd_nemo.analysis.teacher_signal.metrics import METRICS, prompt_metrics

NAN = float("nan")


def by_definition(scores: list[float], rewards: list[float], success: list[bool]) -> dict[str, float]:
    """Appendix A, formula by formula, with no library but `math`."""
    pairs = [(i, j) for i in range(len(scores)) for j in range(i)]
    products = [(scores[i] - scores[j]) * (rewards[i] - rewards[j]) for i, j in pairs]
    concordant, discordant = sum(p > 0 for p in products), sum(p < 0 for p in products)
    unequal = [(i, j) for i, j in pairs if rewards[i] != rewards[j]]
    positive = [s for s, y in zip(scores, success, strict=True) if y]
    negative = [s for s, y in zip(scores, success, strict=True) if not y]
    credit = [float(a > b) + 0.5 * (a == b) for a in positive for b in negative]
    squares = [(1 / (1 + math.exp(-s)) - y) ** 2 for s, y in zip(scores, success, strict=True)]
    return {
        "spearman": pearson(average_ranks(scores), average_ranks(rewards)),
        "kendall": (concordant - discordant) / (concordant + discordant) if concordant + discordant else NAN,
        "pairwise_accuracy": concordant / len(unequal) if unequal else NAN,
        "auc": sum(credit) / len(credit) if credit else NAN,
        "point_biserial": pearson(scores, [float(y) for y in success]),
        "brier": sum(squares) / len(squares) if squares else NAN,
    }


def average_ranks(values: list[float]) -> list[float]:
    return [1 + sum(o < v for o in values) + (sum(o == v for o in values) - 1) / 2 for v in values]


def pearson(x: list[float], y: list[float]) -> float:
    if len(x) < 2 or len(set(x)) == 1 or len(set(y)) == 1:
        return NAN
    mx, my = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    return covariance / math.sqrt(sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y))


def test_hand_computed_case() -> None:
    found = prompt_metrics([-0.1, -0.4, -0.2, -0.3], [1.0, 0.0, 0.0, 1.0], [True, False, False, True])
    # pairs of unequal reward: .1>.4 right, .1>.2 right, .3>.4 right, .3<.2 wrong
    assert found["pairwise_accuracy"] == found["auc"] == 0.75
    assert found["kendall"] == 0.5
    # ranks of scores 4 1 3 2, of rewards 3.5 1.5 1.5 3.5: 2 / sqrt(5 · 4)
    assert found["spearman"] == pytest.approx(2 / math.sqrt(20))
    assert found["point_biserial"] == pytest.approx(0.1 / math.sqrt(0.05 * 1.0))
    p = [1 / (1 + math.exp(s)) for s in (0.1, 0.4, 0.2, 0.3)]
    assert found["brier"] == pytest.approx(((p[0] - 1) ** 2 + p[1] ** 2 + p[2] ** 2 + (p[3] - 1) ** 2) / 4)


@pytest.mark.parametrize("seed", range(60))
def test_agrees_with_the_formulas_on_random_cases_with_ties(seed: int) -> None:
    rng = random.Random(seed)
    n = rng.randint(1, 9)
    scores = [rng.choice([-0.1, -0.2, -0.3, rng.uniform(-3, 0)]) for _ in range(n)]
    rewards = [rng.choice([0.0, 0.25, 0.5, 1.0]) for _ in range(n)]
    success = [reward >= 0.5 for reward in rewards]
    found, expected = prompt_metrics(scores, rewards, success), by_definition(scores, rewards, success)
    for name in METRICS:
        assert found[name] == pytest.approx(expected[name], nan_ok=True), name


def test_agrees_with_scipy() -> None:
    rng = np.random.default_rng(0)
    scores, rewards = -rng.random(40), rng.permutation(40) / 40  # no ties: every coefficient has one definition
    success = rewards >= 0.5
    found = prompt_metrics(scores.tolist(), rewards.tolist(), success.tolist())
    assert found["spearman"] == pytest.approx(stats.spearmanr(scores, rewards).statistic)
    assert found["kendall"] == pytest.approx(stats.kendalltau(scores, rewards).statistic)
    assert found["point_biserial"] == pytest.approx(stats.pointbiserialr(success, scores).statistic)
    u = stats.mannwhitneyu(scores[success], scores[~success], method="exact").statistic
    assert found["auc"] == pytest.approx(u / (success.sum() * (~success).sum()))


def test_ties_of_scores() -> None:
    found = prompt_metrics([-0.5, -0.5, -0.9], [1.0, 0.0, 0.0], [True, False, False])
    assert found["pairwise_accuracy"] == 0.5  # a tie is not right
    assert found["auc"] == 0.75  # a tie is half right
    assert found["kendall"] == 1.0  # a tie is left out


def test_constant_scores_have_no_correlation() -> None:
    found = prompt_metrics([-0.5] * 4, [1.0, 1.0, 0.0, 0.0], [True, True, False, False])
    assert all(math.isnan(found[name]) for name in ("spearman", "kendall", "point_biserial"))
    assert found["auc"] == 0.5 and found["pairwise_accuracy"] == 0.0


@pytest.mark.parametrize("won", [True, False])
def test_one_class_prompt_has_only_a_brier_score(won: bool) -> None:
    found = prompt_metrics([-0.1, -0.2, -0.3], [float(won)] * 3, [won] * 3)
    assert [name for name in METRICS if not math.isnan(found[name])] == ["brier"]


def test_scores_that_are_not_finite_are_left_out() -> None:
    clean = prompt_metrics([-0.1, -0.3, -0.2], [1.0, 0.0, 1.0], [True, False, True])
    dirty = prompt_metrics([-0.1, NAN, -0.3, -math.inf, -0.2], [1.0, 1, 0, 0, 1.0], [True, True, False, False, True])
    assert dirty == clean
    assert all(math.isnan(value) for value in prompt_metrics([NAN], [1.0], [True]).values())
