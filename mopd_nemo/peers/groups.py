"""Split a rollout group into successes and failures (paper eq. 3) and clean their texts for showing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mopd_nemo.chat import Chat
from mopd_nemo.config import PeersConfig
from mopd_nemo.peers.thinking import opens_thinking, strip_thinking
from mopd_nemo.types import Outcome, RolloutGroup, Verdict


@dataclass(frozen=True, slots=True)
class Candidates:
    """Rollouts of one group that may serve as peers, and the text that each would show."""

    texts: tuple[str, ...]
    """Per rollout: what a teacher would read of it. Empty when nothing is left to show."""
    lengths: tuple[int, ...]
    """Per rollout: tokens of the response."""
    successes: tuple[int, ...]
    """Indices of S(x), in sampling order."""
    failures: tuple[int, ...]
    """Indices of F(x), in sampling order."""


def is_success(verdict: Verdict, threshold: float) -> bool:
    """Eq. 3. A verifier error is neither a success nor a failure."""
    return verdict.outcome is not Outcome.VERIFIER_ERROR and verdict.reward >= threshold


def is_failure(verdict: Verdict, threshold: float) -> bool:
    """Eq. 3. A verifier error is neither a success nor a failure."""
    return verdict.outcome is not Outcome.VERIFIER_ERROR and verdict.reward < threshold


def judged(group: RolloutGroup) -> list[int]:
    """Indices of the rollouts that the verifier could judge."""
    return [i for i, verdict in enumerate(group.verdicts) if verdict.outcome is not Outcome.VERIFIER_ERROR]


def distinct(group: RolloutGroup, indices: Sequence[int]) -> list[int]:
    """Of some rollouts, the first of each response."""
    first: dict[tuple[int, ...], int] = {}
    for index in indices:
        first.setdefault(group.rollouts[index].response_ids, index)
    return list(first.values())


def candidates(group: RolloutGroup, chat: Chat, peers: PeersConfig, threshold: float) -> Candidates:
    """Partition a group and clean its texts."""
    opened = opens_thinking(chat.decode(group.prompt_ids, skip_special_tokens=False))
    texts: list[str] = []
    successes: list[int] = []
    failures: list[int] = []
    for index, (rollout, verdict) in enumerate(zip(group.rollouts, group.verdicts, strict=True)):
        text = rollout.text
        if peers.strip_thinking_successes if is_success(verdict, threshold) else peers.strip_thinking_failures:
            text = strip_thinking(text, opened_in_prompt=opened)
        texts.append(chat.neutralise(text).strip())
        if is_success(verdict, threshold):
            successes.append(index)
        elif is_failure(verdict, threshold):
            failures.append(index)
    lengths = tuple(len(rollout.response_ids) for rollout in group.rollouts)
    return Candidates(tuple(texts), lengths, tuple(successes), tuple(failures))
