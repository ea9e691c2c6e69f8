"""Micro-batches of sequences, padding of prompts, and batches that sequences leave at their end.

Shape suffixes: B sequences, S positions, L layers, K key-value heads, C positions of a cache, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from mopd_nemo.engines.local.prefix_tree import common_length


def micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of rows in batches of at most `max_tokens` padded tokens, longest first.

    Rows of similar length share a batch, so little is padding; the longest batch comes first, so that a batch that
    does not fit in memory shows at once. A row longer than `max_tokens` gets a batch of its own.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def tree_batches(units: Sequence[Sequence[Sequence[int]]], max_tokens: int) -> list[list[int]]:
    """Indices of units in batches of at most `max_tokens` tokens, what sequences have in common counted once.

    Units that begin alike are neighbours, and a batch ends where the least is lost by it: what the units on both sides
    have in common is computed twice. The largest batch comes first. A larger unit gets a batch of its own.

    Args:
        units: sequences that must share a batch, with at least one each.
    """
    order = sorted(range(len(units)), key=lambda i: tuple(units[i][0]))
    firsts = [units[i][0] for i in order]
    shared = [0, *(common_length(a, b) for a, b in pairwise(firsts))][: len(order)]  # with the unit before
    own = [sum(len(s) - (common_length(units[i][0], s) if n else 0) for n, s in enumerate(units[i])) for i in order]
    fresh = [tokens - common for tokens, common in zip(own, shared, strict=True)]
    batches: list[tuple[int, list[int]]] = []
    start = 0
    while start < len(order):
        totals = [shared[start] + total for total in accumulate(fresh[start:])]
        count = max(sum(total <= max_tokens for total in totals), 1)
        if count < len(totals):
            full = [n for n in range(1, count + 1) if totals[n - 1] >= totals[count - 1] / 2]
            count = min(full, key=lambda n: (shared[start + n], -n))
        batches.append((totals[count - 1], order[start : start + count]))
        start += count
    return [batch for _, batch in sorted(batches, key=lambda b: -b[0])]


def left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """mask_BS (1 for real tokens) and ids_BS of prompts that all end at the last position."""
    width = max(len(prompt) for prompt in prompts)
    ids_BS = torch.zeros(len(prompts), width, dtype=torch.long)
    mask_BS = torch.zeros(len(prompts), width, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        ids_BS[i, width - len(prompt) :] = torch.tensor(prompt)
        mask_BS[i, width - len(prompt) :] = 1
    return mask_BS.to(device), ids_BS.to(device)


def positions_of(mask_BS: Tensor) -> Tensor:
    """Position ids that count real tokens only."""
    return (mask_BS.cumsum(-1) - 1).clamp(min=0)


def compact_order(ended_B: Tensor) -> Tensor:
    """Which row moves to each place when finished rows leave a batch, so that as few as possible move.

    The last running rows take the places of those that ended; the others stay where they are.
    """
    running = (~ended_B).nonzero().squeeze(-1)
    count = len(running)
    order_B = torch.arange(count, device=ended_B.device)
    order_B[ended_B[:count]] = running[running >= count]
    return order_B


def move_rows(cache_L2BKCD: Tensor, order_B: Tensor) -> None:
    """Bring row `order_B[i]` of a cache to position i; those that stay where they are cost nothing."""
    moved = (order_B != torch.arange(len(order_B), device=order_B.device)).nonzero().squeeze(-1)
    if len(moved):
        cache_L2BKCD[:, :, moved] = cache_L2BKCD[:, :, order_B[moved]]
