"""The problems of a run and of each step: built in, or from JSONL rows `{id, prompt or messages, answer, task}`."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from mopd_nemo.config import Config, UserError
from mopd_nemo.config.verifiers import VerifierConfig
from mopd_nemo.data.arithmetic import SIZES, make_problems, worked_solution
from mopd_nemo.data.rows import BadRows
from mopd_nemo.files import explain, read_models, text_lines, write_rows
from mopd_nemo.types import Message, Problem
from mopd_nemo.verifiers import check_judges, verifier_class
from mopd_nemo.verifiers.pool import VerifierPool

logger = logging.getLogger(__name__)


def load_problems(config: Config, split: Literal["train", "eval"], bad: BadRows | None = None) -> list[Problem]:
    """The problems of one split, in a fixed order.

    Args:
        bad: the treatment of malformed rows. Default: that of `data.on_bad_row`.

    Raises:
        UserError: the file is missing, empty or malformed, no row has the privileged text that the context names, or
            its programs cannot be counted as `eval.paper_metrics` counts them.
    """
    source = config.data.train if split == "train" else config.data.eval
    limit = config.data.num_train if split == "train" else config.data.num_eval
    if source == "arithmetic":
        problems = make_problems(split, min(limit or SIZES[split], SIZES[split]))
        if split == "train" and _read_privileged(config):
            problems = [replace(problem, privileged=worked_solution(problem)) for problem in problems]
    else:
        bad, needed = bad or BadRows(config.data.on_bad_row), "privileged" in config.context
        column = config.data.privileged_column if split == "train" and _read_privileged(config) else None
        problems = read_problems(
            source, f"data.{split}", bad, config.verifier, privileged_column=column, column_is_needed=needed
        )[:limit]
        if needed and column and num_without_privileged(problems) == len(problems):
            raise UserError(
                f"data.train={source}: {column} is empty in each of the {len(problems)} rows, so that context="
                f"[{', '.join(config.context)}] shows nothing of it: write the texts, set data.privileged_column, or "
                "take privileged out of context"
            )
    code = config.verifier.code
    counts_tests = config.eval.paper_metrics and split == "eval" and any(problem.task == "code" for problem in problems)
    if counts_tests and not code.all_tests and code.mode != "paper":
        raise UserError(
            f"eval.paper_metrics=true counts passed tests, and programs for data.eval={source} would be stopped at "
            "their first failed one: set verifier.code.all_tests=true"
        )
    suffix = config.data.prompt_suffix + (config.data.train_prompt_suffix if split == "train" else "")
    return [_with_suffix(problem, suffix) for problem in problems]


def _read_privileged(config: Config) -> bool:
    """Whether a source of the context may read the problems' privileged text: functions of users may."""
    return any(source == "privileged" or ":" in source for source in config.context)


def num_without_privileged(problems: Sequence[Problem]) -> int:
    """Problems whose privileged text says nothing."""
    return sum(not problem.privileged.strip() for problem in problems)


def num_available(source: str, split: Literal["train", "eval"]) -> int:
    """Problems in a source before any limit; 0 for a file that is not there."""
    if source == "arithmetic":
        return SIZES[split]
    file = Path(source)
    return sum(1 for _, line in text_lines(file) if line.strip()) if file.is_file() else 0


def judgeable(
    problems: Sequence[Problem], verifiers: VerifierPool, config: Config, split: Literal["train", "eval"]
) -> list[Problem]:
    """The problems with usable gold answers: each equals itself, and the comparison ends within the time limit.

    Raises:
        UserError: an answer is unusable, and `data.on_bad_row` is `stop`.
    """
    bad = BadRows(config.data.on_bad_row)
    source = config.data.train if split == "train" else config.data.eval
    faults = [verifiers.gold_fault(problem.task, problem.answer) for problem in problems]
    kept = []
    for problem, fault in zip(problems, faults, strict=True):
        if reason := fault.result():
            bad.report(source, f"id {problem.id!r}", reason)
        else:
            kept.append(problem)
    return kept


def with_teachers(problems: Sequence[Problem], config: Config) -> list[Problem]:
    """The problems with the name of their teacher, if there are several: the row's own, or the one of their task.

    Where there is one alone, names in rows are left out with a warning.

    Raises:
        UserError: a problem has no teacher, or a teacher no problem.
    """
    if not config.teachers:
        if named := sum(bool(problem.teacher) for problem in problems):
            logger.warning(
                "data.train=%s: %d of %d rows name a teacher, and the config has no teachers: these names are not read",
                *(config.data.train, named, len(problems)),
            )
        return [replace(problem, teacher="") for problem in problems]
    of_task = {task: name for name, teacher in config.teachers.items() for task in teacher.tasks or (name,)}
    found = [replace(problem, teacher=problem.teacher or of_task.get(problem.task, "")) for problem in problems]
    names = ", ".join(config.teachers)
    for problem in found:
        if not problem.teacher:
            raise UserError(
                f"teachers: none of {names} teaches task {problem.task!r} of data.train={config.data.train} (id "
                f"{problem.id!r}): name it in the tasks of one of them"
            )
        if problem.teacher not in config.teachers:
            raise UserError(
                f"data.train={config.data.train}: row {problem.id!r} asks for teacher {problem.teacher!r}, which is "
                f"none of {names}"
            )
    if idle := config.teachers.keys() - {problem.teacher for problem in found}:
        raise UserError(
            f"teachers.{min(idle)}: it teaches no problem of data.train={config.data.train}: remove it, or name "
            "tasks of the data in its tasks"
        )
    return found


