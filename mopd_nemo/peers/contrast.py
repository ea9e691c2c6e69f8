"""What of an attempt differs from others, for `peers.failure_form: contrast` and for `mopd analyze branches`.

A program is compared statement by statement as Python parses it, so that layout and comments make no difference; other
text sentence by sentence and line by line. What the failure leaves out is not said: nothing of it could be shown.
"""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

_BLOCK = re.compile(r"```[^\n`]*\n(.*?)```", re.DOTALL)
_STEP = re.compile(r"\n+|(?<=[.!?;])\s+")
"""Between two steps: a line break, or the end of a sentence."""
_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")


@dataclass(frozen=True, slots=True)
class Part:
    """A statement of a program, or a step of other text."""

    text: str
    """In its normal spelling."""
    start: int
    """Index into the response of the character that it begins with."""


def difference(failure: str, successes: Sequence[str]) -> str:
    """The parts of a failure that no success has, one a line, in its order; empty when there are none.

    >>> difference("7+5 is 12. So 12 modulo 10 is 1.", ["7+5 is 12. So 12 modulo 10 is 2."])
    'So 12 modulo 10 is 1.'
    """
    return "\n".join(dict.fromkeys(part.text for part in different_parts(failure, successes)))


def different_parts(response: str, others: Sequence[str]) -> list[Part]:
    """The parts of a response that none of the others has, in its order.

    >>> different_parts("7+5 is 12. So 12 modulo 10 is 1.", ["7+5 is 12. So 12 modulo 10 is 2."])[0].start
    11
    """
    programs = [_program(text) for text in (response, *others)]
    parsed = [program for program in programs if program is not None]
    if len(parsed) == len(programs):
        own, *known = [list(_statements(tree.body, starts)) for tree, starts in parsed]
    else:
        own, *known = [list(_steps(text)) for text in (response, *others)]
    texts = {part.text for parts in known for part in parts}
    return [part for part in own if part.text not in texts]


class _Starts:
    """Where the lines of a program begin in the response that it is a part of."""

    def __init__(self, source: str, start: int) -> None:
        self._lines = _LINE.findall(source)
        self._starts = [start, *(start + end for end in accumulate(map(len, self._lines)))]

    def of(self, node: ast.stmt) -> int:
        """The index of a statement's first character. Python counts bytes within a line."""
        before = self._lines[node.lineno - 1].encode()[: node.col_offset]
        return self._starts[node.lineno - 1] + len(before.decode())


def _program(text: str) -> tuple[ast.Module, _Starts] | None:
    """The last fenced block as a Python program; None when there is none or it does not parse."""
    blocks = list(_BLOCK.finditer(text))
    try:
        return (ast.parse(blocks[-1][1]), _Starts(blocks[-1][1], blocks[-1].start(1))) if blocks else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _steps(text: str) -> Iterator[Part]:
    """Its steps without the space around and between their words."""
    ends = [(match.start(), match.end()) for match in _STEP.finditer(text)]
    for start, end in zip(
        [0, *(after for _, after in ends)], [*(before for before, _ in ends), len(text)], strict=True
    ):
        step = text[start:end]
        if step.strip() and not step.startswith("```"):
            yield Part(" ".join(step.split()), end - len(step.lstrip()))


def _statements(body: Sequence[ast.stmt], starts: _Starts) -> Iterator[Part]:
    """Every statement in its normal spelling; of one with a body, its head and then what is inside."""
    for statement in body:
        start = starts.of(statement)
        blocks = [name for name in ("body", "orelse", "finalbody") if getattr(statement, name, None)]
        if not blocks or isinstance(statement, ast.Try | ast.TryStar):
            yield Part(ast.unparse(statement), start)
            continue
        head = copy.copy(statement)
        for name in blocks:
            setattr(head, name, [ast.Pass()] if name == "body" else [])
        yield Part(ast.unparse(head).removesuffix("pass").rstrip(), start)
        for name in blocks:
            yield from _statements(getattr(statement, name), starts)
