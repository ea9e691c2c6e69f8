"""Matched-budget controls: contexts of the same make-up and length whose content should not help, or helps otherwise.

A control starts from the regular selection. It replaces each peer by another rollout of nearly the same length, shown
under the same heading. What a method gains over its control is due to what the peers say, not to a longer prompt.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Sequence
from typing import Literal

from mopd_nemo.peers.select import Candidates, Kind, Peer, Selection

Control = Literal["random_peer", "unrelated_prompt", "success_only"]


def apply_control(
    selections: Sequence[Sequence[Selection | None]], candidates: Sequence[Candidates], control: Control, seed: str
) -> list[list[Selection | None]]:
    """Replace the peers of every target of a step.

    Args:
        selections: per group and rollout, the regular selection; None stays None.
        candidates: per group.
        seed: names the step uniquely within the run.
    """
    controlled = []
    for own, members in zip(candidates, selections, strict=True):
        rng = random.Random(f"{seed}/{own.group_index}")
        group: list[Selection | None] = []
        for target, selection in enumerate(members):
            if selection is None:
                group.append(None)
                continue
            match control:
                case "random_peer":
                    peers = _random_peers(selection.full_peers, target, own, rng)
                case "unrelated_prompt":
                    peers = _unrelated(selection.full_peers, own, candidates)
                case "success_only":
                    peers = _successes_only(selection.full_peers, target, own, candidates)
            group.append(Selection((*peers, *selection.summaries)))
        controlled.append(group)
    return controlled


def _random_peers(peers: Sequence[Peer], target: int, own: Candidates, rng: random.Random) -> list[Peer]:
    """Rollouts of the group at random, whatever their outcome, under the headings of those they replace."""
    others = _distinct([*own.successes, *own.failures], own, without={own.texts[target]})
    drawn = rng.sample(others, min(len(peers), len(others)))
    return [Peer(peer.kind, own.group_index, index) for peer, index in zip(peers, drawn, strict=False)]


def _unrelated(peers: Sequence[Peer], own: Candidates, candidates: Sequence[Candidates]) -> list[Peer]:
    """Rollouts of other problems with the same outcome and the nearest length."""
    found: list[Peer] = []
    for peer in peers:
        nearest = _nearest_elsewhere(peer.kind, own.lengths[peer.rollout_index], own, candidates, found)
        found += [nearest] if nearest is not None else []
    return found


def _successes_only(
    peers: Sequence[Peer], target: int, own: Candidates, candidates: Sequence[Candidates]
) -> list[Peer]:
    """Further successes of the group in place of the failures, then successes of other problems."""
    found = [peer for peer in peers if peer.kind == "success"]
    shown = {own.texts[target], *(own.texts[peer.rollout_index] for peer in found)}
    spare = _distinct(own.successes, own, without=shown)
    for failure in (peer for peer in peers if peer.kind == "failure"):
        length = own.lengths[failure.rollout_index]
        if spare:
            index = min(spare, key=lambda i: abs(own.lengths[i] - length))
            spare.remove(index)
            found.append(Peer("success", own.group_index, index))
        elif (nearest := _nearest_elsewhere("success", length, own, candidates, found)) is not None:
            found.append(nearest)
    return found


def _nearest_elsewhere(
    kind: Kind, length: int, own: Candidates, candidates: Sequence[Candidates], taken: Collection[Peer]
) -> Peer | None:
    """The rollout of another problem with this outcome and the nearest length; ties go to the first."""
    best: tuple[int, Peer] | None = None
    for other in candidates:
        if other.group_index == own.group_index:
            continue
        for index in other.successes if kind == "success" else other.failures:
            peer = Peer(kind, other.group_index, index)
            distance = abs(other.lengths[index] - length)
            if other.texts[index] and peer not in taken and (best is None or distance < best[0]):
                best = distance, peer
    return best[1] if best is not None else None


def _distinct(indices: Iterable[int], own: Candidates, without: set[str]) -> list[int]:
    """Indices with distinct texts that are neither empty nor in `without`."""
    by_text: dict[str, int] = {}
    for index in indices:
        text = own.texts[index]
        if text and text not in without:
            by_text.setdefault(text, index)
    return list(by_text.values())
