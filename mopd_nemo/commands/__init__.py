"""The subcommands of `mopd`. Slow imports are inside the commands, so that `mopd --help` is fast."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="YAML config file.")]
OptionalConfigFile = Annotated[Path | None, typer.Option("--config", "-c", help="YAML config file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace those of the file."),
]


def print_table(
    head: Sequence[str], body: Iterable[Sequence[str]], console: Console | None = None, title: str | None = None
) -> None:
    """Print a table whose first column is text and whose others are numbers; their headings stand word over word."""
    rows = [list(cells) for cells in body]
    head = [head[0], *(re.sub(r" (?=\w)", "\n", name) for name in head[1:])]
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for number, cells in enumerate(zip(head, *rows, strict=True)):
        longest = max((len(word) for cell in cells for word in cell.split()), default=0)
        table.add_column(cells[0], justify="right" if number else "left", min_width=longest, overflow="fold")
    for cells in rows:
        table.add_row(*cells)
    (console or Console()).print(table)
