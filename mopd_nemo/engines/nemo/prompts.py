"""Rows of a batch that share a prompt, which is read once for all of them: found, and packed.

A pass costs about as much as it reads tokens: every prompt once for each part that its rows are cut into, and every
response.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Rows with one prompt."""

    rows: tuple[int, ...]
    """Indices into the batch."""
    prompt: int
    """Tokens of the prompt."""
    responses: tuple[int, ...]
    """Tokens of each row's response."""

    @property
    def tokens(self) -> int:
        """What is read of them."""
        return self.prompt + sum(self.responses)

    def parts(self, count: int) -> list[PromptRows]:
        """Cut into `count` parts of about as many response tokens each."""
        return [self._only(members) for members in evenly(self.responses, count)]

    def within(self, tokens: int) -> list[PromptRows]:
        """As few parts as have at most `tokens` tokens each; a row that is longer is a part of its own."""
        if self.tokens <= tokens:
            return [self]
        return [self._only(members) for members in fill(self.responses, tokens - self.prompt)]

    def _only(self, members: Sequence[int]) -> PromptRows:
        return PromptRows(tuple(self.rows[i] for i in members), self.prompt, tuple(self.responses[i] for i in members))


def by_prompt(ids_BS: Tensor, prompt_lengths: Sequence[int], lengths: Sequence[int]) -> list[PromptRows]:
    """Rows with equal prompts together, in order of their first rows.

    Args:
        lengths: of prompt and response.
    """
    found: dict[bytes, list[int]] = {}
    for row, prompt in enumerate(prompt_lengths):
        found.setdefault(ids_BS[row, :prompt].numpy().tobytes(), []).append(row)
    return [
        PromptRows(tuple(rows), prompt_lengths[rows[0]], tuple(lengths[row] - prompt_lengths[row] for row in rows))
        for rows in found.values()
    ]


def in_bins(groups: Sequence[PromptRows], tokens: int) -> list[list[PromptRows]]:
    """Groups in packed rows of at most `tokens` tokens; see `PromptRows.within` for a longer one."""
    parts = [part for group in groups for part in group.within(tokens)]
    return [[parts[i] for i in members] for members in fill([part.tokens for part in parts], tokens)]


def fill(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Indices of items in about as few bins as hold `limit` each (or a larger item, if there is one), evenly filled."""
    limit = max(limit, *sizes)
    count = max(1, -(-sum(sizes) // max(limit, 1)))
    while True:
        bins = evenly(sizes, count)
        if all(sum(sizes[i] for i in members) <= limit for members in bins):
            return [members for members in bins if members]
        count += 1


def evenly(sizes: Sequence[float], count: int) -> list[list[int]]:
    """Indices of items in `count` bins, each to the emptiest, the largest first; in order within a bin."""
    bins: list[list[int]] = [[] for _ in range(count)]
    fullness: list[tuple[float, int, int]] = [(0, 0, number) for number in range(count)]  # tokens, items
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        filled, items, number = heapq.heappop(fullness)
        bins[number].append(index)
        heapq.heappush(fullness, (filled + sizes[index], items + 1, number))
    return [sorted(members) for members in bins]


def row_by_row(cfg: Mapping[str, Any]) -> str | None:
    """Why workers with this PolicyConfig of NeMo-RL read a prompt again for each response. None: they need not."""
    if not cfg["megatron_cfg"]["enabled"]:
        return "DTensor workers cannot share a prompt between rows"
    if not cfg["sequence_packing"]["enabled"]:
        return "rows that are not packed cannot share a prompt"
    if cfg["megatron_cfg"]["context_parallel_size"] > 1:
        return "context parallelism cuts every row for itself"
    return None


@cache
def say(reason: str) -> None:
    """Log why prompts are not shared, once in a process."""
    logger.warning("scoring reads a prompt again for each of its responses: %s", reason)
