"""A peer in a line or two: the long-context stand-in of the paper's ablation."""

from __future__ import annotations

import re

from mopd_nemo.chat import Chat


def summary_of(text: str, chat: Chat, max_tokens: int) -> str:
    """What the first `<summary>` block of a response says, or else how the response begins.

    Args:
        max_tokens: either is cut to so many tokens, at its end.
    """
    block = re.search(r"<summary>(.*?)</summary>", text, flags=re.DOTALL)
    said = block[1].strip() if block else text
    ids = chat.encode(said)
    return said if len(ids) <= max_tokens else chat.decode(ids[:max_tokens]).rstrip("\ufffd").strip()
