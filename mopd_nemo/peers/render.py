"""Render the user turn that a target's teacher reads (paper eq. 6 and 7): question, successes, failures, closing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mopd_nemo.chat import Chat
from mopd_nemo.config import PeersConfig, Templates

_PART_OF_CHARACTER = "\ufffd"
"""What a decoder writes for the bytes of a character that lost its others to a cut."""


@dataclass(frozen=True, slots=True)
class Section:
    """One piece of evidence in a context."""

    kind: Literal["success", "failure", "success_summary", "failure_summary", "feedback"]
    text: str


@dataclass(frozen=True, slots=True)
class Rendered:
    """A user turn."""

    text: str
    num_tokens: int
    """Of the section texts."""
    num_cut: int
    """Sections that lost their middle to the token budget."""


def render(question: str, sections: Sequence[Section], config: PeersConfig, chat: Chat, room: int) -> Rendered:
    """The teacher's user turn.

    Args:
        question: the student's user turn, kept verbatim.
        room: tokens that all section texts together may take; each also obeys `peers.max_peer_tokens`. Headings and
            closing are not counted here: the caller knows what the templates cost.
    """
    if not sections:
        return Rendered(question, 0, 0)
    ids = [chat.encode(section.text) for section in sections]
    budgets = fair_budgets([min(len(section_ids), config.max_peer_tokens) for section_ids in ids], room)
    parts = [question]
    num_successes = 0
    for section, section_ids, budget in zip(sections, ids, budgets, strict=True):
        num_successes += section.kind == "success"
        text = section.text if budget >= len(section_ids) else _cut_middle(section_ids, budget, config.templates, chat)
        parts.append(_heading(section, num_successes, config.templates).replace("{text}", text))
    parts.append(config.templates.closing)
    return Rendered(
        "".join(parts),
        sum(budgets),
        sum(len(section_ids) > budget for section_ids, budget in zip(ids, budgets, strict=True)),
    )


def fair_budgets(wanted: Sequence[int], room: int) -> list[int]:
    """Split `room` so that small wants are met in full and the large ones share the rest equally.

    >>> fair_budgets([10, 100, 100], 110)
    [10, 50, 50]
    """
    budgets = [0] * len(wanted)
    remaining = max(room, 0)
    smallest_first = sorted(range(len(wanted)), key=lambda i: wanted[i])
    for position, index in enumerate(smallest_first):
        budgets[index] = min(wanted[index], remaining // (len(wanted) - position))
        remaining -= budgets[index]
    return budgets


def _heading(section: Section, num_successes: int, templates: Templates) -> str:
    if section.kind == "success" and num_successes > 1:
        return templates.another_success
    return getattr(templates, section.kind)


def _cut_middle(ids: Sequence[int], budget: int, templates: Templates, chat: Chat) -> str:
    """Keep the start and the end, where the approach and the answer are."""
    keep = budget - len(chat.encode(templates.cut))
    if keep <= 0:
        return chat.decode(ids[:budget]).rstrip(_PART_OF_CHARACTER)
    head, tail = (keep + 1) // 2, keep // 2
    start, end = chat.decode(ids[:head]), chat.decode(ids[len(ids) - tail :])
    return start.rstrip(_PART_OF_CHARACTER) + templates.cut + end.lstrip(_PART_OF_CHARACTER)
