from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from mopd_nemo.analysis.statistics import Noise, estimate, holm, noise

PROBLEMS, SAMPLES = 29, 8
DRAWS = {3: 2000, 5: 2000, 10: 200}
"""By seeds. Ten are bootstrapped, which takes longer."""


def synthetic_runs(seeds: int, draws: int, problems: int = PROBLEMS, shared: bool = True) -> list[np.ndarray]:
    """Shares of right samples of two arms, [draws, seeds, problems] each, with noise like that of the pilot.

    A problem has a difficulty, and an arm learns each problem, in each seed, and in each pair of both, differently. As
    in the pilot, one seed's difference has a standard error of about 5.5 points over problems; seeds differ by about 8.
    """
    rng = np.random.default_rng(seeds)

    def draw(scale: float, *shape: int) -> np.ndarray:
        return rng.normal(0.0, scale, shape)

    difficulty = draw(1.2, draws, 1, problems)
    luck = draw(0.3, draws, seeds, 1)
    arms = []
    for _ in range(2):
        own = draw(0.3, draws, seeds, 1) + draw(0.6, draws, 1, problems) + draw(0.5, draws, seeds, problems)
        lucky = luck if shared else draw(0.3, draws, seeds, 1)
        arms.append(rng.binomial(SAMPLES, 1.0 / (1.0 + np.exp(-(difficulty + lucky + own)))) / SAMPLES)
    return arms


@pytest.fixture(scope="module")
def pilot_noise() -> Noise:
    base, other = synthetic_runs(seeds=150, draws=1, problems=2000)
    return noise(other[0] - base[0])


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_intervals_cover_as_they_say(seeds: int) -> None:
    base, other = synthetic_runs(seeds, DRAWS[seeds])
    bounds = [estimate(difference).interval() for difference in other - base]
    assert np.mean([low <= 0.0 <= high for low, high in bounds]) == pytest.approx(0.95, abs=0.03)


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_intervals_cover_without_common_seeds(seeds: int) -> None:
    bounds = [
        estimate(a, b).interval() for b, a in zip(*synthetic_runs(seeds, DRAWS[seeds], shared=False), strict=True)
    ]
    assert np.mean([low <= 0.0 <= high for low, high in bounds]) == pytest.approx(0.95, abs=0.03)


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_what_is_called_visible_is_found_as_often_as_said(seeds: int, pilot_noise: Noise) -> None:
    experiment = pilot_noise.experiment(seeds, PROBLEMS)
    visible = experiment.detectable()
    base, other = synthetic_runs(seeds, DRAWS[seeds])
    estimates = [estimate(difference) for difference in other - base]
    for effect, chance in ((visible, 0.8), (visible / 2, experiment.power(visible / 2))):
        found = [replace(each, mean=each.mean + effect).p_value() < 0.05 for each in estimates]
        assert np.mean(found) == pytest.approx(chance, abs=0.03 if seeds < 10 else 0.06)
    said = np.median([each.experiment.detectable() for each in estimates[:200]])
    assert said == pytest.approx(visible, rel=0.25), "what a page says of one experiment is near the truth"


def test_a_t_test_on_seeds_and_a_plain_bootstrap_do_not_cover() -> None:
    """Why the interval is neither. Seeds are few or share their problems, so both are too narrow."""
    base, other = synthetic_runs(10, DRAWS[10])
    means = (other - base).mean(-1)
    low, high = stats.t.interval(0.95, 9, means.mean(-1), stats.sem(means, axis=-1))
    assert np.mean((low <= 0) & (high >= 0)) < 0.9


def test_equivalence_is_declared_at_most_as_often_as_said(pilot_noise: Noise) -> None:
    base, other = synthetic_runs(5, DRAWS[5])
    estimates = [estimate(difference) for difference in other - base]
    at_the_margin = [estimate(difference + 0.1).p_equivalent(0.1) < 0.05 for difference in other - base]
    assert np.mean(at_the_margin) <= 0.08
    error = float(pilot_noise.experiment(5, PROBLEMS).variance()[0]) ** 0.5
    assert np.mean([each.p_equivalent(6 * error) < 0.05 for each in estimates]) > 0.95


