"""Families of one-line Python functions, disjoint for warm start, training and evaluation.

A family is a sentence and an expression with constants `{a}` (2 to 9), `{b}` (1 to 9) and `{c}` (a vowel). Each pair of
constants gives a problem: *write a function that does this*, with the expression's values as its hidden tests.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Split = Literal["warm", "train", "eval"]
WORDS = (
    *("a", "to", "sun", "noon", "level", "Hello", "banana"),
    *("Python", "example", "umbrella", "education", "strawberry", "onion", "island"),
)
NUM_TESTS = 8
NUM_DRAWS = 100
SLIPS = ((" > ", " >= "), (" < ", " <= "))


@dataclass(frozen=True, slots=True)
class Family:
    """`takes` is a key of `_TAKES`; `returns` and `expression` hold the constants in braces."""

    name: str
    takes: str
    returns: str
    expression: str


@dataclass(frozen=True, slots=True)
class Task:
    """A family with its constants."""

    family: Family
    constants: dict[str, int | str]

    @property
    def prompt(self) -> str:
        words = _TAKES[self.family.takes][0]
        wanted = self.family.returns.format(**self.constants)
        return (
            f"Write a Python function named f that takes {words} and returns {wanted}. "
            "Answer with the code only, between ```python and ```."
        )

    @property
    def parameters(self) -> str:
        return _TAKES[self.family.takes][1]

    @property
    def solution(self) -> str:
        expression = self.family.expression.format(**self.constants)
        return f"```python\ndef f({self.parameters}):\n    return {expression}\n```"

    def tests(self, rng: random.Random) -> dict[str, Any]:
        """Hidden tests in the form of the `code` task: one JSON argument per line, the value as JSON.

        One that exposes each slip in a comparison, then as many different values as there are, in turn, so that no
        constant passes.
        """
        expression = self.family.expression.format(**self.constants)
        numbers = [value for value in self.constants.values() if isinstance(value, int)] or [0]
        near = [value + by for value in numbers for by in (-1, 0, 1)]
        draw = _TAKES[self.family.takes][2]
        drawn = [json.loads(text) for text in dict.fromkeys(json.dumps(draw(rng, near)) for _ in range(NUM_DRAWS))]
        values = self._values(expression, drawn)
        by_value: dict[str, list[int]] = {}
        for number, value in enumerate(values):
            by_value.setdefault(value, []).append(number)
        turns = itertools.chain(*itertools.zip_longest(*by_value.values()))
        exposing = (
            next(number for number, value in enumerate(self._values(slip, drawn)) if value != values[number])
            for slip in (expression.replace(right, wrong) for right, wrong in SLIPS if right in expression)
        )
        chosen = [number for number in dict.fromkeys([*exposing, *turns]) if number is not None][:NUM_TESTS]
        return {
            "inputs": ["\n".join(map(json.dumps, drawn[number])) for number in chosen],
            "outputs": [values[number] for number in chosen],
            "fn_name": "f",
        }

    def _values(self, expression: str, arguments: list[list[Any]]) -> list[str]:
        function = eval(f"lambda {self.parameters}: {expression}")
        return [json.dumps(function(*one)) for one in arguments]


def tasks(split: Split, each: int, seed: int) -> Iterator[Task]:
    """Up to `each` tasks of every family of a split, with different constants where the family has any."""
    for family in FAMILIES[split]:
        rng = random.Random(f"{family.name}/{seed}")
        yield from (Task(family, constants) for constants in _constants(family, each, rng))


def problems(split: Split, each: int, seed: int) -> Iterator[dict[str, Any]]:
    """Rows of the project's `code` task."""
    for task in tasks(split, each, seed):
        name = "-".join([task.family.name, *map(str, task.constants.values())])
        tests = task.tests(random.Random(f"{name}/{seed}/tests"))
        yield {"id": f"{split}/{name}", "prompt": task.prompt, "task": "code", "answer": tests}


def _constants(family: Family, each: int, rng: random.Random) -> list[dict[str, int | str]]:
    text = family.returns
    choices: dict[str, list[Any]] = {"a": [*range(2, 10)], "b": [*range(1, 10)], "c": [*"aeiou"]}
    used = [name for name in choices if f"{{{name}}}" in text]
    found: list[dict[str, int | str]] = [{}]
    for name in used:
        found = [{**one, name: value} for one in found for value in choices[name]]
    return rng.sample(found, min(each, len(found)))


def _number(rng: random.Random, near: Sequence[int]) -> int:
    return rng.choice(near) if rng.random() < 0.4 else rng.randint(-20, 20)


def _pair(rng: random.Random, near: Sequence[int]) -> list[int]:
    x = _number(rng, near)
    return [x, rng.choice(near) - x if rng.random() < 0.4 else _number(rng, near)]


def _numbers(rng: random.Random, near: Sequence[int]) -> list[int]:
    return [_number(rng, near) for _ in range(rng.randint(2, 6))]