def _with_suffix(problem: Problem, suffix: str) -> Problem:
    *before, user = problem.messages
    return replace(problem, messages=(*before, Message(role="user", content=user["content"] + suffix)))


def problems_of_step(problems: Sequence[Problem], step: int, batch_size: int, seed: int) -> list[Problem]:
    """The `batch_size` problems of 1-based `step`: a pure function, so that a resumed run needs no iterator state.

    Each epoch is a fresh seeded shuffle. Its last incomplete batch is dropped, so no problem appears twice in a step.
    """
    steps_per_epoch = len(problems) // batch_size
    epoch, position = divmod(step - 1, steps_per_epoch)
    order = list(range(len(problems)))
    random.Random(f"order/{seed}/{epoch}").shuffle(order)
    return [problems[i] for i in order[position * batch_size : (position + 1) * batch_size]]


def fingerprints(problems: Sequence[Problem]) -> dict[str, str]:
    """By id, in order: what identifies a problem's messages, answer, task, and privileged text if it has any."""
    parts = {p.id: [p.messages, p.answer, p.task, *filter(None, [p.teacher, p.privileged])] for p in problems}
    return {
        name: hashlib.sha256(json.dumps(own, sort_keys=True, default=repr).encode()).hexdigest()[:16]
        for name, own in parts.items()
    }


def recorded_fingerprints(file: Path) -> dict[str, dict[str, str]]:
    """The `fingerprints` that a run has written, by split. Raises ValueError if the file holds anything else."""
    return TypeAdapter(dict[str, dict[str, str]]).validate_json(file.read_bytes())


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What differs between two sets of `fingerprints`, in words; empty if nothing does."""
    counts = {
        "gone": len(before.keys() - now.keys()),
        "new": len(now.keys() - before.keys()),
        "changed": sum(before[name] != now[name] for name in before.keys() & now.keys()),
    }
    if any(counts.values()):
        return ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    return "" if list(before) == list(now) else "another order"


ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles that chat templates know."""


class _Row(BaseModel):
    model_config = ConfigDict(extra="ignore", coerce_numbers_to_str=True)

    id: Annotated[str, Field(min_length=1)]
    prompt: str | None = None
    messages: list[Message] | None = None
    answer: Any
    task: str
    teacher: str = ""

    @model_validator(mode="after")
    def _check(self) -> _Row:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give exactly one of `prompt` and `messages`")
        if self.messages is not None and (not self.messages or self.messages[-1]["role"] != "user"):
            raise ValueError("`messages` must end with a user turn")
        for message in self.messages or ():
            if message["role"] not in ROLES:
                raise ValueError(f"role {message['role']!r} in `messages`: choose {', '.join(ROLES)}")
        asked = self.messages[-1]["content"] if self.messages else self.prompt or ""
        if not asked.strip():
            raise ValueError("the prompt is empty: `prompt`, or the last of `messages`, must say something")
        return self

    def check_answer(self, config: VerifierConfig) -> None:
        """Find out whether its task's verifier can judge by its answer.

        Raises:
            ValueError: it cannot, or the task has no verifier.
        """
        try:
            verifier = verifier_class(self.task, config)
        except UserError as error:
            raise ValueError(str(error)) from error
        verifier.check_answer(self.answer)

    def to_problem(self) -> Problem:
        messages = self.messages if self.messages is not None else [Message(role="user", content=self.prompt or "")]
        return Problem(self.id, tuple(messages), self.answer, self.task, teacher=self.teacher)


def read_problems(
    path: str,
    key: str,
    bad: BadRows | None = None,
    verifiers: VerifierConfig | None = None,
    *,
    privileged_column: str | None = None,
    column_is_needed: bool = True,
) -> list[Problem]:
    """All problems of a file, in file order. `key` is the config key that named the file, used in errors.

    Args:
        verifiers: settings of the verifiers, which may name further tasks. None: the defaults.
        bad: the treatment of a malformed row or a repeated id. None: stop.
        privileged_column: field with text for the teacher. None: problems have no such text.
        column_is_needed: a row without that field is malformed.

    Raises:
        UserError: no such file, no rows, or a bad row (with line and field) with a policy to stop.
    """
    bad, verifiers = bad or BadRows("stop"), verifiers or VerifierConfig()
    check_judges(verifiers)
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{key}={path}: no such file; name a JSONL file, or `arithmetic` for the built-in task")
    problems: dict[str, Problem] = {}
    for number, line, row in read_models(file, _Row):
        if isinstance(row, ValidationError):
            bad.report(path, f"line {number}", explain(row))
            continue
        try:
            row.check_answer(verifiers)
        except ValueError as error:
            bad.report(path, f"line {number}", str(error))
            continue
        if row.id in problems:
            bad.report(path, f"line {number}", f"id {row.id!r} appears twice; ids must be unique")
        elif privileged_column is None:
            problems[row.id] = row.to_problem()
        elif isinstance(text := json.loads(line).get(privileged_column, None if column_is_needed else ""), str):
            problems[row.id] = replace(row.to_problem(), privileged=text)
        else:
            fault = "missing" if text is None else f"{text!r:.40} is not text"
            remedy = 'write what the teacher may read ("" for nothing), or set data.privileged_column or context'
            bad.report(path, f"line {number}", f"{privileged_column}: {fault}, and context names privileged: {remedy}")
    if not problems:
        raise UserError(f"{key}={path}: the file has no rows")
    return list(problems.values())


def write_problems(path: Path, problems: Iterable[Problem]) -> None:
    """Write problems in the form that `read_problems` reads. The file appears whole or not at all."""
    fields = ("id", "messages", "answer", "task")
    write_rows(path, ({name: getattr(problem, name) for name in fields} for problem in problems))
