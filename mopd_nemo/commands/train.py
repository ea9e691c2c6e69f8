"""`mopd train`."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mopd_nemo.commands import OptionalConfigFile, Overrides
from mopd_nemo.config import UserError
from mopd_nemo.config.load import load_config
from mopd_nemo.run.directory import RunDirectory


def train(
    overrides: Overrides = None,
    config: OptionalConfigFile = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="Run directory to continue.")] = None,
) -> None:
    """Train, from a config or by continuing a run.

    mopd train --config configs/quickstart.yaml peers.failures=0

    mopd train --resume runs/quickstart-20260101-120000
    """
    raise typer.Exit(run_training(config, resume, overrides or []))


def run_training(config_file: Path | None, resume: Path | None, overrides: Sequence[str]) -> int:
    """Start or continue a run; the exit code: 0 complete, 130 stopped by Ctrl-C, 143 by a termination signal."""
    started = time.monotonic()
    if (config_file is None) == (resume is None):
        raise UserError("give either --config FILE for a new run or --resume RUN_DIR to continue one")
    config = load_config(config_file, overrides) if config_file else None
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    console = Console()
    with console.status("loading torch and the model"):
        from mopd_nemo.trainer import Trainer

        if config is not None:
            trainer = Trainer.new(config, console, started)
        else:
            assert resume is not None
            trainer = Trainer.resumed(RunDirectory.open(resume), overrides, console, started)
    try:
        complete = trainer.fit()
    except KeyboardInterrupt:
        console.print("Stopped at once; steps since the last checkpoint are lost.")
        complete = False
    _say_where(trainer.run, complete, console)
    if complete:
        return 0
    return 128 + (trainer.stop.reason or signal.SIGINT)


def _say_where(run: RunDirectory, complete: bool, console: Console) -> None:
    from mopd_nemo.analysis.report import write_report
    from mopd_nemo.run.directory import latest_checkpoint

    write_report([run])
    checkpoint = latest_checkpoint(run.checkpoints)
    console.print(f"run         {run.path}", soft_wrap=True, highlight=False)
    console.print(f"report      {run.report_file}", soft_wrap=True, highlight=False)
    console.print(f"checkpoint  {checkpoint or 'none yet'}", soft_wrap=True, highlight=False)
    if not complete:
        console.print(f"continue    mopd train --resume {run.path}", soft_wrap=True, highlight=False)
