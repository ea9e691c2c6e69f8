"""`mopd eval` and `mopd complete`: responses of a model that is not trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import Progress
from rich.table import Table

from mopd_nemo.commands import ConfigFile, Overrides, check_output, progress
from mopd_nemo.config import Config, LoraConfig, TeacherConfig, UserError
from mopd_nemo.config.load import load_config
from mopd_nemo.files import write_json, write_rows
from mopd_nemo.terminal import Terminal
from mopd_nemo.types import Problem, Rollout

if TYPE_CHECKING:
    from mopd_nemo.engines.base import Engine


def evaluate(
    config_file: ConfigFile,
    overrides: Overrides = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Model to evaluate: a checkpoint, a run with train.keep_best, whose best checkpoint is taken, or any "
            "model directory. Default: model.path."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Also write the metrics as JSON here.")] = None,
    rollouts: Annotated[Path | None, typer.Option(help="Also write the samples here, for `mopd analyze`.")] = None,
) -> None:
    """Evaluate a model on the held-out problems: mean@k, pass@k, majority vote. No teacher is loaded."""
    config = load_config(config_file, overrides or [])
    for path, option in ((output, "--output"), (rollouts, "--rollouts")):
        if path is not None:
            check_output(path, option)
    if checkpoint is not None and (checkpoint / "config.yaml").is_file():
        from mopd_nemo.run.checkpoints import best_checkpoint
        from mopd_nemo.run.directory import RunDirectory

        checkpoint, _ = best_checkpoint(RunDirectory.open(checkpoint))
    if checkpoint is not None and not (checkpoint / "config.json").is_file():
        raise UserError(
            f"--checkpoint {checkpoint}: no config.json in it; name a directory like RUN_DIR/checkpoints/step_000040, "
            "or with engine=nemo what `mopd export` makes of one"
        )
    config = _alone(config, str(checkpoint or config.model.path))

    from mopd_nemo.data.load import judgeable, load_problems
    from mopd_nemo.engines import make_engine
    from mopd_nemo.evaluation import evaluate as evaluate_model
    from mopd_nemo.run.rollouts import rollout_records
    from mopd_nemo.verifiers.pool import VerifierPool

    problems = load_problems(config, "eval")
    with (
        VerifierPool(config.verifier, {problem.task for problem in problems}) as verifiers,
        progress("evaluating") as report,
    ):
        said = f"{len(problems)} problems"
        problems = judgeable(problems, verifiers, config, "eval")
        engine = make_engine(config)
        problems = _tokenized(problems, engine, config)
        metrics, groups = evaluate_model(engine, verifiers, problems, config, lambda done: report(done, said))
    console = Terminal()
    console.print(config.model.path, style="bold", soft_wrap=True)
    table = Table(box=None)
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4f}" if value % 1 else f"{value:.0f}")
    console.print(table)
    if output is not None:
        write_json(output, metrics)
    if rollouts is not None:
        write_rows(rollouts, rollout_records(0, groups, None, engine.chat))


def complete(
    config_file: ConfigFile,
    output: Annotated[Path, typer.Option("--output", "-o", help="JSONL file; one that is not complete is continued.")],
    overrides: Overrides = None,
) -> None:
    """Write the teacher's completions of all training problems, for `method: gkd`. Runs on either engine."""
    config = load_config(config_file, [*(overrides or []), f"gkd.completions={output}"])
    check_output(output, "--output")
    assert config.teacher.path is not None  # gkd has no other teacher

    from mopd_nemo.data.completions import write_completions
    from mopd_nemo.data.load import load_problems
    from mopd_nemo.engines import make_engine
    from mopd_nemo.engines.base import Request, Sampling
    from mopd_nemo.engines.models import check_vocabularies

    check_vocabularies(config.model.path, config.teacher.path)
    problems = load_problems(config, "train")
    console = Terminal(stderr=True)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(f"completing {len(problems)} problems", total=len(problems))
        engine = make_engine(_alone(config, config.teacher.path))
        rollout = config.rollout
        sampling = Sampling(rollout.max_response_tokens, rollout.temperature)

        def write(some: Sequence[Problem], seed: str) -> list[list[Rollout]]:
            prompts = [problem.prompt_ids for problem in some]
            groups = engine.generate(Request(prompts, rollout.num_rollouts_per_prompt, sampling, seed))
            bar.update(task, completed=problems.index(some[-1]) + 1)
            return groups

        problems = _tokenized(problems, engine, config)
        write_completions(output, problems, config, write)
    console.print(f"{output}: completions of {len(problems)} problems by {config.teacher.path}", soft_wrap=True)


def _alone(config: Config, model: str) -> Config:
    """The config of an engine that has this model as its student, without adapters, and no teacher."""
    student = config.model.model_copy(update={"path": model})
    return config.model_copy(update={"model": student, "lora": LoraConfig(), "teacher": TeacherConfig(kind="none")})


def _tokenized(problems: Sequence[Problem], engine: Engine, config: Config) -> list[Problem]:
    from mopd_nemo.chat import with_prompt_ids

    return with_prompt_ids(
        problems,
        engine.chat,
        config.data.max_prompt_tokens,
        escape_control_tokens=config.data.escape_control_tokens,
    )
