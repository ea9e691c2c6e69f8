"""Figures for reports and papers. Every function takes plain rows or numbers and returns a figure, None without data.

Curves take one run or several: `{label: rows}`.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mopd_nemo.run.display import PHASES

SIZE = (5.2, 3.1)
"""Inches: one column of a two-column page, or half the width of a report."""
INK, SOFT = "#1c2430", "#5b6675"
COLOURS = ("#3a6ea5", "#d9730d", "#3b8750", "#8b5fa3", "#c0392b", "#7a6a53", "#2a9d9f", "#a03a6b")
"""Dark enough for white paper. With `MARKERS` they can be told apart in grey."""
MARKERS = "os^Dvx*P"
LINES = ("-", "--", "-.", ":")

_EQUAL = " = "
"""Between the names of runs that share a curve."""
_CHARACTERS_PER_INCH, _LEGEND_ROW = 14, 0.16
"""Of a legend; the height of a row in inches."""

_numbers = count()
_Value = TypeVar("_Value")

Rows = Sequence[Mapping[str, Any]]
Runs = Mapping[str, Rows]
"""Rows of `metrics.jsonl` or `eval.jsonl`, by the run's label."""


def held_out(runs: Runs) -> Figure | None:
    """mean@n with its 95 % interval over steps; for a single run also pass@n and maj@n."""
    runs = {label: rows for label, rows in runs.items() if rows}
    if not runs:
        return None
    figure, axes = new_axes("held-out problems", "step", "%")
    for number, (label, rows) in enumerate(_equal_as_one(runs, _accuracies).items()):
        mean = mean_name(rows[0])
        n = mean.removeprefix("mean@")
        several = [name for name in (mean, f"pass@{n}", f"maj@{n}") if name in rows[0]]
        names = several if len(runs) == 1 else [mean]
        steps = [row["step"] for row in rows]
        low, high = ([100 * row[f"{mean}/{end}"] for row in rows] for end in ("low", "high"))
        band = "95 % interval of the mean" if len(runs) == 1 else None
        axes.fill_between(steps, low, high, color=COLOURS[number % len(COLOURS)], alpha=0.15, linewidth=0, label=band)
        label = f"{label}, {mean}"
        for offset, name in enumerate(names):
            text = name if len(runs) == 1 else label
            axes.plot(steps, [100 * row[name] for row in rows], label=text, markersize=4, **_style(number + offset))
    axes.set_ylim(0, 103)
    _finish(axes)
    return figure


def curve(
    runs: Runs, title: str, unit: str, names: Mapping[str, str], scale: float = 1.0, *, from_zero: bool = False
) -> Figure | None:
    """Metrics over steps. `names` maps metric names to labels; steps without a metric are skipped.

    With several runs, colour distinguishes them, and line style the metrics; of one metric, both distinguish the runs.
    Runs with equal values are one curve, named after all of them.
    """
    several = len(runs) > 1
    lines: list[tuple[int, int, str, list[tuple[float, float]]]] = []
    for m, (name, text) in enumerate(names.items()):
        points = {run: [(row["step"], scale * row[name]) for row in rows if name in row] for run, rows in runs.items()}
        for run, drawn in _equal_as_one({run: p for run, p in points.items() if p}, tuple).items():
            label = ", ".join(part for part in (run if several else "", text if len(names) > 1 else "") if part)
            lines.append((list(runs).index(run.split(_EQUAL)[0]), m, label or text, drawn))
    if not lines:
        return None
    figure, axes = new_axes(title, "step", unit)
    for r, m, label, points in lines:
        style = {"color": COLOURS[(r if several else m) % len(COLOURS)]}
        style["linestyle"] = LINES[(r if several and len(names) == 1 else m) % len(LINES)]
        marker = "o" if len(points) == 1 else None
        axes.plot(*zip(*points, strict=True), linewidth=1.4, marker=marker, label=label, **style)
    if from_zero:
        highest = max(y for *_, points in lines for _, y in points)
        axes.set_ylim(bottom=0, top=None if highest > 0 else 1)
    _finish(axes, legend=several or len(lines) > 1)
    return figure


