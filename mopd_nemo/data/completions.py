"""A file of responses that a teacher wrote before training. `mopd complete` writes it, `method: gkd` reads it.

The first line has the settings that the responses depend on. Every further line has the responses to one problem, in
the order of the problems.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mopd_nemo.config import Config, UserError
from mopd_nemo.files import append_row, read_rows, write_rows
from mopd_nemo.types import Problem, Rollout

Write = Callable[[Sequence[Problem], str], list[list[Rollout]]]
"""Samples the responses to some problems. The text names the seed."""


def write_completions(file: Path, problems: Sequence[Problem], config: Config, write: Write) -> None:
    """Write the responses of all problems, `rollout.num_prompts_per_step` problems at a time.

    A stopped run continues after the last batch of problems that it finished. The file becomes the same.

    Raises:
        UserError: the file holds completions of another teacher, of other settings or of other problems.
    """
    size, header = config.rollout.num_prompts_per_step, _header(config) | {"seed": config.seed}
    rows = read_rows(file) if file.exists() else [header]
    _check_header(file, rows[0] if rows else {}, header)
    if [row["problem"] for row in rows[1:]] != [problem.id for problem in problems[: len(rows) - 1]]:
        raise UserError(f"{file}: its problems are not those of data.train={config.data.train}; write another file")
    done = len(rows) - 1 if len(rows) > len(problems) else (len(rows) - 1) // size * size
    file.parent.mkdir(parents=True, exist_ok=True)
    write_rows(file, rows[: 1 + done])  # without a last line that a kill cut short
    for start in range(done, len(problems), size):
        some = problems[start : start + size]
        for problem, rollouts in zip(some, write(some, f"complete/{config.seed}/{start}"), strict=True):
            responses = [{"ids": r.response_ids, "text": r.text, "finished": r.finished} for r in rollouts]
            append_row(file, {"problem": problem.id, "responses": responses})


def read_completions(config: Config, problems: Sequence[Problem]) -> dict[str, list[Rollout]]:
    """The responses in `gkd.completions`, by problem id.

    Raises:
        UserError: the file is missing, does not cover the problems, or was written with other settings.
    """
    assert config.gkd.completions is not None
    file = Path(config.gkd.completions)
    if not file.is_file():
        raise UserError(
            f"gkd.completions={file}: no such file; write it with `mopd complete --config CONFIG --output {file}`"
        )
    header, *rows = read_rows(file) or [{}]
    _check_header(file, header, _header(config))
    completions = {
        row["problem"]: [Rollout(tuple(r["ids"]), r["text"], r["finished"], ()) for r in row["responses"]]
        for row in rows
    }
    missing = [problem.id for problem in problems if problem.id not in completions]
    if missing:
        named = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise UserError(
            f"gkd.completions={file}: has no completions of {len(missing)} of the {len(problems)} problems of "
            f"data.train={config.data.train}: {named}; `mopd complete --config CONFIG --output {file}` continues it"
        )
    return completions


def _header(config: Config) -> dict[str, Any]:
    rollout = config.rollout
    return {
        "teacher.path": config.teacher.path,
        "model.chat_template_kwargs": config.model.chat_template_kwargs,
        "data.prompt_suffix": config.data.prompt_suffix,
        "data.train_prompt_suffix": config.data.train_prompt_suffix,
        "rollout.num_rollouts_per_prompt": rollout.num_rollouts_per_prompt,
        "rollout.max_response_tokens": rollout.max_response_tokens,
        "rollout.temperature": rollout.temperature,
    }


def _check_header(file: Path, recorded: dict[str, Any], wanted: dict[str, Any]) -> None:
    for key, value in wanted.items():
        if recorded.get(key) != value:
            raise UserError(
                f"gkd.completions={file}: written with {key}={recorded.get(key)!r}, this run has {value!r}; "
                "name another file"
            )
