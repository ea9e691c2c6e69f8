"""report.html: one self-contained page about a run or several, readable offline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from mopd_nemo.analysis import plots
from mopd_nemo.analysis.groups import sample_groups
from mopd_nemo.analysis.page import svgs, write_page
from mopd_nemo.analysis.teacher_signal import RESULT_FILE
from mopd_nemo.config import Config
from mopd_nemo.config.load import flatten
from mopd_nemo.config.plugins import method_class
from mopd_nemo.files import read_rows
from mopd_nemo.run.checkpoints import best_saved
from mopd_nemo.run.directory import RunDirectory
from mopd_nemo.run.display import PHASES, WARM_UP_STEPS
from mopd_nemo.run.guard import signs
from mopd_nemo.types import Outcome

_NOT_COMPARED = ("name", "run_dir")

Rows = Sequence[Mapping[str, Any]]


def write_report(runs: Sequence[RunDirectory], output: Path | None = None) -> Path:
    """Write a page about the records of runs; parts without data are left out.

    Several runs share their figures, with a table of results and a table of the settings that differ.

    Args:
        output: default: report.html in the run's directory or, of several runs, in the working directory.
    """
    labelled = label_runs(runs)
    configs = {label: run.read_config() for label, run in labelled.items()}
    recorded = {label: read_metrics(run) for label, run in labelled.items()}
    metrics = {label: rows for label, (rows, _) in recorded.items()}
    evals = {label: rows for label, (_, rows) in recorded.items()}
    if len(runs) == 1:
        (run,), (config,) = runs, configs.values()
        single = _single(run, config, *next(iter(recorded.values())))
        names, limit = [config.name], _tried(config, next(iter(metrics.values())))
    else:
        single, names, limit = {}, list(labelled), []
    return write_page(
        output or (runs[0].report_file if len(runs) == 1 else Path("report.html")),
        "report.html.j2",
        names=names,
        paths={label: run.path for label, run in labelled.items()},
        summary=summary_table(metrics, evals),
        differences=setting_differences(configs),
        figures=svgs(run_figures(metrics, evals, limit)),
        single=single,
    )


def label_runs(runs: Sequence[RunDirectory]) -> dict[str, RunDirectory]:
    """Runs by directory name, or by path where names are equal."""
    names = [run.path.resolve().name for run in runs]
    return {name if names.count(name) == 1 else str(run.path): run for name, run in zip(names, runs, strict=True)}


def read_metrics(run: RunDirectory) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of metrics.jsonl and of eval.jsonl; empty where a file is missing."""
    files = (run.metrics_file, run.eval_file)
    metrics, evals = (read_rows(file) if file.exists() else [] for file in files)
    return metrics, evals


def run_figures(
    metrics: plots.Runs, evals: plots.Runs, tried: Sequence[tuple[float, float]] = ()
) -> list[Figure | None]:
    """The curves of one run or of several. `tried`: see `plots.ever_solved`."""
    alone = len(metrics) == 1
    curves = [
        plots.curve(metrics, curve.title, curve.unit, names, curve.scale, from_zero=curve.from_zero)
        for curve in (*_CURVES, _outcome_curve(metrics))
        if (names := curve.names if alone else curve.of_several)
    ]
    return [plots.held_out(evals), plots.ever_solved(metrics, tried), *curves, plots.phase_seconds(metrics)]


@dataclass(frozen=True, slots=True)
class _Curve:
    title: str
    unit: str
    names: Mapping[str, str]
    """Metrics and their labels, for one run."""
    of_several: Mapping[str, str]
    """The same for several runs; empty: no figure."""
    scale: float = 1.0
    from_zero: bool = True


_CURVES = (
    _Curve(
        "training rollouts",
        "% of rollouts",
        {"success_rate": "success", "signal": "with teacher signal"},
        {"success_rate": "success"},
        100,
        from_zero=False,
    ),
    _Curve("loss", "the method's objective", {"loss": "loss"}, {"loss": "loss"}, from_zero=False),
    _Curve(
        "entropy",
        "nats per token",
        {"student/entropy": "student", "teacher/entropy": "teacher"},
        {"student/entropy": "student"},
    ),
    _Curve(
        "groups",
        "% of groups",
        {"group/all_failed": "all failed", "group/lone_success": "one success", "group/all_succeeded": "all right"},
        {"group/all_failed": "all failed"},
        100,
    ),
    _Curve(
        "length",
        "tokens",
        {"response/tokens": "response", "context/tokens": "teacher prompt"},
        {"response/tokens": "response"},
    ),
    _Curve("gradient norm", "before clipping", {"grad_norm": "norm"}, {"grad_norm": "norm"}),
)


