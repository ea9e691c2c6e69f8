"""Self-contained HTML pages from templates, and tables in Markdown."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from mopd_nemo.analysis.plots import to_svg
from mopd_nemo.files import write_text


def write_page(path: Path, template: str, /, **values: Any) -> Path:
    """Render a template of `analysis/templates` and replace `path` by it."""
    environment = Environment(
        loader=PackageLoader("mopd_nemo.analysis"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["coded"] = coded
    page = environment.get_template(template).render(**values)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)
    return path


def coded(text: str) -> Markup:
    """Text in which `what stands in backticks` is code; the rest is escaped."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def link_to(target: Path, page: Path) -> str | None:
    """Address of a file for a link on `page`, relative so that both can move together; None: it is not there."""
    if not target.is_file():
        return None
    return quote(os.path.relpath(target.resolve(), page.resolve().parent))


def svgs(figures: Iterable[Figure | None]) -> list[str]:
    """The figures that are not None, as `<svg>` elements."""
    return [to_svg(figure) for figure in figures if figure is not None]


def markdown_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
