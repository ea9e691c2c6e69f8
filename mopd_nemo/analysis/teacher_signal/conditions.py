"""What the teacher reads in each condition: the paper's seven, and three matched-budget controls of 2S+1F.

The prompts are those of training: the same ranking of peers, rendering, budgets and chat template.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

from mopd_nemo.chat import Chat
from mopd_nemo.config import PeersConfig
from mopd_nemo.peers.contexts import PeerContext, render_contexts
from mopd_nemo.peers.controls import Control, apply_control
from mopd_nemo.peers.groups import Candidates, candidates
from mopd_nemo.peers.select import Selection, select_group
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
    """What the teacher of one target reads in one condition."""

    context: PeerContext
    complete: bool
    """False when the group lacks some of the condition's peers; the context then shows those there are."""


def condition_contexts(
    groups: Sequence[RolloutGroup], chat: Chat, config: PeersConfig, seed: str
) -> dict[str, list[list[ConditionContext]]]:
    """Contexts by condition, then one per group and rollout, in order.

    Args:
        groups: problems scored together; the `unrelated_prompt` control draws from the others among them.
        config: order, budgets, stripping and templates; its counts and control are not used.
        seed: names these groups uniquely within the analysis.
    """
    config = config.model_copy(update={"summaries": 0, "min_successes": 0})
    pools = [candidates(group, chat, config) for group in groups]
    contexts = {}
    for name in CONDITIONS:
        selections = [
            _select(name, pool, config, f"{seed}/{group.problem.id}") for group, pool in zip(groups, pools, strict=True)
        ]
        if name in CONTROLS:
            selections = apply_control(selections, pools, cast(Control, name), seed)
        contexts[name] = _contexts(name, groups, selections, pools, chat, config)
    return contexts


def _select(name: str, pool: Candidates, config: PeersConfig, seed: str) -> list[Selection]:
    successes, failures, _ = _COUNTS.get(name, _COUNTS[CONTROLLED])
    counted = config.model_copy(update={"successes": successes, "failures": failures})
    chosen = select_group(pool, [False] * len(pool.texts), counted, seed)
    if name != "2nd S":
        return chosen
    firsts = _select("1S", pool, config, seed)
    return [
        replace(selection, successes=tuple(i for i in selection.successes if i not in first.successes)[:1])
        for selection, first in zip(chosen, firsts, strict=True)
    ]


def _contexts(
    name: str,
    groups: Sequence[RolloutGroup],
    selections: Sequence[Sequence[Selection]],
    pools: Sequence[Candidates],
    chat: Chat,
    config: PeersConfig,
) -> list[list[ConditionContext]]:
    wanted = _COUNTS.get(name, _COUNTS[CONTROLLED])[2]
    shown = [[s if s.has_signal else Selection(plain=True) for s in group] for group in selections]
    contexts = render_contexts(groups, shown, pools, chat, config)
    return [
        [
            ConditionContext(context, len(s.successes) + len(s.failures) + len(s.others) >= wanted)
            for context, s in zip(group, members, strict=True)
        ]
        for group, members in zip(contexts, selections, strict=True)
    ]
