"""Cut rows into micro-batches of similar length, and pad prompts so that what follows them lines up.

Shape suffixes: B sequences, S positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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


def padded_tokens(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> int:
    """Positions of batches that are padded to their longest row."""
    return sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)


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
