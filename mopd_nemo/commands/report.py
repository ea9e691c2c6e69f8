"""`mopd report` and `mopd compare`: pages about runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mopd_nemo.commands import print_table


def report(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="Run directories.")],
    output: Annotated[
        Path | None,
        typer.Option(help="HTML file. Default: report.html of the run; for several runs, report.html here."),
    ] = None,
) -> None:
    """Write report.html of a run again, also while it trains; or one page that lays several runs over each other.

    For means and spread over seeds: `mopd compare`.
    """
    from mopd_nemo.analysis.report import write_report
    from mopd_nemo.run.directory import RunDirectory

    print(write_report([RunDirectory.open(path) for path in run_dirs], output))


def compare(
    run_dirs: Annotated[list[Path], typer.Argument(help="Run directories.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the comparison.")] = Path("comparison"),
    baseline: Annotated[
        str | None,
        typer.Option(
            help="Setting that step times are compared with, by its label. Default: sdpo, where there is one."
        ),
    ] = None,
) -> None:
    """Compare runs: mean and spread over seeds, intervals by problem, time per phase, curves."""
    compare_runs(run_dirs, output, baseline)


def compare_runs(paths: Sequence[Path], output: Path, baseline: str | None = None) -> None:
    """Compare runs, print the tables and write the files."""
    from mopd_nemo.analysis.compare import accuracy_table, compare, time_table, write_comparison

    comparison = compare(paths, baseline)
    console = Console()
    for heading, body in (accuracy_table(comparison), time_table(comparison)):
        narrow = [[cell.replace(" ± ", "±").replace(" to ", "–") for cell in cells] for cells in body]
        print_table(heading, narrow, console)
        console.print()
    for warning in comparison.warnings:
        console.print(f"[yellow]{warning}[/]")
    console.print(str(write_comparison(comparison, output)), soft_wrap=True, highlight=False)
