"""The `mopd` command, one file a subcommand. What is slow to import is imported when a command runs."""

from __future__ import annotations

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
    """Print a table whose first column is text, as wide as its longest word, and whose others are numbers."""
    rows = [list(cells) for cells in body]
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    words = [word for cells in rows for word in cells[0].split()]
    table.add_column(head[0], min_width=max(map(len, words), default=0))
    for name in head[1:]:
        table.add_column(name, justify="right", min_width=6)
    for cells in rows:
        table.add_row(*cells)
    (console or Console()).print(table)
