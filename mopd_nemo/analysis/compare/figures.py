"""Curves of several settings: mean over seeds with a band of one standard deviation."""

from __future__ import annotations

from matplotlib.figure import Figure

from mopd_nemo.analysis.compare.results import Comparison
from mopd_nemo.run.phases import PHASES

_COLOURS = (
    "#4c78a8",
    "#f58518",
    "#54a24b",
    "#e45756",
    "#b279a2",
    "#9d755d",
    "#72b7b2",
    "#ff9da6",
    "#eeca3b",
    "#79706e",
)
_MARKERS = "os^Dv*PXph"


def figures(comparison: Comparison) -> dict[str, Figure]:
    """Figures by file name."""
    n = comparison.num_samples
    return {
        "held_out": _curves(comparison, f"mean@{n}", "evals", f"held-out mean@{n}", "%", 100.0),
        "training_success": _curves(comparison, "success_rate", "metrics", "success of training rollouts", "%", 100.0),
        "ever_solved": _curves(
            comparison, "ever_solved", "metrics", "training problems solved at least once", "problems", 1.0
        ),
        "seconds": _phases(comparison),
    }


def _curves(comparison: Comparison, metric: str, kind: str, title: str, unit: str, scale: float) -> Figure:
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for position, setting in enumerate(comparison.settings):
        points = setting.curve(metric, kind)
        steps = [step for step, _, _ in points]
        means = [scale * mean for _, mean, _ in points]
        deviations = [scale * deviation for _, _, deviation in points]
        colour = _COLOURS[position % len(_COLOURS)]
        marker = _MARKERS[position % len(_MARKERS)] if kind == "evals" else None
        axes.plot(steps, means, color=colour, marker=marker, markersize=4, linewidth=1.5, label=setting.label)
        low = [mean - deviation for mean, deviation in zip(means, deviations, strict=True)]
        high = [mean + deviation for mean, deviation in zip(means, deviations, strict=True)]
        axes.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.set_title(f"{title} (mean over seeds, band: one standard deviation)", fontsize=10, loc="left")
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    figure.legend(frameon=False, fontsize=8, ncols=3, loc="outside lower center")
    return figure


def _phases(comparison: Comparison) -> Figure:
    """Seconds per step of each setting, stacked by phase."""
    height = 1.2 + 0.36 * len(comparison.settings)
    figure = Figure(figsize=(7.2, height), layout="constrained")
    axes = figure.add_subplot()
    labels = [setting.label for setting in comparison.settings]
    left = [0.0] * len(labels)
    for phase, colour in zip(PHASES, _COLOURS, strict=False):
        seconds = [setting.seconds()[phase] for setting in comparison.settings]
        axes.barh(labels, seconds, left=left, color=colour, label=phase)
        left = [start + length for start, length in zip(left, seconds, strict=True)]
    axes.invert_yaxis()
    axes.set_title("seconds per step", fontsize=10, loc="left")
    axes.set_xlabel("seconds")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=8, ncols=len(PHASES), loc="outside lower center")
    return figure
