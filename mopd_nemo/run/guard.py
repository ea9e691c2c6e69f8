"""Signs that a run is being ruined or learns nothing, from the rows that it writes.

They are pure functions, so that a resumed run sees the same.

Problems change from step to step, so no step is compared with another. A window of steps is compared with the best
window before it, in units of the error that comes from the spread between problems, and the more windows there are to
choose the best from, the larger the difference must be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev
from typing import Any

from mopd_nemo.types import RolloutGroup

WINDOW = 3
"""Steps that are taken together."""
CLEAR, LIKELY = 0.01, 0.1
"""Chances of a false sign at a step of a run without a trend, over all pairs of windows so far."""
MIN_PROBLEMS = 8
"""Held-out problems without which an evaluation is no ground for a sign."""
MORE_ENTROPY = 1.5
"""Times that of the first window."""
MORE_UNFINISHED = 0.02
"""Share of responses; less is not worth a sign."""
IDLE_STEPS = 5
"""Steps without anything learned after which it is said, and after each doubling."""
MOST = 0.9
"""Share of the contexts of a step that counts as nearly all."""

STARVED, STARVED_SECONDS = 3.0, 5.0
"""A step lasts so many times the CPU time of its process, and at least so long: others have the cores."""

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Signs:
    """What the latest steps show against the best before them."""

    metrics: Mapping[str, float]
    """`guard/*`, for the row of the step."""
    reasons: tuple[str, ...] = ()
    """In words, each sign that holds."""
    alarm: bool = False
    """One clear sign, or two likely ones."""
    good_step: int | None = None
    """Last step of the best window so far; None: too early to say."""

    @property
    def doubt(self) -> bool:
        """Something may be wrong: reason enough to keep a checkpoint."""
        return bool(self.reasons) or self.metrics.get("guard/success", 0.0) > 1.0


def errors_over_problems(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Standard errors of a step's success and unfinished rates, from the spread between problems."""
    success = [len(group.successes) / len(group.judged) for group in groups if group.judged]
    unfinished = [fmean(not rollout.finished for rollout in group.rollouts) for group in groups]
    return {"guard/success_error": _error(success), "guard/unfinished_error": _error(unfinished)}


def signs(rows: Rows, evaluations: Rows = ()) -> Signs:
    """Judge the latest step.

    Args:
        rows: of `metrics.jsonl`, oldest first.
        evaluations: of `eval.jsonl`, oldest first.
    """
    rows = [row for row in rows if "guard/success_error" in row]  # older versions wrote none
    fallen = _evaluation_fell(evaluations)
    if len(rows) < 2 * WINDOW:
        alarm = fallen is not None
        good, reasons = fallen or (None, "")
        return Signs({"guard/alarm": float(alarm)}, (reasons,) if alarm else (), alarm, good)
    now, earlier = rows[-WINDOW:], [rows[i - WINDOW : i] for i in range(WINDOW, len(rows) - WINDOW + 1)]
    best = max(earlier, key=lambda window: _mean(window, "success_rate") or 0.0)
    shortest = min(earlier, key=lambda window: _mean(window, "response/unfinished") or 0.0)
    success = _excess(best, now, "success_rate", "guard/success_error", rows)
    unfinished = _excess(now, shortest, "response/unfinished", "guard/unfinished_error", rows)
    more = (_mean(now, "response/unfinished") or 0.0) - (_mean(shortest, "response/unfinished") or 0.0)
    entropy, flatter = _times_first(rows, "student/entropy"), _flatter(now)
    clear, likely = (_limit(chance, len(earlier)) for chance in (CLEAR, LIKELY))
    found = {
        _change("success of rollouts", best, now, "success_rate"): success > likely,
        _change("responses cut at the limit", shortest, now, "response/unfinished"): unfinished > likely
        and more >= MORE_UNFINISHED,
        f"the student's entropy is {entropy:.1f} times that of the first steps": entropy >= MORE_ENTROPY,
        f"the teacher has been flatter than the student for {WINDOW} steps": flatter > 1.0,
    }
    reasons = [reason for reason, holds in found.items() if holds] + ([] if fallen is None else [fallen[1]])
    alarm = success > clear or len(reasons) >= 2 or fallen is not None
    metrics = {
        "guard/success": success,
        "guard/unfinished": unfinished,
        "guard/entropy": entropy,
        "guard/teacher": flatter,
        "guard/alarm": float(alarm),
    }
    good = best[-1]["step"] if fallen is None else min(best[-1]["step"], fallen[0])
    return Signs(metrics, tuple(reasons), alarm, good)


