"""The `mopd` command. Each subcommand is a thin door to a room of the package; heavy imports happen behind the door."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from mopd_nemo import __version__
from mopd_nemo.config import UserError

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

analyze_app = typer.Typer(
    name="analyze",
    help="Analyses of recorded rollouts: teacher-signal quality, diversity, case studies.",
    no_args_is_help=True,
)
app.add_typer(analyze_app)


class BadRowPolicy(StrEnum):
    """What to do about a malformed row."""

    STOP = "stop"
    SKIP = "skip"


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
    rollouts: Annotated[Path | None, typer.Option(help="Also write the samples here, for `mopd analyze`.")] = None,
) -> None:
    """Evaluate a model on the held-out problems: mean@k, pass@k, majority vote."""
    from mopd_nemo.commands.evaluate import run_evaluation

    run_evaluation(config, overrides or [], checkpoint, output, rollouts)


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
def report(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="Run directories.")],
    output: Annotated[
        Path | None,
        typer.Option(help="HTML file. Default: report.html of the run; overlay.html here for several."),
    ] = None,
) -> None:
    """Write report.html of a run again, also while it is going on; or one page that lays several runs over each other.

    For means and spread over seeds: `mopd compare`.
    """
    from mopd_nemo.analysis.report import write_overlay, write_report
    from mopd_nemo.run.directory import RunDirectory

    runs = [RunDirectory.open(path) for path in run_dirs]
    print(write_report(runs[0], output) if len(runs) == 1 else write_overlay(runs, output or Path("overlay.html")))


@app.command()
def verify(
    task: Annotated[str, typer.Option(help="math, choice, tool, code or arithmetic.")],
    source: Annotated[
        Path,
        typer.Option("--input", "-i", help="JSONL with {id, response, answer}, or {id, response, tests} for code."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="JSONL with {id, reward, outcome, feedback, seconds}.")
    ],
    workers: Annotated[int | None, typer.Option(min=1, help="Worker processes. Default: one a core.")] = None,
    feedback: Annotated[bool, typer.Option("--feedback", help="Write what the verifier says about failures.")] = False,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="YAML config file with verifier.*")] = None,
    overrides: Overrides = None,
) -> None:
    """Judge responses in a file. Exit code 1 when a row could not be judged.

    mopd verify --task code --input responses.jsonl --output verdicts.jsonl verifier.code.mode=paper
    """
    from mopd_nemo.commands.verify import verify_file
    from mopd_nemo.config.load import load_config

    settings = load_config(config, overrides or []).verifier
    if workers is not None:
        settings = settings.model_copy(update={"workers": workers})
    raise typer.Exit(verify_file(task, source, output, settings, feedback))


data_app = typer.Typer(help="The paper's benchmarks: list them, and prepare one as JSONL.", no_args_is_help=True)
app.add_typer(data_app, name="data")


@data_app.command("list")
def list_data() -> None:
    """Name every data source."""
    from mopd_nemo.commands.data import list_sources

    list_sources()


@data_app.command("prepare")
def prepare_data(
    name: Annotated[str, typer.Argument(help="A source of `mopd data list`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for train.jsonl and eval.jsonl.")],
    inputs: Annotated[
        list[Path] | None,
        typer.Option("--input", "-i", help="Local JSON, JSONL or parquet, or a directory of it. Default: the hub."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Revision on the hub. Default: the one that is known.")] = None,
    on_bad_row: Annotated[BadRowPolicy, typer.Option(help="What to do about a malformed row.")] = BadRowPolicy.STOP,
) -> None:
    """Write a source's problems as JSONL for data.train and data.eval.

    mopd data prepare sciknoweval-chemistry --output data/chemistry
    """
    from mopd_nemo.commands.data import prepare_source

    prepare_source(name, output, inputs or [], revision, on_bad_row.value)


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


@analyze_app.command("teacher-signal")
def teacher_signal(
    rollouts: Annotated[Path, typer.Option(help="Rollouts file (JSONL), or a run directory: its newest evaluation.")],
    overrides: Overrides = None,
    model: Annotated[
        str | None, typer.Option(help="Teacher: model directory or hub name. Default: model.path of the config.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Directory. Default: RUN_DIR/teacher_signal.")] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="Settings. Default: those of the run of the rollouts.")
    ] = None,
    num_prompts: Annotated[int | None, typer.Option(min=1, help="Use only the first so many prompts.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Drop earlier scores in --output.")] = False,
) -> None:
    """How well do a teacher's scores agree with the verifier, by what the teacher reads? Resumable.

    mopd analyze teacher-signal --rollouts runs/a/rollouts/eval_000000.jsonl --output runs/a/teacher_signal
    """
    from mopd_nemo.commands.analyze import analyze_teacher_signal

    analyze_teacher_signal(rollouts, model, output, config, overrides or [], num_prompts, restart)


@analyze_app.command()
def diversity(
    methods: Annotated[list[str], typer.Argument(metavar="LABEL=FILE...", help="Rollouts files or run directories.")],
    output: Annotated[Path, typer.Option(help="Directory for tables and figures.")],
    samples: Annotated[
        int | None, typer.Option(min=2, help="Responses per prompt. Default: the most that every method has.")
    ] = None,
    code: Annotated[bool, typer.Option(help="Take the last fenced code block of a response.")] = True,
) -> None:
    """How different are the responses to one prompt, method by method, on the prompts that all have?

    mopd analyze diversity base=a/rollouts/eval_000000.jsonl mopd=a/rollouts/eval_000040.jsonl --output diversity
    """
    from mopd_nemo.commands.analyze import analyze_diversity

    analyze_diversity(methods, output, samples, code)


@analyze_app.command()
def cases(
    runs: Annotated[list[str], typer.Argument(metavar="LABEL=RUN LABEL=RUN", help="Two run directories.")],
    output: Annotated[Path, typer.Option(help="Directory for the page and its data.")],
    pattern: Annotated[
        list[str] | None,
        typer.Option(help="NAME=REGEX: a failure pattern to count over steps (`.` crosses lines); may be repeated."),
    ] = None,
    problem: Annotated[list[str] | None, typer.Option(help="Show this problem too; may be repeated.")] = None,
    step: Annotated[int | None, typer.Option(help="Evaluation to compare. Default: the last that both have.")] = None,
    max_cases: Annotated[int, typer.Option(min=1, help="Cases of each kind on the page.")] = 8,
) -> None:
    """What does one run solve that the other does not, since when, and what did the teachers read?

    mopd analyze cases mopd=runs/a sdpo=runs/b --output cases --pattern 'no box=^(?!.*boxed)'
    """
    from mopd_nemo.commands.analyze import analyze_cases

    analyze_cases(runs, output, pattern or [], problem or [], max_cases, step)


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
