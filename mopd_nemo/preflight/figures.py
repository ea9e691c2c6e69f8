"""From rows to figures: one number for each problem and context, then means with 95 % intervals over problems."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from mopd_nemo.analysis.teacher_signal.metrics import auc
from mopd_nemo.config import Config
from mopd_nemo.evaluation import bootstrap_interval
from mopd_nemo.preflight.contexts import PLAIN, label_of, name_of
from mopd_nemo.preflight.measure import Plan, Row, Survey

Cell = dict[str, float | int | None]
"""`mean`, `low`, `high` (95 %) over `num` problems; None where there are none."""

MEASURES = ("right", "entropy", "unfinished", "copies", "auc", "nats")
"""Of each context, problem by problem.

right       share of what the model writes after it that the verifier accepts
entropy     minus the mean log-probability of the tokens that it writes: an unbiased estimate of its entropy (nats)
unfinished  share of what it writes that is cut at the limit
copies      share of what it writes that is, word for word, a failure that it was shown
auc         probability that a success among the rollouts scores above a failure
nats        how much further the context lifts the log-probability of successes than that of failures
"""


def figures(found: Survey, rows: Mapping[tuple[str, str], Row], config: Config, plan: Plan) -> dict[str, Any]:
    """Everything that was measured, as JSON.

    Args:
        rows: by problem and context, of all the survey's cases.
    """
    problems = [case.group.problem.id for case in found.cases]
    table = {
        name: [_values(rows[problem, name], rows[problem, PLAIN]) for problem in problems] for name in plan.measured
    }
    contexts: dict[str, Any] = {
        name: {
            "label": label_of(name),
            **{measure: cell([values[measure] for values in table[name]]) for measure in MEASURES},
        }
        for name in plan.measured
    }
    for name in plan.contexts:
        contexts[name] |= {
            "gap": difference(table, name, PLAIN),
            "flatter": difference(table, name, PLAIN, "entropy"),
            "cut": difference(table, name, PLAIN, "unfinished"),
            "copies_without": cell([_copies(rows[p, PLAIN], rows[p, name]) for p in problems]),
            "copies_more": cell(
                [_copies(rows[p, name], rows[p, name]) - _copies(rows[p, PLAIN], rows[p, name]) for p in problems]
            ),
            **_cost([rows[problem, name] for problem in problems], name, found, config),
        }
    verdicts = [verdict for group in found.groups for verdict in group.verdicts if verdict.success is not None]
    return {
        "num_problems": len(problems),
        "num_groups": len(found.groups),
        "samples": plan.samples,
        "success_rate": fmean(bool(verdict.success) for verdict in verdicts) if verdicts else 0.0,
        "configured": name_of(config.peers),
        "besides": [source for source in config.context if source != "peers"],
        "contexts": contexts,
        "minus": {
            name: {other: difference(table, name, other) for other in plan.contexts if other != name}
            for name in plan.contexts
        },
    }


def cell(values: Sequence[float]) -> Cell:
    """Mean and interval of the values that are defined."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return {"mean": None, "low": None, "high": None, "num": 0}
    low, high = bootstrap_interval(known)
    return {"mean": fmean(known), "low": low, "high": high, "num": len(known)}


def difference(table: Mapping[str, Sequence[Mapping[str, float]]], a: str, b: str, measure: str = "right") -> Cell:
    """Of a measure, a's value minus b's, problem by problem."""
    return cell([x[measure] - y[measure] for x, y in zip(table[a], table[b], strict=True)])


def share_right(row: Row) -> float:
    """Of what was written, among what could be judged; undefined where nothing could."""
    judged = [success for success in row["success"] if success is not None]
    return fmean(judged) if judged else math.nan


def _values(row: Row, plain: Row) -> dict[str, float]:
    known = [(p, n) for p, n in zip(row["logprobs"], row["tokens"], strict=True) if p is not None]
    return {
        "right": share_right(row),
        "entropy": -sum(p for p, _ in known) / sum(n for _, n in known) if known else math.nan,
        "unfinished": fmean(not finished for finished in row["finished"]),
        "copies": _copies(row, row),
        "auc": auc(np.array(row["scores"]), np.array(row["targets"], dtype=bool)) if row["scores"] else math.nan,
        "nats": _separation(row, plain),
    }


def _copies(written: Row, shown: Row) -> float:
    """Share of what was written in one row that is a failure shown in the other; undefined when it shows none."""
    failures = {text.strip() for text in shown["shown_failures"]}
    return fmean(text.strip() in failures for text in written["texts"]) if failures else math.nan


def _separation(row: Row, plain: Row) -> float:
    """Mean shift of the successes' log-probability minus that of the failures' (nats)."""
    shifts: dict[bool, list[float]] = {True: [], False: []}
    for success, here, there in zip(row["targets"], row["scores"], plain["scores"], strict=bool(row["scores"])):
        shifts[success].append(here - there)
    return fmean(shifts[True]) - fmean(shifts[False]) if all(shifts.values()) else math.nan


def _cost(rows: Sequence[Row], name: str, found: Survey, config: Config) -> dict[str, Any]:
    """How many targets the context reaches, and what its teacher costs in a step.

    Tokens are counted for each target alone; seconds are those of the scoring here, with whatever the engine shares.
    """
    reach, rollout = found.reach[name], config.rollout
    per_step = rollout.num_prompts_per_step * rollout.num_rollouts_per_prompt
    targets, scored = max(reach.targets, 1), sum(len(row["scores"]) for row in rows)
    seconds = sum(row["seconds"]["score"] for row in rows)
    return {
        "complete": reach.complete / targets,
        "signal": reach.shown / targets,
        "teacher_tokens": per_step * reach.tokens / targets,
        "teacher_seconds": per_step * reach.shown / targets * seconds / scored if scored else None,
    }