def test_equivalence_is_the_90_percent_interval_within_the_margin() -> None:
    base, other = synthetic_runs(3, 1)
    each = estimate(other[0] - base[0])
    low, high = each.interval(0.9)
    assert each.p_equivalent(max(-low, high) + 1e-9) < 0.05 < each.p_equivalent(max(-low, high) - 1e-9)


def test_mean_squares_are_those_of_the_textbook() -> None:
    values = np.random.default_rng(0).normal(size=(4, 6))
    by_seed, by_problem, mean = values.mean(1), values.mean(0), values.mean()
    residual = values - by_seed[:, None] - by_problem + mean
    seeds, problems = 6 * by_seed.var(ddof=1), 4 * by_problem.var(ddof=1)
    rest = (residual**2).sum() / 15
    beyond = max(problems - rest, 0.0)
    each = estimate(values)
    assert each.mean == pytest.approx(mean)
    assert each.error == pytest.approx(((seeds + beyond) / 24) ** 0.5)
    assert each.freedom == pytest.approx((seeds + beyond) ** 2 / (seeds**2 / 3 + beyond**2 / 5))
    found = noise(values)
    assert found.rest == pytest.approx(rest)
    assert (found.seeds, found.problems) == pytest.approx((max(seeds - rest, 0) / 6, max(problems - rest, 0) / 4))


def test_one_seed_is_the_plain_t_interval_over_problems() -> None:
    values = np.array([[0.1, 0.4, 0.3, 0.9]])
    each = estimate(values)
    assert not each.over_seeds
    assert each.interval() == pytest.approx(stats.t.interval(0.95, 3, values.mean(), stats.sem(values[0])))
    assert each.p_value() == pytest.approx(stats.ttest_1samp(values[0], 0.0).pvalue)


def test_one_seed_beside_several_is_refused() -> None:
    with pytest.raises(ValueError, match="one seed"):
        estimate(np.zeros((1, 4)), np.zeros((3, 4)))


def test_equal_runs_differ_by_nothing() -> None:
    each = estimate(np.zeros((3, 5)))
    assert each.interval() == (0.0, 0.0)
    assert (each.p_value(), each.p_equivalent(0.02), each.experiment.detectable()) == (1.0, 0.0, 0.0)


def test_many_seeds_are_bootstrapped_and_agree_with_students_t() -> None:
    base, other = synthetic_runs(10, 1)
    values = other[0] - base[0]
    bootstrapped = estimate(values)
    assert bootstrapped.tails is not None and estimate(values[:9]).tails is None
    student = replace(bootstrapped, tails=None)
    assert bootstrapped.interval() == pytest.approx(student.interval(), abs=0.3 * student.error)
    assert bootstrapped.interval() == estimate(values).interval(), "the same file gives the same page"


def test_power_and_the_visible_effect_are_each_others_inverse(pilot_noise: Noise) -> None:
    for experiment in (pilot_noise.experiment(3, PROBLEMS), estimate(synthetic_runs(1, 1)[0][0]).experiment):
        assert experiment.power(experiment.detectable(alpha=0.0125), alpha=0.0125) == pytest.approx(0.8)
    no_seeds = Noise(0.0, 0.01, 0.0).experiment(5, PROBLEMS)
    assert no_seeds.power(0.0) == pytest.approx(0.025, abs=3e-3), "in its direction, of two"
    error, freedom = (0.01 / PROBLEMS) ** 0.5, PROBLEMS - 1
    noncentral = stats.nct.sf(stats.t.isf(0.025, freedom), freedom, 0.05 / error)
    assert no_seeds.power(0.05) == pytest.approx(noncentral, abs=5e-3)


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
