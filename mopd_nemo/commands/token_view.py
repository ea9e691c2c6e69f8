"""Responses token by token in a terminal: coloured text, bars below it, and where the teacher objects most.

Text of models reaches the terminal without escape sequences, and is never read as markup.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from rich.cells import cell_len, chop_cells
from rich.console import Console
from rich.text import Text

from mopd_nemo.analysis.tokens import Column, TokenView, legend, level, objections, one_line
from mopd_nemo.commands import print_table
from mopd_nemo.terminal import plain, visible

_STYLES = {
    -4: "color(231) on color(130)",
    -3: "color(16) on color(208)",
    -2: "color(16) on color(222)",
    -1: "color(16) on color(230)",
    1: "color(16) on color(195)",
    2: "color(16) on color(153)",
    3: "color(16) on color(74)",
    4: "color(231) on color(25)",
}
"""Oranges where the teacher objects, blues where it agrees, as on the page."""
_BARS = " ▁▂▃▄▅▆▇█"
_OBJECTIONS = 5
_TOKEN_CELLS = 18
"""Room for one token in a table."""


def show_tokens(views: Sequence[TokenView], names: Mapping[int, str], console: Console) -> None:
    """Print responses with all their columns, one below the other.

    Args:
        names: of the tokens that student or teacher would rather have written.
    """
    if console.color_system is not None:
        console.print(_legend(), soft_wrap=False)
    for view in views:
        for column in view.columns:
            console.print()
            heading = f"rollout {view.row['rollout']}, {view.row['outcome']}: {column.label} {column.note}"
            console.print(plain(heading.rstrip(), "bold"))
            for line in _lines(view, column, console.width):
                console.print(line, no_wrap=True, overflow="crop")
            console.print(Text(f"bars: divergence, 0 to {view.highest:.3g} nats", style="dim"))
            _print_objections(view, column, names, console)


def summarise_tokens(views: Sequence[TokenView], console: Console) -> None:
    """Print one line for each rollout and column."""
    rows = []
    for view in views:
        for column in view.columns:
            signal = column.signal
            worst = next(iter(objections(signal, 1)), None)
            where = "–" if worst is None else f"{worst + 1}: {_cell(view.texts[worst])}"
            rows.append(
                [
                    f"{view.row['rollout']} {view.row['outcome']}: {column.label}",
                    str(len(view.texts)),
                    f"{float(np.mean(signal.advantage)):+.3f}",
                    f"{float(np.sum(signal.divergence)):.3f}",
                    where,
                    "–" if worst is None else f"{signal.advantage[worst]:+.2f}",
                ]
            )
    head = ["rollout and context", "tokens", "mean log Q-log P", "sum of divergence", "objects most to", "log Q/P"]
    print_table(head, rows, console)


def _legend() -> Text:
    line = Text("log Q − log P, nats: ")
    for step, text in legend():
        sign = "−" if step < 0 else "+" if step else "±"
        line.append(f" {sign}{text.removeprefix('within ')} ", style=_STYLES.get(step, ""))
        line.append(" ")
    return line


def _lines(view: TokenView, column: Column, width: int) -> Iterator[Text]:
    """The response in lines that fit, each with its bars below."""
    text, bars, used = Text(), Text(style="dim"), 0
    for piece, style, bar in _pieces(view, column):
        for number, part in enumerate(piece.split("\n")):
            if number:
                yield from (text, bars)
                text, bars, used = Text(), Text(style="dim"), 0
            for cells in chop_cells(part, width) if cell_len(part) > width else [part]:
                if used + cell_len(cells) > width:
                    yield from (text, bars)
                    text, bars, used = Text(), Text(style="dim"), 0
                text.append(cells, style=style)
                bars.append(bar * cell_len(cells))
                used += cell_len(cells)
    if used:
        yield from (text, bars)


def _pieces(view: TokenView, column: Column) -> Iterator[tuple[str, str, str]]:
    """Text, style and bar of each token."""
    values = zip(view.texts, column.signal.advantage.tolist(), column.signal.divergence.tolist(), strict=True)
    for text, advantage, divergence in values:
        share = divergence / view.highest if view.highest > 0 and np.isfinite(divergence) else 0.0
        bar = _BARS[round((len(_BARS) - 1) * min(max(share, 0.0), 1.0))]
        shown = visible(text).replace("\n", "↵\n").replace("\t", "    ") or "▯"
        yield shown, _STYLES.get(level(advantage), ""), bar


def _print_objections(view: TokenView, column: Column, names: Mapping[int, str], console: Console) -> None:
    signal = column.signal
    chosen = objections(signal, _OBJECTIONS)
    if not chosen:
        console.print(Text("the teacher objects to no token", style="dim"))
        return
    rows = []
    for i in chosen:
        preferred, share = int(signal.teacher_top_ids[i, 0]), float(np.exp(signal.teacher_top[i, 0]))
        cells = (signal.student[i], signal.teacher[i], signal.advantage[i])
        numbers = [*(f"{value:.2f}" for value in cells), f"{signal.divergence[i]:.2g}"]
        name = _cell(names.get(preferred, f"#{preferred}"))
        rows.append([f"{i + 1}: {_cell(view.texts[i])}", *numbers, name, f"{100 * share:.0f} %"])
    head = ["objects most to", "log P", "log Q", "log Q/P", "divergence", "prefers", "with"]
    print_table(head, rows, console)


def _cell(text: str) -> str:
    """A token in a cell of a table, with its spaces to be seen."""
    shown = one_line(text)
    return shown if cell_len(shown) <= _TOKEN_CELLS else chop_cells(shown, _TOKEN_CELLS - 1)[0] + "…"
