"""Tables of the kept runs: `python -m recipes.real_model.results RUNS_DIR PAGE.md` writes them into the page.

They stand between the page's two markers, so that no number of them is written by hand.
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

from mopd_nemo.config import UserError
from mopd_nemo.evaluation import pass_at_k
from mopd_nemo.files import read_rows
from recipes.real_model.building import ending_with_user_errors

ARMS = ("1S", "2S", "1F", "1S+1F", "2S+1F")
SEEDS = (0, 1, 2)
RESAMPLES = 4000
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


@dataclass(frozen=True, slots=True)
class Kept:
    """What is kept of a run."""

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
    tables = "\n\n".join([state(kept), outcome_table(kept), signs_table(kept)])
    page.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n\n{tables}\n\n{END}", text, flags=re.DOTALL))


def read(runs: Path) -> dict[str, list[Kept]]:
    """Kept runs by arm, in the order of `ARMS`, seeds ascending."""
    found: dict[str, list[Kept]] = defaultdict(list)
    for path in sorted(runs.glob("*-seed*")):
        arm, _, seed = path.name.rpartition("-seed")
        files = (read_rows(path / f"{name}.jsonl") for name in ("metrics", "targets", "problems"))
        found[arm].append(Kept(arm, int(seed), *files))
    if not found:
        raise UserError(f"{runs}: no kept runs; `python -m recipes.real_model.collect` writes them")
    return {arm: found[arm] for arm in ARMS if arm in found}


def state(kept: Mapping[str, Sequence[Kept]]) -> str:
    """How much of the plan is there, and what the verifier could not judge."""
    runs = [run for of_arm in kept.values() for run in of_arm]
    planned = len(ARMS) * len(SEEDS)
    outcomes = sum((Counter(row["outcomes"]) for run in runs for row in [*run.problems, *run.targets]), Counter())
    judged = (
        f"Of {outcomes.total():,} judged responses {outcomes['timeout']} timed out and {outcomes['verifier_error']} "
        "could not be judged."
    )
    if len(runs) == planned:
        return f"All {planned} runs are finished. {judged}"
    return f"**Incomplete: {len(runs)} of {planned} runs are finished.** {judged}"


def outcome_table(kept: Mapping[str, Sequence[Kept]]) -> str:
    """Held-out accuracy before and after, by arm."""
    lines = [
        "| the teacher reads | seeds | mean@8 before | after | change | against 1S | pass@8 after | unfinished after |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for arm, runs in kept.items():
        against = "" if arm == "1S" else _interval(paired(runs, kept.get("1S", ()), lambda run: right(run.after)))
        lines.append(
            f"| {arm} | {', '.join(str(run.seed) for run in runs)} | {_percent(runs, lambda r: right(r.before))} "
            f"| {_percent(runs, lambda r: right(r.after))} | {_interval(changes(runs))} | {against} "
            f"| {_percent(runs, lambda r: passed(r.after))} | {_percent(runs, lambda r: unfinished(r.after))} |"
        )
    return "\n".join(lines)


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
        "targets learned from, %": lambda run, i: 100 * run.targets[i]["taught"] / run.targets[i]["rollouts"],
        "targets with the whole context, %": lambda run, i: (
            100 * run.targets[i]["complete"] / run.targets[i]["rollouts"]
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


def changes(runs: Sequence[Kept]) -> np.ndarray:
    """[seeds, problems]: share of right samples after minus before."""
    return np.array([[right(r.after)[p] - right(r.before)[p] for p in sorted(r.before)] for r in runs])


def paired(runs: Sequence[Kept], others: Sequence[Kept], value: Callable[[Kept], dict[str, float]]) -> np.ndarray:
    """[common seeds, problems]: a run's value minus that of the other arm with the same seed."""
    by_seed = {run.seed: value(run) for run in others}
    pairs = [(value(run), by_seed[run.seed]) for run in runs if run.seed in by_seed]
    return np.array([[mine[p] - other[p] for p in sorted(mine)] for mine, other in pairs])


def interval(values_SP: np.ndarray) -> tuple[float, float, float]:
    """Mean and 95 % bootstrap interval, resampling seeds and problems; one seed's says nothing about other seeds."""
    num_seeds, num_problems = values_SP.shape
    rng = np.random.default_rng(0)
    seeds = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), RESAMPLES) / num_seeds
    problems = rng.multinomial(num_problems, np.full(num_problems, 1 / num_problems), RESAMPLES) / num_problems
    means = np.einsum("rs,sp,rp->r", seeds, values_SP, problems)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(values_SP.mean()), float(low), float(high)


def _interval(values_SP: np.ndarray) -> str:
    if not values_SP.size:
        return ""
    mean, low, high = (100 * number for number in interval(values_SP))
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def _mean(values: Sequence[float | None], digits: int) -> str:
    """A step without a signal has no entropies."""
    known = [value for value in values if value is not None]
    return f"{fmean(known):.{digits}f}" if known else "–"


def _percent(runs: Sequence[Kept], value: Callable[[Kept], dict[str, float]]) -> str:
    return f"{100 * fmean(fmean(value(run).values()) for run in runs):.1f}"


if __name__ == "__main__":
    with ending_with_user_errors():
        typer.run(main)