def remarks(rows: Rows, computes_here: bool = False) -> list[str]:
    """What a person would say after the latest step of a run that learns nothing, learns from fragments, or crawls.

    Args:
        rows: of `metrics.jsonl`, oldest first.
        computes_here: the models are computed in the process of the trainer.
    """
    said = _starved(rows) if computes_here else []
    idle = _steps_since(rows, lambda row: row.get("signal", 1.0) > 0)
    if _is_time(idle):
        said.append(f"nothing was learned in the last {idle} steps: {_why_idle(rows[-idle:])}")
    skipped = _steps_since(rows, lambda row: row.get("signal", 1.0) == 0 or row.get("update/skipped", 0.0) < 1.0)
    if _is_time(skipped):
        said.append(
            f"the updates of the last {skipped} steps were skipped, as their gradients were not finite: lower "
            "optimizer.learning_rate"
        )
    for name, what in _FRAGMENTS.items():
        steps = [row["step"] for row in rows if row.get(name, 0.0) >= MOST]
        if len(steps) == 1 and steps[0] == rows[-1]["step"]:
            said.append(f"{what} ({rows[-1][name]:.0%} in this step)")
    return said


_FRAGMENTS = {
    "context/cut": "nearly all teachers read peers that lost their middle: raise peers.max_peer_tokens or "
    "peers.max_context_tokens",
    "context/overflow": "peers hardly ever fit into the teacher's prompt: raise peers.max_context_tokens",
    "response/unfinished": "nearly all responses are cut at their limit: raise rollout.max_response_tokens, or look "
    "whether the model ends its turns (model.end_tokens)",
    "outcome/verifier_error": "nearly no response could be judged: `mopd inspect` shows the verifier's errors",
}
"""What it means when a metric is near 1, with the remedy."""


def _starved(rows: Rows) -> list[str]:
    """Said at the first step that lasts far longer than it computes."""
    found = [row for row in rows if row.get("seconds/cpu") is not None]
    times = [(row["seconds/step"] - row["seconds/reward"], row["seconds/cpu"]) for row in found]
    slow = [lasted >= max(STARVED_SECONDS, STARVED * computed) for lasted, computed in times]
    if not slow or not slow[-1] or sum(slow) > 1 or found[-1] is not rows[-1]:
        return []
    lasted, computed = times[-1]
    return [
        f"this step took {lasted:.0f} s, in which its process computed for {computed:.0f} s: other programs have the "
        "cores, or the machine lacks memory (`top`)"
    ]


def missing_steps(rows: Rows, expected: Iterable[int]) -> str:
    """Expected steps without a row, in words such as `1 to 4, 7`; empty if there is none."""
    recorded = {row["step"] for row in rows}
    runs: list[list[int]] = []
    for step in expected:
        if step in recorded:
            runs.append([])
        else:
            runs = runs or [[]]
            runs[-1].append(step)
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs if run)


def _steps_since(rows: Rows, learned: Callable[[Mapping[str, Any]], bool]) -> int:
    """Number of latest rows since the last that learned something."""
    return next((number for number, row in enumerate(reversed(rows)) if learned(row)), len(rows))


