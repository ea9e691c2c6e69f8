"""Choose the peers of each target (paper eq. 4), never itself; `peers.dedupe` says how peers with equal text count.

Peers are ranked once per group. Each target gets the highest-ranked peers that it may be shown, so a group has at most
(peers + 1) distinct contexts and most targets share one. In canonical order all peers are equally good. Targets that
serve as peers then get the next ones in rank instead, so a large group needs only two distinct contexts.
`order: random` ranks anew for each target.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from mopd_nemo.chat import Chat, opens_thinking, strip_thinking
from mopd_nemo.config import PeersConfig
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
    """Indices of S(x) that may be shown, in sampling order."""
    failures: tuple[int, ...]
    """Indices of F(x) that may be shown, in sampling order."""
    feedback: tuple[str, ...]
    """Per rollout, the verifier's feedback on it; empty when there is none."""

    def of(self, kind: Kind) -> tuple[int, ...]:
        """Indices of one side, in sampling order."""
        return self.successes if kind == "success" else self.failures

    def twins(self, target: int, kind: Kind) -> list[int]:
        """The other rollouts of one side that read like the target; none where it has nothing to read."""
        text = self.texts[target]
        return [i for i in self.of(kind) if i != target and text and self.texts[i] == text]


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
    """The peers of one target, in the order shown. None, and nothing from other sources: the plain prompt."""

    peers: tuple[Peer, ...] = ()

    @property
    def full_peers(self) -> tuple[Peer, ...]:
        """Peers shown in full."""
        return tuple(peer for peer in self.peers if not peer.summary)

    @property
    def summaries(self) -> tuple[Peer, ...]:
        """Peers shown by their summary."""
        return tuple(peer for peer in self.peers if peer.summary)


def candidates_of(
    groups: Sequence[RolloutGroup], chat: Chat, config: PeersConfig, hidden: Collection[tuple[int, int]] = ()
) -> list[Candidates]:
    """The candidates of each group of a step, their texts cleaned for showing.

    Args:
        hidden: rollouts that no teacher may read, as (group, rollout).
    """
    return [_candidates(group_index, group, chat, config, hidden) for group_index, group in enumerate(groups)]


def select_peers(candidates: Candidates, config: PeersConfig, seed: str) -> list[Selection | None]:
    """One selection per rollout of a group, in order. None: it gets no peers, so no signal from them.

    Args:
        seed: names the group uniquely within the run; the same seed gives the same peers, after a resume too.
    """
    rng = random.Random(seed)
    required = has_required(candidates, config)
    ranked = {kind: _rank(candidates, kind, config) for kind in KINDS}
    counts = {"success": config.successes, "failure": config.failures}
    selections = []
    for target in range(len(candidates.texts)):
        if config.order == "random":
            for ranks in ranked.values():
                rng.shuffle(ranks)
        ranks = {kind: _for_target(ranked[kind], target, candidates, kind, config) for kind in KINDS}
        if config.order == "canonical" and any(None in _first(ranks[kind], counts[kind]) for kind in KINDS):
            ranks = {kind: _rotate(ranks[kind], counts[kind]) for kind in KINDS}
        peers = {kind: [Peer(kind, candidates.group_index, i) for i in ranks[kind] if i is not None] for kind in KINDS}
        chosen = _select(target, peers["success"], peers["failure"], candidates, config)
        selections.append(chosen if required[target] else None)
    return selections


def has_required(candidates: Candidates, config: PeersConfig) -> list[bool]:
    """Per rollout of a group, whether the peers exist beside it that `peers.require` asks for."""
    wanted = {"success": config.require.successes, "failure": config.require.failures}
    ranked = {kind: _rank(candidates, kind, config) for kind in KINDS if wanted[kind]}

    def found(target: int, kind: Kind) -> int:
        return sum(i is not None for i in _for_target(ranked[kind], target, candidates, kind, config))

    return [all(found(target, kind) >= wanted[kind] for kind in ranked) for target in range(len(candidates.texts))]


def _candidates(
    group_index: int, group: RolloutGroup, chat: Chat, config: PeersConfig, hidden: Collection[tuple[int, int]]
) -> Candidates:
    opened = opens_thinking(chat.decode(group.problem.prompt_ids, skip_special_tokens=False))
    texts: list[str] = []
    for rollout, verdict in zip(group.rollouts, group.verdicts, strict=True):
        text = rollout.text
        if config.strip_thinking_successes if verdict.success else config.strip_thinking_failures:
            text = strip_thinking(text, opened_in_prompt=opened)
        texts.append(chat.escape_control_tokens(text).strip())
    lengths = tuple(len(rollout.response_ids) for rollout in group.rollouts)
    feedback = tuple(chat.escape_control_tokens(verdict.feedback).strip() for verdict in group.verdicts)
    successes = tuple(i for i in group.successes if (group_index, i) not in hidden)
    failures = tuple(i for i in group.failures if (group_index, i) not in hidden)
    return Candidates(group_index, tuple(texts), lengths, successes, failures, feedback)


def _select(
    target: int, successes: Sequence[Peer], failures: Sequence[Peer], candidates: Candidates, config: PeersConfig
) -> Selection | None:
    """The selection of one target from its ranked peers."""
    if config.failure_form == "feedback":
        failures = [peer for peer in failures if candidates.feedback[peer.rollout_index]]
    shown, failed = _first(successes, config.successes), _first(failures, config.failures)
    rest = _first([*successes[len(shown) :], *failures[len(failed) :]], config.summaries)
    summaries = (Peer(peer.kind, peer.group_index, peer.rollout_index, summary=True) for peer in rest)
    peers = (*shown, *failed, *summaries)
    if shown:
        return Selection(peers)
    if config.successes == 0:
        return Selection(peers) if peers else None
    match config.when_no_success:
        case "failure_only" if candidates.twins(target, "success"):
            return None  # failures alone would say that nothing worked
        case "failure_only":
            return Selection(peers) if peers else None
        case "plain":
            return Selection()
        case "skip":
            return None


def _for_target(
    ranked: Sequence[int], target: int, candidates: Candidates, kind: Kind, config: PeersConfig
) -> list[int | None]:
    """The ranked peers as one target may be shown them. None stands where it may not be shown one."""
    texts = candidates.texts
    match config.dedupe:
        case "all":
            return [None if texts[i] == texts[target] else i for i in ranked]
        case "peers":
            twin = next(iter(candidates.twins(target, kind)), None)
            return [twin if i == target else i for i in ranked]
        case "none":
            return [None if i == target else i for i in ranked]


def _first(ranked: Sequence[_Ranked], count: int | str) -> tuple[_Ranked, ...]:
    return tuple(ranked if count == "all" else ranked[: int(count)])


def _rotate(ranked: Sequence[_Ranked], count: int | str) -> list[_Ranked]:
    """Move the first `count` to the end."""
    first = _first(ranked, count)
    return [*ranked[len(first) :], *first]


def _rank(candidates: Candidates, kind: Kind, config: PeersConfig) -> list[int]:
    """Candidates with something to show, in the configured order; of equal ones the first, unless all shall count."""
    ranked = [i for i in candidates.of(kind) if candidates.texts[i]]
    if config.dedupe != "none":
        first: dict[str, int] = {}
        for index in ranked:
            first.setdefault(candidates.texts[index], index)
        ranked = list(first.values())
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
