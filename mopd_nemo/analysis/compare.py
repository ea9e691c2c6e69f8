"""Several runs side by side: which setting gives what, over seeds, with what uncertainty and at what cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from mopd_nemo.analysis.contrasts import MARGIN, Contrasts, contrasts
from mopd_nemo.config import UserError
from mopd_nemo.config.load import flatten
from mopd_nemo.config.plugins import recorded_method
from mopd_nemo.files import read_rows
from mopd_nemo.run.directory import RunDirectory
from mopd_nemo.run.display import PHASES, WARM_UP_STEPS
from mopd_nemo.run.rollouts import num_successes, read_groups

_NOT_SETTINGS = {"run_dir", "name", "seed", "gkd.completions"}
"""Beside `logging`: what does not change what a run learns, or changes with the seed."""


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
    def seed(self) -> int:
        """Of all that the run drew."""
        return self.config["seed"]

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

    def by_problem(self) -> dict[int, np.ndarray]:
        """By seed, the share of right samples of every problem at the last evaluation, by id."""
        return {
            run.seed: np.array([right / samples for _, (right, samples) in sorted(run.correct.items())])
            for run in self.runs
        }

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
    baseline: Setting
    """The setting that the others are compared with."""
    contrasts: Contrasts
    """What mean@n of the last evaluation allows to say."""


def compare(paths: Sequence[Path], baseline: str | None = None, margin: float = MARGIN) -> Comparison:
    """Read and group runs, in the order given.

    Args:
        paths: run directories, or directories that hold some, such as a sweep's.
        baseline: label of the setting that the others are compared with. Default: `sdpo`, as in the paper, if there is
            such a setting, else the first.
        margin: difference in mean@n, as a fraction, below which settings count as equal.

    Raises:
        UserError: a path holds no run, a run has no step or no evaluation, evaluations cannot be compared, two runs
            are the same experiment, or there is no such baseline.
    """
    runs = [_read(path) for path in find_runs(paths)]
    shared = {key for key in runs[0].config if all(run.config.get(key) == runs[0].config[key] for run in runs)}
    varied = [key for key in runs[0].config if key not in shared and not _says_nothing(key)]
    implied = _implied(runs)
    labels: dict[str, list[RunResult]] = {}
    for run in runs:
        labels.setdefault(_label(run, [key for key in varied if key not in implied]), []).append(run)
    sizes = {run.config["eval.num_samples"] for run in runs}
    if len(sizes) > 1 or len({frozenset(run.correct) for run in runs}) > 1:
        raise UserError("the runs were evaluated on different problems or numbers of samples: compare like with like")
    if len(runs[0].correct) < 2:
        raise UserError("the runs were evaluated on one problem, which says nothing about others: set data.num_eval")
    settings = {label: Setting(label, members) for label, members in labels.items()}
    for setting in settings.values():
        _refuse_twins(setting)
    if baseline is not None and baseline not in settings:
        raise UserError(f"--baseline {baseline}: no such setting; there are: {', '.join(settings)}")
    base = baseline or ("sdpo" if "sdpo" in settings else next(iter(settings)))
    return Comparison(
        list(settings.values()),
        varied,
        sizes.pop(),
        _warnings(runs, list(settings.values())),
        settings[base],
        contrasts({label: setting.by_problem() for label, setting in settings.items()}, base, margin),
    )


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Run directories among `paths`, and those inside of the others.

    Files are passed over: the table of an earlier comparison may lie beside the runs that `SWEEP/*` names.

    Raises:
        UserError: a path is missing, or a directory neither is a run nor holds one.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such directory")
        if path.is_dir():
            is_run = (path / "config.yaml").is_file()
            inside = [path] if is_run else sorted(file.parent for file in path.glob("*/config.yaml"))
            if not inside:
                raise UserError(f"{path}: neither a run directory (no config.yaml in it) nor one that holds runs")
            found |= dict.fromkeys(inside)
    if not found:
        raise UserError(f"no run directory among {', '.join(map(str, paths))}")
    return list(found)


def _read(path: Path) -> RunResult:
    run = RunDirectory.open(path)
    for file, remedy in ((run.metrics_file, "train it first"), (run.eval_file, "set train.eval_every")):
        if not file.exists() or not read_rows(file):
            raise UserError(f"{path}: {file.name} has no rows; {remedy}")
    evals = read_rows(run.eval_file)
    rollouts = run.rollouts_file(evals[-1]["step"], "eval")
    if not rollouts.exists():
        raise UserError(f"{rollouts}: missing; intervals by problem need the samples of the last evaluation")
    correct = {group.problem_id: (num_successes(group.rows), len(group.rows)) for group in read_groups(rollouts)}
    return RunResult(path, flatten(run.read_config()), read_rows(run.metrics_file), evals, correct)


def _says_nothing(key: str) -> bool:
    return key in _NOT_SETTINGS or key.startswith("logging.")


def _implied(runs: Sequence[RunResult]) -> set[str]:
    """Settings that a method has a preset for, and that do not vary within a method."""
    by_method: dict[str, list[RunResult]] = {}
    for run in runs:
        by_method.setdefault(run.config["method"], []).append(run)
    preset = {key for name in by_method for key in recorded_method(name).preset}
    return {
        key
        for key in preset
        if all(run.config.get(key) == own[0].config.get(key) for own in by_method.values() for run in own)
    }


def _label(run: RunResult, varied: Sequence[str]) -> str:
    """`sdpo` or `mopd peers.failures=0`. What follows from the method's name is not said again."""
    named = [key for key in varied if key not in ("method", "teacher.kind", "teacher.path")]
    parts = [run.config["method"]] if "method" in varied else []
    parts += [f"{key}={run.config[key]}" for key in named]
    if "method" not in varied:
        parts += [f"{key}={run.config[key]}" for key in varied if key.startswith("teacher.")]
    return " ".join(parts) or run.config["method"]