def _outcome_curve(metrics: plots.Runs) -> _Curve:
    """The outcomes that occur, for one run."""
    every = [row for rows in metrics.values() for row in rows]
    outcomes = sorted({name for row in every for name in row if name.startswith("outcome/") and row[name] > 0})
    names = {name: name.removeprefix("outcome/").replace("_", " ") for name in outcomes}
    return _Curve("outcomes", "% of rollouts", names, {}, 100)


def summary_table(metrics: plots.Runs, evals: plots.Runs) -> dict[str, Any]:
    """`head` and `rows`: one row per run."""
    sizes = {plots.mean_name(rows[0]).removeprefix("mean@") for rows in evals.values() if rows}
    n = sizes.pop() if len(sizes) == 1 else "n"
    head = ["run", "steps", f"held-out mean@{n}, %", "95 % interval", f"pass@{n}, %", "ever solved", "seconds a step"]
    return {"head": head, "rows": [[label, *_summary_row(metrics[label], evals[label])] for label in metrics]}


def setting_differences(configs: Mapping[str, Config]) -> list[list[str]]:
    """One row per setting that differs between runs: its key, then its value in each run."""
    flat = [flatten(config) for config in configs.values()]
    keys = dict.fromkeys(key for values in flat for key in values)
    return [
        [key, *(str(values.get(key, "–")) for values in flat)]
        for key in keys
        if key not in _NOT_COMPARED and len({str(values.get(key, "–")) for values in flat}) > 1
    ]


def _summary_row(metrics: Rows, evals: Rows) -> list[str]:
    cells = [str(metrics[-1]["step"]) if metrics else "0"]
    if evals:
        first, last = evals[0], evals[-1]
        mean = plots.mean_name(first)
        best = mean.replace("mean", "pass")
        cells += [f"{100 * first[mean]:.1f} → {100 * last[mean]:.1f}"]
        cells += [f"{100 * last[f'{mean}/low']:.1f} to {100 * last[f'{mean}/high']:.1f}"]
        cells += [f"{100 * first[best]:.1f} → {100 * last[best]:.1f}"]
    else:
        cells += ["–"] * 3
    cells.append(f"{metrics[-1]['ever_solved']:.0f}" if metrics and "ever_solved" in metrics[-1] else "–")
    cells.append(f"{fmean(row['seconds/step'] for row in metrics):.2f}" if metrics else "–")
    return cells


def _single(run: RunDirectory, config: Config, metrics: Rows, evals: Rows) -> dict[str, Any]:
    """The parts of the page that exist for one run only."""
    return {
        "description": _describe(config),
        "config_text": run.config_file.read_text(),
        "cards": _cards(metrics, evals) + _best_card(run, config, evals),
        "signal": _signal(run.path / "teacher_signal"),
        "outcomes": _outcomes(metrics, evals),
        "seconds": _mean_seconds(metrics),
        "choices": read_rows(run.choices_file) if run.choices_file.exists() else [],
        "alarm": _alarm(metrics, evals),
        "samples": sample_groups(run),
        "taught": config.teacher.kind != "none",
    }


def _describe(config: Config) -> str:
    """The main settings in one line."""
    uses, peers = method_class(config.method).uses, config.peers
    parts = [f"method {config.method}"]
    if config.teacher.kind != "none":
        parts.append(f"teacher {config.teacher.kind}")
    if "divergence" in uses:
        parts.append(f"{config.divergence.kind} on {config.divergence.support}")
    if "peers" in uses:
        fixed = f"successes {peers.successes}, failures {peers.failures}"
        parts.append(f"peers: {fixed if peers.choose == 'fixed' else 'measured'}")
    return " · ".join([*parts, f"seed {config.seed}"])


def _tried(config: Config, metrics: Rows) -> list[tuple[float, float]]:
    """Problems sampled so far, if the config gives their number."""
    if not metrics or config.data.num_train is None:
        return []
    return plots.problems_tried(metrics[-1]["step"], config.rollout.num_prompts_per_step, config.data.num_train)


