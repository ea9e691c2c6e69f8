"""The result of a branch analysis as files: JSON for programs, Markdown and figures for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mopd_nemo.analysis.branches.figures import COLUMNS, MEASURES, POINTS
from mopd_nemo.analysis.page import markdown_table
from mopd_nemo.analysis.plots import COLOURS, LINES, SOFT, metric_grid, save_figure, style_axes
from mopd_nemo.evaluation import has_interval
from mopd_nemo.files import write_json, write_text

KINDS = {
    "tokens": "Where the tokens leave those of all successes",
    "parts": "Where the first statement or sentence begins that no success has",
}
SAID = {"log_ratio": "|log Q - log P|", "divergence": "divergence"}
HEADINGS = {
    "near": "near the point",
    "shuffled": "shuffled",
    "elsewhere": "where other failures branch",
    "in_successes": "same place of successes",
    "surprise": "student's surprise",
}
DIFFERENCES = {
    "minus_shuffled": "minus shuffled",
    "minus_elsewhere": "minus where other failures branch",
    "minus_in_successes": "minus same place of successes",
    "minus_surprise": "minus student's surprise",
    "minus_control": "minus peers of other problems",
    "successes_minus_shuffled": "successes at points of their own, minus shuffled",
}
SET_NOTES = {
    "common": "The same failures in every context: those for which each context has all its peers and says something.",
    "own": "Each context on the failures for which it has all its peers. Contexts are not comparable.",
}
NOTES = (
    "*near the point*: share of the sum over a response that lies within the radius of the point.",
    *(f"*{HEADINGS[name]}*: {text}." for name, text in COLUMNS.items() if name != "near"),
    "Differences are taken failure by failure. Means are over problems of means over their failures, with the 95 % "
    "interval of a bootstrap by problem in brackets. *Successes at points of their own* leave all other successes of "
    "their group there.",
)


def write_result(result: Mapping[str, Any], directory: Path) -> list[Path]:
    """Write Markdown, figures and JSON; returns their paths, those for people first."""
    markdown = directory / "branches.md"
    write_text(markdown, to_markdown(result))
    written = [markdown]
    for kind in POINTS:
        figures = {"profile": profile_figure(result, kind), "near": near_figure(result, kind)}
        for name, figure in figures.items():
            written += save_figure(figure, directory / f"branches_{name}_{kind}") if figure is not None else []
    write_json(directory / "branches.json", result)
    return [*written, directory / "branches.json"]


def to_markdown(result: Mapping[str, Any]) -> str:
    """All tables, each with an explanation."""
    labels = result["labels"]
    about = ", ".join(f"{name} {value}" for name, value in result["about"].items())
    parts = ["# Where the teacher objects", f"{about}.", " ".join(NOTES)]
    for kind in POINTS:
        parts += [f"## {KINDS[kind]}", _facts(result["points"][kind])]
        parts += [reason] if (reason := left_out(result, kind)) else []
        for chosen, note in SET_NOTES.items():
            parts.append(note)
            for measure in MEASURES:
                for radius, sets in result["near"][kind][measure].items():
                    title = f"{SAID[measure]}, within ±{radius} tokens"
                    parts += [
                        f"**{title}**",
                        _table(sets[chosen], labels, HEADINGS),
                        _table(sets[chosen], labels, DIFFERENCES, "+"),
                    ]
        parts += [
            "log Q - log P of the token at the point, nats; *mean size* is over all tokens.",
            _at_point(result, kind),
        ]
    return "\n\n".join(parts) + "\n"


def main_table(result: Mapping[str, Any], kind: str) -> tuple[str, list[str], list[list[str]]]:
    """Title, heading and means of |log Q - log P| for the terminal."""
    radius, sets = next(iter(result["near"][kind]["log_ratio"].items()))
    facts = result["points"][kind]
    title = f"{KINDS[kind]}: share of {SAID['log_ratio']} within ±{radius} tokens, {facts['common']} failures, means"
    body = [
        [result["labels"][name], *("–" if cells[c]["mean"] is None else f"{cells[c]['mean']:.3f}" for c in COLUMNS)]
        for name, cells in sets["common"].items()
    ]
    return title, ["", *HEADINGS.values()], body


def left_out(result: Mapping[str, Any], kind: str) -> str:
    """What is not compared, and why; empty: every context is, on some failures."""
    facts = result["points"][kind]
    silent = [result["labels"][name] for name in result["controls"] if name not in result["speaking"]]
    said = f"Nobody has all the peers of {' or '.join(silent)}, or its teacher says nothing there." if silent else ""
    if facts["common"]:
        return said
    if not facts["with_point"]:
        return f"None of the {facts['failures']} failures has such a point, so there is nothing to compare."
    _, sets = next(iter(result["near"][kind]["log_ratio"].items()))
    counts = {result["labels"][name]: cells["failures"] for name, cells in sets["own"].items()}
    told = ", ".join(f"{label} {count}" for label, count in sorted(counts.items(), key=lambda item: item[1])[:3])
    rarest = f" Of {facts['with_point']} failures have a signal: {told}." if told else ""
    return (
        f"No failure has all the peers of every context, so contexts cannot be compared.{rarest} {said} Leave the rare "
        "ones out with --contexts, or give rollouts of larger groups."
    ).replace("  ", " ")


def _facts(facts: Mapping[str, Any]) -> str:
    def quartiles(name: str, digits: int = 0) -> str:
        low, middle, high = facts["quartiles"][name]
        return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"

    text = (
        f"{facts['with_point']} of {facts['failures']} failures have such a point, {facts['at_first_token']} at their "
        f"first token and {facts['at_last_token']} at their last; {facts['common']} have a signal in every context."
    )
    if facts["with_point"]:
        text += f" Median (quartiles): token {quartiles('token')} of {quartiles('length')}, "
        text += f"{quartiles('place', 2)} of the way."
    return text


def _table(sets: Mapping[str, Any], labels: Mapping[str, str], columns: Mapping[str, str], sign: str = "") -> str:
    head = ["the teacher reads", *columns.values(), "problems", "failures"]
    body = [
        [
            labels[name],
            *(_value(cells.get(column), sign) for column in columns),
            str(cells["near"]["problems"]),
            str(cells["failures"]),
        ]
        for name, cells in sets.items()
    ]
    return markdown_table(head, body)


def _at_point(result: Mapping[str, Any], kind: str) -> str:
    body = [
        [
            result["labels"][name],
            *(_value(cells[side], "+") for side in ("failures", "successes")),
            _value(cells["mean_size"]),
        ]
        for name, cells in result["at_point"][kind].items()
    ]
    return markdown_table(["the teacher reads", "failures", "successes at points of their own", "mean size"], body)


def _value(cell: Mapping[str, Any] | None, sign: str = "") -> str:
    if cell is None or cell["mean"] is None:
        return "–"
    if not has_interval(cell["low"], cell["high"], cell["problems"]):
        return f"{cell['mean']:{sign}.3f} (too few problems)"
    return f"{cell['mean']:{sign}.3f} ({cell['low']:{sign}.3f} to {cell['high']:{sign}.3f})"


def profile_figure(result: Mapping[str, Any], kind: str) -> Figure | None:
    """Both measures by distance from the point, as multiples of a response's own mean; a line for each context."""
    shown = [name for name in result["speaking"] if name not in result["controls"].values()]
    shown += [name for name in result["controls"].values() if name in result["speaking"]][-1:]
    if not shown or not result["points"][kind]["common"]:
        return None
    figure = Figure(figsize=(8.6, 3.6), layout="constrained")
    for axes, measure in zip(figure.subplots(1, 2), MEASURES, strict=True):
        profiles = result["profile"][kind][measure]
        for number, name in enumerate(shown):
            style = {"color": COLOURS[number % len(COLOURS)], "linestyle": LINES[number % len(LINES)]}
            _line(axes, profiles[name], result["labels"][name], band=number == 0, **style)
        if measure == "log_ratio":
            _line(axes, profiles["surprise"], "student's surprise", color="black", linestyle=":")
        axes.axhline(1.0, color=SOFT, linewidth=0.9, linestyle=":")
        style_axes(axes, "tokens from the point", "multiple of the response's mean")
        axes.set_title(SAID[measure], fontsize=9, loc="left")
    figure.suptitle(KINDS[kind], fontsize=10, x=0.01, ha="left")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, ncols=4, loc="outside lower center")
    return figure


def _line(axes: Any, profile: Sequence[Mapping[str, Any]], label: str, band: bool = False, **style: Any) -> None:
    points = [point for point in profile if point["mean"] is not None]
    distances = [point["distance"] for point in points]
    axes.plot(distances, [point["mean"] for point in points], linewidth=1.4, label=label, **style)
    if band:
        low, high = ([point[end] for point in points] for end in ("low", "high"))
        axes.fill_between(distances, low, high, color=style["color"], alpha=0.15, linewidth=0)


def near_figure(result: Mapping[str, Any], kind: str) -> Figure | None:
    """Every context's share near the point, and its differences, at the first radius."""
    radius, sets = next(iter(result["near"][kind]["log_ratio"].items()))
    metrics = {"near": HEADINGS["near"], **{n: t for n, t in DIFFERENCES.items() if n != "minus_control"}}
    labels = {name: result["labels"][name] for name in sets["common"]}
    controls = [name for name in labels if name in result["controls"].values()]
    chance = dict.fromkeys((name for name in metrics if name != "near"), 0.0)
    title = f"{KINDS[kind]}: share of {SAID['log_ratio']} within ±{radius} tokens"
    return metric_grid(sets["common"], metrics, labels, chance, controls, title) if labels else None
