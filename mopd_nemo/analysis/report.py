"""report.html: one self-contained page about a run, or one that lays several runs over each other; readable offline."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from mopd_nemo.analysis import plots
from mopd_nemo.analysis.figures import to_svg
from mopd_nemo.analysis.overlay import label_runs, setting_differences, summary_table
from mopd_nemo.analysis.page import svgs, write_page
from mopd_nemo.config import Config
from mopd_nemo.config_methods import METHODS
from mopd_nemo.files import read_rows
from mopd_nemo.run.directory import RunDirectory
from mopd_nemo.run.display import PHASES
from mopd_nemo.run.rollouts import num_successes, teacher_prompts
from mopd_nemo.types import Outcome

_SHOWN_GROUPS = 6
_WARM_UP = 5
"""Steps left out of mean times when there are more: first steps pay for loading (paper appendix E)."""

Rows = Sequence[Mapping[str, Any]]


def write_report(run: RunDirectory, output: Path | None = None) -> Path:
    """Write the report of a run from what it has recorded so far; parts without data are left out."""
    metrics, evals = read_metrics(run)
    recorded = list(run.rollout_files().values())
    config = run.read_config()
    return write_page(
        output or run.report_file,
        "report.html.j2",
        name=config.name,
        description=_describe(config),
        config_text=run.config_file.read_text(),
        cards=_cards(metrics, evals),
        figures=svgs(run_figures({config.name: metrics}, {config.name: evals}, _tried(config, metrics))),
        signal=_signal(run.path / "teacher_signal"),
        outcomes=_outcomes(metrics, evals),
        seconds=_mean_seconds(metrics),
        groups=_sample_groups(read_rows(recorded[-1])) if recorded else [],
        run_path=run.path,
    )


def write_overlay(runs: Sequence[RunDirectory], output: Path) -> Path:
    """Write one page about several runs: a table, what differs in their settings, and their curves overlaid."""
    labelled = label_runs(runs)
    recorded = {label: read_metrics(run) for label, run in labelled.items()}
    metrics = {label: rows for label, (rows, _) in recorded.items()}
    evals = {label: rows for label, (_, rows) in recorded.items()}
    return write_page(
        output,
        "overlay.html.j2",
        names=list(labelled),
        summary=summary_table(metrics, evals),
        differences=setting_differences({label: run.read_config() for label, run in labelled.items()}),
        figures=svgs(run_figures(metrics, evals)),
        paths=[(label, run.path) for label, run in labelled.items()],
    )


def read_metrics(run: RunDirectory) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of metrics.jsonl and of eval.jsonl; none where a file is missing."""
    files = (run.metrics_file, run.eval_file)
    metrics, evals = (read_rows(file) if file.exists() else [] for file in files)
    return metrics, evals


def run_figures(
    metrics: plots.Runs, evals: plots.Runs, tried: Sequence[tuple[float, float]] = ()
) -> list[Figure | None]:
    """The curves of one run or of several. `tried`: see `plots.ever_solved`."""
    every = [row for rows in metrics.values() for row in rows]
    outcomes = sorted({name for row in every for name in row if name.startswith("outcome/") and row[name] > 0})
    alone = len(metrics) == 1
    shares = {"success_rate": "success", "signal": "with teacher signal"} if alone else {"success_rate": "success"}
    groups = {"group/all_failed": "all failed", "group/lone_success": "one success", "group/all_succeeded": "all right"}
    lengths = {"response/tokens": "response", "context/tokens": "teacher prompt"}
    return [
        plots.held_out(evals),
        plots.curve(metrics, "training rollouts", "% of rollouts", shares, 100),
        plots.ever_solved(metrics, tried),
        plots.curve(metrics, "loss", "the method's objective", {"loss": "loss"}),
        plots.curve(
            metrics,
            "entropy",
            "nats per token",
            {"student/entropy": "student", "teacher/entropy": "teacher"} if alone else {"student/entropy": "student"},
            from_zero=True,
        ),
        plots.curve(
            metrics,
            "groups",
            "% of groups",
            groups if alone else {"group/all_failed": "all failed"},
            100,
            from_zero=True,
        ),
        plots.curve(
            metrics,
            "outcomes",
            "% of rollouts",
            {name: name.removeprefix("outcome/").replace("_", " ") for name in outcomes},
            100,
            from_zero=True,
        )
        if alone
        else None,
        plots.curve(metrics, "length", "tokens", lengths if alone else {"response/tokens": "response"}, from_zero=True),
        plots.curve(metrics, "gradient norm", "before clipping", {"grad_norm": "norm"}, from_zero=True),
        plots.phase_seconds(metrics),
    ]


