"""`mopd analyze`: teacher signal, whole, by token and at branches, recovery, diversity and cases of rollouts."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from mopd_nemo.commands import Overrides, check_output, default_output, print_table, progress, scoring_config
from mopd_nemo.commands.branches import branches
from mopd_nemo.commands.tokens import tokens
from mopd_nemo.config import Config, TeacherConfig, UserError
from mopd_nemo.run.directory import RunDirectory
from mopd_nemo.terminal import Terminal

if TYPE_CHECKING:
    from mopd_nemo.analysis.teacher_signal.scoring import ScoreStore
    from mopd_nemo.run.rollouts import RecordedGroup


app = typer.Typer(
    help="Analyses of recorded rollouts: teacher signal, whole, by token and where failures branch off; answer "
    "recovery, diversity, case studies.",
    no_args_is_help=True,
)
app.command()(tokens)
app.command()(branches)


@app.command("teacher-signal")
def teacher_signal(
    rollouts: Annotated[Path, typer.Option(help="Rollouts file (JSONL), or a run directory: its newest evaluation.")],
    overrides: Overrides = None,
    model: Annotated[
        str | None, typer.Option(help="Teacher: model directory or hub name. Default: model.path of the config.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Directory. Default: RUN_DIR/teacher_signal.")] = None,
    config_file: Annotated[
        Path | None, typer.Option("--config", "-c", help="Settings. Default: those of the run of the rollouts.")
    ] = None,
    num_prompts: Annotated[int | None, typer.Option(min=1, help="Use only the first N prompts.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Drop earlier scores in --output.")] = False,
) -> None:
    """How well do a teacher's scores agree with the verifier, by what the teacher reads? Resumable.

    mopd analyze teacher-signal --rollouts runs/a/rollouts/eval_000000.jsonl --output runs/a/teacher_signal
    """
    from mopd_nemo.analysis.teacher_signal.output import collect, write_result
    from mopd_nemo.analysis.teacher_signal.scoring import ScoreStore, manifest_of
    from mopd_nemo.run.rollouts import find_rollouts, read_groups

    source = find_rollouts(rollouts)
    config = scoring_config(source, model, config_file, overrides or [])
    directory = output or default_output(rollouts, "teacher_signal")
    groups = read_groups(source)[:num_prompts]
    store = ScoreStore(directory, manifest_of(source, len(groups), config), restart)
    console = Terminal(stderr=True)
    _score(groups, source, config, store, console)
    about = {"rollouts": source.name, "scored by": Path(config.model.path).name}
    result = collect(groups, store, about)
    written = write_result(result, directory)
    _print_signal(result)
    _print_paths(written)


@app.command()
def recovery(
    rollouts: Annotated[Path, typer.Option(help="Rollouts file (JSONL), or a run directory: its newest evaluation.")],
    overrides: Overrides = None,
    model: Annotated[
        str | None, typer.Option(help="Writer: model directory or hub name. Default: model.path of the config.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Directory. Default: RUN_DIR/recovery.")] = None,
    config_file: Annotated[
        Path | None, typer.Option("--config", "-c", help="Settings. Default: those of the run of the rollouts.")
    ] = None,
    num_prompts: Annotated[int | None, typer.Option(min=1, help="Use only the first N prompts.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Answers for each prompt and condition.")] = 8,
    restart: Annotated[bool, typer.Option("--restart", help="Drop earlier answers in --output.")] = False,
) -> None:
    """How often is a model right when it writes after each condition's teacher prompt? Resumable.

    mopd analyze recovery --rollouts runs/a/rollouts/eval_000000.jsonl --output runs/a/recovery
    """
    from mopd_nemo.analysis.teacher_signal.scoring import manifest_of
    from mopd_nemo.files import write_json
    from mopd_nemo.preflight.recovery import recovery_cases, recovery_figures, recovery_plan
    from mopd_nemo.run.resumable import RowStore
    from mopd_nemo.run.rollouts import find_rollouts, one_of_each_problem, read_groups

    source = find_rollouts(rollouts)
    config = scoring_config(source, model, config_file, overrides or [])
    config = config.model_copy(update={"teacher": TeacherConfig(kind="live")})
    directory = output or default_output(rollouts, "recovery")
    groups = one_of_each_problem(read_groups(source))[:num_prompts]
    plan = recovery_plan(samples, config)
    manifest = manifest_of(source, len(groups), config) | {
        "samples": samples,
        "rollout": config.rollout.model_dump(mode="json"),
        "verifier": config.verifier.model_dump(mode="json"),
    }
    store = RowStore(directory, "written", ("problem", "context"), manifest, restart)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from mopd_nemo.engines import make_engine
    from mopd_nemo.preflight.measure import measure
    from mopd_nemo.verifiers.pool import VerifierPool

    with VerifierPool(config.verifier, {row["task"] for group in groups for row in group.rows}) as verifiers:
        engine = make_engine(config)
        cases = recovery_cases(groups, source, engine.chat, config)
        total = len(cases) * len(plan.measured)
        with progress("writing after each condition") as report:
            for row in measure(cases, engine, verifiers, config, plan, store):
                store.add(row)
                report(len(store) / total, f"{row['context']}, {len(store)} of {total} prompts and conditions")
    result = recovery_figures(cases, store, len(groups))
    write_json(directory / "recovery.json", result)
    _print_recovery(result, samples)
    _print_paths([directory / "recovery.json"])


@app.command()
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
    from mopd_nemo.analysis.diversity import METRICS, READINGS, compare, write_result
    from mopd_nemo.run.rollouts import find_rollouts, read_groups

    check_output(output, "--output", directory=True)
    sources = {label: find_rollouts(path) for label, path in labelled(methods).items()}
    result = compare({label: read_groups(path) for label, path in sources.items()}, samples, code)
    output.mkdir(parents=True, exist_ok=True)
    written = write_result(result, output)
    for name, title in READINGS.items():
        reading = result["readings"][name]
        print_table(
            ["", *reading["methods"]],
            [[text, *(_mean(row[metric]) for row in reading["methods"].values())] for metric, text in METRICS.items()],
            title=f"{title}; {reading['num_prompts']} prompts, means",
        )
    _print_paths(written)


@app.command()
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
    from mopd_nemo.analysis.cases import write_cases

    check_output(output, "--output", directory=True)
    opened = {label: RunDirectory.open(path) for label, path in labelled(runs).items()}
    if len(opened) != 2:
        raise UserError(f"cases compares two runs, A=RUN B=RUN; got {len(opened)}")
    output.mkdir(parents=True, exist_ok=True)
    _print_paths(write_cases(opened, output, parse_patterns(pattern or []), problem or [], max_cases, step))


def labelled(items: Sequence[str]) -> dict[str, Path]:
    """`LABEL=PATH` arguments.

    Raises:
        UserError: one has no label, or two have the same.
    """
    paths: dict[str, Path] = {}
    for item in items:
        label, equals, path = item.partition("=")
        if not (label and equals and path):
            raise UserError(f"{item!r}: write it as LABEL=PATH, for example mopd=runs/a sdpo=runs/b")
        if label in paths:
            raise UserError(f"label {label!r} stands for two paths: {paths[label]} and {path}")
        paths[label] = Path(path)
    return paths


def parse_patterns(items: Sequence[str]) -> dict[str, str]:
    """`NAME=REGEX` arguments."""
    patterns: dict[str, str] = {}
    for item in items:
        name, equals, pattern = item.partition("=")
        if not (name and equals and pattern):
            raise UserError(f"--pattern {item!r}: write it as NAME=REGEX")
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"--pattern {item!r}: not a regular expression: {error}") from error
        patterns[name] = pattern
    return patterns


def _score(
    groups: Sequence[RecordedGroup],
    source: Path,
    config: Config,
    store: ScoreStore,
    console: Console,
) -> None:
    from mopd_nemo.analysis.teacher_signal.conditions import CONDITIONS
    from mopd_nemo.analysis.teacher_signal.scoring import score_rollouts

    missing = sum((group.key, name) not in store for group in groups for name in CONDITIONS)
    if not missing:
        console.print("all scores are there already", style="dim")
        return
    total = len(groups) * len(CONDITIONS)
    console.print(
        f"scoring {len(groups)} prompts in {len(CONDITIONS)} conditions; {total - missing} of {total} are there"
    )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from mopd_nemo.engines import make_engine

    engine = make_engine(config)
    with progress("scoring") as report:
        score_rollouts(groups, source, engine, config, store, lambda done: report(done, f"{len(groups)} prompts"))


def _print_signal(result: Mapping[str, Any]) -> None:
    """Print the means of the common responses. The files also have intervals and the other readings."""
    from mopd_nemo.analysis.teacher_signal.conditions import CONDITIONS, LABELS
    from mopd_nemo.analysis.teacher_signal.metrics import METRICS

    reading = result["common"]
    print_table(
        ["", *(name.replace("_", " ") for name in METRICS)],
        [[LABELS[name], *(_mean(reading[name][metric]) for metric in METRICS)] for name in CONDITIONS],
        title=f"the same responses in every condition, {reading['none']['num_prompts']} prompts, means",
    )


def _print_recovery(result: Mapping[str, Any], samples: int) -> None:
    from mopd_nemo.preflight.rule import points

    print_table(
        ["", "right, %", "gain, points"],
        [
            [cells["label"], points(cells["right"], sign=""), points(cells["gain"])]
            for cells in result["conditions"].values()
        ],
        title=f"{result['num_problems']} prompts (of {result['num_groups']}), {samples} answers each",
    )


def _mean(cell: Mapping[str, Any]) -> str:
    return "–" if cell["mean"] is None else f"{cell['mean']:.3f}"


def _print_paths(paths: Sequence[Path]) -> None:
    console = Terminal(stderr=True)
    for path in paths:
        console.print(str(path), soft_wrap=True)
