"""Case studies (paper appendix C): two runs, problem by problem.

cases.html   for people       cases.json   the same facts for programs
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from mopd_nemo.analysis import plots
from mopd_nemo.analysis.page import link_to, svgs, write_page
from mopd_nemo.analysis.plots import save_figure
from mopd_nemo.config import UserError
from mopd_nemo.files import read_rows, write_json
from mopd_nemo.run.directory import RunDirectory
from mopd_nemo.run.rollouts import (
    SHOWN,
    RecordedGroup,
    Row,
    group_at,
    num_successes,
    read_groups,
    solved_fraction,
    teacher_prompts,
)

SOLVED = 0.5
"""A held-out problem counts as solved if more than this share of its samples is right."""

Runs = Mapping[str, RunDirectory]
Part = tuple[bool, str]
"""A stretch of a text, and before it whether it differs from the other text."""


@dataclass(frozen=True, slots=True)
class Side:
    """One run's rollouts of a problem."""

    label: str
    group: RecordedGroup

    def pick(self, right: bool) -> Row:
        """The first right or wrong response, or the first response if there is none."""
        rows = self.group.rows
        return next((row for row in rows if (row["success"] is True) is right), rows[0])


@dataclass
class History:
    """The course of each training problem."""

    visits: dict[str, list[int]] = field(default_factory=dict)
    """Recorded steps in which a problem was sampled, by problem."""
    first_solved: dict[str, int] = field(default_factory=dict)
    """The first step with a success, by problem."""
    pattern_rows: list[dict[str, Any]] = field(default_factory=list)
    """Per step, the share of rollouts whose response matches each pattern."""


def read_history(run: RunDirectory, patterns: Mapping[str, str]) -> History:
    """Scan all recorded training steps.

    Args:
        patterns: name -> regular expression, searched in each response (`.` crosses lines).
    """
    history = History()
    compiled = {name: re.compile(pattern, re.DOTALL) for name, pattern in patterns.items()}
    for step, file in run.rollout_files().items():
        groups = read_groups(file, SHOWN)
        for group in groups:
            history.visits.setdefault(group.problem_id, []).append(step)
            if num_successes(group.rows) > 0:
                history.first_solved.setdefault(group.problem_id, step)
        responses = [row["response"] for group in groups for row in group.rows]
        shares = {
            name: sum(bool(regex.search(text)) for text in responses) / len(responses)
            for name, regex in compiled.items()
        }
        history.pattern_rows.append({"step": step, **shares})
    return history


def write_cases(
    runs: Runs,
    output: Path,
    patterns: Mapping[str, str],
    problems: Sequence[str],
    max_cases: int,
    step: int | None = None,
) -> list[Path]:
    """Compare two runs and write the page, its data and its figures into `output`; their paths, the page first.

    Args:
        patterns: name -> regular expression, counted in the training responses.
        problems: always shown.
        step: evaluation to compare; default: the last that both have.

    Raises:
        UserError: a run has no recorded rollouts, or lacks one of `problems` or the step.
    """
    histories = {label: read_history(run, patterns) for label, run in runs.items()}
    held_out = _held_out(runs, step)
    if held_out is None and not all(history.visits for history in histories.values()):
        raise UserError(
            f"{', '.join(str(run.path) for run in runs.values())}: neither an evaluation at the same step nor training "
            "rollouts in both; record them with train.eval_every and logging.save_rollouts_every"
        )
    training = _training(histories)
    asked = [_asked(problem, runs, histories, held_out) for problem in problems]
    figures = _figures(runs, histories, patterns)
    page = write_page(
        output / "cases.html",
        "cases.html.j2",
        labels=list(runs),
        runs={label: (run.path, link_to(run.report_file, output / "cases.html")) for label, run in runs.items()},
        patterns=patterns,
        figures=svgs(figures.values()),
        held_out=held_out,
        held_out_cases=_held_out_cases(runs, held_out, max_cases) if held_out else {},
        training=training,
        training_cases=_training_cases(runs, histories, training, max_cases),
        asked=asked,
        solved=SOLVED,
        max_cases=max_cases,
    )
    data = output / "cases.json"
    rows = {label: history.pattern_rows for label, history in histories.items()}
    write_json(data, {"held_out": held_out, "training": training, "patterns": rows})
    return [page, data, *(path for name, figure in figures.items() for path in save_figure(figure, output / name))]


def _held_out(runs: Runs, asked: int | None) -> dict[str, Any] | None:
    """An evaluation that both runs have: the rate of each problem, and the problems that only one run solves."""
    shared = set.intersection(*(set(run.rollout_files("eval")) for run in runs.values()))
    if asked is not None and asked not in shared:
        raise UserError(f"--step {asked}: both runs have evaluations at steps {', '.join(map(str, sorted(shared)))}")
    if not shared:
        return None
    step = max(shared) if asked is None else asked
    rates = {
        label: {group.problem_id: solved_fraction(group.rows) for group in read_groups(run.rollouts_file(step, "eval"))}
        for label, run in runs.items()
    }
    first, second = rates.values()
    common = [problem for problem in first if problem in second]
    only: dict[str, list[str]] = {}
    for label, other in _directions(runs):
        solved = [p for p in common if rates[label][p] > SOLVED >= rates[other][p]]
        only[label] = sorted(solved, key=lambda p: rates[other][p] - rates[label][p])
    return {
        "step": step,
        "num_problems": len(common),
        "only": only,
        "both": sum(all(rate[p] > SOLVED for rate in rates.values()) for p in common),
        "rates": {problem: {label: rates[label][problem] for label in runs} for problem in common},
    }


