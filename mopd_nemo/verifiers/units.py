"""Units after a number: of measure, of currency, counted things, the percent sign."""

from __future__ import annotations

import re
from dataclasses import dataclass

_NAMES = {
    "mm": "millimeter millimetre", "cm": "centimeter centimetre", "m": "meter metre", "km": "kilometer kilometre",
    "in": "inch inches", "ft": "foot feet", "yd": "yard", "mi": "mile", "mg": "milligram", "g": "gram gm",
    "kg": "kilogram kilo", "lb": "pound lbs", "oz": "ounce", "ton": "tonne", "s": "second sec secs",
    "ms": "millisecond",
    "min": "minute mins", "h": "hour hr hrs", "day": "", "week": "", "month": "", "year": "yr yrs", "l": "liter litre",
    "ml": "milliliter millilitre", "gal": "gallon", "deg": "degree degrees deg", "rad": "radian", "n": "newton",
    "j": "joule", "kj": "kilojoule", "w": "watt", "kw": "kilowatt", "v": "volt", "hz": "hertz", "pa": "pascal",
    "mol": "mole", "k": "kelvin", "ev": "", "cal": "calorie", "kcal": "kilocalorie", "acre": "", "hectare": "ha",
    "¤": "dollar usd bucks", "cent": "", "€": "euro eur", "£": "gbp", "¥": "yen yuan", "₹": "rupee rs", "unit": "",
    "mph": "", "kmph": "kph kmh", "%": "",
}  # fmt: skip
_CANONICAL = {
    spelling: name
    for name, others in _NAMES.items()
    for word in (name, *others.split())
    for spelling in (word, f"{word}s")
}
_SINGLE_LETTERS = frozenset("mgshlnjwvk")
"""Units of one letter. A bare letter is more likely a variable, so these need `\\text{}`, or a slash as in m/s."""
_WORDS = sorted(
    (w for w in _CANONICAL if w.isalpha() and w not in _SINGLE_LETTERS and w != "in"), key=len, reverse=True
)
_POWER = r"(?:\s*\^\s*(?:\{\s*-?\d\s*\}|\d))?"
_BARE = rf"(?:(?:square|cubic|sq\.?|cu\.?)\s+)?(?:{'|'.join(_WORDS)})(?![a-zA-Z]){_POWER}"
_IN_TEXT = rf"\\text\s*\{{[^{{}}]*\}}{_POWER}"
_CURRENCY = "¤£€¥₹"
_RATE = rf"(?:km|cm|m|mi|ft|kg|g|l)\s*/\s*(?:s|h|hr|min|m|l|cm)(?![a-zA-Z]){_POWER}"
_ONE = rf"(?:{_IN_TEXT}|{_RATE}|(?i:{_BARE})|\^\\circ(?:\s*(?:[CF](?![a-zA-Z])|\\text\{{\s*[CF]\s*\}}))?|[{_CURRENCY}])"
_UNIT = re.compile(rf"(?:(?<=[\d)}}%.])|(?<=\\pi)|\s)\s*({_ONE}(?:\s*(?:/|\\cdot|per(?![a-z]))?\s*{_ONE})*)$")
_LETTER = re.compile(r"(?<=\d)(\s+[mgsl]|\s*m\s*\^\s*(?:\{\s*[23]\s*\}|[23]))$")
_BEFORE = re.compile(rf"([-+]?)\s*([{_CURRENCY}])\s*(?=[-+.\d\\(])")
_NOT_A_UNIT = re.compile(
    r"(?i)\\text\s*\{\s*(?:mod|if|or|and|for|base|where|when|otherwise|even|odd|undefined|plus|minus|squared|cubed|"
    r"less\s+than|more\s+than|times\s+[\w\\]|below\s+zero|choose|factorial|pi|[xyz]|tenths?|hundredths?|thousandths?|halves|thirds?|fifths?|eighths?)\b"
)
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_SCALE = re.compile(rf"(?i)(?<=[\d}}])\s*(\\text\s*\{{\s*)?({'|'.join(_SCALES)})(?![a-zA-Z])\s*")


@dataclass(frozen=True, slots=True)
class Quantity:
    """A tidied text, split into a value and its unit."""

    value: str
    unit: str
    """In its one spelling, such as `cm^2`. Empty: no unit is written."""
    percent: bool
    scale: int = 1
    """Factor named by a word after the value: 10**6 for `5 million`."""


def split_unit(text: str, *, letters: bool = False) -> Quantity:
    """Split a tidied text into a value and its unit.

    Args:
        letters: read `5 m` and `5m^2` as meters, although m could be a variable.
    """
    unit = ""
    scale, text = _split_scale(text)
    before = _BEFORE.match(text)
    if before:
        unit, text = before[2], before[1] + text[before.end() :]
    behind = _UNIT.search(text) or (_LETTER.search(text) if letters else None)
    if behind and behind[1].startswith("^") and re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", text):
        behind = None  # the degree sign belongs to the function's argument
    if behind and text[: behind.start()].strip() and not _NOT_A_UNIT.search(behind[1]):
        named = canonical_unit(behind[1])
        unit, text = named or unit, text[: behind.start()].strip()
    percent = text.endswith("%") or unit == "%"
    return Quantity(text.rstrip("% "), "" if unit == "%" else unit, percent, scale)


def _split_scale(text: str) -> tuple[int, str]:
    scale = 1
    while word := _SCALE.search(text):
        scale *= _SCALES[word[2].lower()]
        text = re.sub(r"\\text\s*\{\s*\}$", "", f"{text[: word.start()]} {word[1] or ''}{text[word.end() :]}").strip()
    return scale, text


def canonical_unit(text: str) -> str:
    """The one spelling of a unit: `square centimeters`, `\\text{cm}^2` and `cm^{2}` are `cm^2`."""
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text).replace("\\circ", " deg ").lower().replace("\\cdot", "*")
    text = re.sub(r"\bper\b", "/", text.replace("^ deg", "deg").replace("{", "").replace("}", ""))
    text = re.sub(r"\b(?:square|sq\.?)\s+([a-z]+)", r"\1^2", re.sub(r"\b(?:cubic|cu\.?)\s+([a-z]+)", r"\1^3", text))
    text = re.sub(r"([a-z]+)\s+(?:squared)\b", r"\1^2", re.sub(r"([a-z]+)\s+(?:cubed)\b", r"\1^3", text))
    text = re.sub(r"\s*([\^/*])\s*", r"\1", text).strip(" .,;:")
    text = re.sub(r"[a-z¤£€¥₹]+", lambda m: _CANONICAL.get(m[0], _singular(m[0])), text)
    return {"mi/h": "mph", "km/h": "kmph"}.get(" ".join(text.split()), " ".join(text.split()))


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word