_TAKES: dict[str, tuple[str, str, Callable[[random.Random, Sequence[int]], list[Any]]]] = {
    "number": ("a number x", "x", lambda rng, near: [_number(rng, near)]),
    "pair": ("two numbers x and y", "x, y", _pair),
    "list": ("a list of numbers", "l", lambda rng, near: [_numbers(rng, near)]),
    "string": ("a string", "s", lambda rng, near: [rng.choice(WORDS)]),
}
"""What f is given: in words, as parameters, and one draw of arguments, some of them near the constants."""

FAMILIES: dict[Split, tuple[Family, ...]] = {
    "warm": (
        Family("minus", "number", "x minus {b}", "x - {b}"),
        Family("square", "number", "the square of x", "x * x"),
        Family("negative", "number", "True if x is negative, otherwise False", "x < 0"),
        Family("smaller", "pair", "the smaller one", "min(x, y)"),
        Family("product", "pair", "their product plus {b}", "x * y + {b}"),
        Family("total", "list", "their sum", "sum(l)"),
        Family("equal", "list", "how many of them are equal to {b}", "l.count({b})"),
        Family("scaled", "list", "a new list with each number multiplied by {a}", "[v * {a} for v in l]"),
        Family("capitals", "string", "it in capital letters", "s.upper()"),
        Family("length", "string", "its length plus {b}", "len(s) + {b}"),
        Family("last-letter", "string", "its last letter", "s[-1]"),
        Family("below", "list", "how many of them are below {b}", "sum(v < {b} for v in l)"),
    ),
    "train": (
        Family("distance", "number", "the absolute difference between x and {b}", "abs(x - {b})"),
        Family("larger", "pair", "the larger one", "max(x, y)"),
        Family("sum-over", "pair", "True if their sum is greater than {b}, otherwise False", "x + y > {b}"),
        Family("even-sum", "list", "the sum of its even numbers", "sum(v for v in l if v % 2 == 0)"),
        Family("added", "list", "a new list with {a} added to each number", "[v + {a} for v in l]"),
        Family("quotient", "number", "x divided by {a}", "x / {a}"),
        Family("largest-plus", "list", "its largest number plus {b}", "max(l) + {b}"),
        Family("sum-minus", "list", "their sum minus {b}", "sum(l) - {b}"),
        Family("less", "number", "True if x is less than {a}, otherwise False", "x < {a}"),
        Family("square-plus", "number", "the square of x plus {b}", "x * x + {b}"),
        Family("first-greater", "pair", "True if x is greater than y, otherwise False", "x > y"),
        Family("ascending", "list", "a new list sorted from smallest to largest", "sorted(l)"),
        Family("first-capital", "string", "its first letter in capitals", "s[0].upper()"),
        Family("appended", "string", "it with the letter '{c}' added to its end", 's + "{c}"'),
        Family("first-times", "list", "its first number times {a}", "l[0] * {a}"),
        Family(
            "starts-with", "string", "True if it begins with the letter '{c}', otherwise False", 's.startswith("{c}")'
        ),
        Family("gap", "pair", "the absolute difference between them", "abs(x - y)"),
        Family("squares", "list", "a new list with the square of each number", "[v * v for v in l]"),
        Family("twice", "string", "it written twice in a row", "s * 2"),
        Family("large-sum", "list", "the sum of the numbers greater than {b}", "sum(v for v in l if v > {b})"),
    ),
    "eval": (
        Family("greater", "number", "True if x is greater than {a}, otherwise False", "x > {a}"),
        Family("cube", "number", "the cube of x plus {b}", "x ** 3 + {b}"),
        Family("how-many", "list", "how many numbers there are plus {b}", "len(l) + {b}"),
        Family("capped", "number", "x if x is less than {b}, otherwise {b}", "min(x, {b})"),
        Family("minus-y", "pair", "x minus y", "x - y"),
        Family("both-over", "pair", "True if both are greater than {b}, otherwise False", "x > {b} and y > {b}"),
        Family("average", "pair", "their average", "(x + y) / 2"),
        Family("divides-sum", "pair", "the remainder of their sum when divided by {a}", "(x + y) % {a}"),
        Family("range", "list", "the difference between the largest and the smallest", "max(l) - min(l)"),
        Family("square-sum", "list", "the sum of their squares", "sum(v * v for v in l)"),
        Family("multiples", "list", "a list with only the numbers divisible by {a}", "[v for v in l if v % {a} == 0]"),
        Family("ends", "list", "the sum of its first and its last number", "l[0] + l[-1]"),
        Family("backwards", "list", "a new list with the numbers in reverse order", "l[::-1]"),
        Family("negatives", "list", "how many of them are negative", "sum(v < 0 for v in l)"),
        Family("first-numbers", "list", "a new list with its first two numbers", "l[:2]"),
        Family("count-letter", "string", "how many times the letter '{c}' occurs in it", 's.count("{c}")'),
        Family("palindrome", "string", "True if it reads the same backwards, otherwise False", "s == s[::-1]"),
        Family("ending", "string", "its last two letters", "s[-2:]"),
        Family("replaced", "string", "it with every letter '{c}' replaced by '*'", 's.replace("{c}", "*")'),
        Family("small-letters", "string", "it in small letters", "s.lower()"),
    ),
}
