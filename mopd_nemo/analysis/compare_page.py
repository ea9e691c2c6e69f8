"""Tables, figures and pages of a comparison.

`write_comparison` writes compare.md, compare.csv, each figure as PNG and PDF, and compare.html, which holds everything.
"""

from __future__ import annotations

import csv
from pathlib import Path

from matplotlib.figure import Figure

from mopd_nemo.analysis import plots
from mopd_nemo.analysis.compare import Comparison, rows
from mopd_nemo.analysis.contrasts import interval_cell
from mopd_nemo.analysis.page import link_to, markdown_table, svgs, write_page
from mopd_nemo.analysis.plots import COLOURS, LINES, MARKERS, legend_below, new_axes, save_figure
from mopd_nemo.analysis.records import shared_settings
from mopd_nemo.analysis.statistics import Estimate
from mopd_nemo.files import write_text
from mopd_nemo.run.directory import RunDirectory
from mopd_nemo.run.display import PHASES, WARM_UP_STEPS

_ACCURACY_NOTE = (
    "Percent at the last evaluation, means over seeds; before: at the first one. Whole curve: the mean of all "
    "evaluations after the first, high for what learns early and stays. Ever solved: training problems solved at least "
    "once."
)
_TIME_NOTE = f"Mean seconds per phase, without the first {WARM_UP_STEPS} steps."
Table = tuple[list[str], list[list[str]]]
"""Heading and cells."""


def accuracy_table(comparison: Comparison) -> Table:
    """What each setting reached."""
    n = comparison.num_samples
    heading = ["setting", "seeds", "before", f"mean@{n}", "95 % interval", "whole curve", f"pass@{n}", "ever solved"]
    means = comparison.contrasts.means
    body = [
        [
            *(row.setting, str(row.seeds), _percent(row.before), _percent(row.mean)),
            *(interval_cell(means[row.setting]), _percent(row.all_evaluations)),
            *(_percent(row.best), f"{row.ever_solved:.0f}"),
        ]
        for row in rows(comparison)
    ]
    return heading, body


def time_table(comparison: Comparison) -> Table:
    """Seconds per phase and step."""
    columns = (*PHASES, "step")
    heading = ["setting", *columns, "over baseline"]
    body = [
        [row.setting, *(f"{row.seconds[name]:.2f}" for name in columns), f"{100 * row.over_baseline:+.1f} %"]
        for row in rows(comparison)
    ]
    return heading, body


def sections(comparison: Comparison) -> list[tuple[str, str, Table]]:
    """Title, note and table of each part of the page."""
    contrasts = comparison.contrasts
    parts = [("Accuracy", _ACCURACY_NOTE, accuracy_table(comparison))]
    if contrasts.against_baseline:
        title = f"mean@{comparison.num_samples} {contrasts.title}"
        parts.append((title, contrasts.note.replace("**", ""), contrasts.table()))
    return [*parts, (f"Time; baseline: {comparison.baseline.label}", _TIME_NOTE, time_table(comparison))]


def write_csv(comparison: Comparison, file: Path) -> None:
    """Every number, unrounded; a cell is empty where nothing can be said."""
    n = comparison.num_samples
    contrasts = comparison.contrasts
    against = {contrast.setting: contrast for contrast in contrasts.against_baseline}
    table = []
    for row in rows(comparison):
        flat: dict[str, float | str | None] = {"setting": row.setting, "seeds": row.seeds}
        flat |= {f"mean@{n}/before": row.before, f"mean@{n}": row.mean, f"mean@{n}/std": row.std}
        flat |= _bounds(f"mean@{n}", contrasts.means[row.setting])
        flat |= {f"pass@{n}": row.best, f"pass@{n}/std": row.best_std}
        flat |= {f"mean@{n}/all_evaluations": row.all_evaluations, "ever_solved": row.ever_solved}
        contrast = against.get(row.setting)
        flat |= {"minus_baseline": contrast.mean if contrast else None}
        flat |= _bounds("minus_baseline", contrast.estimate if contrast else None)
        known = contrast if contrast and contrast.estimate else None
        flat |= {
            "p_holm": known.p if known else None,
            "p_equivalent_holm": known.p_equivalent if known else None,
            "detectable": known.detectable if known else None,
            "reading": contrast.reading(contrasts.margin) if contrast else None,
        }
        flat |= {f"seconds/{phase}": seconds for phase, seconds in row.seconds.items()}
        flat["step_time_over_baseline"] = row.over_baseline
        table.append(flat)
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, fieldnames=list(table[0]))
        writer.writeheader()
        writer.writerows(table)


def _bounds(name: str, estimate: Estimate | None) -> dict[str, float | None]:
    low, high = estimate.interval() if estimate else (None, None)
    return {f"{name}/low": low, f"{name}/high": high}


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
    figure, axes = new_axes(f"{title}\nmean over seeds, band: one standard deviation", "step", unit)
    for number, setting in enumerate(comparison.settings):
        points = setting.curve(metric, kind)
        steps = [step for step, _, _ in points]
        means = [scale * mean for _, mean, _ in points]
        low, high = ([scale * (mean + sign * std) for _, mean, std in points] for sign in (-1, 1))
        colour = COLOURS[number % len(COLOURS)]
        marker = MARKERS[number % len(MARKERS)] if kind == "evals" else None
        line = LINES[number % len(LINES)]
        label = f"{setting.label} ({len(setting.runs)} seed{'s' * (len(setting.runs) > 1)})"
        axes.plot(steps, means, line, color=colour, marker=marker, markersize=4, linewidth=1.5, label=label)
        axes.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)
    legend_below(axes)
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
        tables=sections(comparison),
        figures=svgs(drawn.values()),
        runs=[
            {
                "setting": setting.label,
                "seed": run.seed,
                "steps": len(run.metrics),
                "path": run.path,
                "link": link_to(RunDirectory(run.path).report_file, directory / "compare.html"),
            }
            for setting in comparison.settings
            for run in setting.runs
        ],
        shared=shared_settings([run.config for setting in comparison.settings for run in setting.runs]),
    )


def render_markdown(comparison: Comparison) -> str:
    """All tables with their notes."""
    parts = [f"**{warning}**" for warning in comparison.warnings]
    for title, note, table in sections(comparison):
        parts += [f"## {title}", markdown_table(*table), note]
    return "\n\n".join(parts) + "\n"
