"""GSM8K: grade-school word problems (Cobbe et al., 2021)."""

from __future__ import annotations

from mopd_nemo.data.rows import Row, RowError, text_field
from mopd_nemo.data.sources.base import BOXED, Hub, Source, train_and_test, user
from mopd_nemo.types import Problem


def to_problem(row: Row, default_id: str) -> Problem:
    """`{question, answer}`; the answer is a solution that ends in `#### number`."""
    question = text_field(row, "question")
    _, mark, gold = text_field(row, "answer").rpartition("####")
    if not mark or not gold.strip():
        raise RowError("answer: does not end in `#### number`")
    return Problem(default_id, user(BOXED.format(problem=question)), gold.strip(), "math")


SOURCE = Source(
    name="gsm8k",
    title="GSM8K",
    hub=Hub("openai/gsm8k", ("train", "test"), config="main"),
    download="https://github.com/openai/grade-school-math (train.jsonl and test.jsonl)",
    to_problem=to_problem,
    assign=train_and_test,
    sizes={"train": 7473, "eval": 1319},
)
