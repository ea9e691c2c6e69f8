"""Settings against a baseline: what their runs allow to say, and what they do not.

`mopd compare` and the result pages of `recipes/` share it, so a difference reads the same everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from mopd_nemo.analysis.statistics import ALPHA, LEVEL, POWER, Estimate, estimate, holm

MARGIN = 0.02
"""Differences that do not matter: two points, about what a percentage is quoted to."""
Values = Mapping[str, Mapping[int, np.ndarray]]
"""Setting -> seed -> value per problem, as a fraction; all in the same order of problems."""


@dataclass(frozen=True, slots=True)
class Contrast:
    """A setting minus the baseline."""

    setting: str
    mean: float
    estimate: Estimate | None
    """None: one side has one seed and others have several; see `Contrasts.note`."""
    seeds: tuple[int, ...]
    """Seeds that both have, by which they are paired; empty: not paired by seed."""
    p: float = 1.0
    """That there is no difference, corrected for the number of contrasts."""
    p_equivalent: float = 1.0
    """That the difference is as large as the margin or larger, corrected likewise."""
    detectable: float | None = None
    """The smallest difference that experiments of this size and noise usually find."""

    def reading(self, margin: float) -> str:
        """In words."""
        if self.estimate is None:
            return "one seed: cannot be said"
        small = self.p_equivalent < ALPHA
        if self.p < ALPHA:
            side = "higher" if self.mean > 0 else "lower"
            return f"{side}, by less than {100 * margin:g}" if small else side
        return f"equal within ±{100 * margin:g}" if small else "not told apart"


@dataclass(frozen=True, slots=True)
class Contrasts:
    """All settings, each by itself and against the baseline."""

    baseline: str
    margin: float
    over_seeds: bool
    """Whether intervals are about other seeds and problems; False: no setting has two seeds, so problems alone."""
    means: dict[str, Estimate | None]
    """Of each setting; None where it has one seed and others have several."""
    against_baseline: list[Contrast]

    @property
    def note(self) -> str:
        """What the columns mean, and what cannot be said."""
        about = "other seeds and other problems" if self.over_seeds else "other problems"
        parts = [f"A 95 % interval holds the mean over {about} of this kind in 95 of 100 such experiments."]
        single = [label for label, mean in self.means.items() if mean is None]
        if not self.over_seeds:
            parts.append("Every setting has one seed: **what other seeds would give cannot be said.**")
        elif single:
            parts.append(f"One seed alone ({'; '.join(single)}) says nothing about others and has no interval.")
        tested = [contrast for contrast in self.against_baseline if contrast.estimate is not None]
        if tested:
            count = f", corrected for {len(tested)} comparisons (Holm)" if len(tested) > 1 else ""
            parts.append(
                f"Differences are paired by problem, and by the seeds named. Higher, lower: p{count} is below {ALPHA}. "
                f"Equal within ±{100 * self.margin:g}: so are both one-sided tests against that margin (TOST). "
                f"Visible from: {100 * POWER:.0f} % of experiments of this size and noise find a difference this large."
            )
        unpaired = [contrast.setting for contrast in tested if self.over_seeds and not contrast.seeds]
        if unpaired:
            parts.append(f"Not paired by seed, for want of two seeds that both sides have: {'; '.join(unpaired)}.")
        return " ".join(parts)

    @property
    def title(self) -> str:
        """Of the table."""
        return f"minus {self.baseline}, in points"

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Heading and cells, in points; `title` says of what."""
        heading = ["setting", "difference", "95 % interval", "p", "reading", "seeds", "visible from"]
        body = []
        for contrast in self.against_baseline:
            p = "–" if contrast.estimate is None else f"{contrast.p:.3f}" if contrast.p >= 0.001 else "< 0.001"
            cells = [contrast.setting, f"{100 * contrast.mean:+.1f}", interval_cell(contrast.estimate, "+")]
            cells += [p, contrast.reading(self.margin)]
            cells += [", ".join(map(str, contrast.seeds)) or "–", _detectable_cell(contrast.detectable)]
            body.append(cells)
        return heading, body


def contrasts(values: Values, baseline: str, margin: float = MARGIN) -> Contrasts:
    """Estimate every setting, and every other one against the baseline.

    Args:
        values: at least the baseline; two problems or more.
        margin: as a fraction; smaller differences do not matter.
    """
    over_seeds = any(len(of_setting) > 1 for of_setting in values.values())
    means = {label: _estimate(of_setting, over_seeds) for label, of_setting in values.items()}
    found = [
        _contrast(label, of_setting, values[baseline], over_seeds)
        for label, of_setting in values.items()
        if label != baseline
    ]
    tested = [contrast.estimate for contrast in found if contrast.estimate is not None]
    corrected = iter(
        zip(
            holm([each.p_value() for each in tested]),
            holm([each.p_equivalent(margin) for each in tested]),
            (each.experiment.detectable(ALPHA / len(tested)) for each in tested),
            strict=True,
        )
    )
    return Contrasts(
        baseline,
        margin,
        over_seeds,
        means,
        [contrast if contrast.estimate is None else _corrected(contrast, *next(corrected)) for contrast in found],
    )


def interval_cell(estimate: Estimate | None, sign: str = "") -> str:
    """95 % interval in points; of a mean (no sign) it stays between 0 and 100."""
    if estimate is None:
        return "–"
    low, high = (100 * bound for bound in estimate.interval(LEVEL))
    if not sign:
        low, high = max(low, 0.0), min(high, 100.0)
    return f"{low:{sign}.1f} to {high:{sign}.1f}"


def _estimate(of_setting: Mapping[int, np.ndarray], over_seeds: bool) -> Estimate | None:
    values_SP = np.array(list(of_setting.values()))
    return None if over_seeds and len(values_SP) == 1 else estimate(values_SP)


def _contrast(label: str, mine: Mapping[int, np.ndarray], base: Mapping[int, np.ndarray], over_seeds: bool) -> Contrast:
    common = tuple(seed for seed in mine if seed in base)
    mine_SP, base_SP = (np.array(list(side.values())) for side in (mine, base))
    if len(common) > 1 or (common and not over_seeds):
        paired = estimate(np.array([mine[seed] - base[seed] for seed in common]))
        return Contrast(label, paired.mean, paired, common)
    if over_seeds and min(len(mine_SP), len(base_SP)) == 1:
        mean = np.mean([mine[seed] - base[seed] for seed in common]) if common else mine_SP.mean() - base_SP.mean()
        return Contrast(label, float(mean), None, common)
    unpaired = estimate(mine_SP, base_SP)
    return Contrast(label, unpaired.mean, unpaired, ())


def _corrected(contrast: Contrast, p: float, p_equivalent: float, detectable: float) -> Contrast:
    return replace(contrast, p=p, p_equivalent=p_equivalent, detectable=detectable)


def _detectable_cell(detectable: float | None) -> str:
    if detectable is None:
        return "–"
    return f"{100 * detectable:.1f}" if detectable < 1.0 else "> 100"
