"""`mopd report` and `mopd compare`: pages about runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from mopd_nemo.commands import check_output, print_table
from mopd_nemo.terminal import Terminal

MARGIN = 2.0
"""Points. As `mopd_nemo.analysis.contrasts.MARGIN`, which is too slow to import here."""


def report(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="Run directories.")],
    output: Annotated[
        Path | None,
        typer.Option(help="HTML file. Default: report.html of the run; for several runs, report.html here."),
    ] = None,
) -> None:
    """Write report.html of a run, also while it trains, or one page with the curves of several runs.

    For means and spread over seeds, use `mopd compare`.
    """
    from mopd_nemo.analysis.report import write_report
    from mopd_nemo.run.directory import RunDirectory

    if output is not None:
        check_output(output, "--output")
    print(write_report([RunDirectory.open(path) for path in run_dirs], output))


def compare(
    run_dirs: Annotated[list[Path], typer.Argument(help="Run directories, or directories of runs such as a sweep's.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the comparison.")] = Path("comparison"),
    baseline: Annotated[
        str | None,
        typer.Option(
            help="Setting that the others are compared with, by its label. Default: sdpo, where there is one, "
            "else the first."
        ),
    ] = None,
    margin: Annotated[
        float, typer.Option(min=0.0, help="Settings whose mean@n differs by less count as equal, in points.")
    ] = MARGIN,
) -> None:
    """Compare runs: accuracy with intervals over seeds and problems, differences and what they allow to say, times."""
    compare_runs(run_dirs, output, baseline, margin)


def compare_runs(paths: Sequence[Path], output: Path, baseline: str | None = None, margin: float = MARGIN) -> None:
    """Compare runs, print the tables and write the files."""
    from mopd_nemo.analysis.compare import compare
    from mopd_nemo.analysis.compare_page import sections, write_comparison

    check_output(output, "--output", directory=True)
    comparison = compare(paths, baseline, margin / 100.0)
    console = Terminal()
    for title, note, (heading, body) in sections(comparison):
        print_table(heading, body, console, title)
        console.print(note, style="dim")
        console.print()
    for warning in comparison.warnings:
        console.print(warning, style="yellow")
    console.print(str(write_comparison(comparison, output)), soft_wrap=True)
