"""Several runs side by side: which setting gives what, over seeds, with what uncertainty and at what cost.

Writes compare.md, compare.csv, each figure as PNG and PDF, and compare.html, which holds everything.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from matplotlib.figure import Figure

from mopd_nemo.analysis import plots
from mopd_nemo.analysis.page import markdown_table, svgs, write_page
from mopd_nemo.analysis.plots import COLOURS, LINES, MARKERS, new_axes, save_figure
from mopd_nemo.config import UserError
from mopd_nemo.config.load import flatten
from mopd_nemo.evaluation import bootstrap_interval, pass_at_k
from mopd_nemo.files import read_rows, write_text
from mopd_nemo.run.directory import RunDirectory
from mopd_nemo.run.display import PHASES, WARM_UP_STEPS

_SIZE = (7.2, 4.2)
_LEGEND_CHARACTERS = 100
"""That fit beside each other below the axes."""
_ACCURACY_NOTE = (
    "Percent. ± is the standard deviation over seeds; the interval is a 95 % bootstrap by problem at the last "
    "evaluation. 'Over all evaluations' is the mean of the curve after the start: high for what learns early and stays."
)
_TIME_NOTE = f"Mean seconds per phase, without the first {WARM_UP_STEPS} steps."
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
    baseline: Setting | None
    """The setting that step times are compared with."""


def compare(paths: Sequence[Path], baseline: str | None = None) -> Comparison:
    """Read and group runs, in the order given.

    Args:
        baseline: label of the setting that step times are compared with. Default: `sdpo`, as in the paper, if there is
            such a setting.

    Raises:
        UserError: a path is no run, a run has no step or no evaluation, evaluations cannot be compared, or there is no
            such baseline.
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
    settings = {label: Setting(label, members) for label, members in labels.items()}
    if baseline is not None and baseline not in settings:
        raise UserError(f"--baseline {baseline}: no such setting; there are: {', '.join(settings)}")
    warnings = _warnings(runs, list(settings.values()))
    return Comparison(list(settings.values()), varied, sizes.pop(), warnings, settings.get(baseline or "sdpo"))


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
class Score:
    """A metric of a setting, as fractions."""

    before: float
    """At the first evaluation."""
    mean: float
    """At the last one, over seeds."""
    std: float
    """Over seeds; NaN with one."""
    low: float
    high: float
    """95 % bootstrap bounds by problem."""

    def cells(self) -> list[str]:
        """Mean with its deviation, and bounds, for people."""
        deviation = "" if math.isnan(self.std) else f" ± {100 * self.std:.1f}"
        return [_percent(self.mean) + deviation, f"{_percent(self.low)} to {_percent(self.high)}"]


@dataclass(frozen=True, slots=True)
class Row:
    """What a setting reached, and what it cost."""

    setting: str
    seeds: int
    mean: Score
    """Of mean@n."""
    best: Score
    """Of pass@n."""
    all_evaluations: float
    """Mean of the mean@n curve after the start: high for a setting that learns early and stays."""
    ever_solved: float
    seconds: dict[str, float]
    """By phase, and `step`."""
    over_baseline: float | None
    """Step time over the baseline's, less 1."""


def rows(comparison: Comparison) -> list[Row]:
    """One row a setting."""
    n = comparison.num_samples
    base = comparison.baseline.seconds()["step"] if comparison.baseline else None
    table = []
    for setting in comparison.settings:
        seconds = setting.seconds()
        curve = [mean for _, mean, _ in setting.curve(f"mean@{n}", "evals")][1:]
        table.append(
            Row(
                setting=setting.label,
                seeds=len(setting.runs),
                mean=_score(setting, f"mean@{n}", None),
                best=_score(setting, f"pass@{n}", n),
                all_evaluations=fmean(curve) if curve else math.nan,
                ever_solved=setting.ever_solved(),
                seconds=seconds,
                over_baseline=seconds["step"] / base - 1.0 if base else None,
            )
        )
    return table


def _score(setting: Setting, metric: str, k: int | None) -> Score:
    before, _ = setting.over_seeds(metric, row=0)
    return Score(before, *setting.over_seeds(metric), *setting.interval(k))


