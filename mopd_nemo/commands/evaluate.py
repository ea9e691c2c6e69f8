"""`mopd eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mopd_nemo.commands import ConfigFile, Overrides
from mopd_nemo.config import TeacherConfig, UserError
from mopd_nemo.config.load import load_config


def evaluate(
    config_file: ConfigFile,
    overrides: Overrides = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Model to evaluate: a checkpoint of a run or any model directory. Default: model.path."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Also write the metrics as JSON here.")] = None,
    rollouts: Annotated[Path | None, typer.Option(help="Also write the samples here, for `mopd analyze`.")] = None,
) -> None:
    """Evaluate a model on the held-out problems: mean@k, pass@k, majority vote. No teacher is loaded."""
    config = load_config(config_file, overrides or [])
    if checkpoint is not None and not (checkpoint / "config.json").is_file():
        raise UserError(
            f"--checkpoint {checkpoint}: no config.json in it; name a directory like RUN_DIR/checkpoints/step_000040, "
            "or with engine=nemo what `mopd export` makes of one"
        )
    model = config.model.model_copy(update={"path": str(checkpoint)} if checkpoint else {})
    config = config.model_copy(update={"model": model, "teacher": TeacherConfig(kind="none")})

    from mopd_nemo.chat import with_prompt_ids
    from mopd_nemo.data.load import judgeable, load_problems
    from mopd_nemo.engines import make_engine
    from mopd_nemo.evaluation import evaluate as evaluate_model
    from mopd_nemo.files import write_json, write_rows
    from mopd_nemo.run.rollouts import rollout_records
    from mopd_nemo.verifiers.pool import VerifierPool

    problems = load_problems(config, "eval")
    console = Console(stderr=True)
    with (
        VerifierPool(config.verifier, {problem.task for problem in problems}) as verifiers,
        Progress(console=console, transient=True) as progress,
    ):
        task = progress.add_task(f"evaluating {len(problems)} problems", total=1.0)
        problems = judgeable(problems, verifiers, config, "eval")
        engine = make_engine(config)
        problems = with_prompt_ids(
            problems,
            engine.chat,
            config.data.max_prompt_tokens,
            escape_control_tokens=config.data.escape_control_tokens,
        )
        metrics, groups = evaluate_model(
            engine, verifiers, problems, config, lambda done: progress.update(task, completed=done)
        )
    table = Table(title=str(checkpoint or config.model.path), box=None)
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4f}" if value % 1 else f"{value:.0f}")
    Console().print(table)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, metrics)
    if rollouts is not None:
        rollouts.parent.mkdir(parents=True, exist_ok=True)
        write_rows(rollouts, rollout_records(0, groups, None, engine.chat))
