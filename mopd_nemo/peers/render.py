"""From the verified groups of a step to the teacher prompt of every rollout (paper eq. 6 and 7).

The user turn that a teacher reads is the question, what each source of the context shows, and a closing instruction.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from mopd_nemo.chat import PART_OF_CHARACTER, Chat
from mopd_nemo.config import FeedbackConfig, PeersConfig, Templates
from mopd_nemo.peers.contrast import difference
from mopd_nemo.peers.controls import apply_control
from mopd_nemo.peers.select import Candidates, Peer, Selection, candidates_of, has_required, select_peers
from mopd_nemo.peers.sources import ContextSection, sections_from
from mopd_nemo.types import Message, RolloutGroup

PLAIN = Selection()
PEERS_ALONE = ("peers",)
NO_SUCCESS = FeedbackConfig()
MIN_TOKENS_PER_SECTION = 16
"""Texts squeezed below this say nothing. Such a target gets no signal and is counted as an overflow."""


@dataclass(frozen=True, slots=True)
class PeerContext:
    """What the teacher of one target reads."""

    prompt_ids: tuple[int, ...] | None
    """Teacher prompt up to and including the assistant header. None: the teacher has no signal for this target."""
    selection: Selection = PLAIN
    sources: tuple[str, ...] = ()
    """The sources of `context` that it shows something of."""
    complete: bool = False
    """It shows as many peers as `peers.successes` and `peers.failures` ask for; `all` asks for at least one. A context
    without peers is complete when it shows something."""
    num_truncated: int = 0
    """Sections that lost their middle to the token budget."""
    overflow: bool = False
    """True when there was something to show but `peers.max_context_tokens` had no room for it."""
    contrast_prompt_ids: tuple[int, ...] | None = None
    """With `divergence.contrast`, the prompt with the failures; the other one then has the successes."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A user turn."""

    text: str
    num_tokens: int
    """Of the section texts."""
    num_truncated: int
    """Sections that lost their middle to the token budget."""


def build_contexts(
    groups: Sequence[RolloutGroup],
    chat: Chat,
    config: PeersConfig,
    seed: str,
    context: Sequence[str] = PEERS_ALONE,
    feedback: FeedbackConfig = NO_SUCCESS,
    hidden: Collection[tuple[int, int]] = (),
) -> list[list[PeerContext]]:
    """One context per group and rollout, in order. Equal contexts of a group share one tuple of ids.

    Args:
        seed: names the step uniquely within the run; the same seed and groups give the same contexts.
        context: the sources, in the order shown.
        hidden: rollouts that no teacher may read, as (group, rollout).
    """
    candidates = candidates_of(groups, chat, config, hidden)
    selections: list[list[Selection | None]] = [[None] * len(group.rollouts) for group in groups]
    if "peers" in context:
        selections = [
            select_peers(own, config, f"{seed}/{group.problem.id}")
            for group, own in zip(groups, candidates, strict=True)
        ]
        if config.control != "none":
            selections = apply_control(selections, candidates, config.control, seed)
    return render_contexts(groups, selections, candidates, chat, config, context, feedback)


def build_contrasts(
    groups: Sequence[RolloutGroup],
    chat: Chat,
    config: PeersConfig,
    seed: str,
    hidden: Collection[tuple[int, int]] = (),
) -> list[list[PeerContext]]:
    """The contexts of `build_contexts` cut in two prompts: successes in one, failures in the other, if there are any.

    A target that has no prompt of successes has no signal.
    """
    after_successes = build_contexts(groups, chat, config.model_copy(update={"failures": 0}), seed, hidden=hidden)
    alone = {"successes": 0, "summaries": 0}
    after_failures = build_contexts(groups, chat, config.model_copy(update=alone), seed, hidden=hidden)
    return [
        [_contrast(*pair) for pair in zip(*members, strict=True)]
        for members in zip(after_successes, after_failures, strict=True)
    ]


def _contrast(successes: PeerContext, failures: PeerContext) -> PeerContext:
    if successes.prompt_ids is None or failures.prompt_ids is None:
        return replace(successes, complete=False)
    return replace(
        successes,
        selection=replace(successes.selection, peers=(*successes.selection.peers, *failures.selection.peers)),
        complete=successes.complete and failures.complete,
        num_truncated=successes.num_truncated + failures.num_truncated,
        contrast_prompt_ids=failures.prompt_ids,
    )


def plain_contexts(groups: Sequence[RolloutGroup]) -> list[list[PeerContext]]:
    """Per group and rollout, the prompt that the student read."""
    return [[PeerContext(group.problem.prompt_ids) for _ in group.rollouts] for group in groups]


def render_contexts(
    groups: Sequence[RolloutGroup],
    selections: Sequence[Sequence[Selection | None]],
    candidates: Sequence[Candidates],
    chat: Chat,
    config: PeersConfig,
    context: Sequence[str] = PEERS_ALONE,
    feedback: FeedbackConfig = NO_SUCCESS,
) -> list[list[PeerContext]]:
    """The teacher prompts of selected peers and of the other sources, one per group and rollout, in order.

    A target without `peers.require` has no signal, whatever other sources say.
    """
    contexts = []
    for group, own, members in zip(groups, candidates, selections, strict=True):
        fitted: dict[tuple[ContextSection, ...], PeerContext] = {}
        required = has_required(own, config)
        contexts.append([])
        for target, selection in enumerate(members):
            by_peers, shown = _peer_sections(selection, candidates, chat, config)
            reads_success = any(peer.kind == "success" and not peer.summary for peer in shown)
            parts = {
                source: by_peers
                if source == "peers"
                else sections_from(source, group, target, reads_success=reads_success, feedback=feedback, chat=chat)
                for source in context
            }
            sections = tuple(section for part in parts.values() for section in part)
            is_plain = selection is not None and not selection.peers
            if not (sections or is_plain) or not required[target]:
                contexts[-1].append(PeerContext(None))
                continue
            if sections not in fitted:
                fitted[sections] = _fit(group, sections, chat, config)
            chosen = Selection(shown)
            contexts[-1].append(
                replace(
                    fitted[sections],
                    selection=chosen,
                    sources=tuple(source for source, part in parts.items() if part),
                    complete=_is_complete(chosen, config) if "peers" in context else True,
                )
            )
    return contexts


