"""`mopd train`, and `mopd sweep`: every combination of some settings, one run after the other."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.panel import Panel

from mopd_nemo.commands import ConfigFile, OptionalConfigFile, Overrides
from mopd_nemo.commands.report import compare_runs
from mopd_nemo.config import Config, TeacherError, UserError
from mopd_nemo.config.load import load_config
from mopd_nemo.files import WriteError
from mopd_nemo.run.directory import RunDirectory
from mopd_nemo.terminal import Terminal, in_words, plain, visible

HALTED = 3
"""Exit code of a run that its guard has stopped. The launcher does not queue such a job again."""
FULL = 4
"""Exit code of a run that could not write a file, mostly for want of room."""
UNTAUGHT = 5
"""Exit code of a run whose served teacher does not answer any more. It is saved."""


def train(
    overrides: Overrides = None,
    config: OptionalConfigFile = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="Run directory to continue.")] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check everything but the weights, show a prompt, and train nothing."),
    ] = False,
) -> None:
    """Train, from a config or by continuing a run.

    mopd train --config configs/quickstart.yaml peers.failures=0

    mopd train --resume runs/quickstart-20260101-120000
    """
    if dry_run:
        if config is None:
            raise UserError("--dry-run looks at a new run: give --config FILE")
        raise typer.Exit(show_outlook(load_config(config, overrides or [])))
    raise typer.Exit(run_training(config, resume, overrides or []))


def show_outlook(config: Config) -> int:
    """Print what a run would use, need and show. Exit code: 0, or 2 when something would stop it."""
    from mopd_nemo.outlook import look_ahead

    console = Terminal()
    found = look_ahead(config)
    for line in found.lines:
        console.print(in_words(line, console), soft_wrap=True)
    for title, text in (("the student reads", found.prompt), ("a teacher reads", found.context)):
        if text:
            console.print(Panel(plain(text), title=title, title_align="left"))
    for error in found.errors:
        print(visible(f"error: {error}"), file=sys.stderr)
    if not found.errors:
        console.print("Nothing found that would stop this run; nothing was trained.")
    return 2 if found.errors else 0


def run_training(config_file: Path | None, resume: Path | None, overrides: Sequence[str]) -> int:
    """Start or continue a run. Exit code: 0 complete, 3 stopped by the guard, 4 no room, 5 no teacher, 130 Ctrl-C."""
    started = time.monotonic()
    if (config_file is None) == (resume is None):
        raise UserError("give either --config FILE for a new run or --resume RUN_DIR to continue one")
    config = load_config(config_file, overrides) if config_file else None
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    console = Terminal()
    with console.status("loading torch and the model"):
        from mopd_nemo.trainer import Trainer

        if config is not None:
            trainer = Trainer.new(config, console, started)
        else:
            assert resume is not None
            trainer = Trainer.resumed(RunDirectory.open(resume), overrides, console, started)
    code = None
    try:
        complete = trainer.fit()
    except WriteError as error:
        console.print(f"error: {error}", style="bold red", soft_wrap=True)
        console.print("The run stops here; steps since the last checkpoint are lost.")
        complete, code = False, FULL
    except TeacherError as error:
        console.print(f"error: {error}", style="bold red", soft_wrap=True)
        console.print("The run is saved as it was before this step; start the teacher again, then continue it.")
        complete, code = False, UNTAUGHT
    except KeyboardInterrupt:
        console.print("Stopped at once; steps since the last checkpoint are lost.")
        complete = False
    _say_where(trainer.run, complete, console)
    if complete:
        return 0
    if code is not None:
        return code
    if trainer.halted:
        good = trainer.good_checkpoint
        start = f"start a new run from {good} (model.path)" if good else "start again from the model"
        console.print(
            f"The guard has stopped this run: {start} with other peers, or go on with guard.action=warn.",
            soft_wrap=True,
        )
        return HALTED
    return 128 + (trainer.stop.reason or signal.SIGINT)


def _say_where(run: RunDirectory, complete: bool, console: Console) -> None:
    from mopd_nemo.analysis.report import write_report
    from mopd_nemo.run.checkpoints import best_saved, checkpoints

    try:
        with console.status("writing the report"):
            write_report([run])
    except WriteError as error:
        console.print(f"no report: {error}", soft_wrap=True)
    saved = checkpoints(run.checkpoints)
    console.print(f"run         {run.path}", soft_wrap=True)
    console.print(f"report      {run.report_file}", soft_wrap=True)
    console.print(f"checkpoint  {saved[-1] if saved else 'none yet'}", soft_wrap=True)
    metric = run.read_config().train.keep_best
    if metric and (best := best_saved(run.checkpoints, run.rows(run.eval_file), metric)):
        console.print(f"best        {best[0]} ({metric} {best[1][metric]:.1%})", soft_wrap=True)
    if not complete:
        console.print(f"continue    mopd train --resume {shlex.quote(str(run.path))}", soft_wrap=True)


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """One combination of settings."""

    path: Path
    overrides: list[str]


def sweep(
    config: ConfigFile,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the sweep; one run directory each.")],
    overrides: Overrides = None,
) -> None:
    """Train every combination of some settings, one after the other, then compare. Continues where it was stopped.

    mopd sweep --config configs/quickstart.yaml --output runs/methods method=mopd,sdpo,grpo seed=0,1,2
    """
    raise typer.Exit(run_sweep(config, overrides or [], output))


def run_sweep(config_file: Path, overrides: Sequence[str], output: Path) -> int:
    """Make the missing runs, then compare all of `output`. Returns the exit code of a run that was stopped, else 0."""
    runs = plan(config_file, overrides, output)
    console = Terminal()
    for number, run in enumerate(runs, start=1):
        directory = RunDirectory(run.path)
        complete, begun = is_complete(directory), directory.config_file.exists()
        state = "done already" if complete else "resumed" if begun else "new"
        console.rule(f"run {number} of {len(runs)}: {run.path.name} ({state})")
        if complete:
            continue
        code = run_training(None, run.path, []) if begun else run_training(config_file, None, run.overrides)
        if code:
            console.print("The sweep stops here; the same command continues it.")
            return code
    compare_runs(sorted(path.parent for path in output.glob("*/config.yaml")), output)
    return 0


def plan(config_file: Path, overrides: Sequence[str], output: Path) -> list[PlannedRun]:
    """Every combination of the values of `key=a,b`, each checked before the first run starts.

    A list value keeps its commas: `optimizer.betas=[0.9,0.95]` is one value.

    Raises:
        UserError: nothing varies, a combination is no valid config, or a run directory has other settings.
    """
    from mopd_nemo.preflight.choice import check_choice

    fixed = [item for item in overrides if len(_values(item)) == 1]
    varied = [_values(item) for item in overrides if len(_values(item)) > 1]
    if not varied:
        raise UserError("nothing varies: give at least one key several values, for example seed=0,1,2")
    if any(item.startswith("run_dir=") for item in overrides):
        raise UserError("run_dir: a sweep names its runs itself; say where with --output")
    runs = []
    for chosen in itertools.product(*varied):
        path = output / ",".join(re.sub(r"[^\w.=+-]+", "_", item) for item in chosen)
        run = PlannedRun(path, [*fixed, *chosen, f"run_dir={path}"])
        wanted = load_config(config_file, run.overrides)
        check_choice(wanted)
        if not wanted.train.eval_every:
            raise UserError("train.eval_every=0: a sweep ends with a comparison of evaluations; give it a number")
        directory = RunDirectory(path)
        if directory.config_file.exists() and directory.read_config() != wanted:
            raise UserError(f"{path}: holds a run with other settings; remove it or choose another --output")
        runs.append(run)
    return runs


def is_complete(run: RunDirectory) -> bool:
    """Whether a run has made all its steps and its last evaluation."""
    if not run.config_file.exists() or not run.metrics_file.exists():
        return False
    train = run.read_config().train
    files = [run.metrics_file, run.eval_file] if train.eval_every else [run.metrics_file]
    return all(any(row["step"] == train.num_steps for row in run.rows(file)) for file in files)


def _values(item: str) -> list[str]:
    """`seed=1,2` -> seed=1 and seed=2. Commas inside brackets, braces or quotes do not separate."""
    key, _, text = item.partition("=")
    parts = re.findall(r"""(?:\[[^\]]*\]|\{[^}]*\}|"[^"]*"|'[^']*'|[^,])+""", text)
    return [f"{key}={part}" for part in parts] or [item]