def _equal_as_one(values: Mapping[str, _Value], content: Callable[[_Value], Hashable]) -> dict[str, _Value]:
    """Values by label, of equal ones the first, under all of their labels: else one curve would hide the other."""
    labels: dict[Hashable, list[str]] = {}
    for label, value in values.items():
        labels.setdefault(content(value), []).append(label)
    return {_EQUAL.join(equal): values[equal[0]] for equal in labels.values()}


def _accuracies(rows: Rows) -> Hashable:
    mean = mean_name(rows[0])
    return tuple((row["step"], row[mean], row[f"{mean}/low"], row[f"{mean}/high"]) for row in rows)


def ever_solved(runs: Runs, tried: Sequence[tuple[float, float]] = ()) -> Figure | None:
    """Training problems solved at least once so far (the paper's figure 3).

    Args:
        tried: (step, problems sampled at least once so far), drawn as the upper limit; see `problems_tried`.
    """
    title = "training problems solved at least once"
    figure = curve(runs, title, "problems", {"ever_solved": "solved"}, from_zero=True)
    if figure is not None and tried:
        axes = figure.axes[0]
        axes.plot(*zip(*tried, strict=True), color=SOFT, linewidth=1, linestyle=":", label="tried")
        _finish(axes)
    return figure


def problems_tried(last_step: int, per_step: int, total: int) -> list[tuple[float, float]]:
    """The corners of the curve (step, problems sampled so far) of a run that takes its problems in turn."""
    all_tried = total / per_step
    corners = [(1.0, float(per_step))]
    if all_tried < last_step:
        corners.append((all_tried, float(total)))
    return [*corners, (float(last_step), float(min(last_step * per_step, total)))]


def phase_seconds(runs: Runs) -> Figure | None:
    """Time of each phase of a step. One run: stacked over steps. Several: means per run."""
    runs = {label: rows for label, rows in runs.items() if rows}
    if not runs:
        return None
    if len(runs) > 1:
        return _phase_bars(runs)
    (rows,) = runs.values()
    figure, axes = new_axes("time of a step", "step", "seconds")
    steps = [row["step"] for row in rows]
    stacks = [[row[f"seconds/{phase}"] for row in rows] for phase in PHASES]
    if len(rows) == 1:
        return _phase_bars({f"step {steps[0]}": rows})
    axes.stackplot(steps, stacks, labels=PHASES, colors=COLOURS, linewidth=0)
    figure.legend(frameon=False, fontsize=8, ncols=6, loc="outside lower center", handlelength=1, columnspacing=1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0)
    return figure


def _phase_bars(runs: Runs) -> Figure:
    figure, axes = new_axes("mean time of a step", "seconds", "", (5.2, 1.6 + 0.35 * len(runs)))
    left = [0.0] * len(runs)
    for phase, colour in zip(PHASES, COLOURS, strict=False):
        means = [sum(row[f"seconds/{phase}"] for row in rows) / len(rows) for rows in runs.values()]
        axes.barh(list(runs), means, left=left, color=colour, label=phase, height=0.6)
        left = [a + b for a, b in zip(left, means, strict=True)]
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", alpha=0.25)
    figure.legend(frameon=False, fontsize=8, ncols=6, loc="outside lower center", handlelength=1, columnspacing=1)
    return figure


