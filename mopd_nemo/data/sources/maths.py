"""Mathematics: DeepMath to train on, AIME and HMMT to evaluate on as the paper does, and GSM8K."""

from __future__ import annotations

from mopd_nemo.data.prepare import Hub, Source, all_for_evaluation, all_for_training, train_and_test, user
from mopd_nemo.data.rows import Row, RowError, text_field
from mopd_nemo.types import Problem

PROMPT = "{problem}\n\nReason step by step, and put the final answer inside \\boxed{{}}."
MIN_DIFFICULTY = 6.0
"""Of DeepMath's rows, as in the paper."""


def from_competition(row: Row, default_id: str) -> Problem:
    """A row `{problem, answer}`, where the answer is an integer or LaTeX."""
    answer = row.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, str | int) or not str(answer).strip():
        raise RowError(f"answer: {answer!r} is neither text nor an integer")
    return _problem(default_id, text_field(row, "problem"), str(answer))


def from_deepmath(row: Row, default_id: str) -> Problem | None:
    """A row `{question, final_answer, difficulty}`. None: it is too easy."""
    difficulty = row.get("difficulty")
    if not isinstance(difficulty, int | float):
        raise RowError(f"difficulty: {difficulty!r} is not a number")
    question, answer = text_field(row, "question"), text_field(row, "final_answer")
    return None if difficulty < MIN_DIFFICULTY else _problem(default_id, question, answer)


def from_gsm8k(row: Row, default_id: str) -> Problem:
    """A row `{question, answer}`, where the answer is a solution that ends in `#### number`."""
    question = text_field(row, "question")
    _, mark, gold = text_field(row, "answer").rpartition("####")
    if not mark or not gold.strip():
        raise RowError("answer: does not end in `#### number`")
    return _problem(default_id, question, gold.strip())


def _problem(id_: str, question: str, answer: str) -> Problem:
    return Problem(id_, user(PROMPT.format(problem=question)), answer, "math")


def _competition(name: str, title: str, repo: str) -> Source:
    return Source(
        name=name,
        title=title,
        hub=Hub(repo, ("train",)),
        download=f"https://huggingface.co/datasets/{repo}",
        to_problem=from_competition,
        assign=all_for_evaluation,
        sizes={"eval": 30},
    )


SOURCES = (
    Source(  # He et al., 2025
        name="deepmath",
        title="DeepMath-103K, difficulty 6 and above",
        hub=Hub("zwhe99/DeepMath-103K", ("train",)),
        download="https://huggingface.co/datasets/zwhe99/DeepMath-103K",
        to_problem=from_deepmath,
        assign=all_for_training,
        sizes={},
    ),
    _competition("aime2024", "AIME 2024", "HuggingFaceH4/aime_2024"),
    _competition("aime2025", "AIME 2025", "MathArena/aime_2025"),
    _competition("hmmt-feb-2025", "HMMT February 2025", "MathArena/hmmt_feb_2025"),
    _competition("hmmt-nov-2025", "HMMT November 2025", "MathArena/hmmt_nov_2025"),
    Source(  # Cobbe et al., 2021
        name="gsm8k",
        title="GSM8K",
        hub=Hub("openai/gsm8k", ("train", "test"), config="main"),
        download="https://github.com/openai/grade-school-math (train.jsonl and test.jsonl)",
        to_problem=from_gsm8k,
        assign=train_and_test,
        sizes={"train": 7473, "eval": 1319},
    ),
)
