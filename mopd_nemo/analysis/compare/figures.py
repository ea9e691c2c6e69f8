"""Curves of several settings: mean over seeds with a band of one standard deviation."""

from __future__ import annotations

from matplotlib.figure import Figure

from mopd_nemo.analysis import plots
from mopd_nemo.analysis.compare.results import WARM_UP_STEPS, Comparison
from mopd_nemo.analysis.figures import COLOURS, LINES, MARKERS, new_axes

_SIZE = (7.2, 4.2)
_LEGEND_CHARACTERS = 100
"""That fit beside each other below the axes."""


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
