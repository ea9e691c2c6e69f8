"""The rollouts of a group that may serve as peers, with their texts cleaned for showing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mopd_nemo.chat import Chat
from mopd_nemo.config import PeersConfig
from mopd_nemo.thinking import opens_thinking, strip_thinking
from mopd_nemo.types import RolloutGroup


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


def distinct(group: RolloutGroup, indices: Sequence[int]) -> list[int]:
    """Of some rollouts, the first of each response."""
    first: dict[tuple[int, ...], int] = {}
    for index in indices:
        first.setdefault(group.rollouts[index].response_ids, index)
    return list(first.values())


def candidates(group: RolloutGroup, chat: Chat, config: PeersConfig) -> Candidates:
    """Clean the texts of a group for showing."""
    opened = opens_thinking(chat.decode(group.problem.prompt_ids, skip_special_tokens=False))
    texts: list[str] = []
    for rollout, verdict in zip(group.rollouts, group.verdicts, strict=True):
        text = rollout.text
        if config.strip_thinking_successes if verdict.success else config.strip_thinking_failures:
            text = strip_thinking(text, opened_in_prompt=opened)
        texts.append(chat.escape_control_tokens(text).strip())
    lengths = tuple(len(rollout.response_ids) for rollout in group.rollouts)
    return Candidates(tuple(texts), lengths, group.successes, group.failures)
