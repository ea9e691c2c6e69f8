"""Gather runs into settings: what the runs of a setting share, and their numbers over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from mopd_nemo.config import UserError
from mopd_nemo.config.load import flatten
from mopd_nemo.evaluation.metrics import bootstrap_interval, pass_at_k
from mopd_nemo.files import read_rows
from mopd_nemo.run.directory import RunDirectory
from mopd_nemo.run.display import PHASES

WARM_UP_STEPS = 5
"""Steps left out of timings, as in the paper's appendix E: they load and compile."""
_NOT_SETTINGS = {"run_dir", "name", "seed", "gkd.completions"}


@dataclass(frozen=True, slots=True)
class RunResult:
    """What one run recorded."""

    path: Path
    config: dict[str, Any]
    """Dotted keys to values."""
    metrics: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    correct: dict[str, tuple[int, int]]
    """Per held-out problem, right samples and samples of the last evaluation."""

    @property
    def num_rollouts(self) -> int:
        """Responses sampled for training."""
        per_step = self.config["rollout.num_prompts_per_step"] * self.config["rollout.num_rollouts_per_prompt"]
        return len(self.metrics) * per_step


@dataclass(frozen=True, slots=True)
class Setting:
    """Runs that differ in their seed alone."""

    label: str
    runs: list[RunResult]

    def over_seeds(self, metric: str, row: int = -1) -> tuple[float, float]:
        """Mean and standard deviation over runs of a metric of one evaluation; the deviation of one run is NaN."""
        values = [run.evals[row][metric] for run in self.runs]
        return fmean(values), stdev(values) if len(values) > 1 else float("nan")

    def interval(self, k: int | None = None) -> tuple[float, float]:
        """95 % bootstrap interval by problem of the last evaluation, averaged over seeds: of mean@n, or of pass@k."""
        per_problem: dict[str, list[float]] = {}
        for run in self.runs:
            for problem, (right, samples) in run.correct.items():
                value = right / samples if k is None else pass_at_k(right, samples, k)
                per_problem.setdefault(problem, []).append(value)
        return bootstrap_interval([fmean(values) for values in per_problem.values()])

    def seconds(self) -> dict[str, float]:
        """Mean seconds of each phase and of the whole step, after the first steps."""
        rows = [row for run in self.runs for row in run.metrics[WARM_UP_STEPS:] or run.metrics]
        return {phase: fmean(row[f"seconds/{phase}"] for row in rows) for phase in (*PHASES, "step")}

    def ever_solved(self) -> float:
        """Training problems solved at least once by the last step, mean over runs."""
        return fmean(run.metrics[-1]["ever_solved"] for run in self.runs)

    def curve(self, metric: str, kind: str) -> list[tuple[int, float, float]]:
        """(step, mean, standard deviation) over runs, at the steps that all runs have. `kind`: metrics or evals."""
        tables = [{row["step"]: row[metric] for row in getattr(run, kind) if metric in row} for run in self.runs]
        steps = sorted(set.intersection(*(set(table) for table in tables)))
        columns = [(step, [table[step] for table in tables]) for step in steps]
        return [(step, fmean(vs), stdev(vs) if len(vs) > 1 else 0.0) for step, vs in columns]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Settings side by side."""

    settings: list[Setting]
    varied: list[str]
    """Keys in which the settings differ."""
    num_samples: int
    """n of mean@n."""
    warnings: list[str]

    @property
    def baseline(self) -> Setting | None:
        """The setting that step times are compared with: sdpo, as in the paper, when there is exactly one."""
        found = [s for s in self.settings if s.runs[0].config["method"] == "sdpo"]
        return found[0] if len(found) == 1 else None


def compare(paths: Sequence[Path]) -> Comparison:
    """Read and group runs, in the order given.

    Raises:
        UserError: a path is no run, a run has no step or no evaluation, or evaluations cannot be compared.
    """
    runs = [_read(path) for path in paths]
    shared = {key for key in runs[0].config if all(run.config.get(key) == runs[0].config[key] for run in runs)}
    varied = [key for key in runs[0].config if key not in shared and key not in _NOT_SETTINGS]
    labels: dict[str, list[RunResult]] = {}
    for run in runs:
        labels.setdefault(_label(run, varied), []).append(run)
    sizes = {run.config["eval.num_samples"] for run in runs}
    if len(sizes) > 1 or len({frozenset(run.correct) for run in runs}) > 1:
        raise UserError("the runs were evaluated on different problems or numbers of samples: compare like with like")
    settings = [Setting(label, members) for label, members in labels.items()]
    return Comparison(settings, varied, sizes.pop(), _warnings(runs, settings))


def _read(path: Path) -> RunResult:
    run = RunDirectory.open(path)
    for file, remedy in ((run.metrics_file, "train it first"), (run.eval_file, "set train.eval_every")):
        if not file.exists() or not read_rows(file):
            raise UserError(f"{path}: {file.name} has no rows; {remedy}")
    evals = read_rows(run.eval_file)
    rollouts = run.rollouts_file(evals[-1]["step"], "eval")
    if not rollouts.exists():
        raise UserError(f"{rollouts}: missing; intervals by problem need the samples of the last evaluation")
    correct: dict[str, tuple[int, int]] = {}
    for row in read_rows(rollouts):
        right, samples = correct.get(row["problem"], (0, 0))
        correct[row["problem"]] = (right + (row["success"] is True), samples + 1)
    return RunResult(path, flatten(run.read_config()), read_rows(run.metrics_file), evals, correct)


def _label(run: RunResult, varied: Sequence[str]) -> str:
    """`sdpo` or `mopd peers.failures=0`. What follows from the method's name is not said again."""
    named = [key for key in varied if key not in ("method", "teacher.kind", "teacher.path")]
    parts = [run.config["method"]] if "method" in varied else []
    parts += [f"{key}={run.config[key]}" for key in named]
    if "method" not in varied:
        parts += [f"{key}={run.config[key]}" for key in varied if key.startswith("teacher.")]
    return " ".join(parts) or run.config["method"]


def _warnings(runs: Sequence[RunResult], settings: Sequence[Setting]) -> list[str]:
    found = []
    budgets = {run.num_rollouts for run in runs}
    if len(budgets) > 1:
        found.append(f"rollout budgets differ: {', '.join(f'{b:,}' for b in sorted(budgets))} training responses")
    unfinished = [run.path.name for run in runs if len(run.metrics) < run.config["train.num_steps"]]
    if unfinished:
        found.append(f"not finished: {', '.join(unfinished)}")
    if len({len(setting.runs) for setting in settings}) > 1:
        found.append("the settings have different numbers of seeds")
    return found
