"""When an output is the expected one. The comparison is made here, outside the sandbox, on plain data."""

from __future__ import annotations

import json
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any

_INTEGER_DIGITS = 50_000
"""LiveCodeBench's limit."""


def loads(text: str) -> Any:
    """JSON, with integers of up to 50,000 digits. Python's own limit is 4,300, and is one for the whole process.

    Raises:
        ValueError: it is not JSON, or a number is longer.
    """
    return json.loads(text, parse_int=_integer)


def _integer(text: str) -> int:
    if len(text.lstrip("-")) > _INTEGER_DIGITS:
        raise ValueError(f"an integer of more than {_INTEGER_DIGITS} digits")
    return int(text) if len(text) <= 4300 else int(Decimal(text))


def same_text(printed: str, expected: str) -> bool:
    """LiveCodeBench's rule for stdout: line by line without outer spaces; lines of numbers compare as numbers."""
    got, want = (text.strip().split("\n") for text in (printed, expected))
    return len(got) == len(want) and all(_same_line(g.strip(), w.strip()) for g, w in zip(got, want, strict=True))


def _same_line(got: str, want: str) -> bool:
    if got == want:
        return True
    tokens, expected = got.split(), want.split()
    if len(tokens) != len(expected):
        return False
    try:
        # Exact decimals: 1.0 is 1, but neighbouring large integers stay apart.
        return [Decimal(token) for token in tokens] == [Decimal(token) for token in expected]
    except InvalidOperation:
        return False


def same_value(value: str, expected: str) -> bool:
    """LiveCodeBench's rule for functions: equal as Python values, where a returned tuple counts as a list."""
    try:
        got = _from_plain(loads(value))
    except (ValueError, TypeError, ArithmeticError, RecursionError):
        return False
    if isinstance(got, tuple):
        got = list(got)
    return bool(got == loads(expected))


class _Foreign:
    """An object that is not plain data: equal to nothing."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return False


def _from_plain(value: Any) -> Any:
    """Undo the tags that the sandbox puts on what JSON cannot tell apart."""
    if isinstance(value, list):
        return [_from_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    match tag:
        case "dict":
            return {_from_plain(key): _from_plain(item) for key, item in content}
        case "tuple":
            return tuple(_from_plain(item) for item in content)
        case "set" | "frozenset":
            return {_from_plain(item) for item in content}
        case "fraction":
            return Fraction(*content)
        case "decimal":
            return Decimal(content)
        case "complex":
            return complex(*content)
    return _Foreign()


def same_text_in_paper(printed: str, expected: str) -> bool:
    """The paper's code: the whole text, newlines as spaces, character by character."""
    got, want = (text.strip().replace("\n", " ").replace("\r", "") for text in (printed, expected))
    return got == want


def same_value_in_paper(value: str, expected: str) -> bool:
    """The paper's code: equal as sorted JSON, where tuples are lists but 3.0 is not 3."""
    try:
        got = _to_json(_from_plain(json.loads(value)))
        return json.dumps(got, sort_keys=True) == json.dumps(json.loads(expected), sort_keys=True)
    except (ValueError, TypeError, ArithmeticError, RecursionError):
        return False


def _to_json(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _to_json(item) for key, item in value.items()}
    return value
