"""The conditions of a teacher-signal analysis: the paper's seven, and three matched-budget controls of 2S+1F.

The teacher prompts are those of training: with the same ranking of peers, rendering, budgets and chat template.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from mopd_nemo.chat import Chat
from mopd_nemo.config import PeersConfig, RequireConfig
from mopd_nemo.peers.controls import Control, apply_control
from mopd_nemo.peers.render import PeerContext, render_contexts
from mopd_nemo.peers.select import Candidates, Selection, candidates_of, select_peers
from mopd_nemo.types import RolloutGroup

_COUNTS: dict[str, tuple[int | str, int | str, int]] = {
    # name: (success peers, failure peers, how many peers make it complete)
    "none": (0, 0, 0),
    "1S": (1, 0, 1),
    "2nd S": (2, 0, 1),
    "1F": (0, 1, 1),
    "1S+1F": (1, 1, 2),
    "2S+1F": (2, 1, 3),
    "all": ("all", "all", 1),
}
CONTROLS: tuple[Control, ...] = ("random_peer", "unrelated_prompt", "success_only")
CONDITIONS: tuple[str, ...] = (*_COUNTS, *CONTROLS)
CONTROLLED = "2S+1F"
"""The condition whose peers the controls replace."""

LABELS = {
    "none": "no peers",
    "1S": "1 success",
    "2nd S": "2nd success",
    "1F": "1 failure",
    "1S+1F": "1 success + 1 failure",
    "2S+1F": "2 successes + 1 failure",
    "all": "all peers",
    "random_peer": "control: random peers",
    "unrelated_prompt": "control: other problems' peers",
    "success_only": "control: successes only",
}


@dataclass(frozen=True, slots=True)
class ConditionContext:
    """The context of one target in one condition."""

    context: PeerContext
    complete: bool
    """False when the group lacks some of the condition's peers. The context then shows the others."""


def condition_contexts(
    groups: Sequence[RolloutGroup], chat: Chat, config: PeersConfig, seed: str
) -> dict[str, list[list[ConditionContext]]]:
    """Contexts by condition, then one per group and rollout, in order.

    Args:
        groups: problems scored together; the `unrelated_prompt` control draws from the others among them.
        config: order, budgets, stripping and templates; its counts and control are not used.
        seed: names these groups uniquely within the analysis.
    """
    shown_as_trained = {"summaries": 0, "require": RequireConfig(), "when_no_success": "failure_only"}
    config = config.model_copy(update=shown_as_trained)
    candidates = candidates_of(groups, chat, config)
    contexts = {}
    for name in CONDITIONS:
        selections = [
            _select(name, own, config, f"{seed}/{group.problem.id}")
            for group, own in zip(groups, candidates, strict=True)
        ]
        if name in CONTROLS:
            selections = apply_control(selections, candidates, cast(Control, name), seed)
        contexts[name] = _contexts(name, groups, selections, candidates, chat, config)
    return contexts


def _select(name: str, own: Candidates, config: PeersConfig, seed: str) -> list[Selection]:
    """The peers of each target; an empty selection is the plain prompt."""
    successes, failures, _ = _COUNTS.get(name, _COUNTS[CONTROLLED])
    counted = config.model_copy(update={"successes": successes, "failures": failures})
    selected = select_peers(own, counted, seed)
    chosen = [Selection() if selection is None else selection for selection in selected]
    if name != "2nd S":
        return chosen
    firsts = _select("1S", own, config, seed)
    return [
        Selection(tuple(peer for peer in selection.peers if peer not in first.peers)[:1])
        for selection, first in zip(chosen, firsts, strict=True)
    ]


def _contexts(
    name: str,
    groups: Sequence[RolloutGroup],
    selections: Sequence[Sequence[Selection | None]],
    candidates: Sequence[Candidates],
    chat: Chat,
    config: PeersConfig,
) -> list[list[ConditionContext]]:
    wanted = _COUNTS.get(name, _COUNTS[CONTROLLED])[2]
    contexts = render_contexts(groups, selections, candidates, chat, config)
    return [
        [ConditionContext(context, len(context.selection.peers) >= wanted) for context in members]
        for members in contexts
    ]
