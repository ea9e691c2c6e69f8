"""Problems from and to a JSONL file with rows `{id, prompt or messages, answer, task}`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from mopd_nemo.config import UserError
from mopd_nemo.data.rows import BadRows
from mopd_nemo.files import explain, read_models, write_rows
from mopd_nemo.types import Message, Problem
from mopd_nemo.verifiers import task_of


class _Row(BaseModel):
    model_config = ConfigDict(extra="ignore", coerce_numbers_to_str=True)

    id: str
    prompt: str | None = None
    messages: list[Message] | None = None
    answer: Any
    task: str

    @model_validator(mode="after")
    def _check(self) -> _Row:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give exactly one of `prompt` and `messages`")
        if self.messages is not None and (not self.messages or self.messages[-1]["role"] != "user"):
            raise ValueError("`messages` must end with a user turn")
        try:
            task = task_of(self.task)
        except UserError as error:
            raise ValueError(str(error)) from error
        task.check_answer(self.answer)
        return self

    def to_problem(self) -> Problem:
        messages = self.messages if self.messages is not None else [Message(role="user", content=self.prompt or "")]
        return Problem(id=self.id, messages=tuple(messages), answer=self.answer, task=self.task)


def read_problems(path: str, key: str, bad: BadRows | None = None) -> list[Problem]:
    """All problems of a file, in file order. `key` is the config key that named the file, used in errors.

    Args:
        bad: what to do about a malformed row or a repeated id; None: stop.

    Raises:
        UserError: no such file, no rows, or a bad row (with line and field) with a policy to stop.
    """
    bad = bad or BadRows("stop")
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{key}={path}: no such file; name a JSONL file, or `arithmetic` for the built-in task")
    problems: dict[str, Problem] = {}
    for number, _, row in read_models(file, _Row):
        if isinstance(row, ValidationError):
            bad.report(path, f"line {number}", explain(row))
        elif row.id in problems:
            bad.report(path, f"line {number}", f"id {row.id!r} appears twice; ids must be unique")
        else:
            problems[row.id] = row.to_problem()
    if not problems:
        raise UserError(f"{key}={path}: the file has no rows")
    return list(problems.values())


def write_problems(path: Path, problems: Iterable[Problem]) -> None:
    """Write problems so that `read_problems` gives them back; the file appears whole or not at all."""
    fields = ("id", "messages", "answer", "task")
    write_rows(path, ({name: getattr(problem, name) for name in fields} for problem in problems))
