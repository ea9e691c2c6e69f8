"""Problems from and to a JSONL file with rows `{id, prompt or messages, answer, task}`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from mopd_nemo.config import UserError
from mopd_nemo.data.rows import BadRows
from mopd_nemo.types import Message, Problem
from mopd_nemo.verifiers import TASKS


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
        if self.task not in TASKS:
            raise ValueError(f"task={self.task!r} has no verifier; known: {', '.join(TASKS)}")
        TASKS[self.task].check_answer(self.answer)
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
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                problem = _Row.model_validate_json(line).to_problem()
            except ValidationError as error:
                bad.report(path, f"line {number}", explain(error))
                continue
            if problem.id in problems:
                bad.report(path, f"line {number}", f"id {problem.id!r} appears twice; ids must be unique")
                continue
            problems[problem.id] = problem
    if not problems:
        raise UserError(f"{key}={path}: the file has no rows")
    return list(problems.values())


def write_problems(path: Path, problems: Iterable[Problem]) -> None:
    """Write problems so that `read_problems` gives them back; the file appears whole or not at all."""
    unfinished = path.with_name(path.name + ".tmp")
    with unfinished.open("w", encoding="utf-8") as file:
        for problem in problems:
            row = {"id": problem.id, "messages": problem.messages, "answer": problem.answer, "task": problem.task}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(unfinished, path)  # noqa: PTH105


def explain(error: ValidationError) -> str:
    """A pydantic error as `field: reason; field: reason`."""
    reasons = []
    for item in error.errors():
        field = ".".join(map(str, item["loc"]))
        message = item["msg"].removeprefix("Value error, ")
        reasons.append(f"{field}: {message}" if field else message)
    return "; ".join(reasons)
