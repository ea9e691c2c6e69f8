"""`mopd compare`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


def compare(
    run_dirs: Annotated[list[Path], typer.Argument(help="Run directories.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the comparison.")] = Path("comparison"),
) -> None:
    """Compare runs: mean and spread over seeds, intervals by problem, time per phase, curves."""
    compare_runs(run_dirs, output)


def compare_runs(paths: Sequence[Path], output: Path) -> None:
    """Compare runs, print the tables and write the files."""
    from mopd_nemo.analysis.compare.page import write_comparison
    from mopd_nemo.analysis.compare.results import compare
    from mopd_nemo.analysis.compare.table import accuracy_table, time_table

    comparison = compare(paths)
    console = Console()
    for heading, body in (accuracy_table(comparison), time_table(comparison)):
        table = Table(box=None, padding=(0, 1, 0, 0))
        table.add_column(heading[0], min_width=max(len(word) for cells in body for word in cells[0].split()))
        for name in heading[1:]:
            table.add_column(name, justify="right")
        for cells in body:
            table.add_row(*(cell.replace(" ± ", "±").replace(" to ", "–") for cell in cells))  # narrow terminals
        console.print(table)
        console.print()
    for warning in comparison.warnings:
        console.print(f"[yellow]{warning}[/]")
    console.print(str(write_comparison(comparison, output)), soft_wrap=True, highlight=False)
