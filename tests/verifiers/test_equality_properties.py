r"""Random golds of each kind: equal forms are accepted; changed digits, signs, exponents, units and order are not."""

from collections.abc import Callable
from fractions import Fraction
from math import gcd

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mopd_nemo.verifiers.equality import equals_itself, equivalent

Case = tuple[str, list[str], list[str]]
"""A gold answer, forms that are equal to it, and answers that are not."""

UNITS = {
    "cm": ["centimeters", r"\text{cm}", r"\mathrm{ cm}"],
    "m": [r"\text{ m}", r"\text{meters}", " meters"],
    "km": ["km", "kilometers"],
    "kg": ["kg", r"\text{ kilograms}"],
    "cm^2": [r"\text{ cm}^2", " square centimeters", r"\text{cm}^{2}", " cm²"],
    "hours": [" hours", r"\text{ hr}", r"\text{ h}"],
    "apples": [r"\text{ apples}", r"\text{ apple}"],
    "dollars": [" dollars", r"\text{ dollars}"],
}


def changed_digit(text: str, position: int) -> str:
    places = [i for i, character in enumerate(text) if character.isdigit()]
    place = places[position % len(places)]
    digit = (int(text[place]) + 1 + position % 9) % 10
    return text[:place] + str(digit) + text[place + 1 :]


def opposite(text: str) -> str:
    return text[1:] if text.startswith("-") else f"-{text}"


def frac(value: Fraction) -> str:
    sign = "-" if value < 0 else ""
    return rf"{sign}\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


@st.composite
def integers(draw: st.DrawFn) -> Case:
    n, k, place = draw(st.integers(-(10**12), 10**12)), draw(st.integers(2, 9)), draw(st.integers(0, 20))
    assume(n != 0)
    forms = [f"{n:,}", f"{n:,}".replace(",", "{,}"), f"{n}.0", f"{n}.", f"${n}$", frac(Fraction(n)), rf"\text{{{n}}}"]
    forms += [f"{n * k}/{k}", rf"\left({n}\right)", f"x={n}", f"{n:,}".replace(",", r"\,"), f"{n - k}+{k}"]
    wrong = [opposite(str(n)), changed_digit(str(n), place), f"{n}1", str(n + 1), f"{n}x", f"{n}.5", f"{2 * n}"]
    return str(n), forms, [text for text in wrong if not text.lstrip("-").startswith("0")]


@st.composite
def decimals(draw: st.DrawFn) -> Case:
    digits, places = draw(st.integers(1, 10**8)), draw(st.integers(1, 12))
    sign, place = draw(st.sampled_from(["", "-"])), draw(st.integers(0, 20))
    assume(digits % 10)
    value = Fraction(digits, 10**places)
    text = f"{sign}{digits // 10**places}.{digits % 10**places:0{places}d}"
    signed = -value if sign else value
    first, rest = str(digits)[0], str(digits)[1:]
    power = len(str(digits)) - 1 - places
    mantissa = f"{sign}{first}.{rest}" if rest else f"{sign}{first}"
    forms = [frac(signed), f"{text}0", rf"{mantissa}\times10^{{{power}}}", f"{mantissa}e{power}", f"${text}$"]
    forms += [rf"{mantissa} \cdot 10^{{{power}}}", f"{mantissa}E{power:+d}", f"{signed.numerator}/{signed.denominator}"]
    wrong = [
        opposite(text),
        changed_digit(text, place),
        rf"{mantissa}\times10^{{{power + 1}}}",
        f"{mantissa}e{power - 1}",
    ]
    wrong += [
        frac(signed + Fraction(1, 10**places)),
        text[:-1] + str(int(text[-1]) % 9 + 1) if text[-1] != "9" else "0",
    ]
    return text, forms, wrong


@st.composite
def rationals(draw: st.DrawFn) -> Case:
    p, q, k = draw(st.integers(1, 10**4)), draw(st.integers(2, 10**4)), draw(st.integers(2, 9))
    assume(gcd(p, q) == 1)
    value = Fraction(p, q) * draw(st.sampled_from([1, -1]))
    sign = "-" if value < 0 else ""
    forms = [f"{sign}{p}/{q}", rf"{sign}\dfrac{{{p}}}{{{q}}}", rf"{sign}\frac{{{k * p}}}{{{k * q}}}"]
    forms += [rf"\frac{{{sign}{p}}}{{{q}}}", rf"{sign}{p} \div {q}", rf"{sign}{p}\cdot\frac{{1}}{{{q}}}"]
    if p > q:
        forms += [rf"{sign}{p // q}\frac{{{p % q}}}{{{q}}}", f"{sign}{p // q} {p % q}/{q}"]
    wrong = [opposite(frac(value)), frac(value + Fraction(1, q)), rf"{sign}\frac{{{p}}}{{{q + 1}}}", f"{sign}{p}{q}"]
    if p != 1:
        wrong.append(rf"{sign}\frac{{{q}}}{{{p}}}")
    return frac(value), forms, wrong


