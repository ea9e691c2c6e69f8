"""`mopd complete`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from mopd_nemo.commands import ConfigFile, Overrides
from mopd_nemo.config import TeacherConfig
from mopd_nemo.config.load import load_config
from mopd_nemo.types import Problem, Rollout


def complete(
    config_file: ConfigFile,
    output: Annotated[Path, typer.Option("--output", "-o", help="JSONL file; one that is not complete is continued.")],
    overrides: Overrides = None,
) -> None:
    """Write the teacher's completions of all training problems, for `method: gkd`. Runs on either engine."""
    config = load_config(config_file, [*(overrides or []), f"gkd.completions={output}"])
    writer = config.model.model_copy(update={"path": config.teacher.path})
    alone = config.model_copy(update={"model": writer, "teacher": TeacherConfig(kind="none")})

    from mopd_nemo.chat import with_prompt_ids
    from mopd_nemo.data.completions import write_completions
    from mopd_nemo.data.load import load_problems
    from mopd_nemo.engines import make_engine
    from mopd_nemo.engines.base import Sampling
    from mopd_nemo.engines.models import check_vocabularies

    assert config.teacher.path is not None
    check_vocabularies(config.model.path, config.teacher.path)
    problems = load_problems(config, "train")
    console = Console(stderr=True)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(f"completing {len(problems)} problems", total=len(problems))
        engine = make_engine(alone)
        rollout = config.rollout
        sampling = Sampling(rollout.max_response_tokens, rollout.temperature)

        def write(some: Sequence[Problem], seed: str) -> list[list[Rollout]]:
            prompts = [problem.prompt_ids for problem in some]
            groups = engine.generate(prompts, rollout.num_rollouts_per_prompt, sampling, seed)
            progress.update(task, completed=problems.index(some[-1]) + 1)
            return groups

        problems = with_prompt_ids(
            problems,
            engine.chat,
            config.data.max_prompt_tokens,
            escape_control_tokens=config.data.escape_control_tokens,
        )
        write_completions(output, problems, config, write)
    console.print(f"{output}: completions of {len(problems)} problems by {config.teacher.path}", soft_wrap=True)
