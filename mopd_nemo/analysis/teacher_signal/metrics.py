"""The six metrics of appendix A: for one prompt, and their means over prompts with bootstrap intervals by prompt.

There are three readings of the means.

`common`         the same responses of the same prompts in every condition: those where each condition has all its peers
                 and each metric is defined. The reading for comparing conditions.
`all_prompts`    every prompt and response, with the peers there are; an undefined metric counts 0. The paper's text:
                 its baseline averages in a 0 for every prompt without a success.
`own_prompts`    each condition over the prompts with at least two responses for which all its peers exist; undefined
                 counts 0. The authors' published scripts: every condition has prompts of its own.

SciPy's `rankdata` is used, not its tests: those also compute p-values, which cost 50 times the statistic here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from mopd_nemo.analysis.teacher_signal.conditions import CONDITIONS, CONTROLLED
from mopd_nemo.evaluation import bootstrap
from mopd_nemo.run.rollouts import RecordedGroup

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
"""Values of scores without information. The Brier score has none: every score is below 0, so every
pseudo-probability is below one half, whatever the teacher's opinion."""

READINGS = ("common", "all_prompts", "own_prompts")
BUCKETS = {
    "easy": "at least half of its responses right",
    "medium": "fewer, and at least one",
    "hard": "none right",
}
"""Prompts by difficulty, as in the paper's Figure 4; its scripts draw the line at 4 of 8."""
CLASSES = ("success", "failure")
REFERENCES = ("none", CONTROLLED)
"""Conditions that every other is compared with, prompt by prompt, in the `common` reading."""

NAN = float("nan")
Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ScoredPrompt:
    """The judged responses of one prompt (verifier errors left out) with their scores."""

    rewards: tuple[float, ...]
    success: tuple[bool, ...]
    scores: Mapping[str, tuple[float | None, ...]]
    """By condition. None: no context fitted, or the score was not finite."""
    complete: Mapping[str, tuple[bool, ...]]
    """By condition: whether the teacher read all the peers that the condition asks for."""
    tokens: tuple[int, ...]
    """Length of each response."""


def scored_prompt(group: RecordedGroup, rows: Mapping[str, Mapping[str, Any]]) -> ScoredPrompt:
    """Join a recorded group with its score rows by condition."""
    judged = [i for i, row in enumerate(group.rows) if row["success"] is not None]
    return ScoredPrompt(
        rewards=tuple(group.rows[i]["reward"] for i in judged),
        success=tuple(group.rows[i]["success"] for i in judged),
        scores={name: tuple(row["scores"][i] for i in judged) for name, row in rows.items()},
        complete={name: tuple(row["complete"][i] for i in judged) for name, row in rows.items()},
        tokens=tuple(group.rows[i]["response_tokens"] for i in judged),
    )


def signal_table(prompts: Sequence[ScoredPrompt]) -> dict[str, Any]:
    """Per reading and condition: `num_prompts`, `num_responses`, and each metric with `mean`, `low`, `high` (95 %).

    Per condition, `common` also has `minus`, the paired difference of each metric from each of `REFERENCES`, and
    `shift`, the log-probability of a whole response minus that without peers (nats), for successes and for failures.
    """
    judged = [prompt for prompt in prompts if prompt.rewards]
    common = _common_support(judged)
    values = {name: _matrix([_metrics(p, rows, name) for p, rows in common], METRICS) for name in CONDITIONS}
    table: dict[str, Any] = {reading: {} for reading in READINGS}
    for name in CONDITIONS:
        everything = [(p, [score is not None for score in p.scores[name]]) for p in judged]
        own = [(p, [k and c for k, c in zip(rows, p.complete[name], strict=True)]) for p, rows in everything]
        table["all_prompts"][name] = _zero_filled(everything, name)
        table["own_prompts"][name] = _zero_filled([(p, rows) for p, rows in own if sum(rows) >= 2], name)
        table["common"][name] = {
            **_summary(values[name], [sum(rows) for _, rows in common]),
            "minus": {other: _intervals(values[name] - values[other], METRICS) for other in REFERENCES},
            "shift": _intervals(_matrix([_shift(p, rows, name) for p, rows in common], CLASSES), CLASSES),
        }
    return table


