"""Choose the peers of each target (paper eq. 4): the target itself excluded, equal texts counted once.

Peers are ranked once per group and a target takes the first ones in rank that are not itself. So a group has at most
(peers + 1) distinct contexts, and most targets share one. In canonical order, where no peer is better than another, the
first ones all step aside for the next in line: two contexts do for a large group. Only `order: random` ranks anew for
each target.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mopd_nemo.config import PeersConfig
from mopd_nemo.peers.groups import Candidates


@dataclass(frozen=True, slots=True)
class OtherPeer:
    """A rollout of another group of the step, shown by a matched-budget control."""

    kind: Literal["success", "failure"]
    group: int
    rollout: int


@dataclass(frozen=True, slots=True)
class Selection:
    """What one target's teacher reads, in this order. Numbers are rollouts of the target's own group."""

    successes: tuple[int, ...] = ()
    failures: tuple[int, ...] = ()
    summaries: tuple[int, ...] = ()
    """Further peers of either outcome, shown by their summaries."""
    others: tuple[OtherPeer, ...] = ()
    feedback: bool = False
    plain: bool = False
    """The bare prompt on purpose: context-free distillation."""

    @property
    def has_signal(self) -> bool:
        """False when the teacher has nothing to say about the target; it then costs no forward pass."""
        return self != Selection()


def select_group(
    candidates: Candidates, has_feedback: Sequence[bool], config: PeersConfig, seed: str
) -> list[Selection]:
    """One selection per rollout of a group, in order.

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
            ranks = _next_in_line(successes, config.successes), _next_in_line(failures, config.failures)
        others = [[i for i in ranked if candidates.texts[i] != text] for ranked in ranks]
        selections.append(_select(others[0], others[1], feedback, config))
    return selections


def _select(successes: Sequence[int], failures: Sequence[int], feedback: bool, config: PeersConfig) -> Selection:
    """Of ranked peers that are not the target."""
    shown, failed = _first(successes, config.successes), _first(failures, config.failures)
    if config.successes == 0 or len(shown) >= config.min_successes:
        rest = [*successes[len(shown) :], *failures[len(failed) :]]
        return Selection(shown, failed, _first(rest, config.summaries))
    match config.when_no_success:
        case "failure_only":
            return Selection(failures=failed)
        case "feedback":
            return Selection(feedback=feedback)
        case "plain":
            return Selection(plain=True)
        case "skip":
            return Selection()


def _first(ranked: Sequence[int], count: int | str) -> tuple[int, ...]:
    return tuple(ranked if count == "all" else ranked[: int(count)])


def _next_in_line(ranked: Sequence[int], count: int | str) -> list[int]:
    """The first ones go last."""
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
