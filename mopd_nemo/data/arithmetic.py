"""The built-in task: chains of single-digit operations, worked left to right modulo 10.

    7+5-3*4  ->  7+5=2, 2-3=9, 9*4=6, \\boxed{6}

A hash of their text splits the problems into three disjoint parts: for the preparation of the embedded model, for
training and for evaluation.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from typing import Literal

from mopd_nemo.types import Message, Problem

Split = Literal["prepare", "train", "eval"]

SIZES = {"train": 4096, "eval": 512}
"""Problems of the two splits that runs use."""
PREFIX = "arithmetic/"
"""Of a problem's id; the expression follows."""
MIN_OPERATIONS = 3
MAX_OPERATIONS = 8
INSTRUCTION = "Work from left to right and keep only the last digit: {expression}\nEnd with \\boxed{{digit}}."


def apply(value: int, operator: str, digit: int) -> int:
    """One step modulo 10."""
    match operator:
        case "+":
            return (value + digit) % 10
        case "-":
            return (value - digit) % 10
        case "*":
            return (value * digit) % 10
    raise ValueError(f"unknown operator {operator!r}")


def parse(expression: str) -> tuple[int, list[tuple[str, int]]]:
    """`7+5-3` -> (7, [("+", 5), ("-", 3)])."""
    operations = [(expression[i], int(expression[i + 1])) for i in range(1, len(expression), 2)]
    return int(expression[0]), operations


def evaluate(expression: str) -> int:
    """Value of a chain, left to right, modulo 10."""
    value, operations = parse(expression)
    for operator, digit in operations:
        value = apply(value, operator, digit)
    return value


def worked_solution(problem: Problem) -> str:
    """A right answer to a problem of this task, line by line.

    >>> worked_solution(to_problem("7+5-3"))
    '7+5=2\\n2-3=9\\n\\\\boxed{9}'
    """
    value, operations = parse(problem.id.removeprefix(PREFIX))
    lines = []
    for operator, digit in operations:
        result = apply(value, operator, digit)
        lines.append(f"{value}{operator}{digit}={result}")
        value = result
    return "\n".join([*lines, f"\\boxed{{{value}}}"])


def split_of(expression: str) -> Split:
    """The part of an expression: 80 % prepare, 10 % train, 10 % eval."""
    bucket = int.from_bytes(hashlib.sha256(expression.encode()).digest()[:4], "big") % 10
    return "train" if bucket == 8 else "eval" if bucket == 9 else "prepare"


def random_expressions(split: Split, seed: int) -> Iterator[str]:
    """An endless seeded stream of expressions of one split. Expressions may repeat."""
    rng = random.Random(f"arithmetic/{split}/{seed}")
    while True:
        chain = [str(rng.randrange(10))]
        num_operations = rng.randint(MIN_OPERATIONS, MAX_OPERATIONS)
        chain += [rng.choice("+-*") + str(rng.randint(1, 9)) for _ in range(num_operations)]
        expression = "".join(chain)
        if split_of(expression) == split:
            yield expression


def make_problems(split: Split, count: int) -> list[Problem]:
    """The first `count` distinct problems of a split, the same in every call."""
    expressions: dict[str, None] = {}
    for expression in random_expressions(split, seed=0):
        if len(expressions) == count:
            break
        expressions[expression] = None
    return [to_problem(expression) for expression in expressions]


def to_problem(expression: str) -> Problem:
    """Wrap an expression as a prompt with its answer."""
    message: Message = {"role": "user", "content": INSTRUCTION.format(expression=expression)}
    return Problem(
        id=PREFIX + expression,
        messages=(message,),
        answer=str(evaluate(expression)),
        task="arithmetic",
    )