@st.composite
def powers(draw: st.DrawFn) -> Case:
    base, exponent = draw(st.integers(2, 50)), draw(st.integers(20, 300))
    forms = [rf"\frac{{1}}{{{base}^{{{exponent}}}}}", rf"{base}^{{-{exponent}}}", rf"1/{base}^{{{exponent}}}"]
    wrong = [rf"{base}^{{-{exponent + 1}}}", rf"{base}^{{{exponent}}}", rf"{base + 1}^{{-{exponent}}}", "0"]
    wrong += [rf"-{base}^{{-{exponent}}}", rf"{base}^{{-{exponent}}}+{base}^{{-{exponent + 60}}}"]
    return rf"{base}^{{-{exponent}}}", forms, wrong


@st.composite
def surds(draw: st.DrawFn) -> Case:
    a, b, c = draw(st.integers(1, 99)), draw(st.integers(2, 30)), draw(st.sampled_from([2, 3, 5, 7, 11]))
    forms = [rf"{b}\sqrt{{{c}}}+{a}", rf"{a}+\sqrt{{{b * b * c}}}", rf"\frac{{{2 * a}+{2 * b}\sqrt{{{c}}}}}{{2}}"]
    wrong = [rf"{a}-{b}\sqrt{{{c}}}", rf"{b}+{a}\sqrt{{{c}}}" if a != b else "1", rf"{a}+{b}\sqrt{{{c + 12}}}"]
    wrong += [rf"{a + 1}+{b}\sqrt{{{c}}}", rf"{a}+{b}", rf"{a}+{b}\sqrt[3]{{{c}}}"]
    return rf"{a}+{b}\sqrt{{{c}}}", forms, wrong


@st.composite
def polynomials(draw: st.DrawFn) -> Case:
    a, b = draw(st.integers(1, 30)), draw(st.integers(1, 30))
    forms = [rf"(x+{b})(x+{a})", rf"x^2+{a * b}+{a + b}x", rf"{a * b} + x\cdot({a + b}+x)", rf"y = (x+{a})(x+{b})"]
    wrong = [rf"(x-{a})(x+{b})", rf"(y+{a})(y+{b})", rf"x^3+{a + b}x+{a * b}", rf"x^2+{a + b}x+{a * b + 1}", f"{a * b}"]
    return rf"x^2+{a + b}x+{a * b}", forms, wrong


@st.composite
def tuples(draw: st.DrawFn) -> Case:
    values = draw(st.lists(st.integers(-99, 99), min_size=3, max_size=5, unique=True))
    text = ", ".join(map(str, values))
    turned = ", ".join(map(str, [*values[1:], values[0]]))
    forms = [
        f"({text})".replace(" ", ""),
        rf"\left({text}\right)",
        rf"\langle {text} \rangle",
        rf"({text}, )"[:-3] + ")",
    ]
    wrong = [f"({turned})", rf"\{{{text}\}}", f"({', '.join(map(str, values[:-1]))})", f"({text}, 100)", str(values[0])]
    return f"({text})", forms, wrong


@st.composite
def sets(draw: st.DrawFn) -> Case:
    values = draw(st.lists(st.integers(-99, 99), min_size=2, max_size=5, unique=True))
    text, turned = ", ".join(map(str, values)), ", ".join(map(str, values[::-1]))
    forms = [rf"\{{{turned}\}}", turned, rf"\left\{{ {text} \right\}}", turned.replace(", ", r" \text{ and } ")]
    wrong = [rf"\{{{text}, 100\}}", ", ".join(map(str, values[:-1])), str(values[0]), text.replace(",", ";") + "; 100"]
    return rf"\{{{text}\}}", forms, wrong


