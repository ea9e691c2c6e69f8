"""SciKnowEval, reasoning level L3, multiple choice, in four domains (Feng et al., 2024).

Rows have the form of the hub, or that of the paper's code (`{idx, system, prompt, answer}`), which carry their prompts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

from mopd_nemo.data.prepare import Hub, Source, Splits
from mopd_nemo.data.rows import Row, RowError, text_field
from mopd_nemo.types import Message, Problem
from mopd_nemo.verifiers.choice import gold_letter

SYSTEM = (
    "You will be given a question and its options. Think it through inside <reasoning> and </reasoning>. Then give the "
    "letter of the right option, and only the letter, inside <answer> and </answer>."
)
_SEED = 42
_EVAL_FRACTION = 0.1
_TYPES = ("mcq-4-choices", "mcq-2-choices")


def to_problem(row: Row, default_id: str, *, domain: str) -> Problem | None:
    """A row of either form. None: a hub row of another domain, level or type."""
    if "prompt" in row and "choices" not in row:
        return _prepared(row, default_id, domain)
    details = row.get("details")
    if not isinstance(details, Mapping):
        raise RowError(f"details: {details!r} is not a mapping")
    if row.get("domain") != domain or details.get("level") != "L3" or row.get("type") not in _TYPES:
        return None
    question = f"{text_field(row, 'question')}\n\n{_options(row)}\n\nThink step by step."
    messages = (Message(role="system", content=SYSTEM), Message(role="user", content=question))
    return Problem(default_id, messages, _letter(row, "answerKey"), "choice")


def _prepared(row: Row, default_id: str, domain: str) -> Problem:
    messages = (
        Message(role="system", content=text_field(row, "system").strip()),
        Message(role="user", content=text_field(row, "prompt")),
    )
    own_id = f"sciknoweval/{domain.lower()}/{row['idx']}" if "idx" in row else default_id
    return Problem(own_id, messages, _letter(row, "answer"), "choice")


def _options(row: Row) -> str:
    choices = row.get("choices")
    texts, labels = (choices.get("text"), choices.get("label")) if isinstance(choices, Mapping) else (None, None)
    if not isinstance(texts, list) or not isinstance(labels, list) or len(texts) != len(labels) or not texts:
        raise RowError(f"choices: {choices!r} is not a mapping of as many texts as labels")
    return "\n".join(f"{label}: {text}" for label, text in zip(labels, texts, strict=True))


def _letter(row: Row, field: str) -> str:
    text = text_field(row, field)
    try:
        return gold_letter(text)
    except ValueError as error:
        raise RowError(f"{field}: {text!r} is not one letter") from error


def assign(by_split: Mapping[str, list[Problem]]) -> Splits:
    """The paper's 90/10 split of one list, by the permutation that `datasets` draws with seed 42."""
    if "train" in by_split:
        return {"train": by_split["train"], "eval": by_split.get("test", [])}
    import numpy as np

    problems = [problem for part in by_split.values() for problem in part]
    order = np.random.default_rng(_SEED).permutation(len(problems)).tolist()
    num_eval = math.ceil(_EVAL_FRACTION * len(problems))
    return {"train": [problems[i] for i in order[num_eval:]], "eval": [problems[i] for i in order[:num_eval]]}


def _source(name: str, domain: str, num_train: int, num_eval: int) -> Source:
    return Source(
        name=f"sciknoweval-{name}",
        title=f"SciKnowEval L3 multiple choice, {name}",
        hub=Hub("hicai-zju/SciKnowEval", ("test",), revision="3284f6fbf3b8063ab8a0408a65fb00157dbdc9fa"),
        download=(
            "https://huggingface.co/datasets/hicai-zju/SciKnowEval, or the prepared rows in datasets/sciknoweval of "
            "https://github.com/lasgroup/SDPO"
        ),
        to_problem=partial(to_problem, domain=domain),
        assign=assign,
        sizes={"train": num_train, "eval": num_eval},
    )


SOURCES = (
    _source("biology", "Biology", 450, 50),
    _source("chemistry", "Chemistry", 1890, 210),
    _source("physics", "Physics", 720, 80),
    _source("materials", "Material", 841, 94),
)