def _training(histories: Mapping[str, History]) -> dict[str, Any]:
    """First step at which each problem was solved, for the problems that both runs sampled."""
    first, second = histories.values()
    common = [problem for problem in first.visits if problem in second.visits]
    solved = {p: {label: history.first_solved.get(p) for label, history in histories.items()} for p in common}
    only = {
        label: [p for p in common if solved[p][label] is not None and solved[p][other] is None]
        for label, other in _directions(histories)
    }
    earlier = dict.fromkeys(histories, 0)
    for steps in solved.values():
        for label, other in _directions(histories):
            mine, theirs = steps[label], steps[other]
            earlier[label] += mine is not None and (theirs is None or mine < theirs)
    return {"num_problems": len(common), "first_solved": solved, "only": only, "earlier": earlier}


def _held_out_cases(runs: Runs, held_out: Mapping[str, Any], max_cases: int) -> dict[str, list[dict[str, Any]]]:
    cases: dict[str, list[dict[str, Any]]] = {}
    for winner, other in _directions(runs):
        groups = {
            label: {g.problem_id: g for g in read_groups(runs[label].rollouts_file(held_out["step"], "eval"), SHOWN)}
            for label in (winner, other)
        }
        cases[winner] = [
            _case(problem, *(Side(label, groups[label][problem]) for label in (winner, other)))
            for problem in held_out["only"][winner][:max_cases]
        ]
    return cases


def _training_cases(
    runs: Runs,
    histories: Mapping[str, History],
    training: Mapping[str, Any],
    max_cases: int,
) -> dict[str, list[dict[str, Any]]]:
    """The step in which one run first solved a problem, beside the last visit of the other run."""
    return {
        winner: [
            _case(
                problem,
                Side(winner, group_at(runs[winner], histories[winner].first_solved[problem], problem)),
                Side(other, group_at(runs[other], histories[other].visits[problem][-1], problem)),
            )
            for problem in training["only"][winner][:max_cases]
        ]
        for winner, other in _directions(runs)
    }


def _asked(
    problem: str,
    runs: Runs,
    histories: Mapping[str, History],
    held_out: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """A problem of `--problem`: the last training visit of both runs, or else the held-out samples."""
    if all(problem in history.visits for history in histories.values()):
        groups = {label: group_at(run, histories[label].visits[problem][-1], problem) for label, run in runs.items()}
    elif held_out is not None and problem in held_out["rates"]:
        groups = {label: group_at(run, held_out["step"], problem, "eval") for label, run in runs.items()}
    else:
        raise UserError(f"--problem {problem}: not among the problems that both runs have recorded")
    first, second = (Side(label, group) for label, group in groups.items())
    return _case(problem, first, second)


def _case(problem: str, first: Side, second: Side) -> dict[str, Any]:
    """A right response of one run beside a wrong one of the other, if they exist, with the differences marked."""
    second_fails = num_successes(second.group.rows) < len(second.group.rows)
    shown = [first.pick(right=second_fails), second.pick(right=not second_fails)]
    sides = [
        {
            "label": side.label,
            "step": side.group.rows[0]["step"],
            "num_correct": num_successes(side.group.rows),
            "num_rollouts": len(side.group.rows),
            "row": row,
            "parts": parts,
            # The teacher prompt of the shown rollout comes first.
            "contexts": sorted(teacher_prompts(side.group.rows), key=lambda c: row["rollout"] not in c["targets"]),
        }
        for side, row, parts in zip(
            (first, second), shown, diff(shown[0]["response"], shown[1]["response"]), strict=True
        )
    ]
    return {"problem": problem, "head": first.group.rows[0], "sides": sides}


def _directions(labels: Mapping[str, Any]) -> list[tuple[str, str]]:
    first, second = labels
    return [(first, second), (second, first)]


def _figures(runs: Runs, histories: Mapping[str, History], patterns: Mapping[str, str]) -> dict[str, Any]:
    metrics = {label: read_rows(run.metrics_file) if run.metrics_file.exists() else [] for label, run in runs.items()}
    rows = {label: history.pattern_rows for label, history in histories.items()}
    figures = {
        "ever_solved": plots.ever_solved(metrics),
        "patterns": plots.curve(
            rows,
            f"responses with {next(iter(patterns))!r}" if len(patterns) == 1 else "responses with a failure pattern",
            "% of rollouts",
            {n: n for n in patterns},
            100,
            from_zero=True,
        ),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def diff(left: str, right: str) -> tuple[list[Part], list[Part]]:
    """Two texts as parts, by line and by word inside changed lines. Joined, the parts give the texts."""
    a, b = left.splitlines(keepends=True), right.splitlines(keepends=True)
    sides: tuple[list[Part], list[Part]] = ([], [])
    for tag, a0, a1, b0, b1 in SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        old, new = "".join(a[a0:a1]), "".join(b[b0:b1])
        if tag == "replace":
            _add(sides, *_words(old, new))
        else:
            _add(sides, [(tag != "equal", old)], [(tag != "equal", new)])
    return sides


def _words(left: str, right: str) -> tuple[list[Part], list[Part]]:
    a, b = (re.findall(r"\s+|\w+|[^\w\s]", text) for text in (left, right))
    sides: tuple[list[Part], list[Part]] = ([], [])
    for tag, a0, a1, b0, b1 in SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        _add(sides, [(tag != "equal", "".join(a[a0:a1]))], [(tag != "equal", "".join(b[b0:b1]))])
    return sides


def _add(sides: tuple[list[Part], list[Part]], left: Sequence[Part], right: Sequence[Part]) -> None:
    for side, parts in zip(sides, (left, right), strict=True):
        side += [part for part in parts if part[1]]
