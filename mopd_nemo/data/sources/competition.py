"""AIME 2024 and 2025, HMMT February and November 2025: the paper's evaluations of mathematics."""

from __future__ import annotations

from mopd_nemo.data.rows import Row, RowError, text_field
from mopd_nemo.data.sources.base import BOXED, Hub, Source, all_for_evaluation, user
from mopd_nemo.types import Problem


def to_problem(row: Row, default_id: str) -> Problem:
    """`{problem, answer}`; an answer is an integer or LaTeX."""
    answer = row.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, str | int) or not str(answer).strip():
        raise RowError(f"answer: {answer!r} is neither text nor an integer")
    return Problem(default_id, user(BOXED.format(problem=text_field(row, "problem"))), str(answer), "math")


def _source(name: str, title: str, repo: str) -> Source:
    return Source(
        name=name,
        title=title,
        hub=Hub(repo, ("train",)),
        download=f"https://huggingface.co/datasets/{repo}",
        to_problem=to_problem,
        assign=all_for_evaluation,
        sizes={"eval": 30},
    )


SOURCES = (
    _source("aime2024", "AIME 2024", "HuggingFaceH4/aime_2024"),
    _source("aime2025", "AIME 2025", "MathArena/aime_2025"),
    _source("hmmt-feb-2025", "HMMT February 2025", "MathArena/hmmt_feb_2025"),
    _source("hmmt-nov-2025", "HMMT November 2025", "MathArena/hmmt_nov_2025"),
)
