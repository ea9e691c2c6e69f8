r"""Expressions other than plain numbers: read by math-verify's parser, compared by their values.

The parser stops silently at what it does not understand. So an expression counts as read only if every token was used
and the parser keeps the meaning of every command. Two expressions are equal if they have the same value to 50 digits,
relative to their size, at several seeded values of their variables.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import Any, TypeAlias

import sympy
from antlr4 import Token
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, _Latex2Sympy
from sympy import Expr, MatrixBase
from sympy.core.function import AppliedUndef

from mopd_nemo.verifiers.numbers import FOUND_DIGITS, GOLD_DIGITS, Number

_DIGITS = 50
_POINTS = 8
_ENOUGH_POINTS = 3
_COMMANDS = frozenset(
    re.findall(
        r"\w+",
        "frac sqrt cdot times div pi theta alpha beta gamma delta epsilon varepsilon lambda mu nu rho sigma tau phi "
        "varphi omega Omega Delta Gamma Sigma Phi Theta zeta eta xi chi psi kappa infty sin cos tan cot sec csc arcsin "
        "arccos arctan arccot arcsec arccsc sinh cosh tanh log ln exp binom sum prod int lim to lfloor rfloor lceil "
        "rceil gcd max min det begin end text le ge",
    )
)
"""Commands that the parser reads with their full meaning."""
_DECIMAL = re.compile(r"(?<![\d_])(\d+)\.(\d+)|(?<![\d_])\.(\d+)")
_INVERSE = re.compile(r"\\(sin|cos|tan|cot|sec|csc)\s*\^\s*\{?\s*-1\s*\}?")
_MISREAD = re.compile(r"['\"?@#¤]|\d\s*_|(?<![_\d])\d+\s+\d")
_CONFIG = ConversionConfig(lowercase_symbols=False)


Expression: TypeAlias = Any
"""`Expr` or `MatrixBase`. SymPy has no types for their arithmetic."""


class _Reader(_Latex2Sympy):
    """The parser, extended to report whether it used the whole text."""

    whole = False
    _parser: Any = None

    def create_parser(self, latex_str: str) -> Any:
        self._parser = super().create_parser(latex_str)
        return self._parser

    def parse(self, latex_str: str) -> Any:
        result = super().parse(latex_str)
        self.whole = self._parser.getCurrentToken().type == Token.EOF
        return result


@lru_cache(maxsize=64)
def read(text: str) -> Expression | None:
    """The expression that a whole tidied text is. None: it is not one, or the parser cannot read it."""
    text = re.sub(
        r"(\\(?:sin|cos|tan|cot|sec|csc)\s*\(?\s*\{?\s*)(\d+(?:\.\d+)?)\s*\^\\circ", r"\1(\\frac{\2\\pi}{180})", text
    )
    if not set(re.findall(r"\\([a-zA-Z]+)", text)) <= _COMMANDS or re.search(
        r"['\"?@#¤]|\d\s*_|(?<![_\d])\d+\s+\d", text
    ):
        return None
    text = re.sub(r"\\text\s*\{\s*([a-zA-Z])\s*\}", r"\1", text)
    if r"\text" in text:
        return None
    text = _INVERSE.sub(r"\\arc\1 ", text)
    text = _DECIMAL.sub(_as_fraction, text)
    is_real = not re.search(r"(?<![a-zA-Z\\])i(?![a-zA-Z])", text)
    reader = _Reader(is_real=is_real, config=_CONFIG)
    try:
        result = reader.parse(text)
    except Exception:  # it raises plain Exception, among others, on text that it cannot read
        return None
    if not reader.whole or not isinstance(result, Expr | MatrixBase):
        return None
    value: Expression = result.replace(_is_odd_root, _real_root) if is_real else result
    return value.subs({symbol: sympy.I for symbol in value.free_symbols if str(symbol) == "i"})


def _is_odd_root(expression: Any) -> bool:
    """Whether this is an odd root of a negative number, for which SymPy would give the complex value."""
    exponent = expression.exp if isinstance(expression, sympy.Pow) else None
    return isinstance(exponent, sympy.Rational) and exponent.q % 2 == 1 < exponent.q and expression.base.is_negative


def _real_root(power: Any) -> Expression:
    return (-1) ** power.exp.p * (-power.base) ** power.exp


def _as_fraction(match: re.Match[str]) -> str:
    whole, after = (match[1], match[2]) if match[1] is not None else ("", match[3])
    return rf"(\frac{{{int(f'0{whole}{after}')}}}{{{10 ** len(after)}}})"


def exact(number: Number) -> Expression:
    """A plain number as an expression."""
    return sympy.Rational(number.value.numerator, number.value.denominator)


def same_expression(gold: Expression, found: Expression) -> bool:
    """Whether two expressions have the same value, for all values of their variables."""
    if isinstance(gold, MatrixBase) or isinstance(found, MatrixBase):
        return _same_matrix(gold, found)
    names = _names(gold, found)
    if not names:
        return _same_constant(gold, found)
    agreed = 0
    for values in _points(names):
        a, b = _value(gold, values), _value(found, values)
        if a is None or b is None:
            continue
        if not _close(a, b):
            return False
        agreed += 1
        if agreed == _ENOUGH_POINTS:
            return True
    return agreed > 0 or gold == found or sympy.simplify(gold - found) == 0


def _same_matrix(gold: Any, found: Any) -> bool:
    gold, found = (value.doit() if hasattr(value, "doit") else value for value in (gold, found))
    if not (isinstance(gold, MatrixBase) and isinstance(found, MatrixBase)) or gold.shape != found.shape:
        return False
    return all(same_expression(a, b) for a, b in zip(gold.flat(), found.flat(), strict=True))


def same_equation(gold: tuple[Expression, Expression], found: tuple[Expression, Expression], *, directed: bool) -> bool:
    """Whether two relations, given as their sides, are equivalent: their differences have a constant ratio.

    Args:
        directed: the ratio must be positive, as for inequalities.
    """
    a, b = gold[0] - gold[1], found[0] - found[1]
    names = _names(a, b)
    if not names or _names(a) != _names(b):
        return False
    ratios = []
    for values in _points(names):
        x, y = _value(a, values), _value(b, values)
        if x is None or y is None or x == 0 or y == 0:
            continue
        ratios.append(x / y)
        if not _close(ratios[0], ratios[-1]):
            return False
    return len(ratios) >= _ENOUGH_POINTS and (not directed or ratios[0].as_real_imag()[0] > 0)


def is_rounded(expression: Expression, number: Number, *, number_is_gold: bool) -> bool:
    """Whether a constant without a finite decimal expansion rounds to a decimal."""
    if number.digits < (GOLD_DIGITS if number_is_gold else FOUND_DIGITS):
        return False
    if not isinstance(expression, Expr) or expression.free_symbols:
        return False
    value = _value(expression, {})
    if value is None or not value.is_real:
        return False
    exact = sympy.Rational(value)
    distance = abs(Fraction(int(exact.p), int(exact.q)) - number.value)
    return distance * 2 <= number.place


def constant(expression: Expression) -> Fraction | None:
    """The value of an expression, if it is a rational number."""
    if not isinstance(expression, Expr) or expression.free_symbols:
        return None
    value = expression.doit()
    return Fraction(int(value.p), int(value.q)) if isinstance(value, sympy.Rational) else None


def _same_constant(gold: Expression, found: Expression) -> bool:
    exact = constant(gold), constant(found)
    if None not in exact:
        return exact[0] == exact[1]
    a, b = _value(gold, {}), _value(found, {})
    if a is None or b is None:
        return bool(gold == found)
    if a == 0 or b == 0:
        return (gold - found).equals(0) is True
    return _close(a, b)


def _names(*expressions: Expression) -> list[Any]:
    """Variables and unknown functions, in a fixed order."""
    found: set[Any] = set()
    for expression in expressions:
        found |= expression.free_symbols | expression.atoms(AppliedUndef)
    return sorted(found, key=str)


def _points(names: list[Any]) -> Any:
    """Test values for the variables: no integers, of both signs, the same in every process."""
    for number in range(_POINTS):
        values = {}
        for index, name in enumerate(names):
            size = sympy.Rational((7919 * (index + 1) + 104729 * number) % 611 + 29, 211)
            values[name] = -size if number % 2 and (index + number // 2) % 2 == 0 else size
        yield values


def _value(expression: Expression, values: dict[Any, Any]) -> Any:
    """The number to `_DIGITS` digits. None: there is none, or it is complex although the values are real."""
    result: Any = sympy.N(expression.doit().subs(values), _DIGITS + 15, chop=False)
    if not result.is_number or result.has(sympy.nan, sympy.zoo, sympy.oo, -sympy.oo):
        return result if result in (sympy.oo, -sympy.oo) else None
    if values and result.as_real_imag()[1] != 0 and not expression.has(sympy.I):
        return None
    return result


def _close(a: Any, b: Any) -> bool:
    if a in (sympy.oo, -sympy.oo) or b in (sympy.oo, -sympy.oo):
        return a == b
    return bool(abs(a - b) <= sympy.Float(10, 30) ** -_DIGITS * max(abs(a), abs(b)))
