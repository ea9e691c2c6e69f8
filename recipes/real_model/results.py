"""Tables of the kept runs: `python -m recipes.real_model.results RUNS_DIR PAGE.md` writes them into the page.

They replace the text between the page's two markers, so that no number is written by hand. Intervals and comparisons
are those of `mopd compare`.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import numpy as np
import typer

from mopd_nemo.analysis.contrasts import Contrasts, contrasts, interval_cell
from mopd_nemo.analysis.page import markdown_table
from mopd_nemo.config import UserError
from mopd_nemo.evaluation import pass_at_k
from mopd_nemo.files import read_rows
from recipes.real_model.building import ending_with_user_errors

ARMS = ("1S", "2S", "1F", "1S+1F", "2S+1F")
SEEDS = (0, 1, 2)
BASELINE = "1S"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


@dataclass(frozen=True, slots=True)
class Kept:
    """The kept files of a run."""

    arm: str
    seed: int
    metrics: list[dict[str, Any]]
    targets: list[dict[str, Any]]
    problems: list[dict[str, Any]]

    @property
    def before(self) -> dict[str, dict[str, Any]]:
        """Rows of the first evaluation, by problem."""
        return self._at(min(row["step"] for row in self.problems))

    @property
    def after(self) -> dict[str, dict[str, Any]]:
        """Rows of the last evaluation, by problem."""
        return self._at(max(row["step"] for row in self.problems))

    def _at(self, step: int) -> dict[str, dict[str, Any]]:
        return {row["problem"]: row for row in self.problems if row["step"] == step}


def main(
    runs: Annotated[Path, typer.Argument(help="What `recipes.real_model.collect` has written.")],
    page: Annotated[Path, typer.Argument(help="Markdown file with the two markers.")],
) -> None:
    kept = read(runs)
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise UserError(f"{page}: needs one line {BEGIN} and one line {END}")
    tables = "\n\n".join([state(kept), *contexts(kept), *others(kept)])
    page.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n\n{tables}\n\n{END}", text, flags=re.DOTALL))


def read(runs: Path) -> dict[str, list[Kept]]:
    """Kept runs by arm, seeds ascending: those of `ARMS` in that order, then the others."""
    found: dict[str, list[Kept]] = defaultdict(list)
    for path in sorted(runs.glob("*-seed*")):
        arm, _, seed = path.name.rpartition("-seed")
        files = (read_rows(path / f"{name}.jsonl") for name in ("metrics", "targets", "problems"))
        found[arm.replace(",", ", ")].append(Kept(arm, int(seed), *files))
    if not found:
        raise UserError(f"{runs}: no kept runs; `python -m recipes.real_model.collect` writes them")
    return {arm: found[arm] for arm in (*ARMS, *found) if arm in found}


def state(kept: Mapping[str, Sequence[Kept]]) -> str:
    """The number of finished runs, and of responses that the verifier could not judge."""
    runs = [run for of_arm in kept.values() for run in of_arm]
    planned, finished = len(ARMS) * len(SEEDS), sum(len(kept.get(arm, ())) for arm in ARMS)
    outcomes = sum((Counter(row["outcomes"]) for run in runs for row in [*run.problems, *run.targets]), Counter())
    judged = (
        f"Of {outcomes.total():,} judged responses {outcomes['timeout']} timed out and {outcomes['verifier_error']} "
        "could not be judged."
    )
    other = f" {len(runs) - finished} runs try something else." if len(runs) > finished else ""
    if finished == planned:
        return f"All {planned} runs of the five contexts are finished.{other} {judged}"
    return f"**Incomplete: {finished} of {planned} runs of the five contexts are finished.**{other} {judged}"


def contexts(kept: Mapping[str, Sequence[Kept]]) -> list[str]:
    """The five contexts: outcomes, differences from the baseline, signs."""
    arms = {arm: kept[arm] for arm in ARMS if arm in kept}
    if BASELINE not in arms:
        return [signs_table(arms)] if arms else []
    said = contrasts(changes(arms), BASELINE)
    against = f"Change in mean@8 {said.title}:"
    return [outcome_table(arms, said), against, markdown_table(*said.table()), said.note, signs_table(arms)]


def others(kept: Mapping[str, Sequence[Kept]]) -> list[str]:
    """What else was tried, beside the baseline and beside the paper's default context."""
    tried = {arm: runs for arm, runs in kept.items() if arm not in ARMS}
    if not tried:
        return []
    beside = [
        contrasts(changes({baseline: kept[baseline], **tried}), baseline)
        for baseline in (BASELINE, ARMS[-1])
        if baseline in kept
    ]
    parts = ["### What else was tried"]
    if beside:
        parts.append(outcome_table(tried, beside[0]))
    for said in beside:
        parts += [f"Change in mean@8 {said.title}:", markdown_table(*said.table()), said.note]
    return [*parts, signs_table(tried)]


