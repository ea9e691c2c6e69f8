"""Means over prompts, in three readings, with bootstrap intervals by prompt.

`common`         the same responses of the same prompts in every condition: those where each condition has all its peers
                 and each metric is defined. The reading for comparing conditions.
`all_prompts`    every prompt and response, with the peers there are; a metric that is not defined counts 0. The
                 paper's text: its baseline averages in a 0 for every prompt without a success.
`own_prompts`    each condition over the prompts with at least two responses for which all its peers exist; undefined
                 counts 0. What the authors' published scripts do: every condition has prompts of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from mopd_nemo.analysis.teacher_signal.conditions import CONDITIONS, CONTROLLED
from mopd_nemo.analysis.teacher_signal.metrics import METRICS, prompt_metrics
from mopd_nemo.evaluation import bootstrap
from mopd_nemo.run.rollouts import RecordedGroup

READINGS = ("common", "all_prompts", "own_prompts")
CLASSES = ("success", "failure")
REFERENCES = ("none", CONTROLLED)
"""Conditions that every other is compared with, prompt by prompt, in the `common` reading."""


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

    `common` has also, per condition, `minus`: the paired difference of each metric to each of `REFERENCES`, and
    `shift`: how much further than without peers the log-probability of a whole response moves (nats), for successes
    and for failures.
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


def one_class_fraction(prompts: Sequence[ScoredPrompt]) -> tuple[float, float]:
    """Prompts without a success, and without a failure, among those with a judged response."""
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
    """Mean change of log P(response) against no peers, over the successes and over the failures."""
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
    """Mean and 95 % percentile interval of each column, resampling rows; None where there is nothing to say."""
    if not len(values):
        return {name: {"mean": None, "low": None, "high": None} for name in names}
    means = values.mean(axis=0)
    low, high = bootstrap(values)
    return {
        name: {"mean": float(means[i]), "low": float(low[i]), "high": float(high[i])} for i, name in enumerate(names)
    }