@st.composite
def intervals(draw: st.DrawFn) -> Case:
    low, width = draw(st.integers(-99, 99)), draw(st.integers(1, 99))
    high = low + width
    left, right = draw(st.sampled_from("([")), draw(st.sampled_from(")]"))
    signs = {"(": "<", "[": r"\le"}[left], {")": "<", "]": r"\leq "}[right]
    flipped = {"(": "[", "[": "(", ")": "]", "]": ")"}
    forms = [
        f"{low} {signs[0]} x {signs[1]} {high}",
        rf"\left{left}{low}.0,{high}\right{right}",
        rf"x \in {left}{low},{high}{right}",
    ]
    wrong = [
        f"{flipped[left]}{low},{high}{right}",
        f"{left}{low},{high}{flipped[right]}",
        f"{left}{low},{high + 1}{right}",
    ]
    wrong += [
        f"{left}{low - 1},{high}{right}",
        f"x {signs[0]} {high}",
        rf"(-\infty,{high}{right}",
        f"{left}{-high},{-low}{right}",
    ]
    return f"{left}{low},{high}{right}", forms, [text for text in wrong if low != -high or text != wrong[-1]]


@st.composite
def quantities(draw: st.DrawFn) -> Case:
    n, unit = draw(st.integers(1, 10**6)), draw(st.sampled_from(sorted(UNITS)))
    gold = f"{n}{UNITS[unit][0]}" if UNITS[unit][0].startswith(("\\", " ")) else f"{n} {UNITS[unit][0]}"
    forms = [f"{n}{form}" if form.startswith(("\\", " ")) else f"{n} {form}" for form in UNITS[unit]]
    others = [form for name, names in UNITS.items() if name != unit for form in names if form[0] in "\\ "]
    return gold, [*forms, str(n)], [f"{n}{other}" for other in others] + [f"{n + 1}{UNITS[unit][-1]}", str(n * 10)]


@st.composite
def words(draw: st.DrawFn) -> Case:
    letters = draw(st.lists(st.sampled_from("ABCDEFGHJKLM"), min_size=3, max_size=5, unique=True))
    turned = [*letters[1:], letters[0]]
    row = ", ".join(letters)
    if draw(st.booleans()):
        return (
            row,
            [row.replace(" ", ""), ", ".join(rf"\text{{{x}}}" for x in letters)],
            [", ".join(turned), letters[0]],
        )
    word = "".join(letters)
    return (
        word,
        [rf"\text{{{word}}}", rf"\mathrm{{{word}}}"],
        ["".join(turned), word[:-1], "".join(sorted(word)[::-1]) + "A"],
    )


@st.composite
def matrices(draw: st.DrawFn) -> Case:
    a, b, c, d = draw(st.lists(st.integers(-50, 50), min_size=4, max_size=4, unique=True))

    def matrix(kind: str, *rows: tuple[object, object]) -> str:
        return rf"\begin{{{kind}}}" + r" \\ ".join(f"{x} & {y}" for x, y in rows) + rf"\end{{{kind}}}"

    forms = [matrix("bmatrix", (a, b), (c, d)), matrix("pmatrix", (f"{a}.0", b), (rf"\frac{{{2 * c}}}{{2}}", d))]
    wrong = [
        matrix("pmatrix", (a, c), (b, d)),
        matrix("pmatrix", (a, b), (c, d + 1)),
        matrix("vmatrix", (a, b), (c, d)),
        str(a),
    ]
    return matrix("pmatrix", (a, b), (c, d)), forms, wrong


@st.composite
def equations(draw: st.DrawFn) -> Case:
    a, b = draw(st.integers(2, 30)), draw(st.integers(1, 30))
    forms = [rf"y - {a}x = {b}", rf"y = {b} + {a} x", rf"{2 * a}x + {2 * b} = 2y", rf"{a}x+{b}"]
    wrong = [rf"y = {a}x - {b}", rf"y = {a + 1}x+{b}", rf"x = {a}y+{b}", rf"y = {a}x", rf"y > {a}x+{b}", str(b)]
    return rf"y = {a}x + {b}", forms, wrong


KINDS: dict[str, Callable[[], st.SearchStrategy[Case]]] = {
    "integers": integers, "decimals": decimals, "rationals": rationals, "powers": powers, "surds": surds,
    "polynomials": polynomials, "tuples": tuples, "sets": sets, "intervals": intervals, "quantities": quantities,
    "words": words, "matrices": matrices, "equations": equations,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_equal_forms_are_accepted_and_changes_are_not(kind: str) -> None:
    @settings(max_examples=25)
    @given(KINDS[kind]())
    def check(case: Case) -> None:
        gold, forms, wrong = case
        assert equals_itself(gold)
        for form in forms:
            assert equivalent(gold, form), (gold, form)
        for other in wrong:
            assert not equivalent(gold, other), (gold, other)

    check()
