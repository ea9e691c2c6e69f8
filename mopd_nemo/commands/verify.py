"""`mopd verify`: judge responses in a JSONL file."""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.progress import MofNCompleteColumn, Progress

from mopd_nemo.commands import OptionalConfigFile, Overrides, check_output
from mopd_nemo.config import UserError
from mopd_nemo.config.load import load_config
from mopd_nemo.config.verifiers import VerifierConfig
from mopd_nemo.files import explain, read_models, replacing, text_lines, to_line
from mopd_nemo.terminal import Terminal
from mopd_nemo.types import Outcome, Verdict
from mopd_nemo.verifiers import verifier_class
from mopd_nemo.verifiers.pool import VerifierPool

_AHEAD = 256
"""Limit of rows in memory: those being judged, and those that wait for an earlier row."""


class _Row(BaseModel):
    model_config = ConfigDict(extra="ignore")

    id: str | int
    response: str
    answer: Any = None
    tests: Any = None
    finished: bool = True


@dataclass(frozen=True, slots=True)
class _PendingRow:
    """A row with its pending verdict, or with the reason why it cannot be judged."""

    id: str | int | None
    verdict: Future[Verdict] | None
    reason: str = ""


def verify(
    task: Annotated[
        str,
        typer.Option(
            help="math, choice, tool, code or arithmetic; one of verifier.custom or verifier.http; or module:Name."
        ),
    ],
    source: Annotated[
        Path,
        typer.Option("--input", "-i", help="JSONL with {id, response, answer}, or {id, response, tests} for code."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="JSONL with {id, reward, outcome, feedback, seconds}.")
    ],
    workers: Annotated[int | None, typer.Option(min=1, help="Worker processes. Default: one a core.")] = None,
    feedback: Annotated[bool, typer.Option("--feedback", help="Write what the verifier says about failures.")] = False,
    config: OptionalConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Judge responses in a file. Exit code 1 when a row could not be judged.

    mopd verify --task code --input responses.jsonl --output verdicts.jsonl verifier.code.mode=paper
    """
    settings = load_config(config, overrides or []).verifier
    if workers is not None:
        settings = settings.model_copy(update={"workers": workers})
    outcomes = _verify_file(task, source, output, settings, feedback)
    raise typer.Exit(1 if outcomes[Outcome.VERIFIER_ERROR] else 0)


def _verify_file(task: str, source: Path, output: Path, config: VerifierConfig, feedback: bool) -> Counter[str]:
    """Judge every row of `source`. Returns the number of rows by outcome."""
    verifier_class(task, config, key="--task")
    if not source.is_file():
        raise UserError(f"--input {source}: no such file")
    total = sum(1 for _, line in text_lines(source) if line.strip())
    if not total:
        raise UserError(f"--input {source}: the file has no rows")
    check_output(output, "--output")
    console = Terminal(stderr=True)
    outcomes: Counter[str] = Counter()
    with (
        VerifierPool(config, [task]) as pool,
        replacing(output) as written,
        Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console) as progress,
    ):
        if pool.sandbox:
            console.print(f"programs run in the sandbox {pool.sandbox}", soft_wrap=True)
        for judging in progress.track(_judge_rows(task, source, pool), total, description=f"judging {task}"):
            row = _result(judging, feedback)
            outcomes[row["outcome"]] += 1
            if row["outcome"] == Outcome.VERIFIER_ERROR:
                console.print(f"{row['error']} (id {row['id']!r})", style="yellow", soft_wrap=True)
            written.write(to_line(row))
    summary = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
    console.print(f"{output}: {summary}", soft_wrap=True)
    return outcomes


def _judge_rows(task: str, source: Path, pool: VerifierPool) -> Iterator[_PendingRow]:
    """Every row in file order. Judging runs ahead by some rows."""
    ahead: deque[_PendingRow] = deque()
    for number, line, row in read_models(source, _Row):
        where = f"{source}, line {number}"
        if isinstance(row, ValidationError):
            ahead.append(_PendingRow(_id_of(line), None, f"{where}: {explain(row)}"))
        else:
            ahead.append(_begin(task, row, where, pool))
        if len(ahead) > _AHEAD:
            yield ahead.popleft()
    yield from ahead


def _begin(task: str, row: _Row, where: str, pool: VerifierPool) -> _PendingRow:
    field = "tests" if task == "code" else "answer"
    answer = getattr(row, field)
    if answer is None:
        return _PendingRow(row.id, None, f"{where}: {field}: missing")
    try:
        pool.class_of(task).check_answer(answer)
    except ValueError as error:
        return _PendingRow(row.id, None, f"{where}: {error}")
    return _PendingRow(row.id, pool.submit(task, row.response, answer, row.finished), where)


def _id_of(line: str) -> Any:
    try:
        return json.loads(line).get("id")
    except (ValueError, AttributeError):
        return None


def _result(judging: _PendingRow, feedback: bool) -> dict[str, Any]:
    """The row to write. A row that was not judged has no reward: 0 would say that the response is wrong."""
    if judging.verdict is None:
        error, verdict = judging.reason, Verdict(0.0, Outcome.VERIFIER_ERROR)
    else:
        verdict = judging.verdict.result()
        error = f"{judging.reason}: {verdict.details.get('error', '')}"
    judged = verdict.outcome is not Outcome.VERIFIER_ERROR
    row = {
        "id": judging.id,
        "reward": verdict.reward if judged else None,
        "outcome": verdict.outcome,
        "feedback": verdict.feedback if feedback else "",
        "seconds": round(verdict.seconds, 4),
    }
    return row if judged else row | {"error": error}
