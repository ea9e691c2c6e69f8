"""Thinking blocks: what comes before the answer, is not judged, and is not shown to others."""

from __future__ import annotations

import re

OPEN, CLOSE = "<think>", "</think>"


def opens_thinking(prompt: str) -> bool:
    """Whether a rendered prompt ends inside a thinking block, as templates of thinking-only models do."""
    return prompt.rfind(OPEN) > prompt.rfind(CLOSE)


def strip_thinking(text: str, *, opened_in_prompt: bool = False) -> str:
    """Remove every thinking block: closed ones, an unclosed one, and one whose opening tag sits in the prompt.

    A response that never left its thinking leaves the empty string.
    """
    if opened_in_prompt and text.find(CLOSE) == -1:
        return ""
    close, open_ = text.find(CLOSE), text.find(OPEN)
    if close != -1 and (open_ == -1 or close < open_):
        text = text[close + len(CLOSE) :]
    text = re.sub(f"{OPEN}.*?({CLOSE}|$)", "", text, flags=re.DOTALL)
    return text.strip()


def after_thinking(text: str) -> str:
    """The part of a response that is its answer: after the last closed block, before a block that is still open.

    Give a response whose opening tag sits in the prompt with that tag before it.
    """
    return text.rpartition(CLOSE)[2].partition(OPEN)[0]