def _refuse_twins(setting: Setting) -> None:
    """Two runs of one seed are one experiment: counted as two, they would make intervals too narrow."""
    by_seed: dict[int, RunResult] = {}
    for run in setting.runs:
        other = by_seed.setdefault(run.seed, run)
        if other is not run:
            raise UserError(f"{other.path} and {run.path}: the same settings and seed ({run.seed}); leave one out")


def _warnings(runs: Sequence[RunResult], settings: Sequence[Setting]) -> list[str]:
    warnings = []
    budgets = {run.num_rollouts for run in runs}
    if len(budgets) > 1:
        warnings.append(f"rollout budgets differ: {', '.join(f'{b:,}' for b in sorted(budgets))} training responses")
    unfinished = [run.path.name for run in runs if len(run.metrics) < run.config["train.num_steps"]]
    if unfinished:
        warnings.append(f"not finished: {', '.join(unfinished)}")
    if len({len(setting.runs) for setting in settings}) > 1:
        warnings.append("the settings have different numbers of seeds")
    return warnings


@dataclass(frozen=True, slots=True)
class Row:
    """What a setting reached, and what it cost. Accuracies are fractions, means over seeds at the last evaluation."""

    setting: str
    seeds: int
    before: float
    """mean@n at the first evaluation."""
    mean: float
    """mean@n."""
    std: float
    """Of mean@n over seeds; NaN with one."""
    best: float
    """pass@n."""
    best_std: float
    """Of pass@n over seeds."""
    all_evaluations: float
    """Mean of the mean@n curve after the start: high for a setting that learns early and stays."""
    ever_solved: float
    seconds: dict[str, float]
    """By phase, and `step`."""
    over_baseline: float
    """Step time over the baseline's, less 1."""


def rows(comparison: Comparison) -> list[Row]:
    """One row a setting."""
    n = comparison.num_samples
    base = comparison.baseline.seconds()["step"]
    table = []
    for setting in comparison.settings:
        seconds = setting.seconds()
        curve = [mean for _, mean, _ in setting.curve(f"mean@{n}", "evals")][1:]
        mean, std = setting.over_seeds(f"mean@{n}")
        best, best_std = setting.over_seeds(f"pass@{n}")
        table.append(
            Row(
                setting=setting.label,
                seeds=len(setting.runs),
                before=setting.over_seeds(f"mean@{n}", row=0)[0],
                mean=mean,
                std=std,
                best=best,
                best_std=best_std,
                all_evaluations=fmean(curve) if curve else math.nan,
                ever_solved=setting.ever_solved(),
                seconds=seconds,
                over_baseline=seconds["step"] / base - 1.0,
            )
        )
    return table