def _peer_sections(
    selection: Selection | None, candidates: Sequence[Candidates], chat: Chat, config: PeersConfig
) -> tuple[tuple[ContextSection, ...], tuple[Peer, ...]]:
    """What a selection shows, and its peers without those of which nothing is left to show.

    In this order, most contexts of a group share the longest prefix.
    """
    if selection is None:
        return (), ()
    sections: list[ContextSection] = []
    shown = []
    for peer in selection.peers:
        own = candidates[peer.group_index]
        text = own.texts[peer.rollout_index]
        if peer.summary:
            kind = "success_summary" if peer.kind == "success" else "failure_summary"
            evidence = [ContextSection(kind, summary_of(text, chat, config.max_summary_tokens))]
        elif peer.kind == "success":
            evidence = [ContextSection("success", text)]
        else:
            successes = [section.text for section in sections if section.kind == "success"]
            evidence = _failure(text, own.feedback[peer.rollout_index], successes, config)
        sections += evidence
        shown += [peer] if evidence else []
    return tuple(sections), tuple(shown)


def _failure(text: str, feedback: str, successes: Sequence[str], config: PeersConfig) -> list[ContextSection]:
    """A failed peer in the form of `peers.failure_form`; nothing where this form has nothing to show."""
    match config.failure_form:
        case "described" if feedback:
            return [ContextSection("failure", text), ContextSection("failure_feedback", feedback)]
        case "feedback":
            return [ContextSection("feedback", feedback)] if feedback else []
        case "contrast" if successes:
            different = difference(text, successes)
            return [ContextSection("failure_difference", different)] if different else []
    return [ContextSection("failure", text)]


def _is_complete(selection: Selection, config: PeersConfig) -> bool:
    """By number alone, because the controls put peers of one kind in the place of the other."""
    wanted = sum(1 if count == "all" else count for count in (config.successes, config.failures))
    return len(selection.full_peers) >= wanted


def _fit(group: RolloutGroup, sections: Sequence[ContextSection], chat: Chat, config: PeersConfig) -> PeerContext:
    """The context with its sections truncated as far as `peers.max_context_tokens` asks."""
    if not sections:
        return PeerContext(group.problem.prompt_ids)
    messages = group.problem.messages
    question, room = messages[-1]["content"], config.max_context_tokens
    while room >= MIN_TOKENS_PER_SECTION * len(sections):
        rendered = render_user_turn(question, sections, config, chat, room)
        user: Message = {"role": "user", "content": rendered.text}
        ids = chat.prompt_ids((*messages[:-1], user))
        excess = len(ids) - config.max_context_tokens
        if excess <= 0:
            return PeerContext(ids, num_truncated=rendered.num_truncated)
        # Headings and closing cost `excess` tokens. A truncation may split a token in two, hence the loop.
        room = rendered.num_tokens - excess
    return PeerContext(None, overflow=True)


def render_user_turn(
    question: str, sections: Sequence[ContextSection], config: PeersConfig, chat: Chat, room: int
) -> Rendered:
    """The teacher's user turn.

    Args:
        question: the student's user turn, kept verbatim.
        room: tokens that all section texts together may take; each also obeys `peers.max_peer_tokens`. Headings and
            closing are not counted.
    """
    if not sections:
        return Rendered(question, 0, 0)
    ids = [chat.encode(section.text) for section in sections]
    budgets = fair_budgets([min(len(section_ids), config.max_peer_tokens) for section_ids in ids], room)
    parts = [question]
    num_successes = 0
    for section, section_ids, budget in zip(sections, ids, budgets, strict=True):
        num_successes += section.kind == "success"
        text = (
            section.text
            if budget >= len(section_ids)
            else _truncate_middle(section_ids, budget, config.templates, chat)
        )
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


def _heading(section: ContextSection, num_successes: int, templates: Templates) -> str:
    if section.kind == "own":
        return f"\n\n{section.heading}\n\n{{text}}"
    if section.kind == "success" and num_successes > 1:
        return templates.another_success
    return getattr(templates, section.kind)


def _truncate_middle(ids: Sequence[int], budget: int, templates: Templates, chat: Chat) -> str:
    """Keep the start and the end, where the approach and the answer are."""
    keep = budget - len(chat.encode(templates.cut))
    if keep <= 0:
        return chat.decode(ids[:budget]).rstrip(PART_OF_CHARACTER)
    head, tail = (keep + 1) // 2, keep // 2
    start, end = chat.decode(ids[:head]), chat.decode(ids[len(ids) - tail :])
    return start.rstrip(PART_OF_CHARACTER) + templates.cut + end.lstrip(PART_OF_CHARACTER)


def summary_of(text: str, chat: Chat, max_tokens: int) -> str:
    """The first `<summary>` block of a response, or else the beginning of the response.

    Args:
        max_tokens: the result is truncated to this many tokens.
    """
    block = re.search(r"<summary>(.*?)</summary>", text, flags=re.DOTALL)
    summary = block[1].strip() if block else text
    ids = chat.encode(summary)
    return summary if len(ids) <= max_tokens else chat.decode(ids[:max_tokens]).rstrip(PART_OF_CHARACTER).strip()
