"""What is printed: text of models, data and paths is neither markup nor an escape sequence of the terminal."""

from __future__ import annotations

import re
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

_PICTURES = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"}
_PICTURES |= {0x7F: "\u2421"} | {code: f"\\x{code:02x}" for code in range(0x80, 0xA0)}
_PICTURES |= {code: f"\\u{code:04x}" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}
"""Control characters, and those that turn the direction of writing, with what is shown in their place."""


class Terminal(Console):
    """A console whose strings are plain text. Styles are given apart, as `style=` or as `Text`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, highlight=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """A string as text that can be shown."""
        return super().render_str(visible(text), **options)


def visible(text: str) -> str:
    """The text with its control characters as pictures: a model's or a row's text cannot steer the terminal."""
    return text.translate(_PICTURES)


_LABEL = re.compile(r"\S{1,14} {2,}")
"""What a line begins with that has a second column."""


def in_words(text: str, console: Console) -> str:
    """A sentence for a terminal, broken between words, under its second column if it has one; elsewhere as it is.

    Code between backticks and long words, such as paths, stay whole, so that they can be copied.
    """
    if not console.is_terminal:
        return text
    match = _LABEL.match(text)
    label = match[0] if match else ""
    lines = [label]
    for word in re.findall(r"(?:`[^`]*`|\S)+", text[len(label) :]):
        gap = " " if len(lines[-1]) > len(label) else ""
        if gap and cell_len(lines[-1] + gap + word) > console.width:
            lines.append(" " * len(label))
            gap = ""
        lines[-1] += gap + word
    return "\n".join(lines)


def plain(text: Any, style: str = "") -> Text:
    """Text for titles and panels, which would read a string as markup."""
    return Text(visible(str(text)), style=style)


def shortened(value: Any, limit: int = 200) -> str:
    """A value for a line or a cell, without its middle if it is long."""
    text = str(value)
    half = limit // 2
    return text if len(text) <= limit else f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"