def _cards(metrics: Rows, evals: Rows) -> list[tuple[str, str]]:
    """The few numbers at the top of the page: (label, value)."""
    items: list[tuple[str, str]] = []
    if evals:
        first, last = evals[0], evals[-1]
        n = plots.mean_name(first).removeprefix("mean@")
        for name in (name for name in (f"mean@{n}", f"pass@{n}", f"maj@{n}") if name in first):
            change = f"{100 * first[name]:.1f} → {100 * last[name]:.1f} %"
            items.append((f"held-out {name}, step {first['step']} → {last['step']}", change))
    if metrics:
        items.append(("steps done", str(metrics[-1]["step"])))
        if "ever_solved" in metrics[-1]:
            items.append(("training problems solved at least once", f"{metrics[-1]['ever_solved']:.0f}"))
        items.append(("seconds per step", f"{fmean(row['seconds/step'] for row in metrics):.2f}"))
        errors = [row["outcome/verifier_error"] for row in metrics if "outcome/verifier_error" in row]
        if errors:
            items.append(("verifier errors", f"{fmean(errors):.2%}"))
    return items


def _best_card(run: RunDirectory, config: Config, evals: Rows) -> list[tuple[str, str]]:
    """The evaluation whose checkpoint `train.keep_best` keeps."""
    metric = config.train.keep_best
    best = best_saved(run.checkpoints, evals, metric) if metric else None
    return (
        [(f"best checkpoint, by {metric}", f"{best[0].name} · {100 * best[1][metric]:.1f} %")]
        if best and metric
        else []
    )


def _signal(directory: Path) -> dict[str, Any] | None:
    """The result of `mopd analyze teacher-signal`, if the run has one."""
    file = directory / RESULT_FILE
    if not file.is_file():
        return None
    from mopd_nemo.analysis.teacher_signal.output import page_values

    return page_values(file)


def _alarm(metrics: Rows, evals: Rows) -> dict[str, Any] | None:
    """The first step at which the guard found the run ruined, and why."""
    for number, row in enumerate(metrics, start=1):
        if row.get("guard/alarm"):
            known = [evaluation for evaluation in evals if evaluation["step"] < row["step"]]
            return {"step": row["step"], "reasons": signs(metrics[:number], known).reasons}
    last = signs(metrics, evals)
    return {"step": metrics[-1]["step"], "reasons": last.reasons} if metrics and last.alarm else None


def _outcomes(metrics: Rows, evals: Rows) -> dict[str, Any] | None:
    """Share of each outcome: in the first and last quarter of training, and on held-out problems."""
    quarter = max(len(metrics) // 4, 1)
    columns: dict[str, Rows] = {}
    if metrics:
        columns[f"training, {_steps(metrics[:quarter])}"] = metrics[:quarter]
        columns[f"training, {_steps(metrics[-quarter:])}"] = metrics[-quarter:]
    if evals:
        columns[f"held out, step {evals[0]['step']}"] = evals[:1]
        columns[f"held out, step {evals[-1]['step']}"] = evals[-1:]
    if not columns:
        return None
    rows = []
    for outcome in Outcome:
        shares = [[row.get(f"outcome/{outcome}", 0.0) for row in chosen] for chosen in columns.values()]
        rows.append([outcome.replace("_", " "), *(f"{fmean(values):.1%}" for values in shares)])
    return {"head": ["outcome", *columns], "rows": rows}


def _mean_seconds(metrics: Rows) -> dict[str, Any] | None:
    """Phase, mean seconds, share of the step."""
    if not metrics:
        return None
    counted = metrics[WARM_UP_STEPS:] or metrics
    total = fmean(row["seconds/step"] for row in counted)
    means = {phase: fmean(row[f"seconds/{phase}"] for row in counted) for phase in PHASES} | {"step": total}
    rows = [[phase, f"{mean:.3f}", f"{mean / total:.0%}"] for phase, mean in means.items()]
    return {"steps": _steps(counted), "rows": rows}


def _steps(rows: Rows) -> str:
    first, last = rows[0]["step"], rows[-1]["step"]
    return f"step {first}" if first == last else f"steps {first} to {last}"
