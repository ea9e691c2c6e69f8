"""From the verified groups of a step to the teacher prompt of every rollout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mopd_nemo.chat import Chat
from mopd_nemo.config import PeersConfig
from mopd_nemo.peers.controls import apply_control
from mopd_nemo.peers.groups import Candidates, candidates
from mopd_nemo.peers.render import Rendered, Section, render
from mopd_nemo.peers.select import Selection, select_group
from mopd_nemo.peers.summary import summary_of
from mopd_nemo.types import Message, RolloutGroup

MIN_TOKENS_PER_SECTION = 16
"""Peers squeezed below this say nothing; such a target gets no signal and is counted as an overflow."""


@dataclass(frozen=True, slots=True)
class PeerContext:
    """What the teacher of one target reads."""

    selection: Selection
    prompt_ids: tuple[int, ...] | None
    """Teacher prompt up to and including the assistant header. None: the teacher has no signal for this target."""
    num_cut: int = 0
    """Sections that lost their middle to the token budget."""
    overflow: bool = False
    """True when peers were there but `peers.max_context_tokens` had no room for them."""


def build_contexts(
    groups: Sequence[RolloutGroup], chat: Chat, config: PeersConfig, seed: str
) -> list[list[PeerContext]]:
    """One context per group and rollout, in order. Equal contexts of a group share one tuple of ids.

    Args:
        seed: names the step uniquely within the run; the same seed and groups give the same contexts.
    """
    pools = [candidates(group, chat, config) for group in groups]
    selections = [
        select_group(pool, [bool(v.feedback.strip()) for v in group.verdicts], config, f"{seed}/{group.problem.id}")
        for group, pool in zip(groups, pools, strict=True)
    ]
    if config.control != "none":
        selections = apply_control(selections, pools, config.control, seed)
    return render_contexts(groups, selections, pools, chat, config)


def render_contexts(
    groups: Sequence[RolloutGroup],
    selections: Sequence[Sequence[Selection]],
    pools: Sequence[Candidates],
    chat: Chat,
    config: PeersConfig,
) -> list[list[PeerContext]]:
    """The teacher prompts of chosen peers, one per group and rollout, in order."""
    return [_group_contexts(g, group, selections[g], pools, chat, config) for g, group in enumerate(groups)]


def _group_contexts(
    index: int,
    group: RolloutGroup,
    selections: Sequence[Selection],
    pools: Sequence[Candidates],
    chat: Chat,
    config: PeersConfig,
) -> list[PeerContext]:
    rendered: dict[tuple[Section, ...], PeerContext] = {}
    contexts = []
    for selection, verdict in zip(selections, group.verdicts, strict=True):
        if not selection.has_signal:
            contexts.append(PeerContext(selection, None))
            continue
        sections = tuple(_sections(selection, index, pools, chat.escape_control_tokens(verdict.feedback), chat, config))
        if sections not in rendered:
            rendered[sections] = _render_context(group, selection, sections, chat, config)
        shared = rendered[sections]
        contexts.append(PeerContext(selection, shared.prompt_ids, shared.num_cut, shared.overflow))
    return contexts


def _sections(
    selection: Selection, group: int, pools: Sequence[Candidates], feedback: str, chat: Chat, config: PeersConfig
) -> list[Section]:
    """Successes, failures, summaries, feedback: most groups share the longest beginning that way."""
    own = pools[group]
    sections = [Section("success", own.texts[index]) for index in selection.successes]
    sections += [Section(p.kind, pools[p.group].texts[p.rollout]) for p in selection.others if p.kind == "success"]
    sections += [Section("failure", own.texts[index]) for index in selection.failures]
    sections += [Section(p.kind, pools[p.group].texts[p.rollout]) for p in selection.others if p.kind == "failure"]
    for index in selection.summaries:
        text = summary_of(own.texts[index], chat, config.max_summary_tokens)
        sections.append(Section("success_summary" if index in own.successes else "failure_summary", text))
    if selection.feedback:
        sections.append(Section("feedback", feedback))
    return sections


def _render_context(
    group: RolloutGroup, selection: Selection, sections: Sequence[Section], chat: Chat, config: PeersConfig
) -> PeerContext:
    if not sections:
        return PeerContext(selection, group.problem.prompt_ids)
    messages = group.problem.messages

    def prompt_ids(rendered: Rendered) -> tuple[int, ...]:
        user: Message = {"role": "user", "content": rendered.text}
        return chat.prompt_ids((*messages[:-1], user))

    question, room = messages[-1]["content"], config.max_context_tokens
    while room >= MIN_TOKENS_PER_SECTION * len(sections):
        rendered = render(question, sections, config, chat, room)
        ids = prompt_ids(rendered)
        excess = len(ids) - config.max_context_tokens
        if excess <= 0:
            return PeerContext(selection, ids, rendered.num_cut)
        room = rendered.num_tokens - excess  # what the templates cost, and a token more where text was cut between two
    return PeerContext(selection, None, overflow=True)
