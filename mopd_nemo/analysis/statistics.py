"""What a few seeds and a few problems allow to say of a mean: intervals, tests and the smallest effect they can show.

Every seed answers the same problems, so a value has three sources of noise: its seed, its problem, and the rest (their
interaction and the samples drawn). The variance of the mean is put together from the mean squares of all three, as for
readers and cases in diagnostic studies (Hillis 2007); its degrees of freedom are Satterthwaite's. A t test on the means
of the seeds leaves the problems out, a bootstrap of few seeds their scarcity: neither covers what it says.

S, T seeds, P problems, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

MANY_SEEDS = 10
"""From here on the tails are those of a bootstrap; with fewer seeds there is too little to resample."""
RESAMPLES = 2000
ALPHA = 0.05
LEVEL = 0.95
POWER = 0.8


class MeanSquares(NamedTuple):
    """Of a table of seeds by problems; arrays hold one number a resample."""

    seeds: np.ndarray
    problems: np.ndarray
    rest: np.ndarray


@dataclass(frozen=True, slots=True)
class Experiment:
    """Size and noise of an experiment: what its standard error is, and what it would find if it were repeated."""

    sides: tuple[MeanSquares, ...]
    """One, or two whose seeds have nothing to do with each other; none: one seed, so about problems alone."""
    num_seeds: tuple[int, ...]
    """Of each side."""
    num_problems: int
    spread: np.ndarray
    """Mean squared deviation of the problems' values (means over seeds, differences of the sides) from their mean."""

    def variance(self) -> tuple[np.ndarray, np.ndarray]:
        """Variance of the mean, and its degrees of freedom."""
        from_seeds, squared, rest = (np.zeros_like(self.spread) for _ in range(3))
        for squares, count in zip(self.sides, self.num_seeds, strict=True):
            # One degree of freedom is too small by chance too often. Its expectation is never below that of the rest.
            lowest = squares.rest if count == 2 else np.where(squares.seeds > 0.0, 0.0, squares.rest)
            part = np.maximum(squares.seeds, lowest) / (count * self.num_problems)
            from_seeds, squared = from_seeds + part, squared + part**2 / (count - 1)
            rest = rest + squares.rest / (count * self.num_problems)
        # What problems add to the rest, which is in the part of the seeds already.
        from_problems = np.maximum(self.spread / (self.num_problems - 1) - rest, 0.0)
        variance = from_seeds + from_problems
        squared = squared + from_problems**2 / (self.num_problems - 1)
        least = np.full_like(variance, min(self.num_seeds, default=2) - 1.0)
        return variance, np.divide(variance**2, squared, out=least, where=squared > 0.0)

    def power(self, effect: float, alpha: float = ALPHA) -> float:
        """Chance that a repetition finds a positive effect at level `alpha`, two-sided, and finds it positive."""
        error, bounds = self._bounds(alpha)
        return float(stats.norm.sf((bounds - effect) / error).mean())

    def detectable(self, alpha: float = ALPHA, power: float = POWER) -> float:
        """The smallest effect that a share `power` of repetitions would find."""
        error, bounds = self._bounds(alpha)
        if error == 0.0:
            return 0.0

        def lacking(effect: float) -> float:
            return float(stats.norm.sf((bounds - effect) / error).mean()) - power

        return optimize.root_scalar(lacking, bracket=(0.0, bounds.max() + 10.0 * error)).root

    def _bounds(self, alpha: float) -> tuple[float, np.ndarray]:
        """True standard error, and what means must exceed in repetitions, whose mean squares are drawn anew."""
        rng = np.random.default_rng(0)

        def drawn(expected: np.ndarray, freedom: int) -> np.ndarray:
            return expected * rng.chisquare(freedom, RESAMPLES) / freedom

        true = Experiment(
            tuple(each._replace(seeds=np.maximum(each.seeds, each.rest)) for each in self.sides),
            self.num_seeds,
            self.num_problems,
            self.spread,
        )
        again = Experiment(
            tuple(
                MeanSquares(
                    drawn(each.seeds, count - 1),
                    each.problems,
                    drawn(each.rest, (count - 1) * (self.num_problems - 1)),
                )
                for each, count in zip(true.sides, self.num_seeds, strict=True)
            ),
            self.num_seeds,
            self.num_problems,
            drawn(self.spread, self.num_problems - 1),
        )
        variance, freedom = again.variance()
        return true.variance()[0].item() ** 0.5, stats.t.isf(alpha / 2.0, freedom) * np.sqrt(variance)


