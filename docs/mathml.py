"""A hook of mkdocs.yml: turns formulas into MathML while the site is built, so that pages need no script for them."""

from __future__ import annotations

import html
import re

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', flags=re.DOTALL)


def on_page_content(content: str, **_: object) -> str:
    """Replace every formula of a rendered page."""
    return FORMULA.sub(lambda found: _mathml(found[3], display=found[2] == "["), content)


def _mathml(latex: str, display: bool) -> str:
    return convert(html.unescape(latex).strip(), display="block" if display else "inline")
