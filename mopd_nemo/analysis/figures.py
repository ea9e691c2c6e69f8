"""Figures on disk and in pages: one style, vector and pixels."""

from __future__ import annotations

import io
import re
from itertools import count
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

SIZE = (5.2, 3.1)
"""Inches: one column of a two-column page, or half the width of a report."""
INK, SOFT = "#1c2430", "#5b6675"
COLOURS = ("#3a6ea5", "#d9730d", "#3b8750", "#8b5fa3", "#c0392b", "#7a6a53", "#2a9d9f", "#a03a6b")
"""Dark enough for white paper; with `MARKERS` they stay apart in grey too."""
MARKERS = "os^Dvx*P"
LINES = ("-", "--", "-.", ":")

_numbers = count()


def new_axes(title: str, x: str, y: str, size: tuple[float, float] = SIZE) -> tuple[Figure, Axes]:
    """One set of axes in the house style."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10, loc="left", color=INK)
    style_axes(axes, x, y)
    return figure, axes


def style_axes(axes: Axes, x: str = "", y: str = "") -> None:
    """Labels, ticks and grid of the house style."""
    axes.set_xlabel(x, fontsize=9, color=INK)
    axes.set_ylabel(y, fontsize=9, color=INK)
    axes.tick_params(labelsize=8, colors=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Write `stem`.pdf (text stays text) and `stem`.png (200 dots an inch)."""
    vector, pixels = (stem.with_name(stem.name + suffix) for suffix in (".pdf", ".png"))
    with matplotlib.rc_context({"pdf.fonttype": 42}):
        figure.savefig(vector, metadata={"CreationDate": None})
    figure.savefig(pixels, dpi=200)
    return [vector, pixels]


def to_svg(figure: Figure) -> str:
    """An `<svg>` element for a page. Ids are made unique: figures share one page, and equal ids would mix them up."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "mopd"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    prefix = f"f{next(_numbers)}-"
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    return re.sub(r'(href="#|url\(#)', rf"\1{prefix}", text)
