"""The result of a preflight as files: JSON for programs, a page for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from mopd_nemo.analysis.page import svgs, write_page
from mopd_nemo.analysis.plots import metric_grid
from mopd_nemo.config import PeersConfig
from mopd_nemo.files import write_json, write_text
from mopd_nemo.preflight.contexts import PLAIN, settings_of
from mopd_nemo.preflight.measure import Row
from mopd_nemo.preflight.rule import Recommendation, points

HEAD = ("context", "right, %", "gain", "entropy", "AUC", "nats", "whole", "s/step")
LEGEND = {
    "right": "share of what it writes that the verifier accepts",
    "gain": "the same minus that without peers, problem by problem, in points",
    "entropy": "of what it writes, nats a token",
    "AUC": "chance that a success among the rollouts scores above a failure",
    "nats": "how much further the context lifts successes than failures",
    "whole": "targets that read all of it",
    "s/step": "teacher seconds a step, estimated",
}
_PANELS = {
    "right": "right after it, %",
    "entropy": "entropy of what it writes, nats a token",
    "unfinished": "cut at the limit, %",
    "auc": "success AUC of rollouts",
    "nats": "successes lifted above failures, nats",
    "complete": "targets with the whole context, %",
}
_PERCENT = ("right", "unfinished", "complete")
_SHOWN_ANSWERS = 4


def write_result(
    figures: Mapping[str, Any],
    recommendation: Recommendation,
    settings: str,
    rows: Mapping[tuple[str, str], Row],
    about: Mapping[str, str],
    directory: Path,
) -> list[Path]:
    """Write `preflight.html`, `preflight.json` and the recommended `settings.yaml`; their paths.

    Args:
        settings: what `settings_text` makes of the recommendation.
        about: what was measured, for a line under the title.
    """
    result = {"about": dict(about), **figures, "recommendation": asdict(recommendation)}
    write_json(directory / "preflight.json", result)
    write_text(directory / "settings.yaml", f"# {recommendation.sentences[0]}\n{settings or '{}'}\n")
    page = write_page(
        directory / "preflight.html",
        "preflight.html.j2",
        about=about,
        figures=figures,
        recommendation=recommendation,
        settings=settings,
        head=HEAD,
        body=table(figures),
        plots=svgs([_grid(figures["contexts"])]),
        legend=LEGEND,
        example=_example(figures, rows),
    )
    return [page, directory / "preflight.json", directory / "settings.yaml"]


def settings_text(recommendation: Recommendation, peers: PeersConfig) -> str:
    """What to change in a config with these peers, as YAML to paste; empty if nothing is recommended."""
    if recommendation.context is None:
        return ""
    settings = settings_of(recommendation.context, peers)
    return "\n".join(["peers:", *(f"  {name}: {value}" for name, value in settings.items())])


def table(figures: Mapping[str, Any]) -> list[list[str]]:
    """One row a context, cells as text under `HEAD`."""
    return [_row(name, cells) for name, cells in figures["contexts"].items()]


def _row(name: str, cells: Mapping[str, Any]) -> list[str]:
    row = ["no peers" if name == PLAIN else name, points(cells["right"], sign="")]
    row += [points(cells["gap"]) if "gap" in cells else ""]
    row += [_number(cells["entropy"], ".2f"), _number(cells["auc"], ".2f")]
    if name == PLAIN:
        return [*row, "", "", ""]
    seconds = cells["teacher_seconds"]
    cost = "–" if seconds is None else f"{seconds:.2g}" if seconds < 10 else f"{seconds:.0f}"
    return [*row, _number(cells["nats"], "+.1f"), f"{cells['complete']:.0%}", cost]


def _number(cell: Mapping[str, float | None], form: str) -> str:
    return "–" if cell["mean"] is None else format(cell["mean"], form)


def _grid(contexts: Mapping[str, Any]) -> Any:
    """A panel a measure, a row a context. What is missing for a context (no peers have no reach) is left out."""
    panels: dict[str, dict[str, Any]] = {}
    for name, cells in contexts.items():
        panels[name] = {}
        for measure in _PANELS:
            value = cells.get(measure, {"mean": None})
            if not isinstance(value, Mapping):
                value = {"mean": value, "low": value, "high": value}
            scale = 100 if measure in _PERCENT else 1
            ends = ("mean", "low", "high")
            panels[name][measure] = {e: None if value.get(e) is None else scale * value[e] for e in ends}
    plain = panels[PLAIN]
    level = {measure: cell["mean"] for measure, cell in plain.items() if cell["mean"] is not None}
    shown = {name: panels[name] for name in panels if name != PLAIN}
    known = {m: text for m, text in _PANELS.items() if all(cells[m]["mean"] is not None for cells in shown.values())}
    return metric_grid(shown, known, {name: name for name in shown}, level | {"nats": 0.0}, (), "")


def _example(figures: Mapping[str, Any], rows: Mapping[tuple[str, str], Row]) -> dict[str, Any] | None:
    """The problem where the contexts differ most: what was read and what was written after it."""
    names = list(figures["contexts"])
    problems = list(dict.fromkeys(problem for problem, _ in rows))
    if not problems:
        return None

    def right(problem: str, name: str) -> float:
        return fmean(bool(success) for success in rows[problem, name]["success"])

    spread = {p: max(right(p, n) for n in names) - min(right(p, n) for n in names) for p in problems}
    problem = max(problems, key=lambda p: spread[p])
    return {
        "problem": problem,
        "contexts": [
            {
                "name": figures["contexts"][name]["label"],
                "prompt": rows[problem, name]["prompt"],
                "right": sum(bool(success) for success in rows[problem, name]["success"]),
                "num": len(rows[problem, name]["success"]),
                "answers": _answers(rows[problem, name]),
            }
            for name in names
        ],
    }


def _answers(row: Row) -> Sequence[tuple[str, bool]]:
    return list(zip(row["texts"], [bool(s) for s in row["success"]], strict=True))[:_SHOWN_ANSWERS]
