"""Write a comparison: compare.md, compare.csv, one PNG a figure, and compare.html, which holds everything."""

from __future__ import annotations

import io
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from mopd_nemo.analysis.compare.figures import figures
from mopd_nemo.analysis.compare.results import WARM_UP_STEPS, Comparison
from mopd_nemo.analysis.compare.table import accuracy_table, markdown, time_table, write_csv

_ACCURACY_NOTE = (
    "Percent. ± is the standard deviation over seeds; the interval is a 95 % bootstrap by problem at the last "
    "evaluation. 'Over all evaluations' is the mean of the curve after the start: high for what learns early and stays."
)
_TIME_NOTE = f"Mean seconds per phase, without the first {WARM_UP_STEPS} steps."


def write_comparison(comparison: Comparison, directory: Path) -> Path:
    """Write all files; the path of the HTML page."""
    directory.mkdir(parents=True, exist_ok=True)
    title = f"{len(comparison.settings)} settings, {sum(len(s.runs) for s in comparison.settings)} runs"
    drawn = figures(comparison)
    for name, figure in drawn.items():
        figure.savefig(directory / f"{name}.png", dpi=150)
    write_csv(comparison, directory / "compare.csv")
    (directory / "compare.md").write_text(render_markdown(comparison), encoding="utf-8")
    environment = Environment(loader=PackageLoader("mopd_nemo.analysis"), autoescape=True, undefined=StrictUndefined)
    page = environment.get_template("compare.html.j2").render(
        title=title,
        warnings=comparison.warnings,
        tables=[
            ("Accuracy", _ACCURACY_NOTE, accuracy_table(comparison)),
            ("Time", _TIME_NOTE, time_table(comparison)),
        ],
        figures=[_svg(figure) for figure in drawn.values()],
        settings=comparison.settings,
    )
    (directory / "compare.html").write_text(page, encoding="utf-8")
    return directory / "compare.html"


def render_markdown(comparison: Comparison) -> str:
    """Both tables with their notes."""
    parts = [f"**{warning}**" for warning in comparison.warnings]
    parts += [markdown(accuracy_table(comparison)), _ACCURACY_NOTE, markdown(time_table(comparison)), _TIME_NOTE]
    return "\n\n".join(parts) + "\n"


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
