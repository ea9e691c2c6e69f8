"""LiveCodeBench v6, contests of February to April 2025: the paper's 131 programming problems (Jain et al., 2025).

Two splits of the same window. `livecodebench-paper` trains on half of the tests of the very problems it evaluates on,
as the paper does: its results say nothing about unseen problems. `livecodebench-clean` has disjoint problems.
"""

from __future__ import annotations

import base64
import io
import json
import pickle
import random
import zlib
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

from mopd_nemo.data.prepare import Hub, Source, Splits, user
from mopd_nemo.data.rows import Row, RowError, text_field
from mopd_nemo.types import Problem
from mopd_nemo.verifiers.code import HiddenTests

FIRST_DAY, AFTER_LAST_DAY = datetime(2025, 2, 1), datetime(2025, 5, 1)

STDIN = """\
Write a Python program that solves the following problem. It reads the input from stdin and prints the answer to \
stdout. Hidden tests check it. You may think first; end with the whole program between ```python and ```.

{question}"""

FUNCTION = """\
Solve the following problem by completing the Python code below it. Hidden tests call it. You may think first; end \
with the whole code between ```python and ```.

{question}

```python
{starter}
```"""


class _TextOnly(pickle.Unpickler):
    """Unpickles a string and refuses everything else: LiveCodeBench packs its tests as a pickled string."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        raise RowError(f"private_test_cases: a pickle that wants {module_name}.{global_name}, not text")


def to_problem(row: Row, default_id: str) -> Problem | None:
    """A row of `code_generation_lite`. None: its contest is outside the window."""
    if not FIRST_DAY <= _date(row) < AFTER_LAST_DAY:
        return None
    question, starter = text_field(row, "question_content"), str(row.get("starter_code") or "").strip()
    public, private = _tests(row, "public_test_cases"), _tests(row, "private_test_cases")
    answer = {
        "inputs": [test["input"] for test in (*public, *private)],
        "outputs": [test["output"] for test in (*public, *private)],
        "fn_name": _metadata(row).get("func_name"),
        "num_public": len(public),
    }
    try:
        HiddenTests.read(answer)
    except ValueError as error:
        raise RowError(str(error)) from error
    prompt = FUNCTION.format(question=question, starter=starter) if starter else STDIN.format(question=question)
    own_id = f"livecodebench/{row['question_id']}" if row.get("question_id") else default_id
    return Problem(own_id, user(prompt), answer, "code")


def _date(row: Row) -> datetime:
    value = row.get("contest_date")
    try:
        date = value if isinstance(value, datetime) else datetime.fromisoformat(str(value))
    except ValueError as error:
        raise RowError(f"contest_date: {value!r} is not a date") from error
    return date.replace(tzinfo=None)


def _tests(row: Row, field: str) -> list[dict[str, str]]:
    """Tests as JSON; private ones are packed on the hub: JSON, pickled, compressed, in base64."""
    text = text_field(row, field)
    if not text.lstrip().startswith("["):
        try:
            text = _TextOnly(io.BytesIO(zlib.decompress(base64.b64decode(text)))).load()
        except (ValueError, zlib.error, pickle.UnpicklingError, EOFError) as error:
            raise RowError(f"{field}: neither JSON nor packed tests: {error}") from error
    tests = _parse_json(text, field)
    if not isinstance(tests, list) or not all(isinstance(t, dict) and {"input", "output"} <= t.keys() for t in tests):
        raise RowError(f"{field}: not a list of tests with input and output")
    return tests


def _metadata(row: Row) -> Mapping[str, Any]:
    value = row.get("metadata")
    return value if isinstance(value, Mapping) else _parse_json(value or "{}", "metadata")


def _parse_json(text: str, field: str) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError) as error:
        raise RowError(f"{field}: not valid JSON: {error}") from error


def assign_paper(by_split: Mapping[str, list[Problem]]) -> Splits:
    """Eval: all private tests of every problem; train: a seeded half of them, of the same problems."""
    rng = random.Random("livecodebench/paper")
    train, evaluation = [], []
    for problem in _all(by_split):
        tests = range(problem.answer["num_public"], len(problem.answer["inputs"]))
        if not tests:
            continue
        half = sorted(rng.sample(tests, max(len(tests) // 2, 1)))
        train.append(_with_tests(problem, half))
        evaluation.append(_with_tests(problem, list(tests)))
    return {"train": train, "eval": evaluation}


def assign_clean(by_split: Mapping[str, list[Problem]]) -> Splits:
    """Half of the problems for each split, with all their tests, public ones too."""
    problems = [_with_tests(problem, list(range(len(problem.answer["inputs"])))) for problem in _all(by_split)]
    random.Random("livecodebench/clean").shuffle(problems)
    half = len(problems) // 2
    return {"train": problems[half:], "eval": problems[:half]}


def _all(by_split: Mapping[str, list[Problem]]) -> list[Problem]:
    return sorted((problem for part in by_split.values() for problem in part), key=lambda problem: problem.id)


def _with_tests(problem: Problem, chosen: list[int]) -> Problem:
    answer = {key: [problem.answer[key][i] for i in chosen] for key in ("inputs", "outputs")}
    return replace(problem, answer=answer | {"fn_name": problem.answer["fn_name"]})


_HUB = Hub("livecodebench/code_generation_lite", ("test",), revision="refs/pr/6")
_DOWNLOAD = "https://huggingface.co/datasets/livecodebench/code_generation_lite (test6.jsonl has them all)"

SOURCES = (
    Source(
        name="livecodebench-paper",
        title="LiveCodeBench v6, the paper's split: training sees half of the tests of the problems it is evaluated on",
        hub=_HUB,
        download=_DOWNLOAD,
        to_problem=to_problem,
        assign=assign_paper,
        sizes={"train": 131, "eval": 131},
        shares_problems=True,
    ),
    Source(
        name="livecodebench-clean",
        title="LiveCodeBench v6, disjoint problems",
        hub=_HUB,
        download=_DOWNLOAD,
        to_problem=to_problem,
        assign=assign_clean,
        sizes={"train": 66, "eval": 65},
    ),
)
