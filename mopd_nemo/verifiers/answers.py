"""Finding and comparing final answers: the parts that need no algebra."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from mopd_nemo.verifiers.base import AnswerError

_OPENING = "\\boxed{"
_STATED = re.compile(
    r"(?im)^\s*(?:####|(?:\*\*)?(?:the\s+)?(?:final\s+)?answer(?:\*\*)?(?:\s+is)?\s*(?:\*\*)?\s*:(?:\*\*)?)\s*(.+?)\s*$"
    r"|(?:the\s+)?(?:final\s+)answer\s+is\s+:?\s*(.+?)(?:[.]?\s*$|\.\s)"
)
"""`#### x`, a line `Answer: x`, and `the final answer is x`."""


def after_thinking(text: str) -> str:
    """What follows the last closed thinking block: an answer inside it is not an answer."""
    return text.rpartition("</think>")[2]


def last_boxed(text: str) -> str | None:
    """Content of the last complete `\\boxed{...}`, nested braces included; None without one."""
    start = text.rfind(_OPENING)
    while start != -1:
        depth = 0
        for end in range(start + len(_OPENING) - 1, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[start + len(_OPENING) : end]
        start = text.rfind(_OPENING, 0, start)
    return None


def final_answer(text: str) -> str | None:
    """The last boxed answer, else the last one stated in words."""
    text = after_thinking(text)
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed.strip() or None
    stated = [match[1] or match[2] for match in _STATED.finditer(text)]
    return stated[-1].strip(" .*") or None if stated else None


def canonical(answer: str) -> Fraction | str:
    """`1,000`, `$1000$`, `50\\%` and `2000/2` compare as numbers; anything else as text without spaces."""
    text = re.sub(r"[\s$]|\\?%|\.$", "", answer.replace("\\$", ""))
    number = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    # Only plain numbers reach Fraction: "1e999999999" would be computed for hours.
    if len(number) <= 100 and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)|[+-]?\d+/[1-9]\d*", number):
        return Fraction(number)
    return text


def gold_text(answer: Any) -> str:
    """The gold answer of a row: a number, LaTeX, a boxed expression, or a solution that ends in `#### x` (GSM8K).

    Raises:
        AnswerError: it is empty or of another type.
    """
    if not isinstance(answer, str | int | float) or isinstance(answer, bool):
        raise AnswerError(f"answer={answer!r}: a math answer is text or a number")
    text = str(answer)
    if "####" in text:
        text = text.rpartition("####")[2]
    text = (last_boxed(text) or text).strip()
    if not text:
        raise AnswerError(f"answer={answer!r}: a math answer cannot be empty")
    return text
