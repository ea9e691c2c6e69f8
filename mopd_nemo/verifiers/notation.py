r"""A normal form of answers: LaTeX and plain text that mean the same become the same text.

Nothing here decides whether two answers are equal. `tidy` removes typesetting (`\left`, `\displaystyle`, thin
spaces, `\text` around numbers), writes Unicode as LaTeX, and completes shorthand (`\frac12`, `\sqrt2`, `√2`, `½`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_UNICODE = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∗": "*", "÷": r"\div ",
    "⁄": "/", "∕": "/", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ",
    "≠": r"\ne ", "≈": r"\approx ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "±": r"\pm ",
    "∓": r"\mp ", "⟨": r"\langle ", "⟩": r"\rangle ", "〈": r"\langle ", "〉": r"\rangle ", "°": r"^\circ ",
    "º": r"^\circ ", "…": r"\ldots ", "⋯": r"\ldots ", "√": r"\sqrt ", "′": "'", "’": "'", "％": "%", "∣": "|",
    "≡": r"\equiv ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "λ": r"\lambda ", "μ": r"\mu ", "φ": r"\phi ",
    "ω": r"\omega ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "\u00a0": " ", "\u2009": r"\,", "\u202f": r"\,",
}  # fmt: skip
_FRACTIONS = {
    "½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅖": "2/5", "⅗": "3/5", "⅘": "4/5",
    "⅙": "1/6", "⅚": "5/6", "⅛": "1/8", "⅜": "3/8", "⅝": "5/8", "⅞": "7/8",
}  # fmt: skip
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")

_RULES: list[tuple[re.Pattern[str], str]] = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        # typesetting
        (r"\\(?:left|right|m?left|m?right|[bB]ig+[lrm]?)(?![a-zA-Z])\s*\.?(?=\s*[\[\]()|\\.]|\s*$)", ""),
        (r"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|rm|bf|it)(?![a-zA-Z])", " "),
        (r"(?<=\d)\s*\{\s*,\s*\}\s*(?=\d{3}(?!\d))", ","),
        (r"(?<=\d),\\!\s*(?=\d{3}(?!\d))", ","),
        (r"(?<=\d)(?:\\[,;:]|\\ |~)\s*(?=\d{3}(?!\d))", ","),
        (r"\\!", ""),
        (r"(?<!\\)\\(?:quad|qquad|enspace|thinspace|[,;:> ])|~|[\n\t\r]", " "),
        (r"\\(?:hspace|vspace|phantom|label|tag)\*?\{[^{}]*\}", " "),
        (r"\\(?:d|t|c)frac(?![a-z])", r"\\frac"),
        (r"\\(?:text(?:bf|it|rm|normal|sf|tt|up|md)?|mbox|textnormal|math(?:rm|bf|it|sf|tt|normal)|operatorname\*?)"
         r"\s*\{", r"\\text{"),
        (r"\\(?:boldsymbol|bm|mathbf|pmb|fbox|boxed)\s*(?=\{)", ""),
        # relations and symbols under one name
        (r"\\(?:leq|leqslant)(?![a-z])|<=|=<", r"\\le "),
        (r"\\(?:geq|geqslant)(?![a-z])|>=", r"\\ge "),
        (r"\\lt(?![a-z])", "<"),
        (r"\\gt(?![a-z])", ">"),
        (r"\\(?:neq|not\s*=)(?![a-z])|!=", r"\\ne "),
        (r"\\(?:approx|simeq|thickapprox)(?![a-z])|~=", r"\\approx "),
        (r"\\(?:varnothing|O(?![a-zA-Z]))|\\\{\s*\\\}", r"\\emptyset "),
        (r"\\(?:lbrace|lgroup)(?![a-z])", r"\\{"),
        (r"\\(?:rbrace|rgroup)(?![a-z])", r"\\}"),
        (r"\\(?:lbrack)(?![a-z])", "["),
        (r"\\(?:rbrack)(?![a-z])", "]"),
        (r"\\(?:langle)(?![a-z])\s*", "("),
        (r"\s*\\(?:rangle)(?![a-z])", ")"),
        (r"\\(?:[lr]?vert|mid)(?![a-z])", "|"),
        (r"\\(?:cdots|dots[bcimo]?|ldots|hdots)(?![a-z])|\.\.\.+", r"\\ldots "),
        (r"\\(?:pmod|mod|bmod|pod)(?![a-z])", r"\\mod "),
        (r"\\(?:cup|bigcup)(?![a-z])", r"\\cup "),
        (r"\\prime(?![a-z])", "'"),
        (r"\^\s*\{\s*('+)\s*\}|\^\s*('+)", r"\1\2"),
        (r"\\infin(?:ty)?(?![a-z])|(?<![a-zA-Z\\])(?:infinity|inf|oo)(?![a-zA-Z])", r"\\infty "),
        (r"\+\s*\\infty", r"\\infty"),
        (r"(?<![a-zA-Z\\])pi(?![a-zA-Z])", r"\\pi "),
        (r"(?<![a-zA-Z\\])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<![a-zA-Z\\])sqrt\s*(?=[\d{])", r"\\sqrt "),
        (r"\*\*", "^"),
        # degrees, percent
        (r"\^\s*\{\s*\\(?:circ|degree)\s*\}|\^\s*\\(?:circ|degree)|\\degree(?![a-z])|\\textdegree", r"^\\circ "),
        (r"\\%|\\text\{\s*%\s*\}", "%"),
        (r"\s*(?:\\text\{\s*)?(?<![a-zA-Z])(?:percentage|percent|per cent|pct)(?![a-zA-Z])(?:\s*\})?", "%"),
        (r"\s+%", "%"),
        # complete what LaTeX lets one abbreviate
        (r"\\sqrt\s*(\d|[a-zA-Z])", r"\\sqrt{\1}"),
        (r"\\sqrt\s*(\\[a-zA-Z]+)(?!\s*\{)", r"\\sqrt{\1}"),
        (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\\frac\s*(\d|[a-zA-Z])\s*(\d|[a-zA-Z])", r"\\frac{\1}{\2}"),
        (r"\\frac\s*(\d|[a-zA-Z])\s*\{", r"\\frac{\1}{"),
        (r"(\\frac\s*\{[^{}]*\})\s*(\d|[a-zA-Z])", r"\1{\2}"),
        (r"(\\frac\s*\{[^{}]*\})\s*(\\[a-zA-Z]+)", r"\1{\2}"),
    ]
]  # fmt: skip
_MATH_MARKS = re.compile(r"\$|\\[()\[\]]")
_EMPTY = re.compile(r"\\text\{\s*\}|(?<!\\)\{\s*\}(?!\s*[\^_])")
_NUMBER_IN_TEXT = re.compile(r"\\text\{\s*([-+]?[\d.,]+)\s*\}")


def tidy(answer: str) -> str:
    """The normal form of an answer. Never raises."""
    text = answer.strip()
    for character, replacement in _FRACTIONS.items():
        if character in text:
            text = re.sub(rf"(\d)\s*{character}", rf"\1 {replacement}", text).replace(character, replacement)
    text = re.sub(r"([⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹ⁿ]+)", lambda m: "^{" + m[1].translate(_SUPERSCRIPTS) + "}", text)
    text = re.sub(r"([₀-₉]+)", lambda m: "_{" + m[1].translate(_SUBSCRIPTS) + "}", text)
    if not text.isascii():
        text = "".join(_UNICODE.get(character, character) for character in text)
    if r"\begin" not in text:
        text = re.sub(r"\\\\(?=[a-zA-Z{}(\[])", r"\\", text)  # a doubled backslash, as in JSON
    text = text.replace(r"\$", "¤")  # a dollar sign, not a math delimiter
    if re.fullmatch(r"\$\s*[-+]?[\d.,\s]+", text) and text.count("$") == 1:
        text = "¤" + text[1:]
    text = _MATH_MARKS.sub(" ", text)
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    text = _NUMBER_IN_TEXT.sub(r" \1 ", _EMPTY.sub(" ", text))
    text = re.sub(r"\s+", " ", text).strip()
    return _without_group(re.sub(r"\s*[.;,:]\s*$", "", text) if not text.endswith(r"\ldots") else text)


def plain(text: str) -> str:
    """A tidied text, for comparison letter by letter. Words lose their capitals, symbols keep them."""
    text = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"\\mod\s*\{?\s*(\w+)\s*\}?", r"\\mod \1", text)
    text = re.sub(r"([_^])\{(\w)\}", r"\1\2", re.sub(r"(\\[a-zA-Z]+)\s+", r"\1", text))
    text = re.sub(r"(?<=[a-zA-Z0-9]) (?=[a-zA-Z0-9])", "·", text)  # spaces between words
    text = re.sub(r"\s+", "", text)
    return re.sub(r"(?<![a-zA-Z\\])(?:[a-zA-Z]{3,}|(?i:no))(?![a-zA-Z])", lambda word: word[0].casefold(), text).rstrip(
        "."
    )


def _without_group(text: str) -> str:
    """The text without braces around the whole of it."""
    while text.startswith("{") and text.endswith("}") and closing(text, 0) == len(text) - 1:
        text = text[1:-1].strip()
    return text


def closing(text: str, start: int) -> int:
    """Index of the bracket that closes the one at `start`; its kind may differ, as in `(0,1]`. -1: there is none."""
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] in "([{") - (text[position] in ")]}")
        if depth == 0:
            return position
    return -1


def split_top(text: str, separator: re.Pattern[str]) -> tuple[list[str], list[str]]:
    """The parts of a text between separators outside of all brackets, and the separators."""
    parts, found, start = [], [], 0
    for match in _outside(text, separator):
        parts.append(text[start : match.start()].strip())
        found.append(match[0].strip())
        start = match.end()
    return [*parts, text[start:].strip()], found


def _outside(text: str, separator: re.Pattern[str]) -> Iterator[re.Match[str]]:
    depth, position = 0, 0
    while position < len(text):
        if depth <= 0 and (match := separator.match(text, position)) and match[0]:
            yield match
            position = match.end()
            continue
        character = text[position]
        if text.startswith(r"\begin{", position):
            depth += 1
        elif text.startswith(r"\end{", position):
            depth -= 1
        depth += (character in "([{") - (character in ")]}")
        position += 1
