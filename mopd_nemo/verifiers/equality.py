r"""Whether two final answers are equal as mathematics.

An answer is split from the outside in: lists, tuples, intervals and their unions, relations, matrices and cases, and at
last single values with their units. Each part is compared with its counterpart. A part that cannot be read completely
is compared as text, and never accepted by the readable rest of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from mopd_nemo.verifiers.notation import closing, plain, split_top, tidy
from mopd_nemo.verifiers.numbers import read_number, same_number
from mopd_nemo.verifiers.structure import (
    FLIPPED,
    ORDERED,
    RELATION,
    TEXT_ONLY,
    Interval,
    assigned_value,
    is_time,
    is_word,
    is_words,
    items_of,
    name_of,
    parts_of,
    ratio_of,
    region_of,
    table_of,
    without_name,
)
from mopd_nemo.verifiers.units import Quantity, split_unit

_DEEPEST = 12


def equivalent(gold: str, found: str) -> bool:
    """Whether a found answer equals the gold answer.

    Raises:
        Exception: SymPy, or the parser, failed on one of them.
    """
    gold, found = tidy(gold), tidy(found)
    return gold == found or same(gold, found)


def equals_itself(gold: str) -> bool:
    """Whether an answer equals itself part by part, without comparing the whole texts.

    Raises:
        Exception: SymPy, or the parser, failed on it.
    """
    return same(tidy(gold), tidy(gold))


def same(gold: str, found: str, depth: int = 0) -> bool:
    """Whether two tidied texts are equal answers."""
    gold, found = _unwrapped(gold), _unwrapped(found)
    if depth > _DEEPEST or not gold or not found:
        return gold == found
    for compare in (_numbers, _texts, _unions, _lists, _relations, _tables, _ratios):
        decided = compare(gold, found, depth + 1)
        if decided is not None:
            return decided
    return _values(split_unit(gold), split_unit(found))


def _unwrapped(text: str) -> str:
    """The text without parentheses or braces around a single value."""
    text = re.sub(r"^\\text\s*\{([^{}]*)\}$", r"\1", text.strip()).strip()
    while text[:1] in ("(", "{") and closing(text, 0) == len(text) - 1 and text[-1] in ")}":
        inside = text[1:-1].strip()
        if len(parts_of(inside, bracketed=True)) > 1 or ratio_of(inside):
            break
        text = inside
    return text


# --- one function per kind of answer: True, False, or None for "not of this kind" ------------------------------------


def _numbers(gold: str, found: str, depth: int) -> bool | None:
    """Two plain numbers. A decimal comma counts as a point if the other answer has the same digits with a point."""
    a, b = read_number(gold), read_number(found)
    if a is not None and b is not None:
        return same_number(a, b)
    for one, other in ((gold, found), (found, gold)):
        if re.fullmatch(r"-?\d+,\d+", one) and one.replace(",", ".") == other:
            return True
    return None


def _texts(gold: str, found: str, depth: int) -> bool | None:
    """Words, and answers with parts that no parser reads."""
    if plain(gold) == plain(found) and not _readable(gold):
        return True
    if is_words(gold) or is_words(found):
        return _same_words(gold, found)
    if len(parts_of(gold)) == 1 and (TEXT_ONLY.search(gold) or TEXT_ONLY.search(found)) and len(parts_of(found)) == 1:
        names = {name_of(gold), name_of(found)} - {""}
        return len(names) < 2 and plain(without_name(gold)) == plain(without_name(found))
    return None


def _readable(text: str) -> bool:
    """Whether to compare the parts of two equal texts, which finds gold answers that cannot be compared."""
    return bool(re.search(r"\d|\\frac|\\sqrt", text)) and not TEXT_ONLY.search(text)


def _unions(gold: str, found: str, depth: int) -> bool | None:
    """Intervals and inequalities in one variable."""
    a, b = region_of(gold), region_of(found)
    if a is None or b is None or a.pieces == b.pieces == 1:
        return None
    if a.name and b.name and a.name != b.name:
        return False
    return _matched(a.intervals, b.intervals, lambda x, y: _same_interval(x, y, depth), ordered=False)


def _lists(gold: str, found: str, depth: int) -> bool | None:
    """Sets, tuples, and values in a row."""
    a, b = items_of(gold), items_of(found)
    if a is None and b is None:
        return None
    if a is None or b is None:
        alone = gold if a is None else found
        return None if split_top(alone, RELATION)[1] else False
    if (a.kind == "tuple" and b.kind == "set") or (a.kind == "set" and b.kind == "tuple"):
        return False
    if a.kind == b.kind == "tuple" and len(a.parts) == 2 and a.brackets != b.brackets:
        return False
    if a.names and b.names:
        if sorted(a.names) != sorted(b.names):
            return False
        values = dict(zip(b.names, b.parts, strict=True))
        return all(same(part, values[name], depth) for name, part in zip(a.names, a.parts, strict=True))
    ordered = "tuple" in (a.kind, b.kind) or bool(a.names or b.names) or all(map(is_word, a.parts))
    once = not ordered and ("set" in (a.kind, b.kind) or all(part[:1] == "(" for part in a.parts))
    return _matched(a.parts, b.parts, lambda x, y: same(x, y, depth), ordered=ordered, once=once)


def _relations(gold: str, found: str, depth: int) -> bool | None:
    """Equations, inequalities, assignments. `x = 5` is `5`, on either side; `2x = 10` is not."""
    (a, a_signs), (b, b_signs) = split_top(gold, RELATION), split_top(found, RELATION)
    if not a_signs and not b_signs:
        return None
    if not (a_signs and b_signs):
        value = assigned_value(found if b_signs else gold)
        if value is None:
            return False
        return same(gold, value, depth) if b_signs else same(value, found, depth)
    if set(a_signs) <= {"=", r"\approx", r"\in"} and set(b_signs) <= {"=", r"\approx", r"\in"}:
        return _same_equations(a, b, gold, found, depth)
    if len(a) == len(b) == 2:
        return _same_inequality(a, a_signs[0], b, b_signs[0])
    if len(a) != len(b):
        return False
    if a_signs[0] != b_signs[0]:
        b, b_signs = b[::-1], [FLIPPED.get(sign, sign) for sign in reversed(b_signs)]
    return a_signs == b_signs and all(same(x, y, depth) for x, y in zip(a, b, strict=True))


def _tables(gold: str, found: str, depth: int) -> bool | None:
    """Matrices, and functions given by cases."""
    a, b = table_of(gold), table_of(found)
    if a is None and b is None:
        return None
    if a is None or b is None:
        return _values(split_unit(gold), split_unit(found))
    if a[0] != b[0] or [len(row) for row in a[1]] != [len(row) for row in b[1]]:
        return False
    rows = zip(a[1], b[1], strict=True)
    return all(same(x, y, depth) for one, other in rows for x, y in zip(one, other, strict=True))


def _ratios(gold: str, found: str, depth: int) -> bool | None:
    """`1:2`, `1:4:9` and times of day."""
    a, b = ratio_of(gold), ratio_of(found)
    if not a and not b:
        return None
    if a and b:
        if len(a) == len(b) and all(same(x, y, depth) for x, y in zip(a, b, strict=True)):
            return True
        if len(a) != len(b) or is_time(gold) or is_time(found):
            return False
        return all(
            same(rf"\frac{{{x}}}{{{y}}}", rf"\frac{{{u}}}{{{v}}}")
            for (x, y), (u, v) in zip(pairwise(a), pairwise(b), strict=True)
        )
    parts = a or b
    if len(parts) != 2 or is_time(gold) or is_time(found):
        return False
    quotient = rf"\frac{{{parts[0]}}}{{{parts[1]}}}"
    return same(quotient, found, depth) if a else same(gold, quotient, depth)


def _values(gold: Quantity, found: Quantity) -> bool:
    """Single values: numbers with their units, expressions."""
    if not gold.unit and not found.unit and read_number(gold.value) is not None:
        found = replace(split_unit(found.value + ("%" if found.percent else ""), letters=True), scale=found.scale)
    if gold.unit and found.unit and gold.unit != found.unit:
        return False
    if "deg" in (gold.unit, found.unit) and gold.unit != found.unit and r"\pi" in gold.value + found.value:
        gold, found = (_in_radians(quantity) for quantity in (gold, found))
    if gold.scale != found.scale:
        return _same_scaled(gold, found)
    if gold.percent != found.percent:
        return _same_percentage(*((gold, found) if gold.percent else (found, gold)))
    return _same_value(_unwrapped(gold.value), _unwrapped(found.value))


def _in_radians(quantity: Quantity) -> Quantity:
    if quantity.unit != "deg":
        return quantity
    return Quantity(rf"\frac{{{quantity.value}}}{{180}} \cdot \pi", "", quantity.percent)


def _same_value(gold: str, found: str) -> bool:
    a, b = read_number(gold), read_number(found)
    if a is not None and b is not None:
        return same_number(a, b)
    if is_words(gold) or is_words(found) or TEXT_ONLY.search(gold) or TEXT_ONLY.search(found):
        return plain(gold) == plain(found)
    from mopd_nemo.verifiers import algebra  # SymPy takes a second to import, and most answers do not need it

    x = algebra.exact(a) if a is not None else algebra.read(gold)
    y = algebra.exact(b) if b is not None else algebra.read(found)
    if x is None or y is None:
        return plain(gold) == plain(found)
    if algebra.same_expression(x, y):
        return True
    if a is not None and a.digits:
        return algebra.is_rounded(y, a, number_is_gold=True) and not _finite(algebra.constant(y))
    if b is not None and b.digits:
        return algebra.is_rounded(x, b, number_is_gold=False) and not _finite(algebra.constant(x))
    return False


def _finite(value: object) -> bool:
    """Whether a rational number has a finite decimal expansion. None stands for an irrational number, which has not."""
    number = read_number(str(value)) if value is not None else None
    return number is not None and number.terminates


def _same_scaled(gold: Quantity, found: Quantity) -> bool:
    """`5 million` equals 5,000,000. It also equals 5, if the question already says `million`."""
    if gold.percent or found.percent:
        return False
    whole = [q.value if q.scale == 1 else rf"({q.value}) \cdot {q.scale}" for q in (gold, found)]
    return _same_value(*whole) or (1 in (gold.scale, found.scale) and _same_value(gold.value, found.value))


def _same_percentage(percentage: Quantity, bare: Quantity) -> bool:
    """`50%` equals 0.5. It also equals 50, if the question already says `%`. `0.5%` does not equal 0.5."""
    if bare.unit:
        return False
    if _same_value(rf"\frac{{{percentage.value}}}{{100}}", bare.value):
        return True
    a, b = read_number(percentage.value), read_number(bare.value)
    return a is not None and b is not None and b.value > 1 and same_number(a, b)


def _same_interval(a: Interval, b: Interval, depth: int) -> bool:
    closed = (a.low_closed, a.high_closed) == (b.low_closed, b.high_closed)
    return closed and same(a.low, b.low, depth) and same(a.high, b.high, depth)


def _same_equations(a: list[str], b: list[str], gold: str, found: str, depth: int) -> bool:
    x, y = assigned_value(gold), assigned_value(found)
    if x is not None and y is not None:
        names = plain(a[0]), plain(b[0])
        if names[0] == names[1]:
            return same(x, y, depth)
        unknown = [re.sub(r"\([a-z]\)$", "", name) for name in names]
        if unknown[0] == unknown[1] != "" and not re.search("[a-zA-Z]", x + y):
            return same(x, y, depth)
    if len(a) != 2 or len(b) != 2:
        return False
    return _same_sides((a[0], a[1]), (b[0], b[1]), directed=False)


def _same_inequality(a: list[str], a_sign: str, b: list[str], b_sign: str) -> bool:
    if FLIPPED.get(b_sign) == a_sign:
        b, b_sign = b[::-1], a_sign
    return a_sign == b_sign and _same_sides((a[0], a[1]), (b[0], b[1]), directed=a_sign in ORDERED)


def _same_sides(a: tuple[str, str], b: tuple[str, str], *, directed: bool) -> bool:
    """Whether two relations with the same sign have equal sides."""
    if [plain(side) for side in a] == [plain(side) for side in b]:
        return True
    from mopd_nemo.verifiers import algebra

    a_left, a_right, b_left, b_right = expressions = [algebra.read(side) for side in (*a, *b)]
    if any(e is None or hasattr(e, "shape") for e in expressions):
        return False
    return algebra.same_equation((a_left, a_right), (b_left, b_right), directed=directed)


_SHORT_WORDS = frozenset({"no", "up", "am", "pm", "ok"})
"""Other pairs of letters name a segment or are a product, so their capitals count."""


def _same_words(gold: str, found: str) -> bool:
    clean = [
        re.sub(r"[()\s.!·]+|,?\\text\{|\}", " ", re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", t)).split()
        for t in (gold, found)
    ]
    if not (len(clean[0]) == 1 and len(clean[0][0]) == 2 and clean[0][0].casefold() not in _SHORT_WORDS):
        clean = [[word.casefold() for word in words] for words in clean]
    return clean[0] == clean[1] or "".join(clean[0]) == "".join(clean[1])


def _matched(
    gold: Sequence[Any],
    found: Sequence[Any],
    same_part: Callable[[Any, Any], bool],
    *,
    ordered: bool,
    once: bool = False,
) -> bool:
    """Whether parts correspond one to one. With `once`, as in a set, repeated parts count once."""
    if ordered:
        return len(gold) == len(found) and all(same_part(a, b) for a, b in zip(gold, found, strict=True))
    left = list(found)
    for part in gold:
        matches = [other for other in left if same_part(part, other)]
        if not matches and not (once and any(same_part(part, other) for other in found)):
            return False
        for other in matches if once else matches[:1]:
            left.remove(other)
    return not left