def outcome_table(kept: Mapping[str, Sequence[Kept]], said: Contrasts) -> str:
    """Held-out accuracy before and after, by arm."""
    heading = ["the teacher reads", "seeds", "mean@8 before", "after", "change", "95 % interval"]
    heading += ["pass@8 before", "after", "unfinished after"]
    body = []
    for arm, runs in kept.items():
        before, after = (_percent(runs, lambda r, at=at: right(getattr(r, at))) for at in ("before", "after"))
        change = 100 * fmean(values.mean() for values in changes(kept)[arm].values())
        body.append(
            [
                *(arm, ", ".join(str(run.seed) for run in runs), before, after, f"{change:+.1f}"),
                interval_cell(said.means[arm], "+"),
                *(_percent(runs, lambda r, at=at: passed(getattr(r, at))) for at in ("before", "after")),
                _percent(runs, lambda r: unfinished(r.after)),
            ]
        )
    return markdown_table(heading, body)


def signs_table(kept: Mapping[str, Sequence[Kept]]) -> str:
    """The signs of collapse, step by step: means over the seeds that all arms have, which draw the same problems."""
    common = set.intersection(*({run.seed for run in runs} for runs in kept.values()))
    steps = [row["step"] for row in next(iter(kept.values()))[0].metrics]
    signs: dict[str, Callable[[Kept, int], float | None]] = {
        "success of rollouts, %": lambda run, i: 100 * run.metrics[i]["success_rate"],
        "unfinished, %": lambda run, i: 100 * run.metrics[i]["response/unfinished"],
        "tokens a response": lambda run, i: run.metrics[i]["response/tokens"],
        "student's entropy": lambda run, i: run.metrics[i].get("student/entropy"),
        "teacher's entropy": lambda run, i: run.metrics[i].get("teacher/entropy"),
        "rollouts learned from, %": lambda run, i: 100 * run.metrics[i]["signal"],
        "rollouts whose teacher read the whole context, %": lambda run, i: (
            100 * run.targets[i]["complete"] / run.targets[i]["rollouts"] if run.arm[0].isdigit() else None
        ),
    }
    seeds = f"seeds {', '.join(map(str, sorted(common)))}" if common else "no seed that all arms have"
    lines = [f"| {seeds} | step {' | '.join(map(str, steps))} |", f"| --- |{' ---: |' * len(steps)}"]
    for name, sign in signs.items():
        lines.append(f"| **{name}** |{' |' * len(steps)}")
        for arm, runs in kept.items():
            digits = 2 if "entropy" in name else 0
            cells = [_mean([sign(run, i) for run in runs if run.seed in common], digits) for i in range(len(steps))]
            lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def right(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Per problem, the share of right samples."""
    return {problem: row["right"] / row["samples"] for problem, row in rows.items()}


def passed(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    return {problem: pass_at_k(row["right"], row["samples"], row["samples"]) for problem, row in rows.items()}


def unfinished(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    return {problem: row["unfinished"] / row["samples"] for problem, row in rows.items()}


def changes(kept: Mapping[str, Sequence[Kept]]) -> dict[str, dict[int, np.ndarray]]:
    """By arm and seed: share of right samples after minus before, problem by problem."""
    return {
        arm: {
            run.seed: np.array([right(run.after)[p] - right(run.before)[p] for p in sorted(run.before)]) for run in runs
        }
        for arm, runs in kept.items()
    }


def _mean(values: Sequence[float | None], digits: int) -> str:
    """A step without a signal has no entropies."""
    known = [value for value in values if value is not None]
    return f"{fmean(known):.{digits}f}" if known else "–"


def _percent(runs: Sequence[Kept], value: Callable[[Kept], dict[str, float]]) -> str:
    return f"{100 * fmean(fmean(value(run).values()) for run in runs):.1f}"


if __name__ == "__main__":
    with ending_with_user_errors():
        typer.run(main)