def _describe(config: Config) -> str:
    """What the method makes of the settings, in a line."""
    uses, peers = METHODS[config.method].uses, config.peers
    parts = [f"method {config.method}"]
    if config.teacher.kind != "none":
        parts.append(f"teacher {config.teacher.kind}")
    if "divergence" in uses:
        parts.append(f"{config.divergence.kind} on {config.divergence.support}")
    if "peers" in uses:
        parts.append(f"peers: successes {peers.successes}, failures {peers.failures}")
    return " · ".join([*parts, f"seed {config.seed}"])


def _tried(config: Config, metrics: Rows) -> list[tuple[float, float]]:
    """Problems sampled so far, where the config says how many there are."""
    if not metrics or config.data.num_train is None:
        return []
    return plots.problems_tried(metrics[-1]["step"], config.rollout.num_prompts_per_step, config.data.num_train)


def _cards(metrics: Rows, evals: Rows) -> list[tuple[str, str]]:
    """The few numbers that stand on top: (label, value)."""
    items: list[tuple[str, str]] = []
    if evals:
        first, last = evals[0], evals[-1]
        n = plots.mean_name(first).removeprefix("mean@")
        for name in (f"mean@{n}", f"pass@{n}", f"maj@{n}"):
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


def _signal(directory: Path) -> dict[str, Any] | None:
    """The teacher-signal result of a run, if `mopd analyze teacher-signal` has been there."""
    from mopd_nemo.analysis.teacher_signal import metrics as names
    from mopd_nemo.analysis.teacher_signal import output
    from mopd_nemo.analysis.teacher_signal.conditions import CONDITIONS, CONTROLS, LABELS

    file = directory / output.RESULT_FILE
    if not file.is_file():
        return None
    result = json.loads(file.read_text())
    figure = plots.metric_grid(result["common"], names.LABELS, LABELS, names.CHANCE, CONTROLS, "")
    return {
        "result": result,
        "readings": output.READINGS,
        "headings": output.HEADINGS,
        "explanations": output.EXPLANATIONS,
        "metrics": names.LABELS,
        "conditions": LABELS,
        "first_control": CONTROLS[0],
        "best": output.best_cells(result, CONDITIONS),
        "figure": to_svg(figure) if figure else None,
    }


def _outcomes(metrics: Rows, evals: Rows) -> dict[str, Any] | None:
    """Share of each outcome: in training at first and at last, and on held-out problems."""
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
    counted = metrics[_WARM_UP:] or metrics
    total = fmean(row["seconds/step"] for row in counted)
    means = {phase: fmean(row[f"seconds/{phase}"] for row in counted) for phase in PHASES} | {"step": total}
    rows = [[phase, f"{mean:.3f}", f"{mean / total:.0%}"] for phase, mean in means.items()]
    return {"steps": _steps(counted), "rows": rows}


def _steps(rows: Rows) -> str:
    first, last = rows[0]["step"], rows[-1]["step"]
    return f"step {first}" if first == last else f"steps {first} to {last}"


def _sample_groups(rows: Rows) -> list[dict[str, Any]]:
    """Some groups of a step: those where successes and failures meet come first, they show the most."""
    groups = [list(members) for _, members in groupby(rows, key=lambda row: row["problem"])]
    groups.sort(key=lambda group: abs(fmean(row["reward"] for row in group) - 0.5))
    return [
        {
            "rows": group,
            "num_correct": num_successes(group),
            "contexts": teacher_prompts(group),
        }
        for group in groups[:_SHOWN_GROUPS]
    ]