@dataclass(frozen=True, slots=True)
class Noise:
    """Variances of a single value, by their source."""

    seeds: float
    problems: float
    rest: float

    def experiment(self, num_seeds: int, num_problems: int) -> Experiment:
        """What is to be expected of one of this size."""
        squares = (
            num_problems * self.seeds + self.rest,
            num_seeds * self.problems + self.rest,
            self.rest,
        )
        spread = np.array(squares[1] * (num_problems - 1) / (num_seeds * num_problems))
        return Experiment((MeanSquares(*map(np.array, squares)),), (num_seeds,), num_problems, spread)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its standard error, and the law of (mean - truth) / error."""

    mean: float
    error: float
    freedom: float
    """Degrees of freedom of Student's t."""
    experiment: Experiment
    tails: np.ndarray | None = None
    """Bootstrapped (mean - truth) / error, sorted; None: Student's t."""

    @property
    def over_seeds(self) -> bool:
        """False: of one seed, so it is about other problems and never about other seeds."""
        return bool(self.experiment.sides)

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """Two-sided interval for the truth."""
        if self.error == 0.0:
            return self.mean, self.mean
        rest = (1.0 - level) / 2.0
        if self.tails is None:
            low, high = stats.t.ppf((rest, 1.0 - rest), self.freedom)
        else:
            low, high = np.quantile(self.tails, (rest, 1.0 - rest))
        return self.mean - float(high) * self.error, self.mean - float(low) * self.error

    def p_value(self) -> float:
        """That the truth is 0, two-sided."""
        return min(1.0, 2.0 * min(self._beyond(0.0, above=True), self._beyond(0.0, above=False)))

    def p_equivalent(self, margin: float) -> float:
        """That the truth is at least `margin` away from 0: the larger of two one-sided tests (TOST)."""
        return max(self._beyond(margin, above=False), self._beyond(-margin, above=True))

    def _beyond(self, truth: float, above: bool) -> float:
        """Chance of a mean as far above (else below) `truth` as this one."""
        if self.error == 0.0:
            return float(self.mean <= truth if above else self.mean >= truth)
        distance = (self.mean - truth) / self.error
        if self.tails is None:
            return float(stats.t.sf(distance if above else -distance, self.freedom))
        further = self.tails >= distance if above else self.tails <= distance
        return (1.0 + float(further.sum())) / (1.0 + len(self.tails))


def estimate(values_SP: np.ndarray, minus_TP: np.ndarray | None = None) -> Estimate:
    """Mean over seeds and problems, or the difference of two means whose seeds have nothing to do with each other.

    Args:
        values_SP: one row a seed; of paired runs their differences.
        minus_TP: subtracted; the same problems, any seeds.

    One seed each gives an estimate over problems alone.

    Raises:
        ValueError: one side has one seed and the other has several, or there are fewer than two problems.
    """
    sides = [values_SP] if minus_TP is None else [values_SP, minus_TP]
    num_problems = values_SP.shape[1]
    if num_problems < 2:
        raise ValueError("one problem says nothing about others")
    fewest, most = (function(map(len, sides)) for function in (min, max))
    if fewest == 1 < most:
        raise ValueError("one seed says nothing about others")
    uniform = [np.full((1, len(side)), 1.0 / len(side)) for side in sides]
    means, experiment = _resampled(sides, uniform, np.full((1, num_problems), 1.0 / num_problems))
    variance, freedom = experiment.variance()
    tails = _tails(sides, means[0]) if fewest >= MANY_SEEDS else None
    return Estimate(float(means[0]), float(variance[0]) ** 0.5, float(freedom[0]), experiment, tails)


def noise(values_SP: np.ndarray) -> Noise:
    """Variances of a single value by source, from at least two seeds; a negative estimate counts as 0."""
    num_seeds, num_problems = values_SP.shape
    (squares,) = estimate(values_SP).experiment.sides
    seeds, problems, rest = (float(array[0]) for array in squares)
    return Noise(max(seeds - rest, 0.0) / num_problems, max(problems - rest, 0.0) / num_seeds, rest)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number: each can be held against the level of a single test (Holm 1979)."""
    count, largest = len(p_values), 0.0
    corrected = [0.0] * count
    for rank, index in enumerate(sorted(range(count), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (count - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def _tails(sides: Sequence[np.ndarray], mean: float) -> np.ndarray:
    """Hierarchical bootstrap: seeds, then problems, which all seeds share. Each resample by its own standard error."""
    rng = np.random.default_rng(0)

    def weights(size: int) -> np.ndarray:
        return rng.multinomial(size, np.full(size, 1.0 / size), RESAMPLES) / size

    means, experiment = _resampled(sides, [weights(len(side)) for side in sides], weights(sides[0].shape[1]))
    variance, _ = experiment.variance()
    usable = variance > 0.0
    return np.sort((means[usable] - mean) / np.sqrt(variance[usable]))


def _resampled(
    sides: Sequence[np.ndarray], seeds: Sequence[np.ndarray], problems_RP: np.ndarray
) -> tuple[np.ndarray, Experiment]:
    """Mean and noise for each row of weights; the weights of a row sum to 1."""
    by_problem_RP = seeds[0] @ sides[0] - (seeds[1] @ sides[1] if len(sides) == 2 else 0.0)
    means = (problems_RP * by_problem_RP).sum(1)
    spread = (problems_RP * (by_problem_RP - means[:, None]) ** 2).sum(1)
    several = [(side, weights) for side, weights in zip(sides, seeds, strict=True) if len(side) > 1]
    squares = tuple(_mean_squares(side, weights, problems_RP) for side, weights in several)
    return means, Experiment(squares, tuple(len(side) for side, _ in several), problems_RP.shape[1], spread)


def _mean_squares(values_SP: np.ndarray, seeds_RS: np.ndarray, problems_RP: np.ndarray) -> MeanSquares:
    num_seeds, num_problems = values_SP.shape
    cells = num_seeds * num_problems
    centred_SP = values_SP - values_SP.mean()
    by_problem_RP, by_seed_RS = seeds_RS @ centred_SP, problems_RP @ centred_SP.T
    means = (by_problem_RP * problems_RP).sum(1)
    between_seeds = np.maximum((seeds_RS * by_seed_RS**2).sum(1) - means**2, 0.0)
    between_problems = np.maximum((problems_RP * by_problem_RP**2).sum(1) - means**2, 0.0)
    total = ((seeds_RS @ centred_SP**2) * problems_RP).sum(1) - means**2
    rest = np.maximum(total - between_seeds - between_problems, 0.0)
    return MeanSquares(
        cells * between_seeds / (num_seeds - 1),
        cells * between_problems / (num_problems - 1),
        cells * rest / ((num_seeds - 1) * (num_problems - 1)),
    )