def accuracy_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Heading and cells: what each setting reached."""
    n = comparison.num_samples
    heading = ["setting", "seeds", "before", f"mean@{n}", "95 % by problem", "over all evaluations"]
    heading += [f"pass@{n}", "95 % by problem", "ever solved"]
    body = [
        [
            *(row.setting, str(row.seeds), _percent(row.mean.before), *row.mean.cells()),
            *(_percent(row.all_evaluations), *row.best.cells(), f"{row.ever_solved:.0f}"),
        ]
        for row in rows(comparison)
    ]
    return heading, body


def time_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Heading and cells: seconds per phase and step."""
    columns = (*PHASES, "step")
    heading = ["setting", *columns]
    if comparison.baseline:
        heading.append(f"step time over {comparison.baseline.label}")
    body = []
    for row in rows(comparison):
        cells = [row.setting, *(f"{row.seconds[name]:.2f}" for name in columns)]
        if row.over_baseline is not None:
            cells.append(f"{100 * row.over_baseline:+.1f} %")
        body.append(cells)
    return heading, body


def write_csv(comparison: Comparison, file: Path) -> None:
    """Every number, unrounded."""
    n = comparison.num_samples
    table = []
    for row in rows(comparison):
        flat: dict[str, float | str] = {"setting": row.setting, "seeds": row.seeds}
        for metric, score in ((f"mean@{n}", row.mean), (f"pass@{n}", row.best)):
            flat |= {f"{metric}/before": score.before, metric: score.mean, f"{metric}/std": score.std}
            flat |= {f"{metric}/low": score.low, f"{metric}/high": score.high}
        flat |= {f"mean@{n}/all_evaluations": row.all_evaluations, "ever_solved": row.ever_solved}
        flat |= {f"seconds/{phase}": seconds for phase, seconds in row.seconds.items()}
        if row.over_baseline is not None:
            flat["step_time_over_baseline"] = row.over_baseline
        table.append(flat)
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, fieldnames=list(table[0]))
        writer.writeheader()
        writer.writerows(table)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def figures(comparison: Comparison) -> dict[str, Figure | None]:
    """Figures by file name."""
    n = comparison.num_samples
    seconds = {s.label: [row for run in s.runs for row in run.metrics[WARM_UP_STEPS:]] for s in comparison.settings}
    return {
        "held_out": _curves(comparison, f"mean@{n}", "evals", f"held-out mean@{n}", "%", 100.0),
        "training_success": _curves(comparison, "success_rate", "metrics", "success of training rollouts", "%", 100.0),
        "ever_solved": _curves(
            comparison, "ever_solved", "metrics", "training problems solved at least once", "problems", 1.0
        ),
        "seconds": plots.phase_seconds(seconds),
    }


def _curves(comparison: Comparison, metric: str, kind: str, title: str, unit: str, scale: float) -> Figure:
    figure, axes = new_axes(f"{title} (mean over seeds, band: one standard deviation)", "step", unit, _SIZE)
    for number, setting in enumerate(comparison.settings):
        points = setting.curve(metric, kind)
        steps = [step for step, _, _ in points]
        means = [scale * mean for _, mean, _ in points]
        low, high = ([scale * (mean + sign * std) for _, mean, std in points] for sign in (-1, 1))
        colour = COLOURS[number % len(COLOURS)]
        marker = MARKERS[number % len(MARKERS)] if kind == "evals" else None
        line = LINES[number // len(COLOURS) % len(LINES)]
        axes.plot(steps, means, line, color=colour, marker=marker, markersize=4, linewidth=1.5, label=setting.label)
        axes.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)
    longest = max((len(setting.label) for setting in comparison.settings), default=1)
    columns = min(max(_LEGEND_CHARACTERS // (longest + 6), 1), 3)
    figure.legend(frameon=False, fontsize=8, ncols=columns, loc="outside lower center")
    return figure


def write_comparison(comparison: Comparison, directory: Path) -> Path:
    """Write all files; the path of the HTML page."""
    directory.mkdir(parents=True, exist_ok=True)
    drawn = figures(comparison)
    for name, figure in drawn.items():
        if figure is not None:
            save_figure(figure, directory / name)
    write_csv(comparison, directory / "compare.csv")
    write_text(directory / "compare.md", render_markdown(comparison))
    return write_page(
        directory / "compare.html",
        "compare.html.j2",
        title=f"{len(comparison.settings)} settings, {sum(len(s.runs) for s in comparison.settings)} runs",
        warnings=comparison.warnings,
        tables=[
            ("Accuracy", _ACCURACY_NOTE, accuracy_table(comparison)),
            ("Time", _TIME_NOTE, time_table(comparison)),
        ],
        figures=svgs(drawn.values()),
        settings=comparison.settings,
    )


def render_markdown(comparison: Comparison) -> str:
    """Both tables with their notes."""
    parts = [f"**{warning}**" for warning in comparison.warnings]
    parts += [markdown_table(*accuracy_table(comparison)), _ACCURACY_NOTE]
    parts += [markdown_table(*time_table(comparison)), _TIME_NOTE]
    return "\n\n".join(parts) + "\n"
