r"""Numbers that need no algebra: exact values, and how precisely they are written.

The rule for equality (docs/verifiers.md):

* Exact values are equal or not; there is no tolerance.
* A decimal that stands for a number without a finite decimal (1/3, \pi) must be that number rounded to its last place:
  a gold answer of at least 3 significant digits, or a response of at least 5.
* A decimal that is longer than the gold answer's may round to it where the gold answer has at least 5 digits.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

GOLD_DIGITS, FOUND_DIGITS = 3, 5
"""Significant digits from which a decimal may stand for a number that has no finite one."""
_LONGEST = 2000
"""Limit of characters and of powers of ten in a plain number: 1e999999999 would take hours to compute."""

_DIGITS = r"(?:[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d{0,2}(?: \d{3})+(?!\d)|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d*)?|\.\d+)"
_SIGN = r"(?:[-+]\s*)?"
_PLAIN = re.compile(
    rf"(?P<sign>{_SIGN})(?P<mantissa>{_DECIMAL})"
    r"(?:[eE](?P<e>[-+]?\d+)|\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*(?:\{\s*(?P<braced>[-+]?\s*\d+)\s*\}|(?P<bare>-?\d+)))?"
)
_POWER_OF_TEN = re.compile(rf"(?P<sign>{_SIGN})10\s*\^\s*(?:\{{\s*(?P<braced>[-+]?\d+)\s*\}}|(?P<bare>-?\d+))")
_INTEGER = rf"\(?\s*({_SIGN}{_DIGITS})\s*\)?"
_FRACTION = re.compile(
    rf"({_SIGN})(?:\\frac\s*\{{\s*{_INTEGER}\s*\}}\s*\{{\s*{_INTEGER}\s*\}}|{_INTEGER}\s*(?:/|\\div)\s*{_INTEGER})"
)
_MIXED = re.compile(rf"({_SIGN})({_DIGITS})(?:\s*\\frac\s*\{{\s*(\d+)\s*\}}\s*\{{\s*(\d+)\s*\}}|\s+(\d+)\s*/\s*(\d+))")
_REPEATING = re.compile(r"([-+]?)\s*(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{?(\d+)\}?")


@dataclass(frozen=True, slots=True)
class Number:
    """A plain number."""

    value: Fraction
    digits: int = 0
    """Significant digits as written. 0: not a decimal, so the value is exact."""
    place: Fraction = Fraction(0)
    """For a decimal: the value of one unit in its last place."""
    mixed: bool = False

    @property
    def terminates(self) -> bool:
        """Whether it has a finite decimal expansion."""
        rest = self.value.denominator
        for prime in (2, 5):
            while rest % prime == 0:
                rest //= prime
        return rest == 1


def read_number(text: str) -> Number | None:
    """The number that a tidied text consists of. None: it is anything else."""
    text = text.strip()
    if not text or len(text) > _LONGEST or not any(map(str.isdigit, text)):
        return None
    for read in (_decimal, _power_of_ten, _mixed, _fraction, _repeating):
        number = read(text)
        if number is not None:
            return number
    return None


def _decimal(text: str) -> Number | None:
    match = _PLAIN.fullmatch(text)
    if match is None:
        return None
    exponent = int((match["e"] or match["braced"] or match["bare"] or "0").replace(" ", ""))
    if abs(exponent) > _LONGEST:
        return None
    whole, point, after = match["mantissa"].replace(",", "").replace(" ", "").partition(".")
    unit = Fraction(10) ** (exponent - len(after))
    value = int(f"0{whole}{after}") * unit
    value = -value if match["sign"].strip() == "-" else value
    return Number(value, len(f"{whole}{after}".lstrip("0")), unit) if point and after else Number(value)


def _power_of_ten(text: str) -> Number | None:
    match = _POWER_OF_TEN.fullmatch(text)
    if match is None or abs(int(match["braced"] or match["bare"])) > _LONGEST:
        return None
    value = Fraction(10) ** int(match["braced"] or match["bare"])
    return Number(-value if match["sign"].strip() == "-" else value)


def _fraction(text: str) -> Number | None:
    match = _FRACTION.fullmatch(text)
    if match is None:
        return None
    above, below = match[2] or match[4], match[3] or match[5]
    if _int(below) == 0:
        return None
    value = Fraction(_int(above), _int(below))
    return Number(-value if match[1].strip() == "-" else value)


def _mixed(text: str) -> Number | None:
    match = _MIXED.fullmatch(text)
    if match is None:
        return None
    above, below = int(match[3] or match[5]), int(match[4] or match[6])
    if not 0 < above < below:
        return None
    value = _int(match[2]) + Fraction(above, below)
    return Number(-value if match[1].strip() == "-" else value, mixed=True)


def _repeating(text: str) -> Number | None:
    match = _REPEATING.fullmatch(text)
    if match is None:
        return None
    sign, whole, after, period = match.groups()
    value = Fraction(int(f"0{whole}{after}")) + Fraction(int(period), 10 ** len(period) - 1)
    value /= 10 ** len(after)
    return Number(-value if sign == "-" else value)


def _int(text: str) -> int:
    return int(re.sub(r"[,\s]", "", text))


def same_number(gold: Number, found: Number) -> bool:
    """Whether two numbers are equal by the rule above."""
    if gold.value == found.value:
        return True
    if gold.digits and found.digits:
        return gold.digits >= FOUND_DIGITS and found.place < gold.place and rounds_to(found.value, gold)
    if gold.digits:
        return gold.digits >= GOLD_DIGITS and not found.terminates and rounds_to(found.value, gold)
    return found.digits >= FOUND_DIGITS and not gold.terminates and rounds_to(gold.value, found)


def rounds_to(value: Fraction, decimal: Number) -> bool:
    """Whether a number, rounded to the last place of a decimal, is that decimal."""
    return abs(value - decimal.value) * 2 <= decimal.place
