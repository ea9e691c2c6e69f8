"""What of a failed attempt differs from successful ones, for `peers.failure_form: contrast`.

A program is compared statement by statement as Python parses it, so that layout and comments make no difference; other
text sentence by sentence and line by line. What the failure leaves out is not said: nothing of it could be shown.
"""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Iterator, Sequence

_BLOCK = re.compile(r"```[^\n`]*\n(.*?)```", re.DOTALL)
_STEP = re.compile(r"\n+|(?<=[.!?;])\s+")
"""Between two steps: a line break, or the end of a sentence."""


def difference(failure: str, successes: Sequence[str]) -> str:
    """The parts of a failure that no success has, one a line, in its order; empty when there are none.

    >>> difference("7+5 is 12. So 12 modulo 10 is 1.", ["7+5 is 12. So 12 modulo 10 is 2."])
    'So 12 modulo 10 is 1.'
    """
    programs = [program_of(text) for text in (failure, *successes)]
    parsed = [program for program in programs if program is not None]
    if len(parsed) == len(programs):
        failed, *right = [list(_statements(program.body)) for program in parsed]
    else:
        failed, *right = [_steps(text) for text in (failure, *successes)]
    known = {part for parts in right for part in parts}
    return "\n".join(part for part in dict.fromkeys(failed) if part not in known)


def program_of(text: str) -> ast.Module | None:
    """The last fenced block as a Python program; None when there is none or it does not parse."""
    blocks = _BLOCK.findall(text)
    try:
        return ast.parse(blocks[-1]) if blocks else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _steps(text: str) -> list[str]:
    """Its steps without the space around and between their words."""
    return [" ".join(step.split()) for step in _STEP.split(text) if step.strip() and not step.startswith("```")]


def _statements(body: Sequence[ast.stmt]) -> Iterator[str]:
    """Every statement in its normal spelling; of one with a body, its head and then what is inside."""
    for statement in body:
        blocks = [name for name in ("body", "orelse", "finalbody") if getattr(statement, name, None)]
        if not blocks or isinstance(statement, ast.Try | ast.TryStar):
            yield ast.unparse(statement)
            continue
        head = copy.copy(statement)
        for name in blocks:
            setattr(head, name, [ast.Pass()] if name == "body" else [])
        yield ast.unparse(head).removesuffix("pass").rstrip()
        for name in blocks:
            yield from _statements(getattr(statement, name))
