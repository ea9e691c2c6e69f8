"""Choose the peers of each target (paper eq. 4). The target itself is excluded, and equal texts count once.

Peers are ranked once per group. Each target gets the highest-ranked peers whose text differs from its own, so a group
has at most (peers + 1) distinct contexts and most targets share one. In canonical order all peers are equally good.
Targets that serve as peers then get the next ones in rank instead, so a large group needs only two distinct contexts.
`order: random` ranks anew for each target.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from mopd_nemo.chat import Chat
from mopd_nemo.config import PeersConfig
from mopd_nemo.thinking import opens_thinking, strip_thinking
from mopd_nemo.types import RolloutGroup

Kind = Literal["success", "failure"]
KINDS: tuple[Kind, Kind] = ("success", "failure")
_Ranked = TypeVar("_Ranked")


@dataclass(frozen=True, slots=True)
class Candidates:
    """The rollouts of one group that may serve as peers, and the text that each would show."""

    group_index: int
    """Index of the group within the step."""
    texts: tuple[str, ...]
    """Per rollout, the cleaned response; empty when nothing is left to show."""
    lengths: tuple[int, ...]
    """Per rollout, tokens of the response."""
    successes: tuple[int, ...]
    """Indices of S(x), in sampling order."""
    failures: tuple[int, ...]
    """Indices of F(x), in sampling order."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A rollout that a teacher reads."""

    kind: Kind
    """The heading that it is shown under. Only the control `random_peer` shows a rollout under the other one."""
    group_index: int
    """Index of its group within the step: the target's own, except under a control."""
    rollout_index: int
    summary: bool = False
    """Shown by its summary, not in full."""


@dataclass(frozen=True, slots=True)
class Selection:
    """What the teacher of one target reads: peers in the order shown, then feedback. Neither: the plain prompt."""

    peers: tuple[Peer, ...] = ()
    feedback: bool = False

    @property
    def full_peers(self) -> tuple[Peer, ...]:
        """Peers shown in full."""
        return tuple(peer for peer in self.peers if not peer.summary)

    @property
    def summaries(self) -> tuple[Peer, ...]:
        """Peers shown by their summary."""
        return tuple(peer for peer in self.peers if peer.summary)


def candidates_of(groups: Sequence[RolloutGroup], chat: Chat, config: PeersConfig) -> list[Candidates]:
    """The candidates of each group of a step, their texts cleaned for showing."""
    return [_candidates(group_index, group, chat, config) for group_index, group in enumerate(groups)]


def select_peers(
    candidates: Candidates, has_feedback: Sequence[bool], config: PeersConfig, seed: str
) -> list[Selection | None]:
    """One selection per rollout of a group, in order. None: the teacher has nothing to read, so no signal.

    Args:
        has_feedback: per rollout, whether its verdict carries feedback.
        seed: names the group uniquely within the run; the same seed gives the same peers, after a resume too.
    """
    rng = random.Random(seed)
    successes = _rank(candidates, candidates.successes, config)
    failures = _rank(candidates, candidates.failures, config)
    first = {candidates.texts[i] for i in (*_first(successes, config.successes), *_first(failures, config.failures))}
    selections = []
    for target, feedback in enumerate(has_feedback):
        text, ranks = candidates.texts[target], (successes, failures)
        if config.order == "random":
            rng.shuffle(successes)
            rng.shuffle(failures)
        elif config.order == "canonical" and text in first:
            ranks = _rotate(successes, config.successes), _rotate(failures, config.failures)
        own_successes, own_failures = (
            [Peer(kind, candidates.group_index, i) for i in ranked if candidates.texts[i] != text]
            for kind, ranked in zip(KINDS, ranks, strict=True)
        )
        selections.append(_select(own_successes, own_failures, feedback, config))
    return selections


def _candidates(group_index: int, group: RolloutGroup, chat: Chat, config: PeersConfig) -> Candidates:
    opened = opens_thinking(chat.decode(group.problem.prompt_ids, skip_special_tokens=False))
    texts: list[str] = []
    for rollout, verdict in zip(group.rollouts, group.verdicts, strict=True):
        text = rollout.text
        if config.strip_thinking_successes if verdict.success else config.strip_thinking_failures:
            text = strip_thinking(text, opened_in_prompt=opened)
        texts.append(chat.escape_control_tokens(text).strip())
    lengths = tuple(len(rollout.response_ids) for rollout in group.rollouts)
    return Candidates(group_index, tuple(texts), lengths, group.successes, group.failures)


def _select(
    successes: Sequence[Peer], failures: Sequence[Peer], feedback: bool, config: PeersConfig
) -> Selection | None:
    """The selection of one target from its ranked peers."""
    shown, failed = _first(successes, config.successes), _first(failures, config.failures)
    if config.successes == 0 or len(shown) >= config.min_successes:
        rest = _first([*successes[len(shown) :], *failures[len(failed) :]], config.summaries)
        summaries = (Peer(peer.kind, peer.group_index, peer.rollout_index, summary=True) for peer in rest)
        return Selection((*shown, *failed, *summaries)) if shown or failed or rest else None
    match config.when_no_success:
        case "failure_only":
            return Selection(failed) if failed else None
        case "feedback":
            return Selection(feedback=True) if feedback else None
        case "plain":
            return Selection()
        case "skip":
            return None


def _first(ranked: Sequence[_Ranked], count: int | str) -> tuple[_Ranked, ...]:
    return tuple(ranked if count == "all" else ranked[: int(count)])


def _rotate(ranked: Sequence[int], count: int | str) -> list[int]:
    """Move the first `count` to the end."""
    first = _first(ranked, count)
    return [*ranked[len(first) :], *first]


def _rank(candidates: Candidates, indices: Sequence[int], config: PeersConfig) -> list[int]:
    """Distinct, non-empty candidates in the configured order."""
    distinct: dict[str, int] = {}
    for index in indices:
        if candidates.texts[index]:
            distinct.setdefault(candidates.texts[index], index)
    ranked = list(distinct.values())
    if config.order == "shortest":
        ranked.sort(key=lambda index: candidates.lengths[index])
    elif config.order == "diverse":
        ranked = _most_diverse_first(ranked, candidates.texts)
    return ranked


def _most_diverse_first(indices: Sequence[int], texts: Sequence[str]) -> list[int]:
    """Farthest-point order: each next peer is the one least like those before it, by Jaccard distance of words."""
    words = {index: frozenset(texts[index].split()) for index in indices}
    ranked, rest = list(indices[:1]), list(indices[1:])
    while rest:
        farthest = max(rest, key=lambda index: min(_distance(words[index], words[other]) for other in ranked))
        ranked.append(farthest)
        rest.remove(farthest)
    return ranked


def _distance(a: frozenset[str], b: frozenset[str]) -> float:
    return 1.0 - len(a & b) / max(len(a | b), 1)