def metric_grid(
    table: Mapping[str, Mapping[str, Any]],
    metrics: Mapping[str, str],
    conditions: Mapping[str, str],
    chance: Mapping[str, float],
    controls: Sequence[str],
    title: str,
) -> Figure | None:
    """One panel per metric, one row per condition: the mean and its 95 % interval.

    Args:
        table: condition -> metric -> `mean`, `low`, `high`.
        metrics: names and titles of the panels.
        conditions: names and labels of the rows.
        chance: by metric, its value without information; a dotted line if it is near the data.
        controls: conditions in a colour of their own.
    """
    if any(table[name][metric]["mean"] is None for name in conditions for metric in metrics):
        return None
    figure = Figure(figsize=(8.6, 5.4), layout="constrained")
    panels = figure.subplots(2, -(-len(metrics) // 2), sharey=True)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    for axes, (metric, text) in zip(panels.flat, metrics.items(), strict=False):
        for row, name in enumerate(conditions):
            cell = table[name][metric]
            colour = COLOURS[1] if name in controls else COLOURS[0]
            axes.plot([cell["low"], cell["high"]], [row, row], color=colour, linewidth=1.6, solid_capstyle="butt")
            axes.plot(cell["mean"], row, "s" if name in controls else "o", color=colour, markersize=4.5)
        style_axes(axes)
        axes.set_title(text, fontsize=9, loc="left")
        axes.grid(visible=False, axis="y")
        axes.grid(axis="x", alpha=0.25)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        low, high = axes.get_xlim()
        level = chance.get(metric, math.nan)
        if low - 0.5 * (high - low) <= level <= high + 0.5 * (high - low):  # a line farther off would squeeze the data
            axes.axvline(level, color=SOFT, linewidth=0.9, linestyle=":")
    panels.flat[0].set_yticks(range(len(conditions)), list(conditions.values()))
    panels.flat[0].invert_yaxis()
    return figure


def bars(
    table: Mapping[str, Mapping[str, Any]], metrics: Mapping[str, str], title: str, columns: int = 3
) -> Figure | None:
    """One panel per metric, one bar per method, with 95 % intervals (the paper's figure 5).

    Args:
        table: method -> metric -> `mean`, `low`, `high`.
        metrics: names and titles of the panels; a metric that no method has is left out.
    """
    shown = {m: text for m, text in metrics.items() if any(row[m]["mean"] is not None for row in table.values())}
    if not shown:
        return None
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(2.7 * columns, 0.5 + 2.1 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    for axes, (metric, text) in zip(panels.flat, shown.items(), strict=False):
        for number, (label, row) in enumerate(table.items()):
            cell = row[metric]
            if cell["mean"] is None:
                continue
            spread = [[cell["mean"] - cell["low"]], [cell["high"] - cell["mean"]]]
            axes.bar(label, cell["mean"], yerr=spread, color=COLOURS[number % len(COLOURS)], width=0.6, capsize=3)
        style_axes(axes)
        axes.set_title(text, fontsize=9, loc="left")
    for axes in panels.flat[len(shown) :]:
        axes.set_visible(False)
    return figure


def mean_name(row: Mapping[str, Any]) -> str:
    """`mean@n` of a row of `eval.jsonl`."""
    return next(name for name in row if name.startswith("mean@") and "/" not in name)


def _style(number: int) -> dict[str, Any]:
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": LINES[number % len(LINES)],
        "marker": MARKERS[number % len(MARKERS)],
    }


def _finish(axes: Axes, legend: bool = True) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if legend:
        legend_below(axes)


def legend_below(axes: Axes) -> None:
    """Name the curves below the axes, where the legend hides none. The figure grows by what that takes."""
    figure = axes.figure
    assert isinstance(figure, Figure)
    for old in figure.legends:
        old.remove()
    handles, names = axes.get_legend_handles_labels()
    longest = max(map(len, names), default=1)
    columns = min(max(int(_CHARACTERS_PER_INCH * figure.get_figwidth()) // (longest + 6), 1), len(names), 4)
    rows = -(-len(names) // max(columns, 1))
    figure.set_figheight(figure.get_figheight() + _LEGEND_ROW * (rows - 1))
    figure.legend(handles, names, frameon=False, fontsize=8, ncols=max(columns, 1), loc="outside lower center")


def new_axes(title: str, x: str, y: str, size: tuple[float, float] = SIZE) -> tuple[Figure, Axes]:
    """One set of axes in the package's style."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10, loc="left", color=INK)
    style_axes(axes, x, y)
    return figure, axes


def style_axes(axes: Axes, x: str = "", y: str = "") -> None:
    """Labels, ticks and grid of the package's style."""
    axes.set_xlabel(x, fontsize=9, color=INK)
    axes.set_ylabel(y, fontsize=9, color=INK)
    axes.tick_params(labelsize=8, colors=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Write `stem`.pdf (with text as text) and `stem`.png (200 dots per inch)."""
    vector, pixels = (stem.with_name(stem.name + suffix) for suffix in (".pdf", ".png"))
    with matplotlib.rc_context({"pdf.fonttype": 42}):
        figure.savefig(vector, metadata={"CreationDate": None})
    figure.savefig(pixels, dpi=200)
    return [vector, pixels]


def to_svg(figure: Figure) -> str:
    """An `<svg>` element for a page. Its ids are unique, because figures share one page."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "mopd"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    prefix = f"f{next(_numbers)}-"
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    return re.sub(r'(href="#|url\(#)', rf"\1{prefix}", text)
