"""Write a comparison: compare.md, compare.csv, each figure as PNG and PDF, and compare.html, which holds everything."""

from __future__ import annotations

from pathlib import Path

from mopd_nemo.analysis import markdown
from mopd_nemo.analysis.compare.figures import figures
from mopd_nemo.analysis.compare.results import WARM_UP_STEPS, Comparison
from mopd_nemo.analysis.compare.table import accuracy_table, time_table, write_csv
from mopd_nemo.analysis.figures import save_figure
from mopd_nemo.analysis.page import svgs, write_page

_ACCURACY_NOTE = (
    "Percent. ± is the standard deviation over seeds; the interval is a 95 % bootstrap by problem at the last "
    "evaluation. 'Over all evaluations' is the mean of the curve after the start: high for what learns early and stays."
)
_TIME_NOTE = f"Mean seconds per phase, without the first {WARM_UP_STEPS} steps."


def write_comparison(comparison: Comparison, directory: Path) -> Path:
    """Write all files; the path of the HTML page."""
    directory.mkdir(parents=True, exist_ok=True)
    drawn = figures(comparison)
    for name, figure in drawn.items():
        if figure is not None:
            save_figure(figure, directory / name)
    write_csv(comparison, directory / "compare.csv")
    (directory / "compare.md").write_text(render_markdown(comparison), encoding="utf-8")
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
    parts += [markdown.table(*accuracy_table(comparison)), _ACCURACY_NOTE]
    parts += [markdown.table(*time_table(comparison)), _TIME_NOTE]
    return "\n\n".join(parts) + "\n"