def _is_time(steps: int) -> bool:
    return steps >= IDLE_STEPS and steps % IDLE_STEPS == 0 and (steps // IDLE_STEPS).bit_count() == 1


def _why_idle(rows: Rows) -> str:
    shares = {name: _mean(rows, name) or 0.0 for name in ("group/all_failed", "group/all_succeeded")}
    if shares["group/all_failed"] >= MOST:
        return "no rollout succeeds. Easier problems or a stronger model are needed; look at one with `mopd inspect`"
    if shares["group/all_succeeded"] >= MOST:
        return "every rollout succeeds. Harder problems are needed"
    if (_mean(rows, "success_without_text") or 0.0) >= MOST:
        return "successes say nothing outside their thinking, so there is nothing to show (docs/metrics.md)"
    return "no rollout had a teacher or an advantage; look at the groups with `mopd inspect`"


def best_evaluation(evaluations: Rows) -> Mapping[str, Any] | None:
    """The one with the highest mean accuracy; of equal ones the first."""
    return max(evaluations, key=lambda row: row[_mean_name(row)], default=None)


def _evaluation_fell(evaluations: Rows) -> tuple[int, str] | None:
    """Step of the best evaluation, and the fall since, when the last one is clearly below it, problem by problem."""
    if len(evaluations) < 2 or evaluations[-1]["num_problems"] < MIN_PROBLEMS:
        return None
    *before, last = evaluations
    error = (last["change/high"] - last["change/low"]) / (2 * NormalDist().inv_cdf(0.975)) if "change" in last else 0.0
    if error <= 0 or -last["change"] / error <= _limit(CLEAR, len(before)):
        return None
    best = next(row for row in before if row["step"] == last["change/from"])
    name = _mean_name(last)
    old, new = (f"{row[name]:.0%} (step {row['step']})" for row in (best, last))
    return best["step"], f"held-out {name} fell from {old} to {new}"


def _mean_name(row: Mapping[str, Any]) -> str:
    return next(name for name in row if name.startswith("mean@") and "/" not in name)


def _limit(chance: float, num_earlier: int) -> float:
    """Of a normal excess: one of all the pairs so far exceeds it with this chance at most.

    Args:
        num_earlier: how many there are to compare the latest with.
    """
    return NormalDist().inv_cdf(1 - chance / (num_earlier * (num_earlier + 1) / 2))


def _excess(high: Rows, low: Rows, name: str, error: str, rows: Rows) -> float:
    """How far one window is above another, in standard errors of the difference.

    The error is that of all rows: windows that were picked for being extreme would understate their own.
    """
    difference = (_mean(high, name) or 0.0) - (_mean(low, name) or 0.0)
    variance = 2 * fmean(row[error] ** 2 for row in rows) / WINDOW
    # Where all problems are alike there is no spread to measure; one response in a hundred is then the least.
    return difference / math.sqrt(variance + 0.01**2)


def _times_first(rows: Rows, name: str) -> float:
    """The latest window over the first one; 0 where either lacks the metric."""
    first, now = _mean(rows[:WINDOW], name), _mean(rows[-WINDOW:], name)
    return now / first if first and now is not None else 0.0


def _flatter(window: Rows) -> float:
    """Least ratio of the teacher's entropy to the student's; 0 unless every step has both."""
    ratios = [
        row["teacher/entropy"] / row["student/entropy"]
        for row in window
        if row.get("student/entropy") and "teacher/entropy" in row
    ]
    return min(ratios) if len(ratios) == WINDOW else 0.0


def _mean(window: Rows, name: str) -> float | None:
    values = [row[name] for row in window if name in row]
    return fmean(values) if values else None


def _change(what: str, before: Rows, now: Rows, name: str) -> str:
    old, new = _mean(before, name) or 0.0, _mean(now, name) or 0.0
    verb = "fell" if new < old else "rose"
    return f"{what} {verb} from {old:.0%} ({_steps(before)}) to {new:.0%} ({_steps(now)})"


def _steps(window: Rows) -> str:
    return f"steps {window[0]['step']} to {window[-1]['step']}"


def _error(values: Sequence[float]) -> float:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
