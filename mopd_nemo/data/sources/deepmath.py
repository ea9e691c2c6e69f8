"""DeepMath-103K with difficulty at least 6, the paper's training set for mathematics (He et al., 2025)."""

from __future__ import annotations

from mopd_nemo.data.rows import Row, RowError, text_field
from mopd_nemo.data.sources.base import BOXED, Hub, Source, all_for_training, user
from mopd_nemo.types import Problem

MIN_DIFFICULTY = 6.0


def to_problem(row: Row, default_id: str) -> Problem | None:
    """`{question, final_answer, difficulty}`; easier rows are not part of it."""
    difficulty = row.get("difficulty")
    if not isinstance(difficulty, int | float):
        raise RowError(f"difficulty: {difficulty!r} is not a number")
    question, answer = text_field(row, "question"), text_field(row, "final_answer")
    if difficulty < MIN_DIFFICULTY:
        return None
    return Problem(default_id, user(BOXED.format(problem=question)), answer, "math")


SOURCE = Source(
    name="deepmath",
    title="DeepMath-103K, difficulty 6 and above",
    hub=Hub("zwhe99/DeepMath-103K", ("train",)),
    download="https://huggingface.co/datasets/zwhe99/DeepMath-103K",
    to_problem=to_problem,
    assign=all_for_training,
    sizes={},
)
