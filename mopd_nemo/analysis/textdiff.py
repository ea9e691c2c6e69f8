"""Two texts side by side, with what differs marked: by line, and by word inside changed lines."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

Part = tuple[bool, str]
"""(differs, text)"""


def diff(left: str, right: str) -> tuple[list[Part], list[Part]]:
    """Both texts as parts that the other has too and parts that it has not. Joined, the parts are the texts."""
    a, b = left.splitlines(keepends=True), right.splitlines(keepends=True)
    sides: tuple[list[Part], list[Part]] = ([], [])
    for tag, a0, a1, b0, b1 in SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        old, new = "".join(a[a0:a1]), "".join(b[b0:b1])
        if tag == "replace":
            _add(sides, *_words(old, new))
        else:
            _add(sides, [(tag != "equal", old)], [(tag != "equal", new)])
    return sides


def _words(left: str, right: str) -> tuple[list[Part], list[Part]]:
    a, b = (re.findall(r"\s+|\w+|[^\w\s]", text) for text in (left, right))
    sides: tuple[list[Part], list[Part]] = ([], [])
    for tag, a0, a1, b0, b1 in SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        _add(sides, [(tag != "equal", "".join(a[a0:a1]))], [(tag != "equal", "".join(b[b0:b1]))])
    return sides


def _add(sides: tuple[list[Part], list[Part]], left: Sequence[Part], right: Sequence[Part]) -> None:
    for side, parts in zip(sides, (left, right), strict=True):
        side += [part for part in parts if part[1]]
