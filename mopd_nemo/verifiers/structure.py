r"""The structure of an answer: rows of values, sets, tuples, intervals, relations, tables, ratios, words.

Everything here takes tidied text and gives text back; whether two parts are equal is for `equality` to say.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mopd_nemo.verifiers.notation import closing, plain, split_top
from mopd_nemo.verifiers.numbers import read_number
from mopd_nemo.verifiers.units import split_unit

_SEMICOLON = re.compile(r"\s*;\s*")
_AND = re.compile(
    r"\s*,?\s*(?:\\text\s*\{\s*,?\s*(?:and|or)\s*\}|(?<![a-zA-Z])(?:and|or)(?![a-z])|\\(?:lor|vee|land)(?![a-z]))\s*,?\s*"
)
_SPACED_COMMA = re.compile(r"\s*,\s+")
_COMMA = re.compile(r"\s*,\s*")
_DESCRIBED_SET = re.compile(r"\\\{\s*[a-zA-Z]\s*(?:\\in\s*\\mathbb\s*\{?\s*R\s*\}?\s*)?[|:](.*[<>].*|.*\\[lg]e.*)\\\}")
_CUP = re.compile(r"\s*\\cup(?![a-z])\s*")
RELATION = re.compile(r"\s*(?:\\(?:le|ge|ne|in|approx|to|equiv)(?![a-z])|[=<>])\s*")
_RATIO = re.compile(r"\s*:\s*")
TEXT_ONLY = re.compile(
    r"\\(?:equiv|mod|ldots|forall|exists|notin|subset|supset|setminus|mapsto|perp|parallel|sim|cong|angle|triangle)"
    r"(?![a-z])|'|(?<![a-zA-Z])\d+\s*_"
)
"""Notation that the parser drops or misreads. Answers with it are compared as text."""
_WORDS = re.compile(r"[A-Za-z][A-Za-z\s,'’.-]*[A-Za-z.]")
_FUNCTIONS = frozenset(["sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "lg"])
FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}
ORDERED = ("<", r"\le", ">", r"\ge")


@dataclass(frozen=True, slots=True)
class Interval:
    """Ends as tidied text, and whether each is closed."""

    low: str
    high: str
    low_closed: bool
    high_closed: bool


@dataclass(frozen=True, slots=True)
class Region:
    """Part of the real line."""

    intervals: list[Interval]
    name: str = ""
    """Name of the variable, if it is written with inequalities."""
    pieces: int = 0
    """Number of inequalities it is written with. 0: written as intervals."""


def parts_of(text: str, *, bracketed: bool = False) -> list[str]:
    """The parts between commas, semicolons and the words and/or, outside of all brackets.

    Args:
        bracketed: the text stood in brackets, where `1,100` is two numbers.
    """
    return [
        part
        for group in split_top(text, _SEMICOLON)[0]
        for clause in split_top(group, _AND)[0]
        for part in _by_commas(clause, bracketed)
        if part
    ]


def _by_commas(text: str, bracketed: bool) -> list[str]:
    """Values between commas. `1,234` is one number where its commas can separate thousands."""
    pieces = split_top(text, _SPACED_COMMA)[0]
    if len(pieces) > 1:
        return [part for piece in pieces for part in _by_commas(piece, bracketed=False)]
    parts = split_top(text, _COMMA)[0]
    if len(parts) < 2 or read_number(split_unit(text, letters=True).value) is None:
        return parts
    divides = bracketed and not any(re.match("0\\d", part) for part in parts)
    return parts if divides else [text]


@dataclass(frozen=True, slots=True)
class Items:
    kind: str
    """`set`, `tuple` or `row` (no brackets)."""
    parts: list[str]
    names: tuple[str, ...] = ()
    """Names of the values if they differ: `a=1, b=2`."""
    brackets: str = ""


def items_of(text: str) -> Items | None:
    """Several values. None: a single one."""
    left, right = text[:1], text[-1:]
    if text.startswith(r"\{") and text.endswith(r"\}") and closing(text, 1) == len(text) - 1:
        return Items("set", _expanded(parts_of(text[2:-2], bracketed=True)))
    if left and left in "([{" and right in ")]}" and closing(text, 0) == len(text) - 1:
        parts = parts_of(text[1:-1], bracketed=True)
        if len(parts) > 1:
            return Items("row", _expanded(parts)) if left == "{" else Items("tuple", parts, brackets=left + right)
    groups = split_top(text, _SEMICOLON)[0]
    if len(groups) > 1 and any(len(parts_of(group)) > 1 for group in groups):
        return Items("row", [f"({','.join(_values_of(parts_of(group)))})" for group in groups])
    parts = _expanded(parts_of(text))
    if len(parts) < 2:
        return None
    return _named(parts)


def _named(parts: list[str]) -> Items:
    """A row of values. `n = 1, 2, 3` and `x = 1, x = 2` become plain values; those of `a = 1, b = 2` keep names."""
    sides = [split_top(part, RELATION) for part in parts]
    assigned = [len(s) == 2 and r[0] in ("=", r"\in") and is_name(s[0]) for s, r in sides]
    if not assigned[0] or any(r for (_, r), a in zip(sides, assigned, strict=True) if not a):
        return Items("row", parts)
    names = [plain(s[0]) if a else None for (s, _), a in zip(sides, assigned, strict=True)]
    values = [s[-1] for s, _ in sides]
    if len({name for name in names if name}) == 1:
        return Items("row", values)
    return Items("row", values, tuple(map(str, names))) if all(names) else Items("row", parts)


def _values_of(parts: list[str]) -> list[str]:
    return _named(parts).parts if parts else parts


def _expanded(parts: Sequence[str]) -> list[str]:
    r"""`1 \pm \sqrt2` as two values."""
    result: list[str] = []
    for part in parts:
        if re.search(r"\\(?:pm|mp)(?![a-z])", part):
            result += [
                re.sub(r"\\pm(?![a-z])", one, re.sub(r"\\mp(?![a-z])", other, part)).strip().removeprefix("+").strip()
                for one, other in (("+", "-"), ("-", "+"))
            ]
        else:
            result.append(part)
    return result


def region_of(text: str) -> Region | None:
    """An interval, a union of intervals, or inequalities in one variable. None: anything else."""
    text = value_if_assigned(text)
    pieces, signs = split_top(text, _CUP)
    if len(pieces) == 1:
        pieces, signs = split_top(text, _AND)
    regions = [_bracketed(piece) or _inequality(piece) for piece in pieces if piece]
    names = {region.name for region in regions if region is not None and region.name}
    if None in regions or len(names) > 1:
        return None
    intervals = [interval for region in regions if region for interval in region.intervals]
    both = any("and" in sign or "land" in sign for sign in signs)
    if both and names:
        intervals = _in_both(intervals)
    if not intervals:
        return None
    return Region(intervals, names.pop() if names else "", sum(region.pieces for region in regions if region))


def _in_both(intervals: list[Interval]) -> list[Interval]:
    """`x > 1 and x < 3` is one interval. `x < 1 and x > 3` is how people write a union. Else: no interval."""
    first, *others = sorted(intervals, key=lambda interval: interval.low == r"-\infty")
    if len(others) != 1 or (first.high, others[0].low) != (r"\infty", r"-\infty"):
        return []
    low, high = read_number(first.low), read_number(others[0].high)
    if low is None or high is None:
        return []
    if low.value < high.value:
        return [Interval(first.low, others[0].high, first.low_closed, others[0].high_closed)]
    return intervals


def _bracketed(text: str) -> Region | None:
    if re.fullmatch(r"\\mathbb\s*\{?\s*R\s*\}?", text):
        return Region([Interval(r"-\infty", r"\infty", False, False)])
    if described := _DESCRIBED_SET.fullmatch(text):
        region = region_of(described[1])
        return None if region is None else Region(region.intervals)
    if text.startswith(r"\{") and text.endswith(r"\}"):
        points = _expanded(parts_of(text[2:-2], bracketed=True))
        return Region([Interval(point, point, True, True) for point in points])
    if text[:1] not in ("(", "[") or text[-1:] not in (")", "]") or closing(text, 0) != len(text) - 1:
        return None
    ends = parts_of(text[1:-1], bracketed=True)
    if len(ends) != 2 or any(split_top(end, RELATION)[1] for end in ends):
        return None
    return Region([Interval(ends[0], ends[1], text[0] == "[", text[-1] == "]")])


def _inequality(text: str) -> Region | None:
    """`a < x <= b`, `x > a`, `b >= x` or `a <= |x| <= b`, where x is a name and the ends have none."""
    sides, signs = split_top(text, RELATION)
    if not signs or not set(signs) <= set(ORDERED) or len(sides) > 3:
        return None
    if signs[0] in (">", r"\ge"):
        sides, signs = sides[::-1], [FLIPPED[sign] for sign in reversed(signs)]
    if not set(signs) <= {"<", r"\le"}:
        return None
    names = [i for i, side in enumerate(sides) if is_name(side)]
    if len(names) != 1 or (len(sides) == 3 and names != [1]):
        return None
    i = names[0]
    low, low_closed = (sides[i - 1], signs[i - 1] == r"\le") if i else (r"-\infty", False)
    high, high_closed = (sides[i + 1], signs[i] == r"\le") if i + 1 < len(sides) else (r"\infty", False)
    interval = Interval(low, high, low_closed, high_closed)
    if not (sides[i].startswith("|") and sides[i].endswith("|")):
        return Region([interval], plain(sides[i]), 1)
    name = plain(sides[i].strip("|"))
    if i == 0:
        return Region([Interval(f"-({high})", high, high_closed, high_closed)], name, 2)
    lowest = r"-\infty" if high == r"\infty" else f"-({high})"
    return Region([Interval(lowest, f"-({low})", high_closed, low_closed), interval], name, 2)


def assigned_value(text: str) -> str | None:
    r"""The value in `x = 5`, `f(2) = 5`, `x = 2 + 3 = 5` or `x \in \{5\}`. None: another relation."""
    sides, signs = split_top(text, RELATION)
    if not set(signs) <= {"=", r"\approx", r"\in"} or not signs:
        return None
    if signs[-1] == r"\approx" and "=" in signs:
        sides, signs = sides[:-1], signs[:-1]
    return sides[-1] if is_name(sides[0]) else None


def value_if_assigned(text: str) -> str:
    value = assigned_value(text)
    return text if value is None else value


def without_name(text: str) -> str:
    """The text without the `n` of a congruence or the `x` of an equation, for comparison as text."""
    return re.sub(r"^[a-zA-Z]\s*\\equiv(?![a-z])", "", value_if_assigned(text))


def name_of(text: str) -> str:
    """The name of the value: `x` in `x = 5` and in a congruence. Empty: it has none."""
    sides, signs = split_top(text, RELATION)
    return plain(sides[0]) if signs and is_name(sides[0]) else ""


def is_name(text: str) -> bool:
    """Whether a text is a name: `x`, `x_1`, `f(2)`, `|AB|`, `\\frac{NO}{BO}`, `(x, y)`; not `2x`, not `a + b`."""
    bare = re.sub(r"_\s*(?:\{[^{}]*\}|\w)", "", text)
    bare = re.sub(r"(?<=[a-zA-Z])\s*\([^()]*\)", "", bare)
    bare = re.sub(
        r"\\(?:angle|triangle|text|overline|vec|hat|frac|mathbb|mathcal|alpha|beta|gamma|theta|lambda|phi|mu)(?![a-z])",
        "",
        bare,
    )
    bare = re.sub(r"\^\s*(?:\\circ|\{?\d\}?)", "", bare) if len(set(re.findall("[a-zA-Z]", bare))) > 1 else bare
    return (
        bool(re.search(r"[a-zA-Z]|\\", text)) and not re.search(r"[\d+\-\\*^=<>\[\]]", bare) and text not in ("e", "i")
    )


def table_of(text: str) -> tuple[str, list[list[str]]] | None:
    """Kind and cells, if the whole text is a matrix or a definition by cases."""
    text = re.sub(r"^[(\[]\s*(?=\\begin)|(?<=\})\s*[)\]]$", "", value_if_assigned(text))
    text = re.sub(r"^\\\{\s*(?=\\begin\{(?:array|aligned)\})", "cases:", text)
    match = re.fullmatch(r"(cases:)?\\begin\{(\w+)\*?\}(?:\s*\{[^{}]*\})?(.*)\\end\{\2\*?\}", text)
    if match is None or r"\begin" in match[3]:
        return None
    kind = "cases" if match[1] or match[2] in ("cases", "dcases") else {"vmatrix": "vmatrix"}.get(match[2], "matrix")
    rows = [row for row in re.split(r"\\\\(?:\[[^\]]*\])?|\\cr(?![a-z])", match[3]) if row.strip()]
    return kind, [[_cell(cell) for cell in row.split("&")] for row in rows]


def _cell(text: str) -> str:
    text = re.sub(
        r"\\text\s*\{\s*(?:if|for|when|where)?\s*\}|^\s*(?:if|for|when)\s|\\hline", " ", text.strip().strip(",;.")
    )
    return re.sub(r"\\text\s*\{\s*(?:if|for|when)\s+([^{}]*)\}", r"\1", text).strip(" ,")


def ratio_of(text: str) -> list[str]:
    """The parts of `a:b:c`. Empty: anything else."""
    parts, found = split_top(value_if_assigned(text), _RATIO)
    return parts if found and all(parts) else []


def is_time(text: str) -> bool:
    return bool(re.search(r"(?<![\d.])\d{1,2}:[0-5]\d(?![\d.])", text))


def is_words(text: str) -> bool:
    """Whether an answer is words and not a product of variables."""
    bare = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text).strip()
    bare = re.sub(r"^\((.*)\)$", r"\1", bare).strip()
    if len(bare) == 1:
        return False
    if re.fullmatch(r"[xyzabc]{2}|[A-Za-z](?:\s*-\s*[A-Za-z])+", bare):
        return False
    return bool(_WORDS.fullmatch(bare)) and bare not in _FUNCTIONS


def is_word(text: str) -> bool:
    bare = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text).strip(" ()")
    return bool(re.fullmatch(r"[A-Z]|[A-Za-z][A-Za-z' -]+", bare))
