"""`mopd report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


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
