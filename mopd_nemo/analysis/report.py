"""report.html: one self-contained page about a run or several, readable offline."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from mopd_nemo.analysis import plots
from mopd_nemo.analysis.answers import cards, cost, describe_method, signed, trained, worked
from mopd_nemo.analysis.findings import findings, in_order
from mopd_nemo.analysis.groups import sample_groups
from mopd_nemo.analysis.page import link_to, svgs, write_page
from mopd_nemo.analysis.records import NOT_COMPARED, Records, Rows, shared_settings
from mopd_nemo.analysis.teacher_signal import RESULT_FILE
from mopd_nemo.config import Config
from mopd_nemo.config.load import flatten
from mopd_nemo.evaluation import has_interval
from mopd_nemo.files import read_rows
from mopd_nemo.run.directory import RunDirectory
from mopd_nemo.run.display import PHASES, WARM_UP_STEPS
from mopd_nemo.types import Outcome


def write_report(runs: Sequence[RunDirectory], output: Path | None = None) -> Path:
    """Write a page about the records of runs; parts without data are left out.

    Several runs share their figures, with a table of results, what they share and what differs in their settings.

    Args:
        output: default: report.html in the run's directory or, of several runs, in the working directory.
    """
    labelled = {label: Records.read(run) for label, run in label_runs(runs).items()}
    if len(labelled) == 1:
        (records,) = labelled.values()
        return _write_single(records, output or records.run.report_file)
    return _write_several(labelled, output or Path("report.html"))


def _write_single(records: Records, output: Path) -> Path:
    run, metrics, evals = records.run, records.metrics, records.evals
    found = findings(records)
    remedies: dict[str, dict[str, None]] = {}
    for finding in found:
        if finding.setting:
            remedies.setdefault(finding.setting, {})[finding.remedy] = None
    return write_page(
        output,
        "report.html.j2",
        name=records.config.name,
        path=run.path,
        shell_path=shlex.quote(str(run.path)),
        recorded=bool(metrics or evals),
        method=describe_method(records),
        worked=worked(records),
        cards=cards(records),
        trained=trained(records),
        cost=cost(records),
        worries=[finding for finding in found if finding.worry],
        in_order=in_order(records),
        remedies={setting: "; ".join(texts) for setting, texts in remedies.items()},
        figures=svgs(run_figures({"": metrics}, {"": evals}, _tried(records.config, metrics))),
        n=plots.mean_name(evals[0]).removeprefix("mean@") if evals else "",
        choices=read_rows(run.choices_file) if run.choices_file.exists() else [],
        signal=_signal(run.path / "teacher_signal"),
        samples=sample_groups(run),
        taught=bool(records.config.teachers) or records.config.teacher.kind != "none",
        outcomes=_outcomes(metrics, evals),
        seconds=_mean_seconds(metrics),
        config_text=run.config_file.read_text(),
    )


def _write_several(labelled: Mapping[str, Records], output: Path) -> Path:
    configs = {label: records.config for label, records in labelled.items()}
    metrics = {label: records.metrics for label, records in labelled.items()}
    evals = {label: records.evals for label, records in labelled.items()}
    return write_page(
        output,
        "overlay.html.j2",
        runs={
            label: {
                "path": records.run.path,
                "link": link_to(records.run.report_file, output),
                "worked": worked(records),
                "worries": [finding for finding in findings(records) if finding.worry],
            }
            for label, records in labelled.items()
        },
        summary=summary_table(labelled),
        differences=setting_differences(configs),
        shared=shared_settings([flatten(config) for config in configs.values()]),
        figures=svgs(run_figures(metrics, evals)),
    )


def label_runs(runs: Sequence[RunDirectory]) -> dict[str, RunDirectory]:
    """Runs by directory name, or by path where names are equal."""
    names = [run.path.resolve().name for run in runs]
    return {name if names.count(name) == 1 else str(run.path): run for name, run in zip(names, runs, strict=True)}


def run_figures(
    metrics: plots.Runs, evals: plots.Runs, tried: Sequence[tuple[float, float]] = ()
) -> list[Figure | None]:
    """The curves of one run or of several. `tried`: see `plots.ever_solved`."""
    several = len(metrics) > 1
    curves = []
    for curve in (*_CURVES, _outcome_curve(metrics)):
        if names := curve.of_several if several else curve.names:
            label = next(iter(names.values()))
            title = f"{curve.title}: {label}" if several and label != curve.title else curve.title
            drawn = plots.curve(metrics, title, curve.unit, names, curve.scale, from_zero=curve.from_zero)
            curves.append(drawn)
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
        "the teacher's log Q − log P",
        "nats, mean over sampled tokens",
        {"teacher/advantage": "the teacher's log Q − log P"},
        {"teacher/advantage": "the teacher's log Q − log P"},
        from_zero=False,
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


def summary_table(labelled: Mapping[str, Records]) -> dict[str, Any]:
    """`head` and `rows`: one row per run."""
    sizes = {plots.mean_name(r.evals[0]).removeprefix("mean@") for r in labelled.values() if r.evals}
    n = sizes.pop() if len(sizes) == 1 else "n"
    head = ["run", "steps", f"held-out mean@{n}, %", "95 % interval", "change, points", f"pass@{n}, %"]
    rows = [[label, *_summary_row(records)] for label, records in labelled.items()]
    return {"head": [*head, "ever solved", "seconds a step"], "rows": rows}


def setting_differences(configs: Mapping[str, Config]) -> list[list[str]]:
    """One row per setting that differs between runs: its key, then its value in each run."""
    flat = [flatten(config) for config in configs.values()]
    keys = dict.fromkeys(key for values in flat for key in values)
    return [
        [key, *(str(values.get(key, "–")) for values in flat)]
        for key in keys
        if key not in NOT_COMPARED and len({str(values.get(key, "–")) for values in flat}) > 1
    ]


def _summary_row(records: Records) -> list[str]:
    metrics, evals = records.metrics, records.evals
    cells = [f"{records.step} of {records.config.train.num_steps}"]
    if evals:
        first, last = evals[0], evals[-1]
        mean = plots.mean_name(first)
        best = mean.replace("mean", "pass")
        change = records.change(first["step"], last["step"]) if first is not last else None
        cells += [f"{100 * first[mean]:.1f} → {100 * last[mean]:.1f}"]
        low, high = last[f"{mean}/low"], last[f"{mean}/high"]
        few = not has_interval(low, high, last.get("num_problems", 0))
        cells += ["too few problems" if few else f"{100 * low:.1f} to {100 * high:.1f}"]
        interval = "–" if change is None else signed(change.mean)
        if change is not None and has_interval(change.low, change.high, change.num_problems):
            interval += f" ({signed(change.low)} to {signed(change.high)})"
        cells += [interval, f"{100 * first[best]:.1f} → {100 * last[best]:.1f}"]
    else:
        cells += ["–"] * 4
    cells.append(f"{metrics[-1]['ever_solved']:.0f}" if metrics and "ever_solved" in metrics[-1] else "–")
    cells.append(f"{fmean(row['seconds/step'] for row in metrics):.2f}" if metrics else "–")
    return cells


def _tried(config: Config, metrics: Rows) -> list[tuple[float, float]]:
    """Problems sampled so far, if the config gives their number."""
    if not metrics or config.data.num_train is None:
        return []
    return plots.problems_tried(metrics[-1]["step"], config.rollout.num_prompts_per_step, config.data.num_train)


def _signal(directory: Path) -> dict[str, Any] | None:
    """The result of `mopd analyze teacher-signal`, if the run has one."""
    file = directory / RESULT_FILE
    if not file.is_file():
        return None
    from mopd_nemo.analysis.teacher_signal.output import page_values

    return page_values(file)


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
