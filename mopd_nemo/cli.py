"""The `mopd` command. Each subcommand is a thin door to a room of the package; heavy imports happen behind the door."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from mopd_nemo import __version__
from mopd_nemo.errors import UserError

app = typer.Typer(
    name="mopd",
    help="Multi-Rollout On-Policy Distillation: train, evaluate, and look at what the teacher saw.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="YAML config file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace those of the file."),
]


@app.command()
def train(
    overrides: Overrides = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="YAML config file of a new run.")] = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="Run directory to continue.")] = None,
) -> None:
    """Train, from a config or by continuing a run.

    mopd train --config configs/quickstart.yaml peers.failures=0

    mopd train --resume runs/quickstart-20260101-120000
    """
    from mopd_nemo.commands.train import run_training

    raise typer.Exit(run_training(config, resume, overrides or []))


@app.command("eval")
def evaluate(
    config: ConfigFile,
    overrides: Overrides = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Model to evaluate: a checkpoint of a run or any model directory. Default: model.path."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Also write the metrics as JSON here.")] = None,
) -> None:
    """Evaluate a model on the held-out problems: mean@k, pass@k, majority vote."""
    from mopd_nemo.commands.evaluate import run_evaluation

    run_evaluation(config, overrides or [], checkpoint, output)


@app.command()
def inspect(
    run_dir: Annotated[Path, typer.Argument(help="Run directory.")],
    step: Annotated[int | None, typer.Option(help="Training step; default: the last one recorded.")] = None,
    problem: Annotated[str | None, typer.Option(help="Problem id; default: list the problems of the step.")] = None,
) -> None:
    """Show a rollout group: responses, verdicts, and exactly what the teacher of each rollout read."""
    from mopd_nemo.commands.inspect import show_group

    show_group(run_dir, step, problem)


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(help="Run directory.")]) -> None:
    """Write report.html of a run again, for example while it is still going on."""
    from mopd_nemo.analysis.report import write_report
    from mopd_nemo.run.directory import RunDirectory

    print(write_report(RunDirectory.open(run_dir)))


@app.command()
def sweep(
    config: ConfigFile,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the sweep; one run directory each.")],
    overrides: Overrides = None,
) -> None:
    """Train every combination of some settings, one after the other, then compare. Goes on where it was stopped.

    mopd sweep --config configs/quickstart.yaml --output runs/methods method=mopd,sdpo,grpo seed=0,1,2
    """
    from mopd_nemo.commands.sweep import run_sweep

    raise typer.Exit(run_sweep(config, overrides or [], output))


@app.command()
def compare(
    run_dirs: Annotated[list[Path], typer.Argument(help="Run directories.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the comparison.")] = Path("comparison"),
) -> None:
    """Compare runs: mean and spread over seeds, intervals by problem, time per phase, curves."""
    from mopd_nemo.commands.compare import compare_runs

    compare_runs(run_dirs, output)


@app.command()
def submit(
    config: ConfigFile,
    overrides: Overrides = None,
    nodes: Annotated[int | None, typer.Option(help="Nodes; short for nemo.num_nodes=N.")] = None,
    site: Annotated[
        Path | None, typer.Option(help="Site file. Default: $MOPD_SITE, else slurm/site.yaml.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Run directory. Default: NAME-DATE-TIME in the site's root.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Several runs as a job array, for example 0,1,2.")] = None,
    chain: Annotated[int, typer.Option(help="So many jobs, each going on where the one before it saved.")] = 1,
    after: Annotated[
        str | None, typer.Option(help="Start when these jobs have succeeded, for example 123,124.")
    ] = None,
    task: Annotated[
        Literal["train", "eval", "interactive"],
        typer.Option(help="`eval` evaluates model.path; `interactive` starts Ray and waits."),
    ] = "train",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script; write and submit nothing.")] = False,
) -> None:
    """Submit a run to Slurm: Ray on all nodes, one driver, saved and queued again at the time limit.

    mopd submit --config configs/quickstart.yaml --dry-run

    mopd submit --config configs/paper/mopd-qwen3-8b-chemistry-1n8g-tp2.yaml --seeds 0,1,2
    """
    from mopd_nemo.commands.submit import Options, run_submit

    options = Options(
        nodes=nodes, site=site, output=output, seeds=seeds, chain=chain, after=after, task=task, dry_run=dry_run
    )
    run_submit(config, overrides or [], options)


@app.command()
def doctor() -> None:
    """Say what is installed and usable on this machine."""
    from mopd_nemo.commands.doctor import print_findings

    print_findings()


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point: bad input ends with its message and exit code 2."""
    try:
        app()
    except UserError as error:
        Console(stderr=True).print("[bold red]error:[/] ", end="")
        print(error, file=sys.stderr)
        sys.exit(2)