def by_difficulty(prompts: Sequence[ScoredPrompt]) -> dict[str, Any]:
    """`own_prompts` and `all_prompts` of the prompts of each bucket that has any.

    The common reading has no place here: no metric but Brier's is defined on a hard prompt.
    """
    members: dict[str, list[ScoredPrompt]] = {name: [] for name in BUCKETS}
    for prompt in prompts:
        if prompt.rewards:
            members[bucket_of(prompt)].append(prompt)
    tables = {name: signal_table(inside) for name, inside in members.items() if inside}
    return {
        name: {"num_prompts": len(members[name]), **{r: table[r] for r in ("all_prompts", "own_prompts")}}
        for name, table in tables.items()
    }


def bucket_of(prompt: ScoredPrompt) -> str:
    """easy, medium or hard."""
    right = sum(prompt.success)
    return "easy" if 2 * right >= len(prompt.success) else "medium" if right else "hard"


def prompt_metrics(scores: Sequence[float], rewards: Sequence[float], success: Sequence[bool]) -> dict[str, float]:
    """All metrics over the responses of one prompt. A response whose score is not finite is left out.

    Args:
        scores: the teacher's mean token log-probability of each response (nats).
        rewards: of the verifier.
        success: whether the reward is at least τ.
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
    """Fraction of the pairs with unequal rewards that the scores order alike. Tied scores do not count as alike."""
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


def one_class_fraction(prompts: Sequence[ScoredPrompt]) -> tuple[float, float]:
    """Fractions of prompts without a success and without a failure, among those with a judged response."""
    judged = [prompt.success for prompt in prompts if prompt.success]
    return fmean(not any(s) for s in judged), fmean(all(s) for s in judged)


def _common_support(prompts: Sequence[ScoredPrompt]) -> list[tuple[ScoredPrompt, list[bool]]]:
    """Prompts where every metric of every condition is defined on the responses that are complete in all of them."""
    kept = []
    for prompt in prompts:
        rows = [
            all(prompt.scores[name][i] is not None and prompt.complete[name][i] for name in CONDITIONS)
            for i in range(len(prompt.rewards))
        ]
        if all(math.isfinite(value) for name in CONDITIONS for value in _metrics(prompt, rows, name)):
            kept.append((prompt, rows))
    return kept


def _zero_filled(prompts: Sequence[tuple[ScoredPrompt, list[bool]]], name: str) -> dict[str, Any]:
    values = _matrix([_metrics(prompt, rows, name) for prompt, rows in prompts], METRICS)
    return _summary(np.nan_to_num(values, nan=0.0), [sum(rows) for _, rows in prompts])


def _metrics(prompt: ScoredPrompt, rows: Sequence[bool], name: str) -> list[float]:
    chosen = [i for i, keep in enumerate(rows) if keep]
    scores = [prompt.scores[name][i] for i in chosen]
    values = prompt_metrics(
        [math.nan if score is None else score for score in scores],
        [prompt.rewards[i] for i in chosen],
        [prompt.success[i] for i in chosen],
    )
    return [values[metric] for metric in METRICS]


def _shift(prompt: ScoredPrompt, rows: Sequence[bool], name: str) -> list[float]:
    """Mean change of log P(response) from that without peers, over the successes and over the failures."""
    changes: dict[bool, list[float]] = {True: [], False: []}
    for i, keep in enumerate(rows):
        with_peers, without = prompt.scores[name][i], prompt.scores["none"][i]
        if keep and with_peers is not None and without is not None:
            changes[prompt.success[i]].append(prompt.tokens[i] * (with_peers - without))
    return [fmean(changes[True]), fmean(changes[False])]


def _matrix(rows: Sequence[Sequence[float]], columns: Sequence[str]) -> np.ndarray:
    return np.array(rows, dtype=float).reshape(-1, len(columns))


def _summary(values: np.ndarray, counts: Sequence[int]) -> dict[str, Any]:
    return {"num_prompts": len(values), "num_responses": sum(counts), **_intervals(values, METRICS)}


def _intervals(values: np.ndarray, names: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """Mean and 95 % percentile interval of each column, by resampling rows; None without rows."""
    if not len(values):
        return {name: {"mean": None, "low": None, "high": None} for name in names}
    means = values.mean(axis=0)
    low, high = bootstrap(values)
    return {
        name: {"mean": float(means[i]), "low": float(low[i]), "high": float(high[i])} for i, name in enumerate(names)
    }
